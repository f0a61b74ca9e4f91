"""The processors of this machine, which many sessions share in the order of their coming.

More threads at work than cores finish no earlier, and each of them holds the activations of its
mini-batch meanwhile. So a session waits for its turn with nothing but its input. The work is done
by as many threads as there are cores and by no others: the C library keeps the memory that a thread
has freed for that thread's next allocation, and OpenMP keeps helpers for each thread that it met.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return the cores' worth of processor time that control groups leave this process.

    A group that may run for 2 ms of 20 has 0.1 of a core, whatever the number of cores. The least
    of the groups from its own up to the root counts, by version 1 and 2 of Linux's control groups.

    Args:
        root: Where the file system begins.

    Returns:
        Cores; None where nothing limits them, or nothing can be read.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup"
        if controllers:  # version 1: a hierarchy for each controller, or for some together
            top = next((top / name for name in (controllers, "cpu") if (top / name).is_dir()), top)
        # in a container the path may be that of outside: then what is mounted is its own group
        group = top / path.lstrip("/")
        while not group.is_dir() and group != top:
            group = group.parent
        around = (group, *group.parents)
        found += [_quota_of(each) for each in around if top in (each, *each.parents)]
    least = min(found, default=math.inf)
    return least if math.isfinite(least) else None


def _quota_of(group: Path) -> float:
    """Return the quota of a control group alone in cores; infinite for none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text()
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


class Processors:
    """A number of cores, each taken by one thread at a time.

    Args:
        cores: How many there are; None for those that this process may use.
    """

    def __init__(self, cores: int | None = None) -> None:
        self._cores = self._free = cores or usable_cores()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self._cores, thread_name_prefix="computes")

    def do(self, work: Callable[[], T], threads: int) -> T:
        """Return what `work` returns, once it was its turn.

        Args:
            work: Done in a thread of the pool. It must not call `do`.
            threads: Cores that it uses at once; more than there are count as all of them.
        """
        wanted = min(threads, self._cores)
        with self._lock:
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append((wanted, turn))
            self._hand_out()
        turn.acquire()
        try:
            return self._pool.submit(work).result()
        finally:
            with self._lock:
                self._free += wanted
                self._hand_out()

    def _hand_out(self) -> None:
        """Let those go on who have waited longest, as far as the free cores suffice."""
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            self._free -= wanted
            turn.release()
