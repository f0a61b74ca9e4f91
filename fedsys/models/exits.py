"""What lets a model answer without some of its units: early exits, and adapters past a unit.

An *early exit* classifies from the tensor at a boundary between units: pooled features, LayerNorm,
linear (Teerapittayanon et al., "BranchyNet", ICPR 2016; with one linear layer as in Kaya et al.,
"Shallow-Deep Networks", ICML 2019). LayerNorm looks at one example at a time and keeps no
statistics, so an exit that is trained beside a frozen backbone, or by many clients, needs none.

A *skip* leaves a run of units out. Where the shapes before and behind it agree nothing stands in
for it, as in a residual network with stochastic depth (Huang et al., ECCV 2016). Where a unit
changes the shape a learned adapter does: what a 1x1 convolution makes of every `s`-th pixel, the
projection of He et al. ("Deep Residual Learning", CVPR 2016, option B).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsys.models.blocks import chain
from fedsys.models.layers import LayeredModel
from fedsys.models.norm import convert_norm

Run = tuple[int, int]
"""Units ``[first, last)`` that are left out."""

_MAP, _TOKENS, _VECTOR = 3, 2, 1  # dimensions of a tensor without its batch


class MeanOfTokens(nn.Module):
    """The mean of ``(rows, tokens, features)`` over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(rows, features)``."""
        return x.mean(1)


def exit_head(shape: Sequence[int], num_classes: int, pool: int = 1) -> nn.Sequential | None:
    """Return a head for tensors of `shape`, without the batch; None if they cannot be pooled.

    Args:
        shape: ``(channels, height, width)``, ``(tokens, features)`` or ``(features,)``.
        num_classes: Number of outputs.
        pool: Of a map, features at ``pool`` times ``pool`` places are left: with one, where
            something is in an early map is forgotten (Kaya et al. pool to four times four).
    """
    if len(shape) not in (_MAP, _TOKENS, _VECTOR):
        return None
    features = shape[-1] if len(shape) == _TOKENS else shape[0]
    pooling: list[tuple[str, nn.Module | None]] = []
    if len(shape) == _MAP:
        places = min(pool, *shape[1:])
        pooling = [("pool", nn.AdaptiveAvgPool2d(places)), ("flatten", nn.Flatten())]
        features *= places**2
    elif len(shape) == _TOKENS:
        pooling = [("pool", MeanOfTokens())]
    norm, linear = nn.LayerNorm(features), nn.Linear(features, num_classes)
    return chain([*pooling, ("norm", norm), ("linear", linear)])


def adapter(before: Sequence[int], behind: Sequence[int], norm: str = "batch") -> nn.Module | None:
    """Return what makes a tensor of shape `behind` of one of shape `before`; None: nothing can.

    Args:
        before: Shape of what is given, without the batch.
        behind: Shape that is wanted.
        norm: What follows a convolution: one of `fedsys.models.norm.NORMS`.
    """
    if tuple(before) == tuple(behind):
        return nn.Identity()
    if len(before) == len(behind) == _MAP:
        return convert_norm(_projection(before, behind), norm)
    if len(before) == _MAP and len(behind) == _VECTOR:
        linear = None if before[0] == behind[0] else nn.Linear(before[0], behind[0])
        pool = nn.AdaptiveAvgPool2d(1)
        return chain([("pool", pool), ("flatten", nn.Flatten()), ("linear", linear)])
    if len(before) == len(behind) == _VECTOR:
        return chain([("linear", nn.Linear(before[0], behind[0]))])
    return None


def _projection(before: Sequence[int], behind: Sequence[int]) -> nn.Sequential:
    """Return a convolution of every `s`-th pixel, or of pooled ones where no stride fits."""
    stride = (max(1, -(-before[1] // behind[1])), max(1, -(-before[2] // behind[2])))
    fits = all(-(-before[i + 1] // stride[i]) == behind[i + 1] for i in (0, 1))
    pool = None if fits else nn.AdaptiveAvgPool2d((behind[1], behind[2]))
    conv = nn.Conv2d(before[0], behind[0], 1, stride=stride if fits else 1, bias=False)
    return chain([("pool", pool), ("conv", conv), ("norm", nn.BatchNorm2d(behind[0]))])


# --------------------------------------------------------------------------------------------------
# What a model allows


def allowed_exits(layers: LayeredModel) -> tuple[int, ...]:
    """Return the boundaries behind which an exit can stand: after units ``[0, b)``, 1 … L-1."""
    return tuple(
        b for b in range(1, len(layers))
        if len(layers.units[b - 1].out_shape) in (_MAP, _TOKENS, _VECTOR)
    )  # fmt: skip


def adapted_units(layers: LayeredModel) -> tuple[int, ...]:
    """Return the units that can be skipped only with an adapter, because they change the shape."""
    return tuple(
        u for u in range(1, len(layers) - 1)
        if (shapes := _shapes(layers, u, u + 1))[0] != shapes[1] and adaptable(*shapes)
    )  # fmt: skip


def adaptable(before: Sequence[int], behind: Sequence[int]) -> bool:
    """Whether `adapter` knows a way from one shape to another."""
    kinds = len(before), len(behind)
    known = kinds in ((_MAP, _MAP), (_MAP, _VECTOR), (_VECTOR, _VECTOR))
    return bool(before) and (tuple(before) == tuple(behind) or known)


def allowed_skips(
    layers: LayeredModel, adapted: Sequence[int] = (), longest: int | None = None
) -> tuple[Run, ...]:
    """Return the runs of units that can be left out, by their first unit and then their length.

    The first unit sees images and the last one makes the scores: neither is ever left out.

    Args:
        layers: The model.
        adapted: Units that have an adapter.
        longest: Units of a run at most; None: any number.
    """
    found = []
    for first in range(1, len(layers) - 1):
        most = len(layers) - 1 if longest is None else min(len(layers) - 1, first + longest)
        for last in range(first + 1, most + 1):
            if steps_past(layers, adapted, first, last) is not None:
                found.append((first, last))
    return tuple(found)


def steps_past(
    layers: LayeredModel, adapted: Sequence[int], first: int, last: int
) -> tuple[int, ...] | None:
    """Return the units whose adapters lead past units ``[first, last)``; None: nothing does.

    None are needed where the shapes before and behind the run agree. Otherwise each of its units is
    passed by its adapter, if it has one, or must leave the shape as it is.
    """
    if not 1 <= first < last < len(layers):
        return None
    before, behind = _shapes(layers, first, last)
    if before and before == behind:
        return ()
    steps = []
    for unit in range(first, last):
        before, behind = _shapes(layers, unit, unit + 1)
        if unit in adapted:
            steps.append(unit)
        elif not before or before != behind:
            return None
    return tuple(steps)


def _shapes(layers: LayeredModel, first: int, last: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what goes into units ``[first, last)`` and of what leaves them."""
    return layers.units[first - 1].out_shape, layers.units[last - 1].out_shape
