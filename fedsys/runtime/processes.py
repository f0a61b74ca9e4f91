"""Child processes that end with their parent, whatever ends it.

Each child leads a process group of its own: Ctrl-C in the terminal reaches only the parent, which
then stops its children in order, and a child takes its own children along. Should the parent be
killed, `fedsys.runtime.nursery` ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fedsys.errors import RuntimeFailure

STOP_S = 5.0
"""Seconds between asking a process to end and killing it."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends (Linux)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Processes:
    """Flower's programs by name; leaving the context stops all of them.

    Args:
        logs: Folder for what they print, a file for each.
        env: Their environment.
        private: Folders with secrets, which are removed when all has ended, whatever ends it.
        roles: Options of `fedsys.runtime.nursery`.
    """

    def __init__(
        self,
        logs: Path,
        env: Mapping[str, str],
        private: Sequence[Path] = (),
        roles: Sequence[str] = (),
    ) -> None:
        self._logs = logs
        self._pids: dict[str, int] = {}
        self._busy = False
        self._vital: set[str] = set()
        with (logs / "nursery.log").open("ab") as log:
            self._nursery = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedsys.runtime.nursery", *roles, *map(str, private)],
                env={**env, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Processes:
        try:
            self._busy = True
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._busy:  # somebody interrupted a request, which may take long: nobody waits
                self._kill()
            else:
                self.stop()
        finally:
            assert self._nursery.stdin is not None and self._nursery.stdout is not None
            with contextlib.suppress(OSError):
                self._nursery.stdin.close()
            wait_or_kill(self._nursery, STOP_S)
            self._nursery.stdout.close()

    def _kill(self) -> None:
        """Kill everything at once; what was just forked ends with the process that forked it."""
        for group in self._pids.values():
            _signal_group(group, signal.SIGKILL)
        self._nursery.kill()

    def start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        vital: bool = True,
    ) -> None:
        """Start a program.

        Args:
            name: What it is called here; what it prints goes to ``<name>.log``, behind what is
                there.
            command: As for `fedsys.runtime.forks.fork`.
            env: Variables to set in its environment.
            vital: Whether its end is a failure.
        """
        request = {
            "start": list(command),
            "log": str(self._logs / f"{name}.log"),
            "env": dict(env or {}),
        }
        self._pids[name] = self._ask(request)["pid"]
        (self._vital.add if vital else self._vital.discard)(name)

    def preload(self) -> None:
        """Import what apps need into the process that is forked for those started from now on."""
        self._ask({"preload": True})

    def pid(self, name: str) -> int:
        """Return the process id of a program, which is that of its group, too."""
        return self._pids[name]

    def status(self, name: str) -> int | None:
        """Return the exit status of a program; None while it runs."""
        return self._ended().get(self._pids[name])

    def ended(self) -> dict[str, int]:
        """Return the exit status of each program that has ended, by name."""
        ended = self._ended()
        return {name: ended[pid] for name, pid in self._pids.items() if pid in ended}

    def check(self, names: Sequence[str] | None = None) -> None:
        """Raise if a program has ended, by default one that is vital.

        Raises:
            RuntimeFailure: Names the program, and shows the end of what it said.
        """
        ended = self._ended()
        for name, pid in self._pids.items():
            if pid in ended and (name in self._vital if names is None else name in names):
                raise RuntimeFailure(
                    f"{name} ended with status {ended[pid]}: {self.last_words(name)}; "
                    f"see {self._logs / name}.log"
                )

    def last_words(self, name: str) -> str:
        """Return the last line that a program printed and that says something."""
        text = (self._logs / f"{name}.log").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if any(c.isalnum() for c in line)]
        return lines[-1] if lines else "it printed nothing"

    def stop(self, names: Sequence[str] | None = None, *, at_once: bool = False) -> None:
        """Stop programs, all by default, with whatever they started.

        Args:
            names: Which.
            at_once: Whether to kill them without asking first.
        """
        chosen = [name for name in self._pids if names is None or name in names]
        groups = [self._pids.pop(name) for name in reversed(chosen)]
        if not at_once:
            for group in groups:
                _signal_group(group, signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while set(groups) - self._ended().keys() and time.monotonic() < deadline:
                time.sleep(0.02)
        for group in groups:  # also where the leader has ended: others of its group may live
            _signal_group(group, signal.SIGKILL)
        while living := set(groups) - self._ended().keys():
            time.sleep(0.01)
            for group in living:
                _signal_group(group, signal.SIGKILL)

    def _ended(self) -> dict[int, int]:
        return {int(pid): status for pid, status in self._ask({"poll": True})["ended"].items()}

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._nursery.stdin is not None
        self._busy = True
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            self._nursery.stdin.write(json.dumps(request) + "\n")
            self._nursery.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._nursery.stdout is not None
        line = self._nursery.stdout.readline()
        if not line:
            raise RuntimeFailure(f"nursery ended: {self.last_words('nursery')}")
        self._busy = False
        answer: dict[str, Any] = json.loads(line)
        return answer


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def wait_or_kill(process: subprocess.Popen[Any], patience_s: float) -> None:
    """Wait for a process that is about to end; kill it if it has not done so in time."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which nobody listens right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def is_free(host: str, port: int) -> bool:
    """Return whether this machine can listen on a port."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that it can clean up.

    Does nothing outside the main thread, where no handler can be set.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
