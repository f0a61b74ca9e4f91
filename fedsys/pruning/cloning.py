"""Copies of modules without copies of tensors, in a fraction of the time of ``copy.deepcopy``.

Most of the time of copying a large model goes into the attributes of its layers, of which only the
registries can change. Everything that is not a plain layer of ``torch.nn`` is copied deeply.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsys.assemble import copy_modules
from fedsys.pruning.vocabulary import LAYERS

_PLAIN = frozenset(LAYERS.values())
_REGISTRY = (dict, set)


def clone(layer: nn.Module) -> nn.Module:
    """Return a layer of ``torch.nn`` that shares the tensors of `layer` and nothing else."""
    new = type(layer).__new__(type(layer))
    new.__dict__.update(
        {k: v.copy() if isinstance(v, _REGISTRY) else v for k, v in layer.__dict__.items()}
    )
    return new


def clone_model(model: nn.Module, tensors: dict[int, Tensor] | None = None) -> nn.Module:
    """Return a copy of a model that shares its tensors.

    Args:
        model: What to copy.
        tensors: What to take in place of a tensor, by the id of the original.

    Raises:
        ModelError: A module holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(tensors or {})
    for module in model.modules():
        if type(module) in _PLAIN and not module._modules:
            new = memo[id(module)] = clone(module)
            for registry in (new._parameters, new._buffers):
                registry.update({name: memo.get(id(t), t) for name, t in registry.items()})
    return copy_modules(model, memo)


def in_float64(module: nn.Module) -> nn.Module:
    """Return a copy of a module that computes in float64 and shares no tensor."""
    if type(module) not in _PLAIN or module._modules:
        tensors: dict[int, Tensor] = {id(p): _parameter(p) for p in module.parameters()}
        return clone_model(module, tensors | {id(b): _doubled(b) for b in module.buffers()})
    new = clone(module)
    new._parameters.update({k: _parameter(p) for k, p in new._parameters.items() if p is not None})
    new._buffers.update({k: _doubled(b) for k, b in new._buffers.items() if b is not None})
    return new


def _parameter(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(_doubled(parameter))


def _doubled(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True)
