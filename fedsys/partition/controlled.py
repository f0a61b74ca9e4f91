"""Conditions that are made, for experiments: others who compute, and others who hold memory.

A `Load` is a process of its own, on the processors of one host. It computes until it has had its
share of processor time, looking every 20 ms: what it misses while others compute, it makes up for.
The memory that it holds is written over and over, a megabyte in a period, so that it stays
resident. What it achieved is measured (`Load.achieved`): an experiment that asks for half of a
processor and gets less of it is one under other conditions. Against a busy machine, the hosts and
the loads of an experiment come first together (`come_first`), so that they are alike among each
other and other work waits.

McNamee et al. (CLOUD 2021) start stress-ng for CPU and memory and ``tc`` for the link, and look at
none of them afterwards. Links are slowed down by `fedsys.transport.shaping` here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import final

import psutil

from fedsys.errors import RuntimeFailure

_CODE = """
import json, os, select, sys, time
if len(sys.argv) > 1 and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, json.loads(sys.argv[1]))
PERIOD, LAG, PIECE = 0.02, 0.5, b"\\1" * (1 << 20)
share, held, at, since, used = 0.0, bytearray(), 0, 0.0, 0.0
while True:
    began = time.monotonic()
    if select.select([sys.stdin], [], [], 0)[0]:
        line = sys.stdin.readline()
        if not line:
            break
        share, count = json.loads(line)
        held = bytearray()
        held, at = bytearray(PIECE) * count, 0
        print(json.dumps("ready"), flush=True)
        since, used = time.monotonic(), time.process_time()
    if held:
        held[at : at + len(PIECE)] = PIECE
        at = (at + len(PIECE)) % len(held)
    due = used + share * (time.monotonic() + PERIOD - since)
    if due > time.process_time() + LAG:  # it makes up for half a second, and no more
        used -= due - time.process_time() - LAG
    while time.process_time() < due and time.monotonic() - began < PERIOD:
        pass
    time.sleep(max(0.0, began + PERIOD - time.monotonic()))
"""
_PIECE = 1 << 20
_END_S = 5.0
_READY_S = 60.0  # to write the memory
FIRST = -20


@dataclass(frozen=True)
class Achieved:
    """What a load took.

    Attributes:
        cpu: Share of one processor.
        memory_bytes: Resident, beyond what it had at its beginning.
    """

    cpu: float
    memory_bytes: int


@final
class Load:
    """Computes and holds memory beside a host, until it is closed.

    Args:
        cores: Processors that it may use; none: all.

    Raises:
        RuntimeFailure: Its process does not start.
    """

    def __init__(self, cores: Sequence[int] = ()) -> None:
        arguments = [json.dumps(list(cores))] if cores else []
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _CODE, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._seen = psutil.Process(self._process.pid)
        self.set(0.0, 0)
        self._base = self._seen.memory_info().rss

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def set(self, cpu: float, memory_bytes: int) -> None:
        """Compute for a share of one processor, and hold memory, from now on.

        Args:
            cpu: In [0, 1].
            memory_bytes: Rounded to whole MiB.

        Raises:
            RuntimeFailure: Its process has ended, or there is not so much memory.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(_READY_S, self._process.kill)
        timer.start()
        try:
            told = [cpu, round(memory_bytes / _PIECE)]
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            wanted = f"{cpu:.0%} of a processor and {memory_bytes / 1e6:.0f} MB"
            raise RuntimeFailure(f"a load of {wanted} ended: is there so much memory?")

    def achieved(self, seconds: float) -> Achieved:
        """Return what it takes, measured for some seconds from now."""
        before, began = sum(self._seen.cpu_times()[:2]), time.monotonic()
        time.sleep(seconds)
        used = sum(self._seen.cpu_times()[:2]) - before
        held = self._seen.memory_info().rss - self._base
        return Achieved(used / (time.monotonic() - began), max(0, held))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def come_first(pids: Iterable[int], priority: int = FIRST) -> bool:
    """Have processes computed before all others of the machine; return whether that is allowed.

    By their priority, which root alone may raise.

    Args:
        pids: Of the processes; their threads, and what they start, come along.
        priority: Theirs from now on, -20 … 19; for setting it back.
    """
    found = list(pids)
    try:
        for pid in found:
            for task in os.listdir(f"/proc/{pid}/task"):  # Linux: a priority is a thread's
                with suppress(ProcessLookupError):  # it ended
                    os.setpriority(os.PRIO_PROCESS, int(task), priority)
    except (AttributeError, OSError):
        return False
    return bool(found)


def within(wanted: float, got: float, tolerance: float) -> bool:
    """Return whether a condition is what was asked for, up to an absolute tolerance."""
    return abs(got - wanted) <= tolerance
