"""Positions from the FCD output of SUMO: ``sumo … --fcd-output FILE``, as XML or CSV.

Either may be compressed with gzip; which it is, is seen in the file. A file is read as a stream,
and nothing but times, names and positions is taken from it. What SUMO 1.28 was seen to write:

* a time step in which nobody is on the way, as an empty element or a row without a name;
* columns named after what moves first: ``vehicle_x``, ``person_x``, or ``x`` (by
  ``--output.column-header``); separators as ``--output.column-separator`` says;
* times as seconds, or as ``[days:]hours:minutes:seconds`` (``--human-readable-time``).

An XML file with a document type is refused, so that no entity is ever expanded.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple, cast
from xml.parsers import expat

from fedsys.errors import ConfigError

CHUNK: Final = 1 << 16
"""Bytes that are read at a time."""

MOST_TOKEN: Final = 1 << 22
"""Bytes without a single element after which a file is taken for no FCD output."""

_KINDS = ("vehicle", "person", "container")
_WHY = "sumo … --fcd-output FILE.xml (or .csv, .xml.gz, .csv.gz) writes one"


class Fix(NamedTuple):
    """Where one vehicle, person or container is at one moment.

    Attributes:
        time_s: Second of the simulation.
        name: Its id.
        x: Metres to the east, or degrees of longitude.
        y: Metres to the north, or degrees of latitude.
    """

    time_s: float
    name: str
    x: float
    y: float


def read(path: Path) -> Iterator[Fix]:
    """Yield what moves, in the order of the file: times never go back.

    Args:
        path: The file.

    Raises:
        ConfigError: It cannot be read, is no FCD output, or holds times that go back or a value
            that is no number; the message names the file and the place.
    """
    before = -math.inf
    try:
        with path.open("rb") as raw:
            head = raw.peek(2)[:2]
            packed = head == b"\x1f\x8b"
            whole = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
            stream = cast(io.BufferedReader, whole)
            for where, fix in _fixes(path, stream):
                if fix.time_s < before:
                    raise _refused(
                        path, where, fix.time_s, f"must not go back: {before:g} s stands before it"
                    )
                before = fix.time_s
                if fix.name:
                    yield fix
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError.of("mobility.file", path, f"cannot be read: {error}") from error


def _fixes(path: Path, stream: io.BufferedReader) -> Iterator[tuple[str, Fix]]:
    head = stream.peek(CHUNK)[:CHUNK].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise ConfigError.of("mobility.file", path, "must hold positions, and is empty", _WHY)
    if head.startswith(b"PAR1"):
        raise ConfigError.of("mobility.file", path, "must be XML or CSV, and is Parquet", _WHY)
    return _Xml(path).fixes(stream) if head.startswith(b"<") else _table(path, stream)


def _refused(path: Path, where: str, value: object, rule: str) -> ConfigError:
    return ConfigError.of(f"mobility.file={path}, {where}", value, rule)


def _number(path: Path, where: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _refused(path, where, text, "must be a finite number")
    return value


def seconds_of(text: str) -> float:
    """Return the seconds of a time as SUMO writes it.

    >>> seconds_of("12.50"), seconds_of("00:01:02"), seconds_of("1:00:00:00.5")
    (12.5, 62.0, 86400.5)

    Raises:
        ValueError: It is no time.
    """
    if ":" not in text:
        return float(text)
    *parts, last = text.split(":")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise ValueError(text)
    days, hours, minutes = (int(part) for part in ("0", *parts)[-3:])
    return ((days * 24 + hours) * 60 + minutes) * 60 + float(last)


def _time(path: Path, where: str, text: str | None) -> float:
    try:
        value = seconds_of((text or "").strip())
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _refused(path, where, text, "must be a time in seconds")
    return value


# --------------------------------------------------------------------------------------------------
# XML


class _Xml:
    """Collects positions while expat calls back."""

    def __init__(self, path: Path) -> None:
        self._path, self._found = path, list[tuple[str, Fix]]()
        self._time: float | None = None
        self._seen = self._root = False
        self._parser = parser = expat.ParserCreate(namespace_separator=None)
        parser.StartElementHandler = self._begin
        parser.EndElementHandler = self._end
        parser.StartDoctypeDeclHandler = self._doctype

    def fixes(self, stream: IO[bytes]) -> Iterator[tuple[str, Fix]]:
        """Yield places and positions, chunk by chunk."""
        silent = 0
        try:
            while chunk := stream.read(CHUNK):
                self._seen = False
                self._parser.Parse(chunk, False)
                yield from self._found
                self._found.clear()
                silent = 0 if self._seen else silent + len(chunk)
                if silent > MOST_TOKEN:
                    raise self._no("must have time steps", f"{silent} bytes have none")
            self._parser.Parse(b"", True)
        except expat.ExpatError as error:
            raise ConfigError.of(
                "mobility.file", self._path, f"must be whole XML: {error}", _WHY
            ) from error
        yield from self._found

    def _begin(self, tag: str, given: dict[str, str]) -> None:
        self._seen = True
        if not self._root:
            self._root = True
            if tag != "fcd-export":
                raise self._no("must be FCD output, with the root fcd-export", f"it is {tag}")
        elif tag == "timestep":
            self._time = _time(self._path, self._where(), given.get("time"))
            self._found.append((self._where(), Fix(self._time, "", 0.0, 0.0)))
        elif tag in _KINDS and self._time is not None:
            where = self._where()
            if not given.get("id"):
                raise _refused(self._path, where, tag, "must have an id")
            x, y = (_number(self._path, f"{where}, {key}", given.get(key)) for key in "xy")
            self._found.append((where, Fix(self._time, given["id"], x, y)))

    def _end(self, tag: str) -> None:
        if tag == "timestep":
            self._time = None

    def _doctype(self, *_: object) -> None:
        raise self._no("must have no document type", "SUMO writes none")

    def _no(self, rule: str, more: str) -> ConfigError:
        return ConfigError.of("mobility.file", self._path, f"{rule}: {more}", _WHY)

    def _where(self) -> str:
        return f"line {self._parser.CurrentLineNumber}"


# --------------------------------------------------------------------------------------------------
# CSV


def _table(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, Fix]]:
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:  # type: ignore[type-var]
        try:
            first = text.readline(CHUNK)
            marks = [mark for mark in ";,\t|" if mark in first]
            mark = max(marks, key=first.count, default=";")
            head = next(csv.reader([first], delimiter=mark), [])
            time, name, x, y = (_column(path, head, key) for key in ("time", "id", "x", "y"))
            lines = csv.reader(text, delimiter=mark, strict=True)
            for row in lines:
                where = f"line {lines.line_num + 1}"
                if not row:
                    continue
                if len(row) != len(head):
                    rule = f"must have the {len(head)} columns of the first line"
                    raise _refused(path, where, row, rule)
                at = _time(path, where, row[time])
                if not row[name]:  # a time step without vehicles
                    yield where, Fix(at, "", 0.0, 0.0)
                    continue
                place = (_number(path, f"{where}, {head[i]}", row[i]) for i in (x, y))
                yield where, Fix(at, row[name], *place)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError.of("mobility.file", path, f"must be a table: {error}") from error


def _column(path: Path, head: Sequence[str], key: str) -> int:
    """Return the place of a column, whatever it is named after."""
    names = [f"{kind}_{key}" for kind in _KINDS] if key != "time" else ["timestep_time"]
    for index, name in enumerate(head):
        if name.strip() in (key, *names):
            return index
    raise ConfigError.of(
        "mobility.file", path, f"must be FCD output: its first line names no column {names[0]}",
        "--output.column-header none leaves the names out",
    )  # fmt: skip
