#!/usr/bin/env bash
# Schedulers of torch.optim, resumed from a checkpoint in either order.
#
# One would guess that after `load_state_dict` of optimizer and scheduler the order does not matter.
# Making a scheduler writes the first learning rate into the optimizer, and loading a scheduler's
# state does not write it back. So where the scheduler is made after the optimizer was loaded,
# LinearLR and what is chained from it go on from the first rate for good (a tenth of what it was),
# OneCycleLR and LambdaLR for one step; StepLR and CosineAnnealingLR are right either way.
# Hurt: resumed runs. Make optimizer and scheduler first, and load both then.
#
# Seen on 30 November 2026, with torch 2.15.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import copy

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    StepLR,
)

KINDS = {
    "StepLR": lambda o: StepLR(o, 3),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10),
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=8),
    "ChainedScheduler": lambda o: ChainedScheduler([ConstantLR(o, 0.1, 3), ExponentialLR(o, 0.9)]),
    "OneCycleLR": lambda o: OneCycleLR(o, 1.0, total_steps=11),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
}
weight = torch.nn.Parameter(torch.ones(1))


def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


for name, make in KINDS.items():
    optimizer = SGD([weight], 0.5)
    scheduler = make(optimizer)
    rates(optimizer, scheduler, 5)
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    straight = rates(optimizer, scheduler, 3)
    resumed = SGD([weight], 0.5)
    resumed.load_state_dict(states[0])
    scheduler = make(resumed)
    scheduler.load_state_dict(states[1])
    again = rates(resumed, scheduler, 3)
    print(name, [round(b / a, 2) for a, b in zip(straight, again)])
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="StepLR [1.0, 1.0, 1.0]
CosineAnnealingLR [1.0, 1.0, 1.0]
LinearLR [0.1, 0.1, 0.1]
ChainedScheduler [0.1, 0.1, 0.1]
OneCycleLR [0.06, 1.0, 1.0]
LambdaLR [6.0, 1.0, 1.0]"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
