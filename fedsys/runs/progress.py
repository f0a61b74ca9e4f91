"""What a person sees while a run goes on: one line per round, an ETA, and where the results are.

Everything goes to standard error, so that standard output stays free for results; only the
closing summary may go there. A terminal gets a bar that moves, below one line for each round; a
file or a pipe gets plain lines without control codes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from fedsys.runs import callbacks, opening
from fedsys.runs.lines import (
    Column,
    Row,
    clock_text,
    columns_for,
    eta_seconds,
    folded,
    narrowed,
    round_line,
    seconds_text,
    summary_lines,
    table_head,
    table_row,
    width_of,
)
from fedsys.runs.notebook import NotebookProgress, is_notebook
from fedsys.runs.pace import Clock, RoundPace

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import ProgressColumn, Task

__all__ = [
    "LineProgress",
    "Progress",
    "RichProgress",
    "Row",
    "Silent",
    "choose",
    "clock_text",
    "eta_seconds",
    "round_line",
    "seconds_text",
    "summary_lines",
    "table_head",
    "table_row",
]

LONG_S = 10.0
"""Seconds after which a round is so long that one wants to know how far it is."""

AGAIN_S = 30.0
"""Seconds from one line about a round that goes on to the next, where lines stay."""


class Progress(Protocol):
    """Shows how far a run is. A context manager: leaving it restores the terminal."""

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Say that rounds begin.

        Args:
            rounds: Number of rounds in all.
            label: What is going on, in a word or two.
            done: Rounds that an earlier run has done already.
        """

    def about(self, text: str) -> None:
        """Show a line about the run itself that stays, for instance its plan."""

    def within(self, text: str) -> None:
        """Say how far the round is that goes on; called often, and shown where a round is long."""

    def round_done(self, row: Row) -> None:
        """Show a round.

        Args:
            row: Values by column of ``metrics.csv``, of which any may be NaN or absent.
        """

    def phase(self, text: str) -> None:
        """Say what happens right now."""

    def note(self, text: str) -> None:
        """Show a line that stays, for instance about a lost client."""

    def finish(self, summary: Row) -> None:
        """Show how the run ended.

        Args:
            summary: Any of ``accuracy``, ``val_accuracy``, ``loss`` (of the test part),
                ``rounds``, ``seconds``, ``model_sha256`` and ``run_dir``.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None: ...


def choose(json: bool, stream: TextIO | None = None, out: TextIO | None = None) -> Progress:
    """Return the display that fits the place where it is shown, which tells callbacks, too.

    Args:
        json: Whether standard output is kept for one JSON object; then the summary goes to
            `stream` as well.
        stream: Where progress goes; standard error by default.
        out: Where the summary goes without `json`; standard output by default.
    """
    display = _display(json, stream, out)
    listeners = callbacks.present()
    return display if listeners is None else callbacks.TellingDisplay(display, listeners)


def _display(json: bool, stream: TextIO | None, out: TextIO | None) -> Progress:
    if stream is None and is_notebook():
        return NotebookProgress()
    stream = sys.stderr if stream is None else stream
    out = sys.stdout if out is None else out
    if stream is None:  # a process without standard streams, such as a service
        return Silent()
    summary = stream if json or out is None else out
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return RichProgress(stream, summary)
    return LineProgress(stream, summary)


# --------------------------------------------------------------------------------------------------
# Displays


class Silent:
    """Shows nothing."""

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Do nothing."""

    def about(self, text: str) -> None:
        """Do nothing."""

    def within(self, text: str) -> None:
        """Do nothing."""

    def round_done(self, row: Row) -> None:
        """Do nothing."""

    def phase(self, text: str) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self, summary: Row) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        pass


class LineProgress:
    """Writes plain lines, one per round: for files, pipes and simple terminals.

    Args:
        stream: Where progress goes.
        summary: Where the summary goes; `stream` by default.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, stream: TextIO, summary: TextIO | None = None, clock: Clock = time.monotonic
    ) -> None:
        self._stream, self._summary = stream, summary or stream
        self._pace = RoundPace(clock)
        self._phase = ""
        self._due = LONG_S

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Write what begins, and how much of it there is."""
        self._pace.start(rounds, done)
        after = f", continued after round {done}" if done else ""
        self.note(f"{label}: {rounds} round{'' if rounds == 1 else 's'}{after}")

    def about(self, text: str) -> None:
        """Write a line."""
        self.note(text)

    def within(self, text: str) -> None:
        """Write a line after `LONG_S`, and then every `AGAIN_S`."""
        since = self._pace.since()
        if since >= self._due:
            self._due = since + AGAIN_S
            number = f"round {self._pace.done + 1}/{self._pace.rounds}"
            self.note(f"{number} for {seconds_text(since)}: {text}")

    def round_done(self, row: Row) -> None:
        """Write the line of a round with an ETA."""
        self._pace.step()
        self._due = LONG_S
        self.note(round_line(row, self._pace.rounds, self._pace.eta()))

    def phase(self, text: str) -> None:
        """Write what happens before and after the rounds; during them the rounds are enough."""
        if not 0 <= self._pace.done < self._pace.rounds and text != self._phase:
            self._phase = text
            self.note(text)

    def note(self, text: str) -> None:
        """Write a line."""
        print(text, file=self._stream, flush=True)

    def finish(self, summary: Row) -> None:
        """Write the summary."""
        for line in summary_lines(summary):
            print(line, file=self._summary, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        pass


class RichProgress:
    """Draws a bar with an ETA on a terminal, and above it a table that grows by round.

    The head of the table waits for the first round, which tells what columns there are, and is
    drawn again where these change.

    Args:
        stream: The terminal.
        summary: Where the summary goes; `stream` by default.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, stream: TextIO, summary: TextIO | None = None, clock: Clock = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bars
        from rich.progress import SpinnerColumn

        opening.clear()
        self._stream, self._summary = stream, summary or stream
        self._pace = RoundPace(clock)
        self._columns: tuple[Column, ...] | None = None
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._bars = Bars(
            SpinnerColumn(),
            _bar_column(self._pace, self._width),
            console=self._console,
            refresh_per_second=5,
            transient=True,
            # Where standard output is not this terminal, it must stay what it is.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._task = self._bars.add_task("", total=None, phase="", within="")

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Show what begins, and the bar."""
        self._pace.start(rounds, done)
        self._columns = None
        self._bars.update(self._task, description=label, total=rounds, completed=done, phase="")
        self._bars.start()
        after = f", continued after round {done}" if done else ""
        self.about(f"{label}: {rounds} round{'' if rounds == 1 else 's'}{after}")

    def about(self, text: str) -> None:
        """Write a line above the bar, folded where the terminal is narrow."""
        self._console.print(folded(text, self._width()), style="bold")

    def within(self, text: str) -> None:
        """Show how far a long round is beside the bar."""
        if self._pace.since() >= LONG_S:
            self._bars.update(self._task, within=text)

    def round_done(self, row: Row) -> None:
        """Add the line of a round and move the bar."""
        self._pace.step()
        columns = columns_for(row, self._pace.rounds, self._width())
        if columns != self._columns:
            self._columns = columns
            self._console.print(table_head(self._pace.rounds, columns), style="dim")
        self._console.print(table_row(row, self._pace.rounds, columns))
        self._bars.update(self._task, completed=self._pace.done, within="")

    def phase(self, text: str) -> None:
        """Show what happens beside the bar."""
        self._bars.update(self._task, phase=text)
        self._bars.start()

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._console.print(folded(text, self._width()), style="yellow")

    def finish(self, summary: Row) -> None:
        """Take the bar away and write the summary."""
        self._bars.stop()
        for line in narrowed(summary_lines(summary), width_of(self._summary)):
            print(line, file=self._summary, flush=True)

    def _width(self) -> int:
        """Return the width of the terminal now; rich alone would ask another stream for it."""
        if (width := width_of(self._stream)) is not None:
            self._console.width = width
        return self._console.width

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bars.stop()  # shows the cursor again, whatever ended the block


SPINNER = 2
"""Columns of what stands before the bar."""

BAR, NARROW_BAR = 24, 8
"""Columns of the bar, and on a terminal where it would leave no room for the words."""

SHORT = 20
"""Characters of a label that stands before the bar; a longer one stands above it alone."""


def _bar_column(pace: RoundPace, width: Callable[[], int]) -> ProgressColumn:
    """Return a column with label, bar, rounds, elapsed time, ETA, and what happens.

    The ETA is whole on every terminal that has room for it; label, bar and what happens give way.
    Rich's own estimate looks at the last thirty seconds only, in which a slow run ends no round.
    """
    from rich.console import Group
    from rich.progress import ProgressColumn
    from rich.progress_bar import ProgressBar
    from rich.table import Column as Cell
    from rich.table import Table
    from rich.text import Text

    class Bar(ProgressColumn):
        max_refresh = None

        def render(self, task: Task) -> RenderableType:
            times = clock_text(pace.elapsed())
            if task.total is not None:
                times = f"{pace.done}/{pace.rounds}  {times}  ETA {clock_text(pace.eta())}"
            room = width() - SPINNER - len(times)
            bar = next((n for n in (BAR, NARROW_BAR) if n + 12 <= room), 0)
            label = task.description if len(task.description) <= SHORT else ""
            room -= bar + 1
            label = label if len(label) + 1 <= room else ""
            room -= len(label) + 2
            happens = " ".join(t for t in (task.fields["within"], task.fields["phase"]) if t)
            parts: list[RenderableType] = [Text(label)] if label else []
            if bar:
                parts.append(
                    ProgressBar(
                        total=task.total, completed=task.completed, width=bar,
                        pulse=task.total is None, animation_time=task.get_time(),
                    )
                )  # fmt: skip
            parts.append(Text(times))
            if room > 3 and happens:
                parts.append(Text(_cut(happens, room), style="dim"))
            grid = Table.grid(*(Cell(no_wrap=True) for _ in parts), padding=(0, 1, 0, 0))
            grid.add_row(*parts)
            return Group(grid)

    return Bar(table_column=Cell(no_wrap=True))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"
