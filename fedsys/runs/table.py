"""``metrics.csv`` as rows: what can be read of it, and what is damaged."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedsys.files import whole_lines


@dataclass(frozen=True)
class Table:
    """A file of rows, one for each round.

    Attributes:
        rows: The good ones, as text by column; each has a ``round``, from 1.
        problems: What is wrong with the others, by line.
    """

    rows: tuple[dict[str, str], ...]
    problems: tuple[str, ...]


def read_table(path: Path) -> Table:
    """Return what a file of rows holds, nothing if there is no file.

    A line that was not written to its end is no damage: its round is played again.

    Raises:
        RunError: The file cannot be read.
    """
    lines = whole_lines(path)
    if not lines:
        return Table((), ())
    header = _cells(lines[0])
    if header is None or "round" not in header:
        return Table((), ("its first line does not name the columns",))
    rows: list[dict[str, str]] = []
    problems: list[str] = []
    for number, line in enumerate(lines[1:], 2):
        cells = _cells(line)
        if cells is None or len(cells) != len(header):
            problems.append(f"line {number} is no row of {len(header)} cells")
            continue
        row = dict(zip(header, cells, strict=True))
        if not row["round"].removesuffix(".0").isdecimal():
            problems.append(f"line {number} is of round {row['round']!r}")
            continue
        rows.append(row)
    return Table(tuple(rows), tuple(problems))


def _cells(line: str) -> list[str] | None:
    """Return the cells of a line; None if it is no row."""
    try:
        rows = list(csv.reader([line], strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def columns_of(rows: Iterable[dict[str, str]]) -> list[str]:
    """Return every column in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def csv_text(rows: Iterable[Iterable[str]]) -> bytes:
    """Return rows as the text of a file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
