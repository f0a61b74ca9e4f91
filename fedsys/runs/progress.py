"""What a person sees while a run goes on: one line per round, an ETA, and where the results are.

Everything goes to standard error, so that standard output stays free for results; only the
closing summary may go there. A terminal gets a bar that moves, below one line for each round; a
file or a pipe gets plain lines without control codes.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task

Row = Mapping[str, Any]
Clock = Callable[[], float]


class Progress(Protocol):
    """Shows how far a run is. A context manager: leaving it restores the terminal."""

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Say that rounds begin.

        Args:
            rounds: Number of rounds in all.
            label: What is going on, in a word or two.
            done: Rounds that an earlier run has done already.
        """

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
    """Return the display that fits the place where it is shown.

    Args:
        json: Whether standard output is kept for one JSON object; then the summary goes to
            `stream` as well.
        stream: Where progress goes; standard error by default.
        out: Where the summary goes without `json`; standard output by default.
    """
    stream = sys.stderr if stream is None else stream
    out = sys.stdout if out is None else out
    if stream is None:  # a process without standard streams, such as a service
        return Silent()
    summary = stream if json or out is None else out
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return RichProgress(stream, summary)
    return LineProgress(stream, summary)


# --------------------------------------------------------------------------------------------------
# Words: what is said, apart from where


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


_COLUMNS: tuple[tuple[str, str, int, Callable[[float], str]], ...] = (
    ("val accuracy", "val_accuracy", 12, lambda x: f"{x:.2%}"),
    ("val loss", "val_loss", 8, lambda x: f"{x:.4f}"),
    ("train loss", "train_loss", 10, lambda x: f"{x:.4f}"),
    ("clients", "clients", 7, lambda x: f"{x:.0f}"),
    ("time", "seconds_round", 7, seconds_text),
    ("virtual", "virtual_s", 7, seconds_text),
)

_OFTEN_ABSENT = frozenset({"virtual_s"})  # of runs on a fleet only: no dash for it


def _shown(row: Row, name: str, form: Callable[[float], str]) -> str:
    value = row.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]  # what has no number is shown as absent
    except (TypeError, ValueError):
        return "-"
    return form(number) if math.isfinite(number) else str(number)


def _round_text(row: Row, rounds: int) -> str:
    return f"{_shown(row, 'round', lambda x: f'{x:.0f}')}/{rounds}"


def table_head(rounds: int) -> str:
    """Return the line above the lines of `table_row`."""
    first = "round".rjust(max(2 * len(str(rounds)) + 1, 5))
    return "  ".join([first, *(title.rjust(width) for title, _, width, _ in _COLUMNS)])


def table_row(row: Row, rounds: int) -> str:
    """Return a round as a line of a table; what is absent is a dash, or nothing."""
    first = _round_text(row, rounds).rjust(max(2 * len(str(rounds)) + 1, 5))
    cells = (
        ("" if name in _OFTEN_ABSENT and name not in row else _shown(row, name, form)).rjust(width)
        for _, name, width, form in _COLUMNS
    )
    return "  ".join([first, *cells])


def round_line(row: Row, rounds: int, eta: float | None) -> str:
    """Return a round as a line that is understood alone; what is absent is left out.

    >>> round_line({"round": 3, "val_accuracy": 0.96, "clients": 8}, 10, 12.0)
    'round  3/10  val accuracy 96.00%  clients 8  ETA 0:12'
    """
    parts = [f"round {_round_text(row, rounds).rjust(2 * len(str(rounds)) + 1)}"]
    for title, name, _, form in _COLUMNS:
        if row.get(name) is not None:
            parts.append(f"{title} {_shown(row, name, form)}")
    return "  ".join([*parts, f"ETA {clock_text(eta)}"])


def summary_lines(summary: Row) -> list[str]:
    """Return the closing lines: how good, how long, and where the results are."""
    parts = []
    if "accuracy" in summary:
        parts.append(f"test accuracy {_shown(summary, 'accuracy', lambda x: f'{x:.2%}')}")
    if "val_accuracy" in summary:
        parts.append(f"val accuracy {_shown(summary, 'val_accuracy', lambda x: f'{x:.2%}')}")
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


class _Pace:
    """Counts rounds against a clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.rounds = self.done = self._before = 0
        self.begun = self._last = clock()

    def start(self, rounds: int, done: int) -> None:
        self.rounds, self.done, self._before = rounds, done, done
        self.begun = self._last = self._clock()

    def step(self) -> None:
        self.done += 1
        self._last = self._clock()

    def elapsed(self) -> float:
        return self._clock() - self.begun

    def eta(self) -> float | None:
        since = self._clock() - self._last
        here = self.done - self._before
        return eta_seconds(self.rounds - self._before, here, self._last - self.begun, since)


# --------------------------------------------------------------------------------------------------
# Displays


class Silent:
    """Shows nothing."""

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
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
        self._pace = _Pace(clock)
        self._phase = ""

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Write what begins, and how much of it there is."""
        self._pace.start(rounds, done)
        after = f", continued after round {done}" if done else ""
        self.note(f"{label}: {rounds} round{'' if rounds == 1 else 's'}{after}")

    def round_done(self, row: Row) -> None:
        """Write the line of a round with an ETA."""
        self._pace.step()
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

    Args:
        stream: The terminal.
        summary: Where the summary goes; `stream` by default.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, stream: TextIO, summary: TextIO | None = None, clock: Clock = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        self._summary = summary or stream
        self._pace = _Pace(clock)
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _pace_column(self._pace),
            TextColumn("{task.fields[phase]}", style="dim", markup=False),
            console=self._console,
            refresh_per_second=5,
            transient=True,
            # Where standard output is not this terminal, it must stay what it is.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._task = self._bars.add_task("", total=None, phase="")

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Show the bar and the head of the table."""
        self._pace.start(rounds, done)
        self._bars.update(self._task, description=label, total=rounds, completed=done, phase="")
        self._bars.start()
        self._console.print(table_head(rounds), style="dim")

    def round_done(self, row: Row) -> None:
        """Add the line of a round and move the bar."""
        self._pace.step()
        self._console.print(table_row(row, self._pace.rounds))
        self._bars.update(self._task, completed=self._pace.done)

    def phase(self, text: str) -> None:
        """Show what happens beside the bar."""
        self._bars.update(self._task, phase=text)
        self._bars.start()

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._console.print(text, style="yellow")

    def finish(self, summary: Row) -> None:
        """Take the bar away and write the summary."""
        self._bars.stop()
        for line in summary_lines(summary):
            print(line, file=self._summary, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bars.stop()  # shows the cursor again, whatever ended the block


def _pace_column(pace: _Pace) -> ProgressColumn:
    """Return a column with rounds, elapsed time and ETA.

    Rich's own estimate looks at the last thirty seconds only, in which a slow run ends no round.
    """
    from rich.progress import ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Pace(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = clock_text(pace.elapsed())
            if task.total is None:
                return Text(elapsed)
            return Text(f"{pace.done}/{pace.rounds}  {elapsed}  ETA {clock_text(pace.eta())}")

    return Pace(table_column=Column(no_wrap=True))
