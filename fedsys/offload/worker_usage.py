"""What the worker processes of an edge server take of the machine, as Linux tells it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkerUsage:
    """Processes of one edge server, added up.

    Attributes:
        processes: How many there are.
        cpu_s: Processor time, in seconds.
        resident_bytes: Memory, that which they share counted for each.
    """

    processes: int
    cpu_s: float
    resident_bytes: int

    @classmethod
    def of(cls, pids: Iterable[int]) -> WorkerUsage:
        """Return what processes take; zeros of those that have ended, and where nobody tells."""
        listed, ticks, pages = list(pids), 0, 0
        for pid in listed:
            with contextlib.suppress(OSError, ValueError, IndexError):
                # Behind the name, which may have spaces: utime and stime 14 and 15, rss 24
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
                pages += int(fields[21])
        size, rate = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        return cls(len(listed), ticks / rate, pages * size)
