#!/usr/bin/env bash
# Opacus' DPMultiheadAttention, which its ModuleValidator puts in place of nn.MultiheadAttention.
#
# It says it is a drop-in replacement and loads the same weights, so one would guess the same
# answers, as there are with the sequence first. With `batch_first=True`, as Vision Transformers and
# most encoders have it, heads and positions are mixed up on the way out whenever there is more than
# one head: what one head found for one position lands in another one. Shapes are right, attention
# weights too, and training goes on; a model that was trained before is lost by `fix`.
# Hurt: private fine-tuning of any transformer. Put the sequence first, or compare answers.
#
# Seen on 30 November 2026, with opacus 1.6.0 and torch 2.15.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q opacus==1.6.0 torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import torch
from opacus.validators import ModuleValidator
from torch import nn

torch.manual_seed(0)
for heads in (1, 2):
    for batch_first in (False, True):
        plain = nn.MultiheadAttention(8, heads, batch_first=batch_first)
        private = ModuleValidator.fix(plain)
        x = torch.randn(5, 3, 8)
        with torch.no_grad():
            (one, weights), (other, others) = plain(x, x, x), private(x, x, x)
        apart = [float((a - b).abs().max()) for a, b in ((one, other), (weights, others))]
        same = ["same" if d < 1e-5 else "apart" if d > 0.1 else "near" for d in apart]
        print({"heads": heads, "batch_first": batch_first, "answers": same[0], "weights": same[1]})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="{'heads': 1, 'batch_first': False, 'answers': 'same', 'weights': 'same'}
{'heads': 1, 'batch_first': True, 'answers': 'same', 'weights': 'same'}
{'heads': 2, 'batch_first': False, 'answers': 'same', 'weights': 'same'}
{'heads': 2, 'batch_first': True, 'answers': 'apart', 'weights': 'same'}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
