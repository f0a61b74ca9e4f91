"""What each operation of a traced model does to channels.

A *channel* is an index along dimension 1 of a tensor whose dimension 0 is the batch: a feature map
of a convolution, a feature of a linear layer. The whole conversion of `fedsys.pruning.dense.shrink`
rests on a dozen kinds of operations:

========  =========================================  ===============================================
kind      examples                                   channel `j` of the output depends on
========  =========================================  ===============================================
INPUT     the model's input                          the input
CONSTANT  a buffer of shape ``(1, C, …)``            nothing
MIX       convolution (any groups), linear           the inputs whose weights on `j` are not 0
SCALE     BatchNorm in evaluation, PReLU             `j`, with parameters of its own
SAME      activation, pooling, dropout, scalar math  `j`
NORM      GroupNorm                                  all channels of `j`'s group
ADD MUL   sum, difference; product of two tensors    `j` of both operands
CAT       concatenation of channels                  `j` of the operand that it came from
FLATTEN   from maps to features                      the map that it came from
SIZE      ``x.size(0)``: any size but of channels    nothing
OPAQUE    everything else                            all channels of all inputs: none is touched
========  =========================================  ===============================================

What is not understood is OPAQUE, so an unknown operation costs savings, never correctness.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.errors import is_number
from fedsys.randomness import KeyedDropout, is_random_depth

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Convolutions that are understood; transposed ones are OPAQUE."""


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # a tuple is looked through faster than a union
_LAYERS = (*_CONVS, nn.Linear)


class Kind(Enum):
    """How the channels of an operation's output depend on those of its inputs."""

    INPUT = "input"
    CONSTANT = "constant"
    MIX = "mix"
    SCALE = "scale"
    SAME = "same"
    NORM = "norm"
    ADD = "add"
    MUL = "mul"
    CAT = "cat"
    FLATTEN = "flatten"
    SIZE = "size"
    OPAQUE = "opaque"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One node of the graph, understood.

    Attributes:
        kind: How channels depend on each other.
        node: The node of the traced graph.
        inputs: The nodes whose channels it reads, in order.
        module: The module that it calls, if any.
        shape: Shape of its output with the batch; empty if that is not one tensor.
        connected: Where a MIX has weights other than 0, bool of ``(groups, out, in)`` per group;
            None for other kinds.
        at_border: The same for the weights that can meet padded zeros; None if none can.
        zero_border: It reads zeros outside of its input, so that a constant map does not stay
            uniform at the border.
    """

    kind: Kind
    node: fx.Node
    inputs: tuple[fx.Node, ...]
    module: nn.Module | None
    shape: tuple[int, ...]
    zero_border: bool = False
    connected: Tensor | None = None
    at_border: Tensor | None = None

    @property
    def name(self) -> str:
        """Path of the module, or the name of the node where no module is called."""
        return str(self.node.target) if self.module is not None else self.node.name

    @property
    def channels(self) -> int:
        """Number of channels of the output; 0 if it has none."""
        return self.shape[1] if len(self.shape) > 1 else 0

    @property
    def layer(self) -> Conv | nn.Linear:
        """The layer that a MIX calls."""
        assert isinstance(self.module, _LAYERS)
        return self.module

    @property
    def groups(self) -> int:
        """Number of groups of a convolution or GroupNorm; 1 for a linear layer."""
        if isinstance(self.module, nn.GroupNorm):
            return self.module.num_groups
        return self.module.groups if isinstance(self.module, _CONVS) else 1


_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid, nn.Tanh,
    nn.GELU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Mish,
    nn.LogSigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
IDENTITIES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, KeyedDropout,
)  # fmt: skip
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d,
    nn.ZeroPad3d,
)  # fmt: skip
_SAME_FUNCTIONS = frozenset({
    F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.sigmoid, F.tanh, F.gelu,
    F.leaky_relu, F.elu, F.selu, F.celu, F.softplus, F.softsign, F.mish, F.logsigmoid,
    torch.relu, torch.sigmoid, torch.tanh, torch.neg, torch.abs, torch.exp, torch.clamp,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.interpolate,
    operator.neg, torch.square, torch.sqrt,
})  # fmt: skip
_SAME_METHODS = frozenset({"relu", "sigmoid", "tanh", "contiguous", "clamp", "neg", "abs", "exp"})
_ZERO_PADDED = frozenset({F.avg_pool1d, F.avg_pool2d, F.avg_pool3d})
_ADDS = frozenset({operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub})
_MULS = frozenset({operator.mul, operator.imul, torch.mul})
_SCALAR_MATH = (
    _ADDS | _MULS | {operator.truediv, operator.itruediv, torch.div, operator.pow, torch.pow}
)
_MEANS = frozenset({torch.mean, "mean", torch.amax, "amax", torch.amin, "amin"})
"""Over the pixels of one channel, a uniform map gives what it is at every pixel; a sum does not."""


def describe(
    node: fx.Node,
    module: nn.Module | None,
    shapes: dict[fx.Node, tuple[int, ...]],
    shared: bool,
) -> Op:
    """Say which kind of operation `node` is.

    Args:
        node: A node of the traced graph.
        module: The module that it calls, or None.
        shapes: Shapes of the tensors computed so far, and of `node` itself; a node that does not
            compute one tensor is missing.
        shared: Another node calls the same module.
    """
    shape = shapes.get(node, ())
    inputs = tuple(n for n in node.all_input_nodes if n in shapes)
    opaque = Op(Kind.OPAQUE, node, inputs, module, shape)
    if node.op == "placeholder":
        return Op(Kind.INPUT, node, (), None, shape)
    if node.op == "output":
        return Op(Kind.OUTPUT, node, inputs, None, ())
    if node.op == "get_attr":
        simple = len(shape) > 1 and shape[0] == 1
        return Op(Kind.CONSTANT, node, (), None, shape) if simple else opaque
    if _asks_for_size(node):
        return Op(Kind.SIZE, node, inputs, None, ())
    by_size = node.target in ("view", "reshape")  # their other inputs are sizes
    if len(shape) < 2 or not inputs or (len(inputs) < len(node.all_input_nodes) and not by_size):
        return opaque
    if module is not None:
        kind = _kind_of_module(module, shapes[inputs[0]], shape)
        if shared and kind in (Kind.MIX, Kind.SCALE, Kind.NORM):
            return opaque  # its weights serve two places, which may need different channels
        if kind is not Kind.MIX:
            return Op(kind, node, inputs, module, shape, _reads_zeros(module))
        return _describe_layer(node, inputs, module, shape)
    kind = _kind_of_function(node, inputs, shapes)
    return Op(kind, node, inputs, None, shape, _function_reads_zeros(node))


def _kind_of_module(module: nn.Module, given: tuple[int, ...], shape: tuple[int, ...]) -> Kind:
    if isinstance(module, Conv):
        return Kind.MIX if len(shape) == module.weight.dim() else Kind.OPAQUE
    if isinstance(module, nn.Linear):
        return Kind.MIX if len(shape) == 2 else Kind.OPAQUE
    if isinstance(module, _BatchNorm):
        return Kind.SCALE if module.running_mean is not None else Kind.OPAQUE
    if isinstance(module, nn.PReLU):
        return Kind.SCALE
    if isinstance(module, nn.GroupNorm):
        return Kind.NORM
    if isinstance(module, nn.Flatten):
        return _flatten(given, shape) if module.start_dim == 1 else Kind.OPAQUE
    known = isinstance(module, _ACTIVATIONS + IDENTITIES + _POOLS)
    if (known or (module is not None and is_random_depth(module))) and given[:2] == shape[:2]:
        return Kind.SAME
    return Kind.OPAQUE


def _kind_of_function(
    node: fx.Node, inputs: tuple[fx.Node, ...], shapes: dict[fx.Node, tuple[int, ...]]
) -> Kind:
    target: Any = node.target
    given, shape = shapes[inputs[0]], shapes[node]
    if len(inputs) == 1 and given[:2] == shape[:2]:
        if target in _SAME_FUNCTIONS or target in _SAME_METHODS:
            return Kind.SAME
        if target in _SCALAR_MATH and any(is_number(each) for each in node.args):
            return Kind.SAME
        if target in _MEANS and _over_space(node, len(given)):
            return Kind.SAME
    if len(inputs) == 2 and target in _ADDS | _MULS and not node.kwargs:
        same = all(len(shapes[n]) == len(shape) and shapes[n][1] == shape[1] for n in inputs)
        return (Kind.ADD if target in _ADDS else Kind.MUL) if same else Kind.OPAQUE
    if target in (torch.cat, torch.concat) and _cat_dimension(node, len(shape)) == 1:
        parts: Any = node.args[0]
        whole = len(parts) == len(inputs) and sum(shapes[n][1] for n in parts) == shape[1]
        return Kind.CAT if whole else Kind.OPAQUE
    if target in (torch.flatten, "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        return _flatten(given, shape) if start == 1 else Kind.OPAQUE
    if target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
        return _flatten(given, shape)
    return Kind.OPAQUE


def _flatten(given: tuple[int, ...], shape: tuple[int, ...]) -> Kind:
    """From ``(B, C, …)`` to ``(B, C · …)``."""
    whole = len(shape) == 2 and shape[0] == given[0] and shape[1] == math.prod(given[1:])
    return Kind.FLATTEN if whole else Kind.OPAQUE


def _asks_for_size(node: fx.Node) -> bool:
    """Say whether `node` reads sizes of a tensor, and nobody asks for its number of channels."""
    if node.target == "size" and len(node.args) == 2:
        return bool(node.args[1] in (0, 2, 3))
    whole = node.target == "size" or (node.target is getattr and node.args[1:] == ("shape",))
    return whole and all(
        user.target is operator.getitem and user.args[1] in (0, 2, 3) for user in node.users
    )


def _over_space(node: fx.Node, dimensions: int) -> bool:
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return False
    return all(d % dimensions > 1 for d in dims)


def _cat_dimension(node: fx.Node, dimensions: int) -> object:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim % dimensions if isinstance(dim, int) else None


def _reads_zeros(module: nn.Module) -> bool:
    if isinstance(module, Conv):
        padded = module.padding == "same" or any(p for p in module.padding if isinstance(p, int))
        return module.padding_mode == "zeros" and padded
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        padding = module.padding
        padded = any(padding) if isinstance(padding, tuple) else padding != 0
        odd = getattr(module, "divisor_override", None) is not None and module.ceil_mode
        return (padded and module.count_include_pad) or odd
    return isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d | nn.ZeroPad3d)


def _function_reads_zeros(node: fx.Node) -> bool:
    if node.target not in _ZERO_PADDED:
        return False
    padding: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
    return bool(padding != 0) or len(node.args) > 4 or bool(node.kwargs)


# --------------------------------------------------------------------------------------------------
# Which weights of a MIX connect which channels


def _describe_layer(
    node: fx.Node, inputs: tuple[fx.Node, ...], layer: nn.Module, shape: tuple[int, ...]
) -> Op:
    assert isinstance(layer, Conv | nn.Linear)
    groups = layer.groups if isinstance(layer, Conv) else 1
    values = layer.weight.detach()
    present = values.bool()  # twice as fast as to compare with zero
    at_border = None
    if isinstance(layer, Conv):
        inner = _inner_tap(layer) if _reads_zeros(layer) else -1
        outer, present = _split(present.flatten(2), inner)
        at_border = outer.view(groups, -1, outer.shape[1]) if _reads_zeros(layer) else None
    connected = present.view(groups, -1, present.shape[1])
    border = at_border is not None and bool(at_border.any())
    return Op(Kind.MIX, node, inputs, layer, shape, border, connected, at_border)


def _split(present: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """Return where ``(out, in, taps)`` has any but the inner tap, and where it has any."""
    if inner < 0:
        connected = _any(present, 2)
        return connected, connected
    middle = present[..., inner].clone()
    present[..., inner] = False
    outer = _any(present, 2)
    return outer, middle | outer


def _inner_tap(layer: Conv) -> int:
    """Return which position of a kernel never meets the padding, counted row by row.

    It is the one over the output's own pixel, provided that the map does not grow; -1 if there is
    none.
    """
    position = 0
    for axis, size in enumerate(layer.kernel_size):
        reach = int(layer.dilation[axis]) * (size - 1)
        padding: Any = layer.padding  # a word, or a number per axis
        before = reach // 2 if isinstance(padding, str) else int(padding[axis])
        tap, rest = divmod(before, int(layer.dilation[axis]))
        if rest or 2 * before > reach:
            return -1
        position = position * size + tap
    return position


def outputs_reading(op: Op, inputs: Tensor, border: bool = False) -> Tensor:
    """Return which outputs of a MIX have a weight on one of `inputs` (bool of ``(in,)``).

    With `border` only weights that can meet padded zeros count.
    """
    present = op.at_border if border else op.connected
    if present is None or not bool(inputs.any()):
        return torch.zeros(op.channels, dtype=torch.bool)
    return _any(present & inputs.view(op.groups, 1, -1), 2).flatten()


def inputs_read_by(op: Op, outputs: Tensor, border: bool = False) -> Tensor:
    """Return which inputs of a MIX one of `outputs` (bool of ``(out,)``) has a weight on."""
    present = op.at_border if border else op.connected
    assert present is not None
    if op.groups > 1:
        return _any(present & outputs.view(op.groups, -1, 1), 1).flatten()
    if not bool(outputs.any()):
        return torch.zeros(present.shape[2], dtype=torch.bool)
    return _any(present[0] if bool(outputs.all()) else present[0][outputs], 0)


def _any(values: Tensor, dimension: int) -> Tensor:
    """Return ``values.any(dimension)``: torch finds the largest byte many times faster."""
    if values.shape[dimension] == 1:
        return values.squeeze(dimension)
    return values.view(torch.uint8).amax(dimension).view(torch.bool)
