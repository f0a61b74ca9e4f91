"""Progress of a server app in another process, shown where the run was asked for.

The server app of a deployment runs beside the SuperLink, which passes on what it prints. There,
`Relay` prints each call of its methods as one line; here, `Replay` makes the same calls on a real
display. So a deployment looks like every other run, and its result and its error arrive as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from fedsys import errors
from fedsys.errors import FedsysError, RuntimeFailure
from fedsys.runs import startup as stages
from fedsys.runs.progress import Progress, Row

PREFIX = "fedsys> "
"""Begins each line of a relay, among all that Flower logs."""

WITHIN_S = 5.0
"""Seconds from one line about a round that goes on to the next: Flower keeps all of them."""


class Relay:
    """A display that prints what it is asked to show, one JSON object per line.

    Args:
        stream: Where to; by default standard output, which Flower records.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._due = 0.0

    def start(self, rounds: int, label: str = "train", done: int = 0) -> None:
        """Pass on that rounds begin."""
        self._say("start", rounds=rounds, label=label, done=done)

    def about(self, text: str) -> None:
        """Pass on a line about the run."""
        self._say("about", text=text)

    def within(self, text: str) -> None:
        """Pass on how far a round is, not more often than every `WITHIN_S`."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + WITHIN_S
            self._say("within", text=text)

    def round_done(self, row: Row) -> None:
        """Pass on a round."""
        self._say("round_done", row=dict(row))

    def phase(self, text: str) -> None:
        """Pass on what happens right now."""
        self._say("phase", text=text)

    def note(self, text: str) -> None:
        """Pass on a line that stays."""
        self._say("note", text=text)

    def finish(self, summary: Row) -> None:
        """Pass on the result."""
        self._say("finish", summary=dict(summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, FedsysError):
            self._say("error", kind=type(error).__name__, message=str(error))

    def _say(self, call: str, **arguments: object) -> None:
        # One write per line: what Flower logs in the meantime does not come between.
        line = PREFIX + json.dumps({"call": call, **arguments}) + "\n"
        stream = self._stream or sys.stdout  # looked up now: Flower replaces it when it records
        stream.write(line)
        stream.flush()


class Replay:
    """Makes the calls that a `Relay` printed.

    Args:
        progress: The display.

    Attributes:
        result: What the run ended with, once it has.
        error: What made it fail, if it said so.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._rest = ""
        self.result: Mapping[str, Any] | None = None
        self.error: FedsysError | None = None

    def feed(self, text: str) -> None:
        """Take a piece of what the server app's process printed, cut anywhere."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            start = line.find(PREFIX)
            if start >= 0:
                self._call(line[start + len(PREFIX) :])

    def _call(self, text: str) -> None:
        try:
            arguments = json.loads(text)
            call = arguments.pop("call")
        except (ValueError, AttributeError, KeyError):
            return  # not from a relay: somebody else's line that begins alike
        if call == "finish":
            self.result = arguments["summary"]
        elif call == "error":
            self.error = error_of(str(arguments["kind"]), str(arguments["message"]))
        elif call in ("start", "about", "within", "round_done", "phase", "note"):
            _note_time(call)
            getattr(self._progress, call)(**arguments)


def _note_time(call: str) -> None:
    """Keep the time of the command that follows a run, as the server app does for its process."""
    clock = stages.current()
    if call == "start":
        clock.reached("server app, nodes, data and model")
        clock.rounds_begin()
    elif call == "round_done":
        clock.round_ended()


def error_of(kind: str, message: str) -> FedsysError:
    """Return an error of the tree by the name of its class; RuntimeFailure for other names."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FedsysError):
        return found(message)
    return RuntimeFailure(message)
