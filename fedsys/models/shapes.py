"""Shapes and work of the most common modules in closed form.

PyTorch finds them out too, on the ``meta`` device, but for convolutions, pooling and linear layers
it loads its compiler and a computer algebra system to do so: seconds, and 150 MB, in every process
that wants to know where a model can be cut. On a device that is more than training takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

Shape = tuple[int, ...]

_CONV: Mapping[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_POOL: Mapping[type[nn.Module], int] = {
    **{nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3},
    **{nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
}
_ADAPTIVE: Mapping[type[nn.Module], int] = {
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3},
}

_FUNCTIONS: Mapping[Any, Callable[..., nn.Module]] = {
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
}
_SAME_ORDER = 3
"""Arguments after the input that functions and modules take in the same order."""


def module_for(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module | None:
    """Return the module that does what ``function(x, *args, **kwargs)`` does, if one is known."""
    made = _FUNCTIONS.get(function)
    if made is None or len(args) > _SAME_ORDER:
        return None
    return made(*args, **kwargs)


def result_of(module: nn.Module, shape: Sequence[int]) -> tuple[Shape, int] | None:
    """Return the shape of ``module(x)`` and its multiply-accumulates, if a formula is known.

    Args:
        module: A module of exactly one of the classes here; subclasses may do something else.
        shape: Of `x`, batch first.

    Returns:
        None if there is no formula, or `x` does not fit the module: then running it says why.
    """
    kind, shape = type(module), tuple(shape)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        if not shape or shape[-1] != module.in_features:
            return None
        return (*shape[:-1], module.out_features), math.prod(shape) * module.out_features
    dims = _CONV.get(kind) or _POOL.get(kind) or _ADAPTIVE.get(kind)
    if dims is None or len(shape) != dims + 2:
        return None
    if kind in _CONV:
        return _convolved(module, shape, dims)
    if kind in _ADAPTIVE:
        return _adapted(module, shape, dims)
    return _pooled(module, shape, dims)


def _each(value: int | Sequence[int], dims: int) -> Shape:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _slid(
    shape: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, up: bool = False
) -> Shape:
    """Return the spatial sizes that a window gives (formula of ``nn.MaxPool2d``).

    With `up`, a window may stick out at the end, as long as it begins inside.
    """
    sizes = []
    for n, k, s, p, d in zip(shape[2:], kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        size = (-(-room // s) if up else room // s) + 1
        sizes.append(size - (up and (size - 1) * s >= n + p))
    return tuple(sizes)


def _convolved(module: nn.Module, shape: Shape, dims: int) -> tuple[Shape, int] | None:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if isinstance(module.padding, str) or shape[1] != module.in_channels:
        return None
    kernel = module.kernel_size
    sizes = _slid(shape, kernel, module.stride, module.padding, module.dilation)
    if min(sizes) < 1:
        return None
    out = (shape[0], module.out_channels, *sizes)
    return out, math.prod(out) * (module.in_channels // module.groups) * math.prod(kernel)


def _pooled(module: nn.Module, shape: Shape, dims: int) -> tuple[Shape, int] | None:
    if getattr(module, "return_indices", False):
        return None
    kernel, stride, padding, dilation = (
        _each(getattr(module, name, 1), dims)
        for name in ("kernel_size", "stride", "padding", "dilation")
    )
    up = bool(getattr(module, "ceil_mode", False))
    sizes = _slid(shape, kernel, stride, padding, dilation, up)
    fits = min(sizes) >= 1 and all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    return ((*shape[:2], *sizes), 0) if fits else None


def _adapted(module: nn.Module, shape: Shape, dims: int) -> tuple[Shape, int] | None:
    if getattr(module, "return_indices", False):
        return None
    wanted: Any = module.output_size
    sizes = tuple(wanted) if isinstance(wanted, (list, tuple)) else (wanted,) * dims
    spatial = (n if size is None else size for n, size in zip(shape[2:], sizes, strict=True))
    return (*shape[:2], *spatial), 0
