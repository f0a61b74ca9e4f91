"""Words for the terminal: rounds, durations and results as lines, whatever shows them."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from fedsys.runs.measured import metric_in

Row = Mapping[str, Any]


def clock_text(seconds: float | None) -> str:
    """Return a duration as a clock shows it.

    >>> clock_text(5), clock_text(75.4), clock_text(3723), clock_text(None)
    ('0:05', '1:15', '1:02:03', '-:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds_text(seconds: float) -> str:
    """Return a duration with three digits and its unit.

    >>> seconds_text(0.01234), seconds_text(1.234), seconds_text(83.21), seconds_text(600)
    ('12.3 ms', '1.23 s', '83.2 s', '10:00')
    """
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 300 else clock_text(seconds)


def eta_seconds(rounds: int, done: int, spent: float, since: float) -> float | None:
    """Return the seconds that are left, or None before the first round has ended.

    Args:
        rounds: Rounds that this process has to do.
        done: Rounds that it has done.
        spent: Seconds that these took.
        since: Seconds since the last of them ended.
    """
    if done <= 0:
        return None
    mean = spent / done
    return max(mean * (rounds - done) - min(since, mean), 0.0)


@dataclass(frozen=True)
class Column:
    """One column of the table of rounds.

    Attributes:
        title: Above it, and before a value that stands alone.
        name: Of the column in ``metrics.csv``.
        width: Characters.
        form: A number as text.
        rank: Where a terminal is narrow, those of the highest ranks are left out.
    """

    title: str
    name: str
    width: int
    form: Callable[[float], str]
    rank: int


COLUMNS = (
    Column("val accuracy", "val_accuracy", 12, lambda x: f"{x:.2%}", 0),
    Column("val loss", "val_loss", 8, lambda x: f"{x:.4f}", 4),
    Column("train loss", "train_loss", 10, lambda x: f"{x:.4f}", 3),
    Column("clients", "clients", 7, lambda x: f"{x:.0f}", 5),
    Column("time", "seconds_round", 7, seconds_text, 1),
    Column("virtual", "virtual_s", 7, seconds_text, 2),
    Column("epsilon", "epsilon", 7, lambda x: f"{x:.3g}", 1),
)

USUAL = tuple(column for column in COLUMNS if column.name not in ("virtual_s", "epsilon"))
"""Columns of a run that models no fleet and promises nothing."""


def columns_of(row: Row) -> tuple[Column, ...]:
    """Return all columns, the first for the metric by which the run is judged."""
    metric = metric_in(row)
    if metric.name == "accuracy":
        return COLUMNS
    title = f"val {metric.name.replace('_', ' ')}"
    own = Column(title, f"val_{metric.name}", max(12, len(title)), metric.text, 0)
    return own, *COLUMNS[1:]


def columns_for(row: Row, rounds: int, width: int) -> tuple[Column, ...]:
    """Return the columns that have a value in a round and fit into so many characters."""
    chosen = [column for column in columns_of(row) if row.get(column.name) is not None]
    while chosen and len(table_head(rounds, chosen)) > width:
        chosen.remove(max(chosen, key=lambda column: column.rank))
    return tuple(chosen)


def folded(text: str, width: int) -> str:
    """Return a text in lines of at most `width` characters, but for words that are longer.

    Lines end behind commas and colons where what stands between these is short enough.
    """
    width = max(width, 20)
    parts = re.split(r"(?<=[,;:]) ", text)
    if max(map(len, parts)) <= width - 2:
        text = " ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    lines = textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def _shown(row: Row, name: str, form: Callable[[float], str]) -> str:
    value = row.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]  # what has no number is shown as absent
    except (TypeError, ValueError):
        return "-"
    return form(number) if math.isfinite(number) else str(number)


def _round_text(row: Row, rounds: int) -> str:
    return f"{_shown(row, 'round', lambda x: f'{x:.0f}')}/{rounds}"


def table_head(rounds: int, columns: Sequence[Column] = USUAL) -> str:
    """Return the line above the lines of `table_row`."""
    first = "round".rjust(max(2 * len(str(rounds)) + 1, 5))
    return "  ".join([first, *(column.title.rjust(column.width) for column in columns)])


def table_row(row: Row, rounds: int, columns: Sequence[Column] = USUAL) -> str:
    """Return a round as a line of a table; what is absent is a dash."""
    first, *rest = cells_of(row, rounds, columns)
    cells = (cell.rjust(column.width) for cell, column in zip(rest, columns, strict=True))
    return "  ".join([first.rjust(max(2 * len(str(rounds)) + 1, 5)), *cells])


def cells_of(row: Row, rounds: int, columns: Sequence[Column]) -> list[str]:
    """Return a round's number and its values as texts; what is absent is a dash."""
    return [_round_text(row, rounds), *(_shown(row, c.name, c.form) for c in columns)]


def round_line(row: Row, rounds: int, eta: float | None) -> str:
    """Return a round as a line that is understood alone; what is absent is left out.

    >>> round_line({"round": 3, "val_accuracy": 0.96, "clients": 8}, 10, 12.0)
    'round  3/10  val accuracy 96.00%  clients 8  ETA 0:12'
    """
    parts = [f"round {_round_text(row, rounds).rjust(2 * len(str(rounds)) + 1)}"]
    for column in columns_of(row):
        if row.get(column.name) is not None:
            parts.append(f"{column.title} {_shown(row, column.name, column.form)}")
    return "  ".join([*parts, f"ETA {clock_text(eta)}"])


def within_text(clients: int, asked: int, batches: int, expected: int) -> str:
    """Return how far a round is; mini-batches that nobody here sees are left out.

    >>> within_text(3, 8, 120, 400)
    '3 of 8 clients done, 120 of 400 batches'
    """
    told = f"{clients} of {asked} clients done"
    return f"{told}, {min(batches, expected)} of {expected} batches" if batches else told


def summary_lines(summary: Row) -> list[str]:
    """Return the closing lines: how good, how long, and where the results are."""
    parts, metric = [], metric_in(summary)
    title = metric.name.replace("_", " ")
    if metric.name in summary:
        parts.append(f"test {title} {_shown(summary, metric.name, metric.text)}")
    if f"val_{metric.name}" in summary:
        parts.append(f"val {title} {_shown(summary, f'val_{metric.name}', metric.text)}")
    if "loss" in summary:
        parts.append(f"test loss {_shown(summary, 'loss', lambda x: f'{x:.4f}')}")
    end = []
    if "rounds" in summary:
        number = _shown(summary, "rounds", lambda x: f"{x:.0f}")
        end.append(f"{number} round{'' if number == '1' else 's'}")
    if "seconds" in summary:
        end.append(f"in {_shown(summary, 'seconds', seconds_text)}")
    lines = [", ".join([*parts, *([" ".join(end)] if end else [])])]
    if "model_sha256" in summary:
        lines.append(f"model   sha256 {summary['model_sha256']}")
    if "run_dir" in summary:
        lines.append(f"results {summary['run_dir']}")
    return [line for line in lines if line]


def narrowed(lines: Sequence[str], width: int | None) -> list[str]:
    """Return closing lines that fit a terminal; a path stays whole, so that it can be copied.

    Args:
        lines: Those of `summary_lines`.
        width: Columns of the terminal; None where it is none, and lines may be of any length.
    """
    if width is None:
        return list(lines)
    fitting = []
    for line in lines:
        if line.startswith("model ") and len(line) > width:
            fitting.append(f"{line[: max(width, 24) - 1]}…")  # whole in run.json
        else:
            fitting.append(line if line.startswith("results ") else folded(line, width))
    return fitting


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Return a table; columns that are empty throughout are left out.

    Args:
        head: Titles.
        rows: As many cells each.
        right: Titles of those columns that stand at the right, as numbers do.

    >>> print(aligned(["a", "b", "n"], [["x", "", "1"], ["yy", "", "10"]], ["n"]))
    a    n
    x    1
    yy  10
    """
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    sides = [str.rjust if head[i] in right else str.ljust for i in kept]
    return "\n".join(
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def width_of(stream: TextIO | None) -> int | None:
    """Return the columns of a terminal; None for everything else."""
    try:
        return None if stream is None else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return None


def fitted(text: str, stream: TextIO | None) -> str:
    """Return a text that is folded if it goes to a terminal."""
    width = width_of(stream)
    return text if width is None else folded(text, width)
