"""The edge server: holds the sessions of many devices; a process, or threads of the run.

Two kinds of peers connect. A **server app** controls: it opens sessions, collects their state at
the end of a round and releases them. A **device** presents the token of its session and then
speaks with it alone. Every link has a thread of its own, so sessions work side by side; what fails
on one link (a broken frame, a wrong token, an operation out of turn) ends that link with a reason,
is counted, and touches no other session.

Over TLS the controller is known by the name in its certificate; on loopback and in memory by a
token that was given to both sides when the edge was started. Until a link has shown what makes it
one of the two, it is that of a stranger (`fedsys.transport.strangers`).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from fedsys import config as configuration
from fedsys.config import EdgeConfig
from fedsys.errors import FedsysError, LinkClosed, SessionError
from fedsys.offload.edge_control import EdgeControl
from fedsys.offload.edge_devices import EdgeDevices
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.edge_models import check_models
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.emulation import Workers
from fedsys.offload.fencing import Epoch
from fedsys.offload.link_probes import LinkProbes
from fedsys.offload.moving import Moving
from fedsys.offload.peers import Peers
from fedsys.offload.replication import hand_over, send_state
from fedsys.offload.session import Session
from fedsys.offload.session_table import SessionTable
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.offload.worker_usage import WorkerUsage
from fedsys.transport.addresses import serve
from fedsys.transport.descriptors import affordable
from fedsys.transport.link import AcceptedLink, Server
from fedsys.transport.security import Credentials
from fedsys.transport.strangers import Census, Strangers
from fedsys.transport.wire import Limits

CONTROLLER = "server"
"""Name in the certificate of a server app, unless the edge is told another."""

LINKS = 1024
"""Links of controllers and devices at one time, as far as there are descriptors."""

STUCK_S = 60.0
"""How long a process in which sessions compute may keep an edge server that stops, in seconds."""

_STRANGERS = Strangers()
_DESCRIPTORS = {"tcp": 3, "grpc": 1, "memory": 0}  # of one link
_OTHERS = 192  # descriptors for /health and /metrics


_log = logging.getLogger(__name__)


class SessionProcesses(Protocol):
    """Processes in which the sessions of an edge server compute."""

    def on_lost(self, lost: Callable[[Sequence[EdgeSession]], None]) -> None:
        """Have `lost` called with the sessions of each process that ends before it should."""
        ...

    def open(
        self,
        spec: SessionSpec,
        start: Snapshot,
        replicate: Callable[[SessionSpec, Snapshot], None],
    ) -> EdgeSession:
        """Return a session in one of them.

        Raises:
            FedsysError: It cannot be built, or its process has ended.
        """
        ...

    def usage(self) -> WorkerUsage:
        """Return what they take."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class EdgeServer:
    """Serves sessions at an address until it is stopped.

    Args:
        name: Name of the edge in logs and assignments.
        address: ``tcp://host:port``, ``grpc://host:port`` or ``memory://name``.
        credentials: For mutual TLS; needed between processes unless the address is on loopback.
        control_token: What a controller without a certificate must present.
        controller: Name in the certificate of the server app.
        device: Where sessions compute.
        limits: What it takes upon itself: the ``max_`` values of ``edge``.
        plain: Accept unprotected links from other hosts, for networks that are trusted.
        models: Dotted prefixes of the constructors that a controller may name; None for any.
        crash: What the fault ``edge_killed`` does to this server; None refuses sessions that come
            with faults.
        workers: Processes in which sessions compute, which are this object's from here on; None:
            they compute in this one.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        credentials: Credentials | None = None,
        control_token: str = "",
        controller: str = CONTROLLER,
        device: torch.device | None = None,
        limits: EdgeConfig | None = None,
        plain: bool = False,
        models: Sequence[str] | None = None,
        crash: Callable[[EdgeServer], None] | None = None,
        workers: SessionProcesses | None = None,
    ) -> None:
        limits = limits or EdgeConfig()
        frames = Limits(frame_bytes=limits.max_frame_bytes, tensor_bytes=limits.max_frame_bytes)
        self.name, self._models = name, models
        self._device, self._workers = device or torch.device("cpu"), Workers(name)
        self._table = table = SessionTable(name, limits)
        self._processes = workers
        if workers is not None:
            workers.on_lost(self._lost)
        faults = EdgeFaults(name, None if crash is None else lambda: crash(self), table.tell)
        peers = Peers(name, credentials, frames, plain=plain)
        self._moving = moving = Moving(name, table, peers, faults, self._session)
        self._devices = EdgeDevices(table, faults, moving.moves, moving.copies)
        self._probes = LinkProbes()
        self._control = EdgeControl(
            name, table, faults, self._session, self._probes, moving,
            token=control_token, controller=controller,
        )  # fmt: skip
        pipes = 0 if workers is None else limits.max_sessions
        links, self._strangers = _places(address.partition("://")[0], limits.max_sessions, pipes)
        self._server: Server = serve(
            address,
            self._serve,
            credentials=credentials,
            limits=frames,
            max_links=links,
            strangers=self._strangers,
            plain=plain,
        )

    @property
    def address(self) -> str:
        """Address to dial, with the port that was chosen."""
        return self._server.address

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions that are open."""
        return self._table.names

    @property
    def session_bytes(self) -> int:
        """Weights and optimizer state of all sessions, in bytes."""
        return self._table.nbytes

    @property
    def counters(self) -> Counter[str]:
        """Events by name: ``opened``, ``released``, ``steps`` …, and ``refused_*`` by reason."""
        return self._table.counters

    def census(self) -> Census:
        """Return how many links there are, and how many may be."""
        return self._server.census()

    def workers_usage(self) -> WorkerUsage:
        """Return what the processes take in which sessions compute, if there are any."""
        return WorkerUsage(0, 0.0, 0) if self._processes is None else self._processes.usage()

    def stop(self, grace_s: float = 5.0) -> list[tuple[SessionSpec, Snapshot]]:
        """Freeze every session at the end of its step, hand it to its controller, and stop.

        A session that does not get to the end of its step in time goes on elsewhere from what its
        controller has of it.

        Args:
            grace_s: How long to wait for steps that are begun. A process in which sessions compute
                may take `STUCK_S` longer, to do an operation and to give its sessions.

        Returns:
            The sessions that no controller took.
        """
        self._moving.close()
        limit = threading.Timer(grace_s + STUCK_S, self._end_workers)
        limit.daemon = True
        limit.start()
        try:
            left = hand_over(self._table, self._table.stop(), grace_s)
        finally:
            limit.cancel()
        self._server.stop(0.0)
        self._end_workers()
        return left

    def adopt(self, spec: SessionSpec, start: Snapshot) -> None:
        """Hold a session whose controller is not there; it may come and claim it.

        Raises:
            SessionError: It is open already, or this server is full.
            FrameError: It does not fit its own specification.
        """
        with self._table.lock:
            self._table.hold(self._session(spec, start), None)
            self._moving.opened(spec, start, Epoch(1, 0, self.name))

    def kill(self) -> None:
        """Drop every session and link without a word, as a crash would."""
        self._moving.close()
        if self._table.kill():
            self._server.stop(0.0)
        self._end_workers()

    def _end_workers(self) -> None:
        if self._processes is not None:
            self._processes.close()

    def _session(self, spec: SessionSpec, start: Snapshot) -> EdgeSession:
        if self._models is not None:
            config = configuration.parse(spec.config)
            check_models(config.model, self._models)
            check_models([config.task.loss, config.task.metric], self._models, "task")
        if self._processes is not None:
            _check_divisible(spec)
            return self._processes.open(spec, start, self._replicate)
        return Session(spec, start, self._device, self._replicate, self._workers)

    def _lost(self, sessions: Sequence[EdgeSession]) -> None:
        """End sessions whose process is gone, as those of an edge server that is gone end.

        Their server apps lose their links, reach this edge server again, see what it still has, and
        open the others anew.
        """
        names, links = self._table.lose(sessions)
        _log.warning("%s lost a worker process, with %d sessions", self.name, len(names))
        self._table.count("workers_lost")
        for name in names:
            self._moving.forget(name)
        for link in links:
            link.close()

    def _replicate(self, spec: SessionSpec, snapshot: Snapshot) -> None:
        send_state(self._table, "replica", spec, snapshot)  # without one training goes on

    def _serve(self, link: AcceptedLink) -> None:
        try:
            first = link.recv(self._strangers.seconds)
            if first.kind == "hello":
                self._devices.serve(link, first)
            elif first.kind == "probe":
                self._devices.say_whether_here(link, first)
            elif first.kind == "measure":
                self._probes.serve(link, first)
            elif first.kind == "control":
                self._control.serve(link, first)
            elif first.kind == "peer":
                self._moving.moves.serve_peer(link, first)
            else:
                kinds = "hello, probe, measure, control or peer"
                raise SessionError(f"{first.kind}: a link begins with {kinds}")
        except LinkClosed:
            pass
        except FedsysError as error:
            self._table.count(f"refused_{type(error).__name__}")
            _log.warning("%s refused %s: %s", self.name, link.peer or "a peer", error)
            raise


def _check_divisible(spec: SessionSpec) -> None:
    """Refuse a session whose time is that of one machine.

    Raises:
        SessionError: It stands for a machine that all sessions share.
    """
    if configuration.parse(spec.config).fleet.emulate:
        raise SessionError(
            "fleet.emulate=true: the machine that an edge server stands for is one process's; "
            "start it with edge.workers=1"
        )


def _places(kind: str, sessions: int, pipes: int) -> tuple[int, Strangers]:
    """Return how many links there may be, and what those of strangers may cost.

    Where the system allows fewer descriptors, there are fewer of both.

    Args:
        kind: Of the links: ``tcp``, ``grpc`` or ``memory``.
        sessions: How many there may be; a device that comes back may have two links for a moment.
        pipes: Descriptors that they need beside.
    """
    wanted = max(LINKS, 2 * sessions) + _STRANGERS.places
    each = _DESCRIPTORS.get(kind, 0)
    found = affordable(wanted, each=each, kept=_OTHERS + pipes) if each else wanted
    places = min(_STRANGERS.places, max(1, found // 4))
    return found - places, replace(_STRANGERS, places=places)
