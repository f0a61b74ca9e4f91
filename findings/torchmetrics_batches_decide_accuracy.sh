#!/usr/bin/env bash
# torchmetrics 1.9: binary accuracy of logits, and R2Score of large targets.
#
# One would guess that a metric updated batch by batch tells what it tells of all at once. Accuracy
# takes what it is given as probabilities unless one of them is below 0 or above 1: four right
# answers are 100 % in one batch, and 50 % one by one, as a logit of 0.2 alone is a probability
# below a half. R2Score keeps float32 sums of squares: of a model that is right to 0.01 around
# 100,000 it says 0.0 in one batch, 1.0 one by one, and 1.0 in float64. No warning.
# Hurt: evaluation over clients with few examples each, and of bytes or microseconds.
#
# Seen on 30 November 2026, with torchmetrics 1.9.0 and torch 2.15.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torchmetrics==1.9.0 torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import torch
from torchmetrics import Accuracy, R2Score


def both(make, predictions, targets):
    found = []
    for size in (len(targets), 1):
        metric = make()
        for p, t in zip(predictions.split(size), targets.split(size)):
            metric.update(p, t)
        found.append(round(float(metric.compute()), 3))
    return dict(zip(("at once", "one by one"), found))


logits, answers = torch.tensor([0.2, -0.3, 0.9, 0.1]), torch.tensor([1, 0, 1, 1])
print("accuracy of logits", both(lambda: Accuracy("binary"), logits, answers))
print("of probabilities", both(lambda: Accuracy("binary"), logits.sigmoid(), answers))
targets = torch.arange(10) + 1e5
print("R2", both(R2Score, targets + 0.01, targets))
exact = R2Score().set_dtype(torch.float64)
exact.update((targets + 0.01).double(), targets.double())
print("R2 in float64", round(float(exact.compute()), 3))
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="accuracy of logits {'at once': 1.0, 'one by one': 0.5}
of probabilities {'at once': 1.0, 'one by one': 1.0}
R2 {'at once': 0.0, 'one by one': 1.0}
R2 in float64 1.0"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
