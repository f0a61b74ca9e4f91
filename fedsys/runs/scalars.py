"""The numbers of a run as table cells and as TensorBoard scalars."""

from __future__ import annotations

import functools
import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedsys.errors import is_installed
from fedsys.files import writing


def to_cell(value: Any) -> str:
    """Return the text of a value in a table: one line, from which the number can be read back."""
    if value is None:
        return ""
    if hasattr(value, "item"):  # scalars of NumPy and torch
        value = value.item()
    if isinstance(value, bool):
        return str(int(value))
    return " ".join(value.splitlines()) if isinstance(value, str) else repr(value)


def from_cell(cell: str) -> float | str:
    """Return the number that a cell of a table holds, or else its text."""
    try:
        return float(cell)
    except ValueError:
        return cell


def scalar_tag(column: str) -> str:
    """Return the name that TensorBoard groups a column under.

    >>> scalar_tag("val_accuracy"), scalar_tag("seconds_train"), scalar_tag("clients")
    ('accuracy/val', 'seconds/train', 'clients')
    """
    head, _, tail = column.partition("_")
    if head in ("train", "val", "test") and tail:
        return f"{tail}/{head}"
    return f"{head}/{tail}" if head in ("seconds", "bytes") and tail else column


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of a row of a round under its `scalar_tag`, without the round itself."""
    return {
        scalar_tag(name): number
        for name, value in row.items()
        if name != "round" and isinstance(number := from_cell(to_cell(value)), float)
    }


class Scalars:
    """Writes scalars to a TensorBoard event file.

    It writes the records itself instead of leaving them to torch's ``SummaryWriter``, which
    imports TensorFlow where that is installed, and whose thread hides a full disk; and instead of
    to TensorBoard's ``RecordWriter``, which imports a third of TensorBoard for a sum of bytes.
    """

    def __init__(self, folder: Path, first_round: int = 1) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{time.time_ns() // 1000:020d}.{os.getpid()}"
        self._path = folder / name
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._path.open("ab")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_round > 1:  # TensorBoard forgets what former files say about these steps
            restart = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=first_round, session_log=restart))

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Write every number of a row, under its `scalar_tag`, as the value at `step`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=number) for tag, number in numbers_of(row).items()
        ]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        with writing(self._path):
            self._file.write(_record(event.SerializeToString()))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # what could not be written has been reported by `_write`
            self._file.close()


def _record(data: bytes) -> bytes:
    """Return what an event file holds of some bytes: length, bytes, and a sum for each of both.

    The format is TensorFlow's TFRecord: little-endian uint64 of the length, its masked CRC-32C as
    uint32, the bytes, and theirs.
    """
    length = struct.pack("<Q", len(data))
    return length + _masked(_crc32c(length)) + data + _masked(_crc32c(data))


def _masked(crc: int) -> bytes:
    """Return a sum as event files hold it: turned by 15 bits, plus a constant.

    TensorFlow does so because the sum of bytes that hold sums themselves tells little.
    """
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@functools.lru_cache(maxsize=1)
def _table() -> tuple[int, ...]:
    def entry(number: int) -> int:
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        return number

    return tuple(map(entry, range(256)))


def scalars(folder: Path, first_round: int = 1) -> Scalars | None:
    """Return what writes an event file; None without TensorBoard: ``metrics.csv`` says the same."""
    return Scalars(folder, first_round) if is_installed("tensorboard") else None
