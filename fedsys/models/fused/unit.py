"""A unit of modules whose first one computes for all of them, and hands on what the last one would.

The modules stay where they are, with their names, parameters and buffers, so optimizers, masks and
states see what they always saw. Outputs are laid out channels_last. Sums are those of
`fedsys.models.fused.source`; float64 where they are long, so gradients are nearer to the exact ones
than torch's own.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedsys.models.batchnorm import BatchMoments, DeferredBatchNorm
from fedsys.models.fused.building import built
from fedsys.models.fused.matching import Fusion, UnitPaths, pair
from fedsys.models.modes import Modes, Value
from fedsys.randomness import Piece, piece_of

_log = logging.getLogger("fedsys.kernels")

_COUNTS = (
    *("images", "channels", "height", "width"),
    *("x_image", "x_channel", "x_row", "x_column"),
    *("outputs", "kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y", "pad_x"),
    *("w_output", "w_channel", "w_row", "w_column", "conv_h", "conv_w"),
    *("pool_y", "pool_x", "pool_stride_y", "pool_stride_x", "pool_pad_y", "pool_pad_x"),
    *("out_h", "out_w", "norm", "groups", "threads"),
)
_NUMBERS = ("eps", "momentum", "cap")
_TENSORS = (
    *("x", "weight", "bias", "gamma", "beta", "running_mean", "running_var"),
    *("out", "where", "keep", "d_out", "d_weight", "d_bias", "d_gamma", "d_beta", "d_conv"),
)
_AFFINE, _BATCH, _GROUP = range(3)


class _Told(ctypes.Structure):
    """What the kernels are told, as in their source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )

    def give(self, **tensors: Tensor | None) -> None:
        """Set where tensors are; None for none."""
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


def fuse(module: nn.Module, fusion: Fusion) -> nn.Module:
    """Let the units that `module` has compute at once, in place, and return the module.

    Where there are no kernels they compute as before, which is said.

    Args:
        module: The whole model, or a part of it, with the global names of modules.
        fusion: What is to be fused.
    """
    paths = dict(module.named_modules())
    there = [unit for unit in fusion.units if {unit.conv, *unit.others} <= paths.keys()]
    if there and built().library is None:
        _warn_once(f"client.kernels=fused: units compute plainly, as {built().detail}")
        return module
    for unit in there:
        conv, others = paths[unit.conv], [paths[path] for path in unit.others]
        fused = FusedUnit(unit, [conv, *others], fusion.modes)
        conv.forward = fused  # type: ignore[method-assign]  # called by conv(x), hooks and all
        for other in others:
            other.forward = passed  # type: ignore[method-assign]
    return module


def passed(x: Tensor) -> Tensor:
    """Return `x`: what a module behind the first one of a unit does."""
    return x


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


class _Shape(NamedTuple):
    """What the counts of a call depend on."""

    x: tuple[int, ...]
    x_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]


class FusedUnit:
    """What the first module of a unit computes for all of them.

    Args:
        unit: Paths of the modules.
        modules: These, in order.
        modes: What the model sets of them in training and in evaluation.
    """

    def __init__(self, unit: UnitPaths, modules: list[nn.Module], modes: Modes) -> None:
        self.unit, self._modules, self._modes = unit, modules, modes
        self._conv = cast(nn.Conv2d, modules[0])
        found = dict(zip(unit.others, modules[1:], strict=True))
        self._norm, self._pool = found.get(unit.norm), cast(Any, found.get(unit.pool))
        self._told: dict[_Shape, _Told] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedUnit:
        modules = [copy.deepcopy(module, memo) for module in self._modules]
        return FusedUnit(self.unit, modules, self._modes)

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the modules make of ``(rows, channels, height, width)`` one by one."""
        kind = self._kind()
        told = self._counts(x) if self._is_for(x) else None
        if told is None or self._values(kind, told) == 1:
            return self._plain(x)  # torch says what is wrong
        told.norm, told.threads, told.cap = kind, torch.get_num_threads(), self.unit.cap
        norm, statistics = self._norm, _Statistics()
        if isinstance(norm, nn.GroupNorm):
            told.groups, told.eps = norm.num_groups, norm.eps
        elif norm is not None:
            statistics = self._statistics(kind)
            told.eps, told.momentum = self._set("eps"), statistics.momentum
        tensors = self._conv.weight, self._conv.bias, *_scale_of(norm)
        out: Tensor = _Fused.apply(x, *tensors, _Call(told, statistics, self._conv))  # type: ignore[no-untyped-call]
        if statistics.piece is not None:
            count = x.shape[0] * told.conv_h * told.conv_w
            cast(DeferredBatchNorm, norm).gather(statistics.seen(count), statistics.piece)
        return out

    def _plain(self, x: Tensor) -> Tensor:
        for module in self._modules:
            x = type(module).forward(module, x)
        return x

    def _values(self, kind: int, told: _Told) -> int:
        """Return of how many values statistics are taken; 0 for no statistics."""
        area = int(told.conv_h * told.conv_w)
        if kind == _GROUP:
            return area * int(told.outputs) // cast(nn.GroupNorm, self._norm).num_groups
        return area * int(told.images) if kind == _BATCH else 0

    def _set(self, name: str) -> Any:
        """Return an attribute that the normalisation has when it is called.

        A forward may set it in the whole model between convolution and normalisation.
        """
        modes = self._modes.training if self._conv.training else self._modes.evaluation
        special: Mapping[str, Value] = modes.get(self.unit.norm, {})
        return special[name] if name in special else getattr(self._norm, name)

    def _kind(self) -> int:
        norm = self._norm
        if norm is None:
            return _AFFINE
        if isinstance(norm, nn.GroupNorm):
            return _GROUP
        return _BATCH if self._set("training") or norm.running_mean is None else _AFFINE

    def _is_for(self, x: Tensor) -> bool:
        """Return whether the kernels compute with `x` and the tensors of the modules."""
        tensors = [x, *self._conv.parameters()]
        flat: list[Tensor] = []
        if self._norm is not None:
            flat = [*self._norm.parameters(), *_running(self._norm)]
        if x.dim() != 4 or x.shape[1] != self._conv.in_channels:
            return False
        fits = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in (*tensors, *flat))
        if not fits:
            told = f"{x.dtype} on {x.device}".removeprefix("torch.")
            rule = "the kernels are for float32 on the CPU"
            _warn_once(f"client.kernels=fused: {self.unit.conv} computes plainly: {told}; {rule}")
        usual = len(flat) == 0 or all(t.shape == (self._conv.out_channels,) for t in flat)
        return fits and usual and all(t.is_contiguous() for t in flat)

    def _counts(self, x: Tensor) -> _Told | None:
        """Return sizes and strides for an input; None if nothing is to be computed."""
        strides = x.stride(), self._conv.weight.stride()
        shape = _Shape(tuple(x.shape), *strides)
        if shape not in self._told:
            if len(self._told) > 64:
                self._told.clear()
            self._told[shape] = _told_of(self._conv, self._pool, shape)
        told = self._told[shape]
        sizes = told.images, told.conv_h, told.conv_w, told.out_h, told.out_w
        return _Told.from_buffer_copy(told) if min(sizes) > 0 else None

    def _statistics(self, kind: int) -> _Statistics:
        """Return which running statistics a call of BatchNorm reads or moves, and how far."""
        norm = cast(Any, self._norm)
        mean, var, momentum = norm.running_mean, norm.running_var, self._set("momentum")
        if kind == _AFFINE or mean is None or not self._set("training"):
            return _Statistics(mean, var)
        piece = piece_of(norm) if isinstance(norm, DeferredBatchNorm) else None
        if piece is not None and piece.stop - piece.start < piece.of:
            return _Statistics(torch.zeros_like(mean), torch.zeros_like(var), 1.0, piece)
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
        return _Statistics(mean, var, momentum)


def _running(norm: nn.Module) -> list[Tensor]:
    found = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    return [tensor for tensor in found if tensor is not None]


def _scale_of(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _told_of(conv: nn.Conv2d, pool: nn.MaxPool2d | None, shape: _Shape) -> _Told:
    """Return sizes and strides of a call; sizes below 1 where torch is to say what is wrong."""
    sides, kernel = shape.x[2:], conv.kernel_size
    stride, padding = conv.stride, cast(tuple[int, int], conv.padding)
    high, wide = ((sides[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))
    window, step, border, ceil = (1, 1), (1, 1), (0, 0), False
    if pool is not None:
        window, border, ceil = pair(pool.kernel_size), pair(pool.padding), pool.ceil_mode
        step = pair(pool.stride if pool.stride is not None else pool.kernel_size)
    out = [_pooled(n, window[i], step[i], border[i], ceil) for i, n in enumerate((high, wide))]
    if any(2 * border[i] > window[i] for i in range(2)):
        out = [0, 0]
    return _Told(
        *shape.x, *shape.x_strides, conv.out_channels, *kernel, *stride, *padding,
        *shape.weight_strides, high, wide, *window, *step, *border, *out,
    )  # fmt: skip


def _pooled(size: int, window: int, step: int, border: int, ceil: bool) -> int:
    """Return how many windows there are: with `ceil` the last may begin in the image only."""
    free = size + 2 * border - window
    count = (-(-free // step) if ceil else free // step) + 1
    return count - 1 if ceil and (count - 1) * step >= size + border else count


@dataclass(frozen=True)
class _Statistics:
    """Running statistics of a call.

    Attributes:
        mean: ``(channels,)``, read or moved in place; None for none.
        var: The like.
        momentum: Share of what is seen now.
        piece: Of a mini-batch whose statistics are gathered; None: they are moved at once.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float = 0.0
    piece: Piece | None = None

    def seen(self, count: int) -> BatchMoments:
        """Return what a piece with `count` values for each channel showed."""
        assert self.mean is not None and self.var is not None
        return BatchMoments(count, self.mean.double(), self.var.double() * (count - 1))


class _Call(NamedTuple):
    """What a call has besides its tensors."""

    told: _Told
    statistics: _Statistics
    conv: nn.Conv2d


class _Fused(torch.autograd.Function):
    """The two functions of the kernels, as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
        beta: Tensor | None, call: _Call,
    ) -> Tensor:  # fmt: skip
        """Return the pooled outputs, channels_last."""
        told, seen = call.told, call.statistics
        shape = told.images, told.outputs, told.out_h, told.out_w
        out = torch.empty(shape, memory_format=torch.channels_last)
        where = torch.empty(out.numel(), dtype=torch.int8)
        keep = torch.empty(_kept(told), dtype=torch.float64)
        told.give(
            x=x, weight=weight, bias=bias, gamma=gamma, beta=beta, running_mean=seen.mean,
            running_var=seen.var, out=out, where=where, keep=keep,
        )  # fmt: skip
        _run("fedsys_unit_forward", told)
        ctx.save_for_backward(x, weight, bias, gamma, beta, where, keep)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and parameters."""
        x, weight, bias, gamma, beta, where, keep = ctx.saved_tensors
        told, conv = ctx.call.told, ctx.call.conv
        d_out = d_out.contiguous(memory_format=torch.channels_last)
        d_weight = torch.empty_like(weight)
        d_bias, d_gamma, d_beta = torch.empty((3, told.outputs)).unbind()
        d_conv: Tensor | None = None
        if ctx.needs_input_grad[0]:
            shape = told.images, told.outputs, told.conv_h, told.conv_w
            d_conv = torch.empty(shape, memory_format=torch.channels_last)
        told.give(
            x=x, weight=weight, bias=bias, gamma=gamma, beta=beta, where=where, keep=keep,
            d_out=d_out, d_weight=d_weight, d_bias=d_bias, d_gamma=d_gamma, d_beta=d_beta,
            d_conv=d_conv,
        )  # fmt: skip
        _run("fedsys_unit_backward", told)
        d_x = None if d_conv is None else _to_input(d_conv, x, weight, conv)
        made = (d_x, d_weight, d_bias, d_gamma, d_beta)
        wanted = zip(made, ctx.needs_input_grad, strict=False)
        return *(gradient if needed else None for gradient, needed in wanted), None


def _kept(told: _Told) -> int:
    """Return how many numbers forward leaves for backward."""
    patch = told.channels * told.kernel_y * told.kernel_x
    sums = {
        _AFFINE: 2 * told.outputs,
        _BATCH: patch * (patch + 1) + 2 * told.outputs,
        _GROUP: 2 * told.images * told.groups,
    }
    return int(told.channels + sums[told.norm])


def _to_input(d_conv: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return the gradient of a convolution's input, by torch's own convolution."""
    backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.convolution_backward
    return backward(
        d_conv, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), 1,
        (True, False, False),
    )[0]  # fmt: skip


def _run(name: str, told: _Told) -> None:
    """Call a kernel; other Python threads go on meanwhile.

    Raises:
        MemoryError: There is no memory for it.
    """
    if getattr(built().library, name)(ctypes.byref(told)):
        raise MemoryError(f"{name}: {told.images} images of {told.channels} channels")
