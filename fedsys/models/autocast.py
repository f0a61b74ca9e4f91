"""The types of what leaves the units of a model that computes in bfloat16 where autocast does.

They are found by running the model once, on a few examples and parameters of zeros that take no
memory: PyTorch's lists of what computes in which type know no ``meta`` device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.models.layers import LayeredModel, section
from fedsys.transport.several import Inputs, Shape, arguments, examples_of, is_several

_ROWS = 2


def under_autocast(model: LayeredModel, shape: Shape, device: str = "cpu") -> LayeredModel:
    """Return the model with the bytes that leave its units when it computes under autocast.

    Args:
        model: A chain of units; on any device, ``meta`` for instance.
        shape: Of one example, or of its several tensors.
        device: Kind of device whose lists count: ``cpu`` or ``cuda``.

    Raises:
        ModelError: The model does not run under autocast.
    """
    types = _types(model, shape, device)
    units = []
    for unit in model.units:
        elements = sum(torch.Size(form).numel() for form in unit.out_shapes)
        itemsize = max(types[name].itemsize for name in unit.outputs)
        units.append(dataclasses.replace(unit, bytes_out=elements * itemsize))
    return dataclasses.replace(model, units=tuple(units))


def _types(model: LayeredModel, shape: Shape, device: str) -> dict[str, torch.dtype]:
    """Return the type of the tensor of each node, by its name."""
    whole = _of_zeros(section(model, 0, len(model)), device).eval()
    failed: Exception | None = None
    for example in _examples(model, shape, device):
        watched = _Watched(whole)
        try:
            with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
                watched.run(*arguments(whole, example))
        except Exception as error:  # whatever the user's modules raise
            failed = failed or error
        else:
            return watched.types
    reason = str(failed).strip().partition("\n")[0]
    raise ModelError(
        f"client.precision=bf16: the model does not run under autocast: {reason}; "
        "choose client.precision=fp32"
    ) from failed


def _examples(model: LayeredModel, shape: Shape, device: str) -> list[Inputs]:
    """Return examples that the model may take: numbers, or else tokens."""
    if is_several(shape):
        return [examples_of(shape, _ROWS).to(torch.device(device))]
    floats = [p.dtype for p in model.graph.parameters() if p.is_floating_point()]
    kinds = [floats[0] if floats else torch.float32, torch.int64]
    return [torch.zeros((_ROWS, *shape), dtype=kind, device=device) for kind in kinds]


def _of_zeros(module: nn.Module, device: str) -> nn.Module:
    """Give a module parameters and buffers of zeros, each a single number in memory; return it."""
    made: dict[int, Tensor] = {}

    def zeros(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            value = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value
        return made[id(tensor)]

    for inner in module.modules():
        for name, tensor in (
            *inner.named_parameters(recurse=False, remove_duplicate=False),
            *inner.named_buffers(recurse=False, remove_duplicate=False),
        ):
            setattr(inner, name, zeros(tensor))
    return module


class _Watched(fx.Interpreter):  # torch.fx walks graphs by overriding this
    """Runs a graph node by node and notes the type of what each makes."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, fx.GraphModule)
        super().__init__(module)
        self.types: dict[str, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run `n` and note the type of the tensor that it made."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.types[n.name] = out.dtype
        return out
