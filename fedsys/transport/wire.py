"""Frames to bytes and back: a small checked header, then raw tensors.

::

    offset  bytes  field (little endian)
    0       4      magic "FSYS"
    4       2      version of the format, 1
    6       2      flags, 0
    8       4      H, length of the header
    12      8      P, length of the payload
    20      4      CRC-32 of the 20 bytes before and of the header
    24      H      header: MessagePack
    24 + H  P      payload: the tensors in the order of the header, each padded to 64 bytes

The header is ``{"kind": …, "meta": {…}, "tensors": [[name, dtype, shape, order, bytes, sum], …]}``.
`order` lists the dimensions from the slowest to the fastest in memory and is empty for a
contiguous tensor; ``[0, 2, 3, 1]`` is channels_last. Strides are therefore kept: a convolution
sees the activation as it would have seen it without the wire, and computes the same bits. For the
same reason every decoded tensor starts at a multiple of 64 bytes, as torch allocates its own.

Nothing is executed and nothing is believed: dtype, shape, order and lengths are declared in the
header and checked against `Limits` before memory is taken for the payload, and each tensor has a
checksum. A decoded tensor is writable and has its own version counter, but all tensors of a frame
lie in one block of memory, which lives as long as any of them.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack
import numpy as np
import torch
from torch import Tensor

from fedsys.errors import FrameError
from fedsys.transport.tensors import DTYPES, dense_bytes, dense_strides, tensor_at

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC: Final = b"FSYS"
VERSION: Final = 1
ALIGNMENT: Final = 64

_PREAMBLE: Final = struct.Struct("<4sHHIQI")
PREAMBLE_BYTES: Final = _PREAMBLE.size
_CRC_AT: Final = _PREAMBLE.size - 4
_ZEROS: Final = bytes(ALIGNMENT)
_SCALARS: Final = frozenset((str, int, float, bool, type(None)))
_KIND: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BLOCK: Final = 4096  # bytes that are summed word by word into one; a page
_FEW_BLOCKS: Final = 4  # up to which summing takes longer than it saves
_LARGE: Final = 1 << 16  # bytes; copying them takes longer than handing over to another thread
_MAX_ELEMENTS: Final = 1 << 60  # beyond it, strides would overflow 64 bits
_MAX_DIMENSIONS: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One message: what it is, a few plain values, and tensors by name.

    Attributes:
        kind: What the message is, 1 to 64 of ``A-Z a-z 0-9 _ . -``.
        meta: Plain values (numbers, strings, booleans, None, lists, mappings with string keys).
            Tuples arrive as lists; NaN and infinities arrive as they are. Integers have at most
            64 bits.
        tensors: Dense tensors. They arrive on the CPU, detached, in the order given.
        encoded_bytes: Bytes on the wire of a frame that was received; 0 before.
        arrived_s: Seconds of `time.monotonic` at which it was there; 0 before.
    """

    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    encoded_bytes: int = 0
    arrived_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts. A frame over a limit is refused before its payload is stored.

    Attributes:
        frame_bytes: Payload of one frame, in bytes.
        tensor_bytes: One tensor, in bytes.
        tensors: Number of tensors in one frame.
        header_bytes: Header of one frame, in bytes; about 100 per tensor are needed.
    """

    frame_bytes: int = 1 << 30
    tensor_bytes: int = 1 << 30
    tensors: int = 4096
    header_bytes: int = 256 << 10


DEFAULT_LIMITS: Final = Limits()


def checksum(data: Buffer) -> int:
    """Return 32 bits that differ after any corruption confined to 4096 consecutive bytes.

    Of more than four pages of 4096 bytes, the pages are added as 512 words of 64 bits each; CRC-32
    covers the sums and the rest. This runs at the speed of memory, several times faster than CRC-32
    over everything. The certainty is that of CRC-32 (1 in 2^32 is missed). Errors in several pages
    can cancel out only if they hit the same word of their pages with opposite sums.
    """
    blocks = len(data) // _BLOCK
    if blocks <= _FEW_BLOCKS:
        return zlib.crc32(data)
    pages = np.ndarray((blocks, _BLOCK // 8), np.uint64, data)
    sums = np.add.reduce(pages, axis=0)
    return zlib.crc32(memoryview(data)[blocks * _BLOCK :], zlib.crc32(sums))


# --------------------------------------------------------------------------------------------------
# Encoding


def encode_parts(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> list[Buffer]:
    """Return buffers that make up the encoded frame when put one after the other.

    The parts of dense tensors of the CPU are views of their memory: no copy is made, and the
    tensors must not change until the parts have been used.

    Raises:
        FrameError: The frame cannot be sent: its kind, a value, a tensor, or a limit.
    """
    if not isinstance(frame.kind, str) or not _KIND.fullmatch(frame.kind):
        raise FrameError(f"kind={frame.kind!r}: must be 1 to 64 of A-Z a-z 0-9 _ . -")
    table: list[tuple[object, ...]] = []
    parts: list[Buffer] = [b""]
    size = 0
    for name, x in frame.tensors.items():
        _check_name(name)
        data, dtype, shape, order = dense_bytes(name, x)
        nbytes = len(data)
        if nbytes > limits.tensor_bytes:
            raise FrameError(_over(f"tensor {name!r}", nbytes, "tensor_bytes"))
        table.append((name, dtype, shape, order, nbytes, checksum(data)))
        padding = -nbytes % ALIGNMENT
        size += nbytes + padding
        if nbytes:
            parts.append(data)
        if padding:
            parts.append(_ZEROS[:padding])
    _check_total(len(table), size, limits)
    parts[0] = _head(frame, table, size, limits)
    return parts


def _head(frame: Frame, table: list[tuple[object, ...]], size: int, limits: Limits) -> bytes:
    meta = frame.meta
    try:
        _check_plain(meta)
        header: bytes = msgpack.packb({"kind": frame.kind, "meta": {**meta}, "tensors": table})
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FrameError(f"meta of frame {frame.kind!r} is not plain: {error}") from error
    if len(header) > limits.header_bytes:
        raise FrameError(_over("header of frame " + repr(frame.kind), len(header), "header_bytes"))
    stated = _PREAMBLE.pack(MAGIC, VERSION, 0, len(header), size, 0)[:_CRC_AT]
    return stated + zlib.crc32(header, zlib.crc32(stated)).to_bytes(4, "little") + header


def _check_plain(value: object) -> None:
    """Raise TypeError unless `value` is of the types that a header may carry."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"the key {str(key)[:40]!r} must be a string")
            if type(inner) not in _SCALARS:
                _check_plain(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            if type(inner) not in _SCALARS:
                _check_plain(inner)
    elif type(value) not in _SCALARS:
        raise TypeError(f"a {type(value).__name__} is not a plain value")


def encode(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Return the frame as bytes.

    Raises:
        FrameError: The frame cannot be sent: its kind, a value, a tensor, or a limit.
    """
    return b"".join(encode_parts(frame, limits))


def declared_bytes(encoded: Buffer) -> int:
    """Return how long a frame says that it is, from its first `PREAMBLE_BYTES`; unchecked."""
    _, _, _, header, payload, _ = _PREAMBLE.unpack_from(encoded)
    return PREAMBLE_BYTES + int(header) + int(payload)


def kind_of(encoded: Buffer) -> str:
    """Return the kind of a frame from bytes that `encode` or `encode_parts` begins with."""
    header_bytes = _PREAMBLE.unpack_from(encoded)[3]
    header = memoryview(encoded)[_PREAMBLE.size : _PREAMBLE.size + header_bytes]
    return str(msgpack.unpackb(header)["kind"])


# --------------------------------------------------------------------------------------------------
# Decoding


class _Declared(NamedTuple):
    """One checked entry of the table of tensors; no order if it is contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    nbytes: int
    sum: int

    def read(self, payload: np.ndarray[Any, np.dtype[np.uint8]], start: int) -> Tensor:
        if self.nbytes == 0:
            strides = dense_strides(self.shape, self.order or range(len(self.shape)))
            return torch.empty_strided(self.shape, strides, dtype=self.dtype)
        data = payload.data[start : start + self.nbytes]
        if checksum(data) != self.sum:
            raise FrameError(f"tensor {self.name!r}: the checksum of its data does not match")
        if self.dtype == torch.bool and payload[start : start + self.nbytes].max() > 1:
            raise FrameError(f"tensor {self.name!r}: a boolean must be 0 or 1")
        return tensor_at(payload, start, self.dtype, self.shape, self.order)


class _Header(NamedTuple):
    """A checked header."""

    kind: str
    meta: dict[str, Any]
    tensors: list[_Declared]


def _over(what: str, value: int, limit: str) -> str:
    return f"{what} has {value} bytes: more than the limit; raise Limits.{limit} on both sides"


def _check_total(tensors: int, nbytes: int, limits: Limits) -> None:
    if tensors > limits.tensors:
        raise FrameError(f"a frame with {tensors} tensors: at most {limits.tensors} are accepted")
    if nbytes > limits.frame_bytes:
        raise FrameError(_over("the payload", nbytes, "frame_bytes"))


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.isprintable() or len(name) > 1024:
        raise FrameError("a tensor has no printable name of at most 1024 characters")


def _naturals(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise FrameError(f"the header declares {str(value)[:80]} where a short list is expected")
    for n in value:
        if type(n) is not int or n < 0:
            raise FrameError(f"the header declares {str(value)[:80]} where sizes are expected")
    return tuple(value)


def _declared(entry: object, limits: Limits) -> _Declared:
    if not isinstance(entry, list) or len(entry) != 6:
        raise FrameError("the header has an entry for a tensor without its six fields")
    name, dtype_name, shape_list, order_list, nbytes, total = entry
    _check_name(name)
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise FrameError(f"tensor {name!r}: dtype {str(dtype_name)[:40]!r} is unknown")
    if type(nbytes) is not int or type(total) is not int:
        raise FrameError(f"tensor {name!r}: its length and checksum must be integers")
    shape, order = _naturals(shape_list), _naturals(order_list)
    if order and sorted(order) != list(range(len(shape))):
        raise FrameError(f"tensor {name!r}: order {order} does not fit the shape {shape}")
    elements = math.prod(shape)
    if (elements or math.prod(n or 1 for n in shape)) > _MAX_ELEMENTS:
        raise FrameError(f"tensor {name!r}: shape {shape} is too large to address")
    if nbytes != elements * dtype.itemsize:
        raise FrameError(f"tensor {name!r}: {nbytes} bytes do not fit {shape} of {dtype_name}")
    if nbytes > limits.tensor_bytes:
        raise FrameError(_over(f"tensor {name!r}", nbytes, "tensor_bytes"))
    return _Declared(name, dtype, shape, order, nbytes, total)


_NOTHING: Final = np.empty(0, dtype=np.uint8)


class Assembler:
    """Puts one frame together from consecutive pieces of its bytes, of any size.

    Memory for the payload is taken once the header has been checked; a header that is refused
    costs no more than `Limits.header_bytes`. After a `FrameError` the assembler is of no more use.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._head = bytearray()  # only for a head that comes in more than one piece
        self._payload_at = _PREAMBLE.size
        self._payload_bytes = self._filled = 0
        self._declared: _Header | None = None
        self._payload = _NOTHING

    @property
    def expected_bytes(self) -> int:
        """Bytes of the whole frame; the length of the preamble as long as that is unknown."""
        return self._payload_at + self._payload_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes fed so far."""
        head = len(self._head) if self._declared is None else self._payload_at
        return head + self._filled

    def feed(self, piece: Buffer) -> Frame | None:
        """Take the next bytes; return the frame if they complete it, else None.

        Raises:
            FrameError: The bytes are not a valid frame, are over a limit, or go past its end.
        """
        rest = memoryview(piece)
        if self._declared is None:
            had = len(self._head)
            data: Buffer = piece
            if had:
                self._head += rest
                data = self._head
            if not self._read_head(data):
                if not had:
                    self._head += rest
                return None
            self._declared = self._read_header(data)
            rest = rest[self._payload_at - had :]
            if self._payload_bytes:
                self._payload = _aligned(self._payload_bytes)
        end = self._filled + len(rest)
        if end > self._payload_bytes:
            raise FrameError(f"{end - self._payload_bytes} bytes follow the end of the frame")
        if len(rest) > _LARGE:  # NumPy lets other threads run while it copies
            np.copyto(self._payload[self._filled : end], np.frombuffer(rest, dtype=np.uint8))
        elif len(rest):
            self._payload.data[self._filled : end] = rest
        return self.filled(len(rest))

    def vacant(self) -> memoryview:
        """Return the memory that the next bytes belong in, up to the end of the frame.

        Empty before the header is there. Whoever writes the bytes there himself saves a copy, and
        tells `filled` how many.
        """
        return self._payload.data[self._filled :]

    def filled(self, nbytes: int) -> Frame | None:
        """Count bytes that were written to `vacant`; return the frame if they complete it.

        Raises:
            FrameError: A checksum does not match, or a tensor is not valid.
        """
        self._filled += nbytes
        declared = self._declared
        if declared is None or self._filled < self._payload_bytes:
            return None
        return self._finish(declared)

    def _read_head(self, data: Buffer) -> bool:
        """Check the preamble if it is there; return whether the header is there too."""
        if len(data) < _PREAMBLE.size:
            return False
        if self._payload_at == _PREAMBLE.size:
            magic, version, flags, header, payload, _ = _PREAMBLE.unpack_from(data)
            if magic != MAGIC:
                raise FrameError(f"the bytes begin with {bytes(magic)!r}: not a frame of fedsys")
            if version != VERSION or flags != 0:
                raise FrameError(
                    f"a frame of version {version} with flags {flags:#x}: this side speaks version "
                    f"{VERSION}; install the same version of fedsys on both sides"
                )
            if header > self._limits.header_bytes:
                raise FrameError(_over("the header", header, "header_bytes"))
            _check_total(0, payload, self._limits)
            self._payload_at, self._payload_bytes = _PREAMBLE.size + header, payload
        return len(data) >= self._payload_at

    def _read_header(self, data: Buffer) -> _Header:
        stated = int.from_bytes(data[_CRC_AT : _PREAMBLE.size], "little")
        raw = bytes(data[_PREAMBLE.size : self._payload_at])
        if stated != zlib.crc32(raw, zlib.crc32(data[:_CRC_AT])):
            raise FrameError("the checksum of the header does not match")
        try:
            header = msgpack.unpackb(raw)
            kind, meta, table = header["kind"], header["meta"], header["tensors"]
            _check_plain(meta)
        except (TypeError, KeyError) as error:
            raise FrameError(f"the header lacks kind, meta or tensors: {error}") from error
        except (ValueError, RecursionError, msgpack.UnpackException) as error:
            raise FrameError(f"the header is not MessagePack: {error}") from error
        if not isinstance(meta, dict) or not isinstance(table, list):
            raise FrameError("the header lacks kind, meta or tensors")
        if not isinstance(kind, str) or not _KIND.fullmatch(kind):
            raise FrameError(f"kind={str(kind)[:80]!r}: must be 1 to 64 of A-Z a-z 0-9 _ . -")
        _check_total(len(table), self._payload_bytes, self._limits)
        tensors = [_declared(entry, self._limits) for entry in table]
        if len(table) > 1 and len({entry.name for entry in tensors}) != len(table):
            raise FrameError("the header declares two tensors of one name")
        declared = 0
        for entry in tensors:
            declared += entry.nbytes + -entry.nbytes % ALIGNMENT
        if declared != self._payload_bytes:
            raise FrameError(
                f"the header declares tensors of {declared} bytes in a payload of "
                f"{self._payload_bytes}"
            )
        return _Header(kind, meta, tensors)

    def _finish(self, declared: _Header) -> Frame:
        tensors, start = {}, 0
        for entry in declared.tensors:
            tensors[entry.name] = entry.read(self._payload, start)
            start += entry.nbytes + -entry.nbytes % ALIGNMENT
        now = time.monotonic()
        return Frame(declared.kind, declared.meta, tensors, self.expected_bytes, now)


def _aligned(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uninitialised memory that starts at a multiple of 64.

    The system backs it with pages when they are written, so a frame that is announced and never
    sent costs nothing.
    """
    block = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block.data)) % ALIGNMENT
    return block[start : start + nbytes]


def decode(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Return the frame that `data` holds; its tensors are copies, writable, at 64-byte addresses.

    Raises:
        FrameError: The bytes are not exactly one valid frame, or it is over a limit.
    """
    assembler = Assembler(limits)
    frame = assembler.feed(data)
    if frame is None:
        raise FrameError(
            f"the frame ends after {assembler.received_bytes} of {assembler.expected_bytes} bytes"
        )
    return frame
