"""Tensors as their difference from others that the receiver has: to the bit, and smaller.

What a step changes of a parameter are mostly the lower bits of its mantissa. The bits of both are
combined by exclusive or; of the result, the bytes of each place are put together, and those places
that are mostly zero are compressed. Whatever does not become smaller by that goes as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsys.errors import FrameError

_SAMPLE = 8192  # bytes by which it is judged whether compressing pays
_PAYS = 0.9
_SUFFIX = "^"


def encode(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors for a frame, those that became smaller under their name with ``^`` behind.

    Args:
        tensors: By name, on the CPU.
        base: Others, of which the receiver has the same bits.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        other = base.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            found[name] = tensor
            continue
        packed = _packed(_bytes(tensor) ^ _bytes(other), tensor.element_size())
        if len(packed) < tensor.nbytes:
            found[name + _SUFFIX] = torch.frombuffer(packed, dtype=torch.uint8)
        else:
            found[name] = tensor
    return found


def decode(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `encode` was given, in its order.

    Raises:
        FrameError: They are not differences from `base`.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUFFIX):
            found[name] = tensor
            continue
        own = name.removesuffix(_SUFFIX)
        if own not in base:
            raise FrameError(f"{own}: a difference from what is not here")
        other = base[own]
        bits = _bytes(other) ^ _unpacked(tensor, other.nbytes, other.element_size(), own)
        found[own] = torch.from_numpy(bits).view(other.dtype).reshape(other.shape)
    return found


def _bytes(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _packed(bits: np.ndarray[tuple[int], np.dtype[np.uint8]], width: int) -> bytearray:
    """Return for each place of an element a flag, a length, and the bytes of all elements."""
    made = bytearray()
    for place in range(width):
        plane = np.ascontiguousarray(bits[place::width]).tobytes()
        sample = plane[:_SAMPLE]
        small = len(zlib.compress(sample, 1)) < _PAYS * len(sample)
        data = zlib.compress(plane, 1) if small else plane
        made += bytes([small]) + len(data).to_bytes(4, "little") + data
    return made


def _unpacked(
    packed: Tensor, nbytes: int, width: int, name: str
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FrameError(f"{name}: a difference must be bytes")
    data, at = packed.numpy().tobytes(), 0
    bits = np.empty(nbytes, np.uint8)
    for place in range(width):
        length = int.from_bytes(data[at + 1 : at + 5], "little")
        plane, small = data[at + 5 : at + 5 + length], data[at : at + 1] == b"\x01"
        at += 5 + length
        if small:
            inflating = zlib.decompressobj()
            try:  # never more memory than the tensor has
                plane = inflating.decompress(plane, max(1, nbytes // width))
            except zlib.error as error:
                raise FrameError(f"{name}: a difference that is damaged") from error
        if len(plane) != nbytes // width:
            raise FrameError(f"{name}: a difference of another size")
        bits[place::width] = np.frombuffer(plane, np.uint8)
    return bits
