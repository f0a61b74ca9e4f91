#!/usr/bin/env bash
# Opacus' gradients by example of convolutions that pad with something other than zeros.
#
# One would guess that the gradients of the examples add up to the gradient of the batch. For
# `padding_mode="circular"` (and "reflect") they do not: the rule for convolutions unfolds an input
# that it padded with zeros. Training goes on in another direction at the borders; the validator
# passes the model. `padding_idx` of an embedding, whose row has no gradient in PyTorch, gets one.
# With force_functorch=True both are right.
# Hurt: private training on panoramas, tori, or padded text; the claim holds, the model is worse.
#
# Seen on 30 November 2026, with opacus 1.6.0 and torch 2.15.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q opacus==1.6.0 torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import copy

import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn


def look(name, layer, x):
    seen = {"validator": ModuleValidator.is_valid(layer)}
    for way, functorch in (("by default", False), ("functorch", True)):
        model = nn.Sequential(copy.deepcopy(layer))
        model(x).pow(2).sum().backward()
        whole = model[0].weight.grad.clone()
        hooked = GradSampleModule(model, loss_reduction="sum", force_functorch=functorch)
        hooked(x).pow(2).sum().backward()
        apart = float((model[0].weight.grad_sample.sum(0) - whole).norm() / whole.norm())
        seen[way] = "same" if apart < 1e-5 else "apart" if apart > 0.01 else "near"
    print(name, seen)


torch.manual_seed(0)
image = torch.randn(4, 2, 6, 6)
for mode in ("zeros", "circular", "reflect"):
    look(mode, nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False), image)
words = torch.tensor([[1, 2, 0], [3, 0, 0]])
table = nn.Embedding(5, 4, padding_idx=0)
nn.init.normal_(table.weight)
look("padding_idx", table, words)
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="zeros {'validator': True, 'by default': 'same', 'functorch': 'same'}
circular {'validator': True, 'by default': 'apart', 'functorch': 'same'}
reflect {'validator': True, 'by default': 'apart', 'functorch': 'same'}
padding_idx {'validator': True, 'by default': 'apart', 'functorch': 'same'}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
