"""Tensors as bytes: which types travel, and the order of their dimensions in memory.

The order lists the dimensions from the slowest to the fastest; it is empty for a contiguous tensor
and ``[0, 2, 3, 1]`` for channels_last. With the shape it gives back the strides of any tensor whose
elements fill a stretch of memory without gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsys.errors import FrameError

CHANNELS_LAST: Final = (0, 2, 3, 1)

DTYPES: Final[Mapping[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.complex64,
        torch.complex128,
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
}
"""Types that travel, by name: all plain types of torch that hold whole bytes, but not complex32,
which torch itself calls experimental."""

INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the bytes of an element: what other types are viewed as where their bits count."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_UNKNOWN_TO_NUMPY: Final = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e4m3fnuz: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.float8_e5m2fnuz: torch.int8,
}
_IN_NUMPY: Final = {
    dtype: torch.empty(0, dtype=_UNKNOWN_TO_NUMPY.get(dtype, dtype)).numpy().dtype
    for dtype in DTYPES.values()
}
_BY_FORMAT: Final = {
    torch.empty(1, dtype=dtype).numpy().data.format: _NAMES[dtype]
    for dtype in (torch.float64, torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8)
}
"""Types that a memoryview casts to bytes; others take the longer way."""


class Dense(NamedTuple):
    """The memory of a tensor, and what it takes to make the tensor of it again.

    Attributes:
        data: Its bytes.
        dtype: Key of `DTYPES`.
        shape: Its shape.
        order: Order of its dimensions in memory.
    """

    data: memoryview
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor without gaps in that order of dimensions."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


# Both directions go by NumPy and memoryviews: on a thread that was just woken, the first call of
# anything costs ten times what it costs in a loop, and torch is much to call.


def dense_bytes(name: str, x: Tensor) -> Dense:
    """Return the memory of a tensor as bytes, and its order of dimensions.

    No copy is made of a dense tensor of the CPU: the bytes change with it. Other tensors are
    copied to the CPU, or together, keeping their order where torch keeps it.

    Raises:
        FrameError: The tensor is sparse, quantised, without data, or of a type not in `DTYPES`.
    """
    try:
        data = x.numpy().data
    except (TypeError, RuntimeError):  # not on the CPU, with a gradient, of another type or layout
        return _made_dense(name, x)
    dtype, shape = _BY_FORMAT.get(data.format), data.shape or ()
    if dtype is None or not data.c_contiguous or 1 in shape or 0 in shape:
        return _made_dense(name, x)
    return Dense(data.cast("B"), dtype, shape, ())


def _made_dense(name: str, x: Tensor) -> Dense:
    if x.layout != torch.strided or x.dtype not in _NAMES or x.is_meta:
        what = "meta" if x.is_meta else f"{x.layout}, {x.dtype}".replace("torch.", "")
        raise FrameError(f"tensor {name!r} ({what}): must be dense, of a plain type, with data")
    x = x.detach().cpu().resolve_conj().resolve_neg()
    order = _order_of(x)
    if order is None:
        x = x.clone(memory_format=torch.preserve_format)
        order = _order_of(x)
    if order is None:
        x = x.contiguous()
    return Dense(_memory(x, order or ()), _NAMES[x.dtype], tuple(x.shape), order or ())


def _order_of(x: Tensor) -> tuple[int, ...] | None:
    """Return the order of dimensions in memory, ``()`` if contiguous, None if there are gaps."""
    shape, strides = x.shape, x.stride()
    if 1 not in shape and x.is_contiguous():
        return ()
    natural = tuple(range(x.dim()))
    if strides == dense_strides(shape, natural):
        return ()
    by_stride = tuple(sorted(natural, key=lambda dim: -strides[dim]))
    # Dimensions of size 1 have no place of their own, so the common order is tried first.
    candidates = [CHANNELS_LAST, by_stride] if x.dim() == 4 else [by_stride]
    for order in candidates:
        dense = dense_strides(shape, order)
        if all(a == b for a, b, n in zip(strides, dense, shape, strict=True) if n != 1):
            return order if dense == strides or not x.is_contiguous() else ()
    return None


def _memory(x: Tensor, order: tuple[int, ...]) -> memoryview:
    if x.numel() == 0:
        return memoryview(b"")
    array = x.view(_UNKNOWN_TO_NUMPY.get(x.dtype, x.dtype)).numpy()
    if order:
        array = array.transpose(order)
    data: memoryview = array.reshape(-1).view(np.uint8).data
    return data


def tensor_at(
    payload: np.ndarray[Any, np.dtype[np.uint8]],
    start: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: tuple[int, ...],
) -> Tensor:
    """Return the tensor whose bytes begin at `start`: a view, as writable as `payload`."""
    known = _IN_NUMPY[dtype]
    if order:
        strides = [n * known.itemsize for n in dense_strides(shape, order)]
        array = np.ndarray(shape, known, payload, start, strides)
    else:
        array = np.ndarray(shape, known, payload, start)
    x = torch.from_numpy(array)
    return x.view(dtype) if dtype in _UNKNOWN_TO_NUMPY else x
