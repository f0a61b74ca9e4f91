"""Between which values a channel stays for all inputs, by interval arithmetic.

Pruning may leave a filter with weights of one sign. Behind a ReLU its inputs are not negative, so
one without positive weights and with a bias of at most zero gives nothing but zeros after the next
ReLU: the channel is *closed*, as constant as one without weights. The same holds for every
activation that ends flat (`CLOSING`), at either end.

Inputs of a model are not bounded, and every channel is taken for itself: where two channels vary
together, the bounds are wider than what is reached. So everything called closed is closed, and what
only the interplay of channels closes is not found; to find that in general is NP-hard (Katz et al.,
"Reluplex", CAV 2017). Bounds are computed in float64; their rounding moves an output by as little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsys.pruning.dense.ops import Kind, Op

CLOSING = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.ELU)
"""Activations that never fall, and are flat at an end."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RISING = (*CLOSING, nn.LeakyReLU)
_RISING_FUNCTIONS = frozenset({
    F.relu, F.relu6, F.hardtanh, F.hardsigmoid, F.sigmoid, F.tanh, F.elu,
    torch.relu, torch.sigmoid, torch.tanh,
})  # fmt: skip
_RISING_METHODS = frozenset({"relu", "sigmoid", "tanh"})
_MEANS = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.UpsamplingNearest2d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
"""What they give lies between the least and the greatest that they read, padded zeros included."""

_MEAN_FUNCTIONS = frozenset({
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, torch.mean,
})  # fmt: skip
_MEAN_METHODS = frozenset({"contiguous", "mean"})

_LOOK = 256
"""Weights of a filter that are looked at first: few filters have one sign among so many."""


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Of the channels of one tensor, over all inputs, places and map sizes.

    Attributes:
        low: Float64 of ``(C,)``; minus infinity if there is no bound.
        high: The same, upwards.
    """

    low: Tensor
    high: Tensor

    @property
    def closed(self) -> Tensor:
        """Which channels have only one value, bool of ``(C,)``."""
        return self.low == self.high

    def with_zero(self) -> Bounds:
        """Return bounds that hold for padded zeros, too."""
        return Bounds(self.low.clamp(max=0.0), self.high.clamp(min=0.0))

    def narrowed(self, where: Tensor, value: Tensor) -> Bounds:
        """Return these bounds, but the values of ``(C, …)`` where channels are known by them."""
        known = value.reshape(len(where), -1)
        low = torch.where(where, known.amin(1), self.low)
        return Bounds(low, torch.where(where, known.amax(1), self.high))


def unbounded(channels: int) -> Bounds:
    """Return bounds that say nothing."""
    high = torch.full((channels,), torch.inf, dtype=torch.float64)
    return Bounds(-high, high)


def bounds_of(op: Op, inputs: Sequence[Bounds]) -> Bounds:
    """Return the bounds of what `op` computes.

    Args:
        op: The operation.
        inputs: Bounds of each tensor that it reads.
    """
    match op.kind:
        case Kind.MIX:
            return _mix(op, inputs[0].with_zero() if op.zero_border else inputs[0])
        case Kind.SCALE:
            return _scaled(op, inputs[0])
        case Kind.SAME:
            return _same(op, inputs[0])
        case Kind.ADD if "sub" in getattr(op.node.target, "__name__", ""):
            return Bounds(inputs[0].low - inputs[1].high, inputs[0].high - inputs[1].low)
        case Kind.ADD:
            return Bounds(inputs[0].low + inputs[1].low, inputs[0].high + inputs[1].high)
        case Kind.MUL:
            ends = [_times(a, b) for a in _ends(inputs[0]) for b in _ends(inputs[1])]
            return Bounds(torch.stack(ends).amin(0), torch.stack(ends).amax(0))
        case Kind.CAT:
            lows, highs = [each.low for each in inputs], [each.high for each in inputs]
            return Bounds(torch.cat(lows), torch.cat(highs))
        case Kind.FLATTEN:
            times = op.channels // len(inputs[0].low)
            low, high = (end.repeat_interleave(times) for end in _ends(inputs[0]))
            return Bounds(low, high)
        case _:
            return unbounded(op.channels)


def _ends(bounds: Bounds) -> tuple[Tensor, Tensor]:
    return bounds.low, bounds.high


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return the product; zero times infinity is zero."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _mix(op: Op, given: Bounds) -> Bounds:
    """Bounds of a layer: each weight with that end of its input at which it is at its least."""
    assert op.connected is not None
    layer, result = op.layer, unbounded(op.channels)
    weight = layer.weight.detach()
    taps = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    low, high = (end.view(op.groups, -1) for end in _ends(given))
    whose = _one_sided(taps, high[0].isinf()) if op.groups == 1 else torch.arange(op.channels)
    if not len(whose):
        return result
    present = op.connected.flatten(0, 1)  # as the weight: inputs are counted in their group
    rows, columns = present[whose].nonzero().unbind(1)
    rows = whose[rows]
    values, group = taps[rows, columns].double(), rows // (op.channels // op.groups)
    up, down = (end.sum(1) for end in (values.clamp(min=0.0), values.clamp(max=0.0)))
    least, most = low[group, columns], high[group, columns]
    bias = layer.bias
    start = torch.zeros_like(result.high) if bias is None else bias.detach().double()
    ends = (start.clone(), start.clone())
    ends[0].index_add_(0, rows, _times(up, least) + _times(down, most))
    ends[1].index_add_(0, rows, _times(up, most) + _times(down, least))
    result.low[whose], result.high[whose] = ends[0][whose], ends[1][whose]
    return result


def _one_sided(taps: Tensor, endless: Tensor) -> Tensor:
    """Return the filters whose first weights on `endless` inputs have one sign: others have no end.

    Args:
        taps: Weights, ``(out, in, taps)``.
        endless: Inputs without an upper bound, bool of ``(in,)``.
    """
    few = max(_LOOK // taps.shape[2], 1)
    if bool(endless[:few].all()):
        first = taps.flatten(1)[:, : few * taps.shape[2]]  # no copy
    else:
        first = (taps[:, :few] * endless[:few, None]).flatten(1)
    least, most = first.aminmax(dim=1)
    return ((least >= 0) | (most <= 0)).nonzero().flatten()


def _scaled(op: Op, given: Bounds) -> Bounds:
    module = op.module
    if not isinstance(module, _NORMS):
        return unbounded(op.channels)
    assert module.running_mean is not None and module.running_var is not None
    factor = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * module.weight.detach()
    shift = -module.running_mean * factor
    if module.bias is not None:
        shift = shift + module.bias.detach()
    ends = torch.where(factor == 0, 0.0, factor * torch.stack(_ends(given))) + shift
    return Bounds(*ends.aminmax(dim=0))


def _same(op: Op, given: Bounds) -> Bounds:
    target, module = op.node.target, op.module
    within = given.with_zero() if op.zero_border else given
    if isinstance(module, _MEANS) and getattr(module, "divisor_override", None) is None:
        return within
    if target in _MEAN_FUNCTIONS or target in _MEAN_METHODS:
        return within
    if isinstance(module, nn.Hardswish) or target is F.hardswish:
        return _hardswish(given)
    rising = _rising(op)
    if rising is None:
        return unbounded(op.channels)
    return Bounds(rising(given.low.clone()), rising(given.high.clone()))  # it may work in place


def _rising(op: Op) -> Callable[[Tensor], Tensor] | None:
    """Return the function of an activation that never falls, or None for every other operation."""
    module, target = op.module, op.node.target
    if isinstance(module, _RISING):
        slope = getattr(module, "negative_slope", getattr(module, "alpha", 0.0))
        return module.forward if slope >= 0 else None
    kwargs: dict[str, Any] = {k: v for k, v in op.node.kwargs.items() if k != "inplace"}
    if len(op.node.args) > 1 or kwargs:
        return None  # arguments of its own
    if target in _RISING_METHODS:
        return lambda x: getattr(x, str(target))()
    if target in _RISING_FUNCTIONS and callable(target):
        return target
    return None


def _hardswish(given: Bounds) -> Bounds:
    """It is 0 up to -3, falls to -0.375 at -1.5, and rises from there."""
    low, high = (F.hardswish(end.clamp(min=-3.0)) for end in _ends(given))
    valley = torch.where(given.high <= -1.5, high, -0.375)
    return Bounds(torch.where(given.low >= -1.5, low, valley), torch.maximum(low, high))
