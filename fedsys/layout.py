"""Tensors as bytes: which types travel, and the order of their dimensions in memory.

The order lists the dimensions from the slowest to the fastest; it is empty for a contiguous tensor
and ``[0, 2, 3, 1]`` for channels_last. With the shape it gives back the strides of any tensor whose
elements fill a stretch of memory without gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

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

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_PLAIN_TO_PYTHON: Final = frozenset(
    (torch.float64, torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8)
)  # types that a memoryview casts to bytes; others take the longer way
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


def dtype_name(x: Tensor) -> str:
    """Return the key of `DTYPES` for a tensor that `dense_bytes` accepts."""
    return _NAMES[x.dtype]


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor without gaps in that order of dimensions."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def dense_bytes(name: str, x: Tensor) -> tuple[memoryview, tuple[int, ...]]:
    """Return the memory of a tensor as bytes, and its order of dimensions.

    No copy is made of a dense tensor of the CPU: the bytes change with it. Other tensors are
    copied to the CPU, or together, keeping their order where torch keeps it.

    Raises:
        FrameError: The tensor is sparse, quantised, without data, or of a type not in `DTYPES`.
    """
    if x.layout != torch.strided or x.dtype not in _NAMES or x.is_meta:
        what = "meta" if x.is_meta else f"{x.layout}, {x.dtype}".replace("torch.", "")
        raise FrameError(f"tensor {name!r} ({what}): must be dense, of a plain type, with data")
    if x.requires_grad:
        x = x.detach()
    if not x.is_cpu:
        x = x.cpu()
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    order = _order_of(x)
    if order is None:
        x = x.clone(memory_format=torch.preserve_format)
        order = _order_of(x)
    if order is None:
        x, order = x.contiguous(), ()
    return _memory(x, order), order


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


# Both directions go by NumPy: an operation of torch lets other threads run, and a thread that has a
# small frame in hand then waits for its turn longer than all else takes.


def _memory(x: Tensor, order: tuple[int, ...]) -> memoryview:
    if x.numel() == 0:
        return memoryview(b"")
    if x.dtype in _UNKNOWN_TO_NUMPY:
        x = x.view(_UNKNOWN_TO_NUMPY[x.dtype])
    array = x.numpy()
    if order:
        array = array.transpose(order)
    if x.dtype not in _PLAIN_TO_PYTHON:
        array = array.reshape(-1).view(np.uint8)
    data: memoryview = array.data.cast("B")
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
