"""Units of a model as data, for hosts that have no copy of it.

A host builds what it is sent by the vocabulary of dense models (`fedsys.pruning.dense`): names of
operations and layers, no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.models.layers import LayeredModel, section
from fedsys.partition.remote_host import Described
from fedsys.partition.tensor_store import digest_of
from fedsys.pruning.dense import architecture
from fedsys.pruning.dense.simplify import drop_checks
from fedsys.pruning.memory import dismantle, trim


@final
class StageBuilder:
    """Makes modules of what was sent, for `fedsys.partition.host.HostServer`."""

    def build(self, body: bytes, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the module that a body describes, with these tensors.

        Raises:
            ModelError: It describes none, or names something that is not allowed.
        """
        try:
            described = json.loads(body)
            return architecture.build(described, tensors)
        except ModelError:
            raise
        except Exception as error:  # layers refuse arguments by whatever their authors chose
            raise ModelError(f"what was sent describes no units: {error!r}") from error

    def free(self, module: nn.Module) -> None:
        """Take a module apart; tensors that others use stay theirs."""
        dismantle(module)
        trim()


@final
class UnitParts:
    """The units of a model, described when they are asked for.

    Args:
        layers: The model, with values.
        input_shape: Of its input, without the batch.

    Raises:
        ModelError: A unit has an operation that cannot be named.
    """

    def __init__(self, layers: LayeredModel, input_shape: Sequence[int]) -> None:
        self.layers, self._input = layers, tuple(input_shape)
        self._digests: dict[int, tuple[Tensor, str]] = {}
        self._known: dict[tuple[int, int], Described] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def of(self, first: int, last: int) -> Described:
        """Return units ``[first, last)`` as data."""
        key = first, last
        if key not in self._known:
            self._known[key] = self._describe(first, last)
        return self._known[key]

    def _describe(self, first: int, last: int) -> Described:
        module = section(self.layers, first, last).eval()
        drop_checks(module.graph)  # inputs of the first unit are checked where they come in
        body = architecture.describe(module)
        tensors = _used(module)
        names = {name: self._digest(tensor) for name, tensor in tensors.items()}
        by_digest = {names[name]: tensor.detach() for name, tensor in tensors.items()}
        shapes = (self._input,) if first == 0 else self.layers.units[first - 1].out_shapes
        dismantled = json.dumps(body, allow_nan=False).encode()
        return Described(dismantled, names, by_digest, shapes)

    def _digest(self, tensor: Tensor) -> str:
        found = self._digests.get(id(tensor))
        if found is None or found[0] is not tensor:
            found = self._digests[id(tensor)] = tensor, digest_of(tensor)
        return found[1]


def _used(module: fx.GraphModule) -> dict[str, Tensor]:
    """Return the parameters and buffers that the graph uses, by name."""
    paths = {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    found: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    found |= dict(module.named_buffers(remove_duplicate=False))
    return {
        name: tensor
        for name, tensor in found.items()
        if name in paths or any(name.startswith(f"{path}.") for path in paths)
        if isinstance(tensor, torch.Tensor)
    }
