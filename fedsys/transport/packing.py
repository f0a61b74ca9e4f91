"""All arrays of a record as one, for the way through a SuperLink.

A SuperLink stores each array of a message as objects of their own, pushed and pulled by a request
each, which its database works off one after the other: a model of a hundred arrays costs seconds
before a byte of it counts. Packed, a record is one array, whatever the model. Unpacking gives the
same names, types, shapes and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedsys.errors import ModelError
from fedsys.transport import records

INDEX = "packed-index"
"""Name of the record that says what was packed."""

ORDER = "records"


def pack(content: RecordDict) -> RecordDict:
    """Return the content with one array in the place of each array record.

    The index holds for each array record its names and the sizes of its arrays in bytes, each as
    a ``.npy`` file, which says type and shape itself.
    """
    index = ConfigRecord({ORDER: list(content)})
    packed = RecordDict({INDEX: index})
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            files = [array.data for array in record.values()]
            index[f"{name}.names"] = list(record)
            index[f"{name}.sizes"] = [len(file) for file in files]
            whole = np.frombuffer(b"".join(files), dtype=np.uint8)
            packed[name] = records.record_of({"packed": whole})
        else:
            packed[name] = record
    return packed


def is_packed(message: Message) -> bool:
    """Return whether a message has packed content."""
    return message.has_content() and INDEX in message.content


def unpack(content: RecordDict) -> RecordDict:
    """Return what was packed.

    Raises:
        ModelError: The index does not fit the arrays.
    """
    index = content.config_records[INDEX]
    original = RecordDict()
    for name in cast(list[str], index[ORDER]):
        record = content[name]
        if isinstance(record, ArrayRecord):
            names = cast(list[str], index[f"{name}.names"])
            sizes = cast(list[int], index[f"{name}.sizes"])
            record = ArrayRecord(dict(zip(names, _arrays(record, sizes), strict=True)))
        original[name] = record
    return original


def _arrays(record: ArrayRecord, sizes: list[int]) -> Iterable[Array]:
    whole = records.view(record["packed"]).tobytes()
    if sum(sizes) != len(whole):
        raise ModelError(f"packed arrays: {len(whole)} bytes instead of {sum(sizes)}")
    start = 0
    for size in sizes:
        yield records.array_of(whole[start : start + size])
        start += size
