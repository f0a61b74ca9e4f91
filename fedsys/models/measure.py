"""What each node of a graph costs: shapes, bytes and multiply-accumulates, without computing.

A graph is run once on the ``meta`` device, where tensors have a shape and no values, and the
operations that torch reports are counted by the formulas of ``torch.utils.flop_counter`` (one
multiply-accumulate is two of its floating-point operations).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsys.errors import ModelError
from fedsys.models.assemble import copy_modules
from fedsys.models.shapes import module_for, result_of
from fedsys.randomness import KeyedDropout
from fedsys.transport.several import Inputs


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one node of a graph makes of a batch.

    Attributes:
        shape: Shape of its tensor, batch first; None if it makes no tensor or several.
        bytes: Size of all tensors that it makes.
        macs: Multiply-accumulates of convolutions, matrix products and attention.
    """

    shape: tuple[int, ...] | None
    bytes: int
    macs: int


def measure(module: fx.GraphModule, example: Inputs) -> dict[str, NodeCost]:
    """Return what every node of the graph of `module` makes of `example`, in evaluation.

    On the ``meta`` device nothing is computed, whatever device the tensors of `module` are on.

    Args:
        module: A traced model.
        example: A batch; its device says where to run.

    Raises:
        ModelError: Names the node that does not accept what it is given.
    """
    tensors = (example,) if isinstance(example, Tensor) else example.tensors
    meter = _Meter(module, on_meta=tensors[0].is_meta)
    # attention has a fused path without gradients, whose work cannot be counted
    given = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    try:
        with torch.enable_grad(), meter.counter, torch.device(given[0].device):
            meter.run(*given)
    except Exception as error:  # whatever the user's modules raise
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{type(module).__name__} fails at {meter.now} on an input of shape "
            f"{' and '.join(map(_form, given))}: {reason}; "
            "give an example like those that the model is made for"
        ) from error
    return meter.measured


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


def meta_player(root: nn.Module, graph: fx.Graph) -> fx.Interpreter:
    """Return what runs nodes of `graph`, which may still grow, on the ``meta`` device.

    Args:
        root: Has what the graph names; on any device.
        graph: Its nodes are run by the methods of the interpreter that are called like their `op`.
    """
    return _Meter(root, on_meta=True, graph=graph)


_FREE = frozenset(
    [
        "new_empty",
        "empty",
        "empty_like",
        "detach",
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "cat",
        "add",
        "add_",
        "mul",
        "mul_",
        "mean",
        "relu",
        "relu_",
        "hardtanh",
        "hardtanh_",
        "hardswish",
        "hardswish_",
        "hardsigmoid",
        "silu",
    ]
)
"""Operations that have no multiply-accumulates to be counted."""


class _Counter(TorchDispatchMode):  # the one way to see the operations that modules are made of
    """Counts multiply-accumulates by the formulas of ``torch.utils.flop_counter``.

    Its ``FlopCounterMode`` cannot be used: it hooks the modules of all threads while it counts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types here
        self.macs = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing here is compiled: else torch loads its compiler, 100 MB and seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _FREE:
            return out
        # It brings Triton, 70 MB that most models need not have.
        from torch.utils.flop_counter import flop_registry

        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out


# What these return has the shape of what they are given. On meta, PyTorch takes milliseconds to
# find that out for a normalisation: it decomposes it in Python.
_SAME_SHAPE = (
    *(KeyedDropout, nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
)


class _Meter(fx.Interpreter):  # torch.fx walks graphs by overriding this
    """Runs a graph node by node and notes the result and the work of each."""

    def __init__(self, module: nn.Module, *, on_meta: bool, graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values=graph is None, graph=graph)
        self.counter = _Counter()
        self.measured: dict[str, NodeCost] = {}
        self.now = ""
        self._on_meta = on_meta
        self._memo: dict[int, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run `n` and note what it made."""
        self.now = n.name if n.op != "call_module" else str(n.target)
        before = self.counter.macs
        out = super().run_node(n)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.measured[n.name] = NodeCost(
            tuple(out.shape) if isinstance(out, Tensor) else None,
            sum(t.numel() * t.element_size() for t in tensors),
            self.counter.macs - before,
        )
        return out

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a copy of the module, in evaluation."""
        module = self.fetch_attr(target)
        if self._on_meta:
            if isinstance(module, _SAME_SHAPE) and args:
                return args[0]
            if len(args) == 1 and not kwargs and (out := self._known(module, args[0])) is not None:
                return out
            for tensor in (*module.parameters(), *module.buffers()):
                self._memo.setdefault(id(tensor), tensor.to("meta"))
        return copy_modules(module, self._memo).eval()(*args, **kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function, unless what it makes is known."""
        if self._on_meta and args and isinstance(args[0], Tensor):
            module = module_for(target, args[1:], kwargs)
            if module is not None and (out := self._known(module, args[0])) is not None:
                return out
        return super().call_function(target, args, kwargs)

    def _known(self, module: nn.Module, x: Tensor) -> Tensor | None:
        known = result_of(module, x.shape)
        if known is None:
            return None
        shape, macs = known
        self.counter.macs += macs
        return x.new_empty(shape)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fetch a tensor to where the graph runs."""
        tensor = self.fetch_attr(target)
        return tensor.to("meta") if self._on_meta else tensor
