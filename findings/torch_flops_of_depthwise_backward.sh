#!/usr/bin/env bash
# torch.utils.flop_counter: the backward of convolutions in groups, and LSTMs.
#
# A backward is two products of the size of the forward, one for the input and one for the weight,
# so one would guess twice the forward. In groups it is counted 1 + groups times: 9 for a depthwise
# convolution of 8 channels, 65 of 64, as the gradient of the weight is counted as without groups.
# The forward is right. A GRU is counted in full and an LSTM of the same size as 0, as it goes
# through an operator of oneDNN that has no formula (on the CPU).
# Hurt: who plans training by it: a MobileNet seems many times as costly, an LSTM free.
#
# Seen on 30 November 2026, with torch 2.15.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def counted(work):
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


for groups in (1, 2, 8, 64):
    layer = nn.Conv2d(64, 64, 3, padding=1, groups=groups)
    image = torch.rand(1, 64, 8, 8, requires_grad=True)
    forward, outputs = counted(lambda: layer(image))
    backward, _ = counted(outputs.sum().backward)
    right = forward == 2 * 64 * (64 // groups) * 9 * 64
    print({"groups": groups, "forward right": right, "backward/forward": backward / forward})
for kind in (nn.GRU, nn.LSTM):
    layer = kind(32, 64)
    weights = sum(p.numel() for n, p in layer.named_parameters() if "weight" in n)
    found, _ = counted(lambda: layer(torch.rand(10, 1, 32)))
    print(kind.__name__, {"share counted": found / (2 * 10 * weights)})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="{'groups': 1, 'forward right': True, 'backward/forward': 2.0}
{'groups': 2, 'forward right': True, 'backward/forward': 3.0}
{'groups': 8, 'forward right': True, 'backward/forward': 9.0}
{'groups': 64, 'forward right': True, 'backward/forward': 65.0}
GRU {'share counted': 1.0}
LSTM {'share counted': 0.0}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
