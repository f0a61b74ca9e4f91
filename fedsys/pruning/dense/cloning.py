"""Copies of modules without copies of tensors, in a fraction of the time of ``copy.deepcopy``.

And runs in float64 of models that are not, with a copy of one layer at a time.

Most of the time of copying a large model goes into the attributes of its layers, of which only the
registries can change. Everything that is not a plain layer of ``torch.nn`` is copied deeply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsys.models.assemble import copy_modules
from fedsys.pruning.dense.vocabulary import LAYERS

_PLAIN = frozenset(LAYERS.values())
_REGISTRY = (dict, set)


def clone(layer: nn.Module) -> nn.Module:
    """Return a layer of ``torch.nn`` that shares the tensors of `layer` and nothing else."""
    new = type(layer).__new__(type(layer))
    new.__dict__.update({k: _own(v) for k, v in layer.__dict__.items()})
    return new


def _own(value: Any) -> Any:
    if not isinstance(value, _REGISTRY):
        return value
    return value.copy() if value else type(value)()  # most are empty, and ordered: slow to copy


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


def copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares no tensor."""
    if type(module) not in _PLAIN or module._modules:
        return clone_model(module, _changed(module, lambda tensor: tensor.detach().clone()))
    new = clone(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            new._parameters[name] = nn.Parameter(parameter.detach().clone())
    for name, buffer in module._buffers.items():
        new._buffers[name] = None if buffer is None else buffer.clone()
    return new


def _in_float64(module: nn.Module) -> nn.Module:
    """Return a copy that computes in float64, to be called once: it may share all but tensors."""
    if type(module) not in _PLAIN or module._modules:
        return clone_model(module, _changed(module, lambda tensor: _doubled(tensor).clone()))
    if not module._parameters and not module._buffers:
        return module
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers"):
        tensors = module.__dict__[registry].items()
        new.__dict__[registry] = {k: None if t is None else _doubled(t) for k, t in tensors}
    return new


def _changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Return what to take in place of the tensors of `module`, by their ids."""
    tensors: dict[int, Tensor] = {id(p): nn.Parameter(change(p)) for p in module.parameters()}
    return tensors | {id(b): change(b) for b in module.buffers()}


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _with_float64(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def long(value: Any) -> Any:
        floats = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.float64 if floats else value

    return tuple(map(long, args)), {key: long(value) for key, value in kwargs.items()}


def _lengthened(value: Any) -> Any:
    return _doubled(value) if torch.is_tensor(value) else value


class InFloat64(fx.Interpreter):
    """Runs a graph in float64, whatever the types of its parts are."""

    def call_function(self, target: fx.node.Target, args: Any, kwargs: Any) -> Any:
        """Call a function; a type of floats that it is given, or takes by default, is float64."""
        return _lengthened(super().call_function(target, *_with_float64(args, kwargs)))

    def call_method(self, target: fx.node.Target, args: Any, kwargs: Any) -> Any:
        """Call a method, in the same way."""
        return _lengthened(super().call_method(target, *_with_float64(args, kwargs)))

    def call_module(self, target: fx.node.Target, args: Any, kwargs: Any) -> Any:
        """Call a copy of the module."""
        return _in_float64(self.module_at(target))(*args, **kwargs)

    def module_at(self, target: fx.node.Target) -> nn.Module:
        """Return the module that a node calls."""
        found = self.submodules.get(str(target))  # a module of two names is there under one
        module: nn.Module = self.fetch_attr(str(target)) if found is None else found
        return module

    def get_attr(self, target: fx.node.Target, args: Any, kwargs: Any) -> Any:
        """Read a copy of the tensor."""
        return _lengthened(super().get_attr(target, args, kwargs))
