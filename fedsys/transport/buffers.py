"""Buffers that are sent one after the other: cut into pieces, or what is left of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from fedsys.transport.wire import Buffer

CHUNK_BYTES: Final = 1 << 20


def chunks(parts: Sequence[Buffer], least: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Copy buffers, put one after the other, into equal pieces of `least` to 2 · `least` bytes.

    All that is shorter makes one piece.
    """
    total = sum(len(part) for part in parts)
    size = -(-total // max(1, total // least))
    held: list[memoryview] = []
    count = 0
    for part in parts:
        rest = memoryview(part)
        while count + len(rest) >= size:
            held.append(rest[: size - count])
            rest = rest[size - count :]
            yield b"".join(held)
            held, count = [], 0
        held.append(rest)
        count += len(rest)
    if count:
        yield b"".join(held)


def after(parts: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """Return buffers without their first `nbytes` bytes."""
    for index, part in enumerate(parts):
        if nbytes < len(part):
            return [part[nbytes:], *parts[index + 1 :]]
        nbytes -= len(part)
    return []
