#!/usr/bin/env bash
# torch.nn.utils.clip_grad_norm_, where all gradients are finite and their norm is not.
#
# One would guess gradients of norm 1. The norm is told in the type of the gradients: of 100,000
# entries of 300 in float16 it is 94,868, which float16 does not have, so the norm is infinite, the
# factor 0, and every gradient is erased, also those of other parameters in float32. The step does
# nothing but weight decay; a loss that falls no more is all there is to see. bfloat16 has the
# range; `error_if_nonfinite=True` raises.
# Hurt: training in float16 at a large loss scale. Clip after unscaling, in float32.
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

for kind in (torch.float32, torch.bfloat16, torch.float16):
    large, small = nn.Parameter(torch.zeros(100_000, dtype=kind)), nn.Parameter(torch.zeros(2))
    large.grad = torch.full_like(large, 300)
    small.grad = torch.full_like(small, 300)
    finite = bool(large.grad.isfinite().all())
    norm = float(nn.utils.clip_grad_norm_([large, small], 1.0))
    after = float(torch.cat([large.grad.double(), small.grad.double()]).norm())
    print(str(kind), {"finite": finite, "norm": round(norm, -3), "norm after": round(after, 2)})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="torch.float32 {'finite': True, 'norm': 95000.0, 'norm after': 1.0}
torch.bfloat16 {'finite': True, 'norm': 95000.0, 'norm after': 1.0}
torch.float16 {'finite': True, 'norm': inf, 'norm after': 0.0}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
