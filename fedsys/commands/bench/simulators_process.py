"""Simulators as processes that do a round when they are asked: their time and their memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from fedsys.commands.bench.sampling import sampled
from fedsys.errors import RuntimeFailure
from fedsys.runtime.processes import wait_or_kill

LOOK_S = 0.03
"""Seconds between two looks at the memory."""

END_S = 30.0
"""Seconds that a simulator has to end when its rounds are over."""


class Simulator:
    """One simulator, of one process or several that take part in each round.

    Args:
        name: Said in errors.
        calls: Command and further variables of each process.
        log: File that gets what they print.
        longest_s: Seconds that it has to start, or for a round.
    """

    def __init__(
        self,
        name: str,
        calls: Sequence[tuple[Sequence[str], Mapping[str, str]]],
        log: Path,
        longest_s: float,
    ) -> None:
        self.name, self._log, self._longest_s = name, log, longest_s
        with log.open("wb") as out:
            self._processes = [_started(command, more, out) for command, more in calls]

    def ready(self) -> Mapping[str, Any]:
        """Wait until it could begin, and return what it told.

        Raises:
            RuntimeFailure: It has ended, or is not ready in time.
        """
        return self._answers()[0]

    def round(self) -> Mapping[str, Any]:
        """Have it do a round; return what it told of it, with ``seconds`` and ``cpu_s``.

        Raises:
            RuntimeFailure: It has ended, or takes too long.
        """
        before, began = self._cpu_s(), time.perf_counter()
        for process in self._processes:
            with contextlib.suppress(OSError):  # it has ended: that is said by what it answers
                _pipe(process.stdin).write(b"\n")
                _pipe(process.stdin).flush()
        told = self._answers()[0]
        seconds = time.perf_counter() - began
        return {**told, "seconds": seconds, "cpu_s": self._cpu_s() - before}

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[float]]:
        """Look at its memory in the block; the list holds the largest seen, in bytes, after it."""
        peak = [0.0]
        with sampled(lambda: own_memory(self._family()), LOOK_S) as seen:
            yield peak
        family = self._family()
        peak[0] = max([*seen, own_memory(family)]) + file_memory(family)

    def close(self) -> None:
        """Let it end by itself if its rounds are over, and end it if it does not."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                _pipe(process.stdin).close()
        for process in self._processes:
            wait_or_kill(process, END_S)
            _pipe(process.stdout).close()

    def kill(self) -> None:
        """End it and all that it started."""
        for one in self._family():
            with contextlib.suppress(psutil.Error):
                one.kill()
        self.close()

    def _family(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                first = psutil.Process(process.pid)
                found += [first, *first.children(recursive=True)]
        return found

    def _cpu_s(self) -> float:
        total = 0.0
        for one in self._family():
            with contextlib.suppress(psutil.Error):
                total += sum(one.cpu_times()[:2])
        return total

    def _answers(self) -> list[Mapping[str, Any]]:
        deadline = time.monotonic() + self._longest_s
        return [self._answer(process, deadline) for process in self._processes]

    def _answer(self, process: subprocess.Popen[bytes], deadline: float) -> Mapping[str, Any]:
        out = _pipe(process.stdout)
        heard, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
        line = out.readline() if heard else b""
        if not line:
            how = "has ended" if heard else f"says nothing within {self._longest_s:g} s"
            said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeFailure(
                f"{self.name} {how}: {''.join(said) or 'no word'}; see {self._log}"
            )
        told: Mapping[str, Any] = json.loads(line)
        return told


def _started(
    command: Sequence[str], more: Mapping[str, str], out: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
    )  # fmt: skip


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # all of them are pipes
    return stream


# --------------------------------------------------------------------------------------------------
# Memory

_SHARED = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV")
"""Names of mappings that are memory of processes, not files."""


def own_memory(family: Sequence[psutil.Process]) -> float:
    """Return the bytes that processes hold beside mapped files; what they share counts once.

    The proportional size that Linux tells; where there is none, resident size, and then files are
    in it.
    """
    total = 0.0
    for process in family:
        rollup = _values(Path(f"/proc/{process.pid}/smaps_rollup"))
        if "Pss_Anon" in rollup:
            total += rollup["Pss_Anon"] + rollup["Pss_Shmem"]
        else:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def file_memory(family: Sequence[psutil.Process]) -> float:
    """Return the bytes of mapped files, such as libraries, each once, that processes hold.

    Proportional size would divide them by all processes of the machine that map them, and so
    depend on what else runs.
    """
    largest: dict[str, float] = {}
    for process in family:
        for path, size in _files(process.pid).items():
            largest[path] = max(largest.get(path, 0.0), size)
    return sum(largest.values())


def _values(path: Path) -> dict[str, float]:
    """Return the sizes in a file of /proc, in bytes by name; none where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {
        name: 1024.0 * int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if rest.endswith(" kB")
    }


def _files(pid: int) -> dict[str, float]:
    """Return the resident bytes of each file that a process maps, without pages it has changed."""
    if not psutil.LINUX:  # elsewhere it is not told what has been changed
        return {}
    with contextlib.suppress(psutil.Error, OSError):
        return {
            mapped.path: float(mapped.rss - mapped.anonymous)
            for mapped in psutil.Process(pid).memory_maps()
            if mapped.path.startswith("/") and not mapped.path.startswith(_SHARED)
        }
    return {}
