"""Progress in a notebook: one output of the cell, a bar above a table, which grows in its place.

A kernel has no terminal: what a terminal draws would be many lines there, and lines on standard
error stand on red ground.
"""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from fedsys.runs.lines import (
    Column,
    Row,
    cells_of,
    clock_text,
    columns_for,
    summary_lines,
    table_head,
    table_row,
)
from fedsys.runs.pace import Clock, RoundPace

WIDE = 200
"""Characters of a line, of which a notebook has as many as it likes."""

NEWEST = 50
"""Rounds that the table shows: all of it is sent anew with each."""

OFTEN_S = 0.5
"""Seconds from one drawing to the next while a round goes on."""

Bundle = dict[str, str]
"""What a front end may choose from, by media type."""

Show = Callable[[Bundle], None]


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, not IPython in a terminal."""
    library = sys.modules.get("IPython")
    shell = None if library is None else library.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _output() -> Show:
    """Return what shows a bundle in the cell that runs now, in the place of the one before."""
    display: Any = importlib.import_module("IPython.display").display
    handle: Any = None

    def show(bundle: Bundle) -> None:
        nonlocal handle
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    return show


class NotebookProgress:
    """Draws a run as HTML, and as text for front ends that show none.

    Args:
        show: Shows a bundle in the place of the one before; by default in the present cell.
        clock: Monotonic time in seconds.
    """

    def __init__(self, show: Show | None = None, clock: Clock = time.monotonic) -> None:
        self._show, self._pace = show or _output(), RoundPace(clock)
        self._label, self._now = "", ""
        self._columns: Sequence[Column] = ()
        self._rows: list[Row] = []
        self._above: list[str] = []
        self._below: list[str] = []
        self._ended, self._due = False, 0.0

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Show what begins, and the bar."""
        self._pace.start(rounds, done)
        self._due = 0.0
        after = f", continued after round {done}" if done else ""
        self._label = f"{label}: {rounds} round{'' if rounds == 1 else 's'}{after}"
        self._columns, self._rows, self._now = (), [], ""
        self._draw()

    def about(self, text: str) -> None:
        """Add a line above the table."""
        self._above.append(text)
        self._draw()

    def within(self, text: str) -> None:
        """Show how far the round is beside the bar, not more often than every `OFTEN_S`."""
        self._now = text
        if (since := self._pace.elapsed()) >= self._due:
            self._due = since + OFTEN_S
            self._draw()

    def round_done(self, row: Row) -> None:
        """Add a round and move the bar."""
        self._pace.step()
        self._now, self._due = "", 0.0
        self._columns = columns_for(row, self._pace.rounds, WIDE)
        self._rows = [*self._rows, dict(row)][-NEWEST:]
        self._draw()

    def phase(self, text: str) -> None:
        """Show what happens beside the bar."""
        self._now = text
        self._draw()

    def note(self, text: str) -> None:
        """Add a line below the table."""
        self._below.append(text)
        self._draw()

    def finish(self, summary: Row) -> None:
        """Take the bar away and add the summary."""
        self._below += summary_lines(summary)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._ended, self._now = True, ""
        self._draw()

    def _draw(self) -> None:
        self._show({"text/plain": self._text(), "text/html": self._html()})

    def _times(self) -> str:
        pace = self._pace
        eta = (
            f"{pace.done}/{pace.rounds}  {clock_text(pace.elapsed())}  ETA {clock_text(pace.eta())}"
        )
        return "  ".join(part for part in (eta if pace.rounds else "", self._now) if part)

    def _text(self) -> str:
        rounds = self._pace.rounds
        lines = [*self._above, self._label]
        if self._rows:
            lines.append(table_head(rounds, self._columns))
        lines += [table_row(row, rounds, self._columns) for row in self._rows]
        lines += self._below if self._ended else [*self._below, self._times()]
        return "\n".join(line for line in lines if line)

    def _html(self) -> str:
        rounds, pace = self._pace.rounds, self._pace
        parts = [_lines(self._above), _lines([self._label])]
        if not self._ended:
            bar = f'<progress max="{rounds}" value="{pace.done}"></progress> ' if rounds else ""
            parts.append(f"<div>{bar}{html.escape(self._times())}</div>")
        if self._rows:
            head = ["round", *(column.title for column in self._columns)]
            body = [cells_of(row, rounds, self._columns) for row in self._rows]
            rows = _row("th", head) + "".join(_row("td", cells) for cells in body)
            parts.append(f"<table>{rows}</table>")
        return "".join([*parts, _lines(self._below)])


def _lines(texts: Sequence[str]) -> str:
    return "".join(f"<div>{html.escape(text)}</div>" for text in texts if text)


def _row(tag: str, cells: Sequence[str]) -> str:
    style = ' style="text-align:right"'
    return "<tr>" + "".join(f"<{tag}{style}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"
