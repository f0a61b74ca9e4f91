"""Callbacks: objects of the process that asked for a run, which are told how it goes.

A callback has three methods. This one is whole, and stops nothing and changes nothing::

    class Best:
        def start(self, rounds, done):
            self.best = 0.0

        def round(self, row):
            self.best = max(self.best, row["val_accuracy"])

        def end(self, figures):
            print(self.best, "run failed" if figures is None else figures["model_sha256"])

    fedsys.train("rounds=3", callbacks=[Best()])

They stay in their process, also where the run does not: a deployment passes its rounds on. A
`tracker` (`fedsys.runs.tracking`) is told more, and lives where the server app does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from fedsys.errors import ConfigError

if TYPE_CHECKING:
    from fedsys.runs.lines import Row

METHODS = ("start", "round", "end")


class Callback(Protocol):
    """Is told how a run goes, in the thread that asked for it. What it raises ends the run."""

    def start(self, rounds: int, done: int) -> None:
        """Rounds are about to begin; called once.

        Args:
            rounds: How many the run has in all.
            done: Those that were done before it was continued.
        """

    def round(self, row: Row) -> None:
        """A round is done.

        Args:
            row: Its values by column of ``metrics.csv``. A round that is done again because a
                process was lost comes again.
        """

    def end(self, figures: Mapping[str, Any] | None) -> None:
        """The run has ended; called once for each `start`.

        Args:
            figures: What ``run.json`` says at its end; None if it failed or was interrupted.
        """


class Listeners:
    """The callbacks of a run, and which of them know that it has begun.

    Args:
        callbacks: In the order in which they are told.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self._begun: list[Callback] = []

    def start(self, rounds: int, done: int) -> None:
        """Tell those that do not know yet: a run that is submitted again begins again."""
        for callback in self._callbacks[len(self._begun) :]:
            self._begun.append(callback)
            callback.start(rounds, done)

    def round(self, row: Row) -> None:
        """Tell all of them, each with values of its own."""
        for callback in self._begun:
            callback.round(dict(row))

    def end(self, figures: Mapping[str, Any] | None) -> None:
        """Tell all that know of the begin, whatever one of them raises, the last one first."""
        with ExitStack() as ends:
            while self._begun:
                ends.callback(self._begun.pop(0).end, None if figures is None else dict(figures))


_listeners: ContextVar[Listeners | None] = ContextVar("listeners", default=None)


@contextmanager
def listening(callbacks: Sequence[Callback]) -> Iterator[Listeners]:
    """Have the displays that are chosen in the block tell callbacks, too.

    The block says how the run ended, by `Listeners.end`; if it does not, it has failed.

    Raises:
        ConfigError: One of them lacks a method.
    """
    for position, callback in enumerate(callbacks):
        missing = [m for m in METHODS if not callable(getattr(callback, m, None))]
        if missing or isinstance(callback, type):
            rule = "must be an object with the methods start, round and end"
            way_out = "it lacks " + ", ".join(missing) if missing else "make one of this class"
            raise ConfigError.of(f"callbacks[{position}]", repr(callback), rule, way_out)
    listeners = Listeners(tuple(callbacks))
    token = _listeners.set(listeners)
    try:
        yield listeners
    finally:
        _listeners.reset(token)
        listeners.end(None)


def present() -> Listeners | None:
    """Return who listens to the run that this block carries out; None if nobody does."""
    return _listeners.get()


class TellingDisplay:
    """A display whose begin and rounds are told to callbacks as well.

    Args:
        display: Any `fedsys.runs.progress.Progress`.
        listeners: Told after it.
    """

    def __init__(self, display: Any, listeners: Listeners) -> None:
        self._display, self._listeners = display, listeners

    def __getattr__(self, name: str) -> Any:
        return getattr(self._display, name)

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Show and tell that rounds begin."""
        self._display.start(rounds, label, done)
        self._listeners.start(rounds, done)

    def round_done(self, row: Row) -> None:
        """Show and tell a round."""
        self._display.round_done(row)
        self._listeners.round(row)

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._display.__exit__(kind, error, at)
