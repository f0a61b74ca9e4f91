"""How long a command takes until its first round begins and after its last one, and with what.

The clock starts with the process, so that what happens before the first line of fedsys counts, too:
Python, and the imports of the command line. It is one for the whole process, because a run passes
through code that is called by Flower and can be handed nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class Startup:
    """Seconds by name of what happened before the first round, and when the rounds were.

    Args:
        age_s: Seconds that have passed already.
    """

    def __init__(self, age_s: float = 0.0) -> None:
        self._began = self._last = time.monotonic() - age_s
        self._seconds: dict[str, float] = {}
        self._first: float | None = None
        self._round_end: float | None = None

    def reached(self, stage: str) -> None:
        """Book the time since the former stage under `stage`, which is over now."""
        now = time.monotonic()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def rounds_begin(self) -> None:
        """Note that the first round of this run begins."""
        self._first = time.monotonic()

    def round_ended(self) -> None:
        """Note that a round has ended."""
        self._round_end = time.monotonic()

    def figures(self) -> dict[str, Any]:
        """Return ``seconds_to_first_round``, ``seconds_after_last_round``, and the ``startup``.

        What has not happened is left out.
        """
        told: dict[str, Any] = {}
        if self._first is not None:
            told["seconds_to_first_round"] = self._first - self._began
        if self._round_end is not None:
            told["seconds_after_last_round"] = time.monotonic() - self._round_end
        return told | {"startup": dict(self._seconds)}


def age_of_process() -> float:
    """Return the seconds since this process was started."""
    try:  # to a hundredth of a second; what psutil knows depends on when the machine was booted
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # not Linux
        import psutil

        return time.time() - psutil.Process().create_time()


_current: Startup | None = None


def begin() -> Startup:
    """Start the clock of a run; that of the first run of a process started with the process."""
    global _current
    _current = Startup(0.0 if _current else age_of_process())
    return _current


def current() -> Startup:
    """Return the clock of the run that goes on in this process."""
    return _current or begin()
