"""Processes in which the sessions of one edge server compute, each with an interpreter of its own.

::

    edge server ──▶ nursery                 forks a worker when it is sent a socket for one
      │  │  └─────▶ worker 0                opens a session when it is sent a pipe for one
      │  └────────▶ worker 1
      └── pipes, one for each session       see `fedsys.offload.session_proxy`

The edge server keeps links, control, the table of sessions and all that moves them. The nursery
(`fedsys.runtime.edge_nursery`) has imported what sessions need and does nothing else, so that a
worker starts in milliseconds and never inherits the threads of a server that is at work. A worker
that was killed takes its sessions along, as an edge server that was killed would; the next session
gets a new one.

All of them end with the edge server, whatever ends it: they read that its sockets are closed, and a
worker is killed when the nursery ends. Ctrl-C and SIGTERM are for the edge server alone, which has
sessions to hand over first.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from fedsys.errors import LinkClosed, RuntimeFailure
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.processors import usable_cores
from fedsys.offload.session_proxy import SessionProxy
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.offload.worker_usage import WorkerUsage
from fedsys.runtime.processes import wait_or_kill
from fedsys.transport.frame_pipe import FramePipe

PID: Final = struct.Struct("<q")
"""What the nursery answers: the process id of a worker."""

_END_S: Final = 2.0  # for the nursery to end by itself
_FORK_S: Final = 120.0  # for the nursery to fork; the first time it imports torch before
_ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(eq=False)
class _Worker:
    """One process, as the edge server sees it."""

    pid: int
    control: socket.socket
    load: int = 0
    over: bool = False
    ending: threading.Lock = field(default_factory=threading.Lock)
    sessions: weakref.WeakSet[SessionProxy] = field(default_factory=weakref.WeakSet)


class EdgeWorkers:
    """The worker processes of one edge server. Methods may be called from any thread.

    Args:
        count: How many there are.
        name: Of the edge server.

    Raises:
        RuntimeFailure: They do not start.
    """

    def __init__(self, count: int, name: str) -> None:
        self._name, self._cores = name, -(-usable_cores() // count)
        self._lost: Callable[[Sequence[EdgeSession]], None] = lambda sessions: None
        self._lock = threading.RLock()
        self._closed = False
        self._nursery: subprocess.Popen[bytes] | None = None
        self._asked: socket.socket | None = None
        self._workers: list[_Worker] = []
        try:
            self._workers += [self._fork() for _ in range(count)]
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of those that live."""
        with self._lock:
            return [worker.pid for worker in self._workers if not worker.over]

    def on_lost(self, lost: Callable[[Sequence[EdgeSession]], None]) -> None:
        """Have `lost` called with the sessions of each worker that ends before it should."""
        self._lost = lost

    def open(
        self,
        spec: SessionSpec,
        start: Snapshot,
        replicate: Callable[[SessionSpec, Snapshot], None],
    ) -> EdgeSession:
        """Return a session in the process that has the fewest.

        Raises:
            FedsysError: It cannot be built, or its process has ended.
        """
        with self._lock:
            worker = self._least_loaded()
            worker.load += 1
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(worker.control, [b"s"], [theirs.fileno()])
        except OSError as error:
            ours.close()
            self._session_ended(worker)
            raise LinkClosed(f"session {spec.id}: its process has ended") from error
        gone = partial(self._session_ended, worker)
        broken = partial(self._end, worker)
        session = SessionProxy(FramePipe(ours), spec, start, replicate, gone, broken)
        with self._lock:
            worker.sessions.add(session)
            session.lost = worker.over
        return session

    def usage(self) -> WorkerUsage:
        """Return what the processes take that live."""
        return WorkerUsage.of(self.pids)

    def close(self) -> None:
        """End the processes at once; what is worth keeping was taken from the sessions before."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                _shut(worker.control)
            asked, nursery = self._asked, self._nursery
        if asked is not None:
            _shut(asked)
            asked.close()
        if nursery is not None:
            wait_or_kill(nursery, _END_S)

    def _session_ended(self, worker: _Worker) -> None:
        """Take note that a session of a worker is no more."""
        with self._lock:
            worker.load -= 1

    def _least_loaded(self) -> _Worker:
        for place, worker in enumerate(self._workers):
            if worker.over:
                self._workers[place] = self._fork()
        return min(self._workers, key=lambda worker: worker.load)

    def _fork(self) -> _Worker:
        if self._closed:
            raise LinkClosed(f"{self._name} has stopped")
        for _ in range(2):  # the nursery may have been killed, too
            asked = self._asked or self._start_nursery()
            ours, theirs = socket.socketpair()
            with contextlib.suppress(OSError), theirs:
                socket.send_fds(asked, [b"w"], [theirs.fileno()])
                told = asked.recv(PID.size)
                if len(told) == PID.size:
                    worker = _Worker(int(PID.unpack(told)[0]), ours)
                    threading.Thread(target=self._watch, args=(worker,), daemon=True).start()
                    return worker
            ours.close()
            asked.close()
            self._asked = None
        raise RuntimeFailure(f"the worker processes of {self._name} do not start")

    def _start_nursery(self) -> socket.socket:
        if self._nursery is not None:
            wait_or_kill(self._nursery, _END_S)
        asked, theirs = socket.socketpair()
        asked.settimeout(_FORK_S)  # the lock is held meanwhile: without a limit nobody could stop
        # What can be imported here can be imported there, models of the user's own among it
        path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
        place = str(theirs.fileno())
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedsys.runtime.edge_nursery", place, self._name,
                 str(self._cores)],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=2,  # what this process says there is read by others
                pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self._asked = asked
        return asked

    def _watch(self, worker: _Worker) -> None:
        """Wait for the end of a worker."""
        with contextlib.suppress(OSError):
            worker.control.recv(1)  # it says nothing
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        """End a worker if it has not, and its sessions; returns when all know of that."""
        with worker.ending:
            with self._lock:
                known, worker.over, closed = worker.over, True, self._closed
                sessions = list(worker.sessions)
                for session in sessions:  # also those that nobody holds yet: they are refused then
                    session.lost = True
            if known:
                return
            _shut(worker.control)
            worker.control.close()
            if not closed:
                self._lost(sessions)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
