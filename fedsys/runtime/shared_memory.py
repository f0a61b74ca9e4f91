"""Contents of messages in memory that processes share: written once, looked at without a copy.

Arrays stand in a file without a name that lives in memory (Linux), all else is packed by msgpack.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgpack
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedsys.transport import records
from fedsys.transport.messages import of_kind

ALIGNMENT: Final = 64
"""Bytes of which the place of each array is a multiple: those of a cache line."""

Told = list[Any]
"""A content but for the numbers of its arrays: of each record its name, kind and values."""


class Region:
    """Memory of processes that are forked after it was made; it grows with what is put there.

    One process at a time writes; when, the processes settle among themselves.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("fedsys")
        self._map: mmap.mmap | None = None

    def close(self) -> None:
        """Let go of it; arrays over it stay what they are."""
        os.close(self._file)
        self._map = None

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            there = os.fstat(self._file).st_size
            if there < size:
                os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, max(size, there))
        return self._map

    def put(self, arrays: Mapping[int, NDArray[Any]]) -> dict[int, int]:
        """Write arrays one behind the other, over what was there; return where each begins."""
        places, end = {}, 0
        for key, array in arrays.items():
            places[key] = end
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if end:
            whole = np.frombuffer(self._mapped(end), dtype=np.uint8)
            for key, array in arrays.items():
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                whole[places[key] : places[key] + len(flat)] = flat
        return places

    def array(self, dtype: str, shape: tuple[int, ...], place: int) -> NDArray[Any]:
        """Return the array at a place, read-only."""
        kind, count = np.dtype(dtype), math.prod(shape)
        memory = self._mapped(place + count * kind.itemsize) if count else b""
        array: NDArray[Any] = np.frombuffer(memory, kind, count, place if count else 0)
        array = array.reshape(shape)
        array.flags.writeable = False
        return array


def arrays_in(contents: Iterable[RecordDict]) -> dict[int, NDArray[Any]]:
    """Return the arrays of contents by identity: one that stands in many is one.

    Raises:
        ModelError: An array was not serialised by NumPy.
    """
    return {
        id(array): records.view(array)
        for content in contents
        for record in of_kind(content, ArrayRecord).values()
        for array in record.values()
    }


def tell(content: RecordDict, places: Mapping[int, tuple[int, int]]) -> Told:
    """Return what `read` makes the content of.

    Args:
        content: To be read in another process.
        places: For each array, by identity, the number of its region and its place there.
    """
    told: Told = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            rows = [
                [key, array.dtype, list(array.shape), *places[id(array)]]
                for key, array in record.items()
            ]
            told.append([name, "a", rows])
        else:
            kind = "m" if isinstance(record, MetricRecord) else "c"
            told.append([name, kind, dict(record)])
    return told


def read(told: Told, regions: Mapping[int, Region]) -> RecordDict:
    """Return a content over the arrays of regions; it is that until somebody writes there."""
    content: dict[str, Any] = {}
    for name, kind, values in told:
        if kind == "a":
            content[name] = records.record_over(
                {
                    key: regions[number].array(dtype, tuple(shape), place)
                    for key, dtype, shape, number, place in values
                }
            )
        else:
            made: type[MetricRecord] | type[ConfigRecord]
            made = MetricRecord if kind == "m" else ConfigRecord
            content[name] = records.unchecked(made, values)
    return records.unchecked(RecordDict, content)


def kept(content: RecordDict) -> RecordDict:
    """Return the content with arrays of its own, whatever is written into regions later."""
    own = {
        name: records.lasting(record) if isinstance(record, ArrayRecord) else record
        for name, record in content.items()
    }
    return records.unchecked(RecordDict, own)


def packed(value: Any) -> bytes:
    """Return plain values as bytes."""
    data: bytes = msgpack.packb(value)
    return data


def unpacked(data: bytes) -> Any:
    """Return what `packed` packed."""
    return msgpack.unpackb(data, strict_map_key=False)
