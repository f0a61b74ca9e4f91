"""The edge server: holds the sessions of many devices; a process, or threads of the run.

Two kinds of peers connect. A **server app** controls: it opens sessions, collects their state at
the end of a round and releases them. A **device** presents the token of its session and then
speaks with it alone. Every link has a thread of its own, so sessions work side by side; what fails
on one link (a broken frame, a wrong token, an operation out of turn) ends that link with a reason,
is counted, and touches no other session.

Over TLS the controller is known by the name in its certificate; on loopback and in memory by a
token that was given to both sides when the edge was started.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedsys.errors import (
    FedsysError,
    FrameError,
    LinkClosed,
    LinkError,
    SecurityError,
    SessionError,
)
from fedsys.identity import arithmetic
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.emulation import Workers
from fedsys.offload.session import Session
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.dial import serve
from fedsys.transport.link import Link, Server
from fedsys.transport.security import Credentials, same_token
from fedsys.transport.wire import DEFAULT_LIMITS, Frame, Limits

CONTROLLER = "server"
"""Name in the certificate of a server app, unless the edge is told another."""

ORPHAN_S = 900.0
"""How long a session outlives the link of its controller, in seconds."""

_HELLO_S = 30.0  # for the first frame of a link

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EdgeLimits:
    """What an edge server takes upon itself.

    Attributes:
        sessions: Sessions at one time.
        session_bytes: Weights and optimizer state of all sessions together, in bytes.
        links: Links at one time.
        frames: Limits of a frame.
    """

    sessions: int = 256
    session_bytes: int = 16 << 30
    links: int = 1024
    frames: Limits = DEFAULT_LIMITS


class EdgeServer:
    """Serves sessions at an address until it is stopped.

    Args:
        name: Name of the edge in logs and assignments.
        address: ``tcp://host:port``, ``grpc://host:port`` or ``memory://name``.
        credentials: For mutual TLS; needed between processes unless the address is on loopback.
        control_token: What a controller without a certificate must present.
        controller: Name in the certificate of the server app.
        device: Where sessions compute.
        limits: What it takes upon itself.
        plain: Accept unprotected links from other hosts, for networks that are trusted.
        crash: What the fault ``edge_killed`` does to this server; None refuses sessions that come
            with faults.

    Attributes:
        counters: Events by name since the start: ``opened``, ``released``, ``steps`` …, and
            ``refused_*`` by reason.
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
        limits: EdgeLimits | None = None,
        plain: bool = False,
        crash: Callable[[EdgeServer], None] | None = None,
    ) -> None:
        self.name, self.counters = name, Counter[str]()
        strikes = None if crash is None else lambda: crash(self)
        self._faults = EdgeFaults(name, strikes, self._tell)
        self._stopped = False
        self._orphaned: dict[str, float] = {}  # by session: since when it has no controller
        self._control_token, self._controller = control_token, controller
        self._device = device or torch.device("cpu")
        self._workers = Workers(name)
        self._limits = limits or EdgeLimits()
        self._sessions: dict[str, Session] = {}
        self._devices: dict[str, Link] = {}  # the link of each session's device
        self._controllers: dict[str, Link] = {}  # by session: who opened it
        self._lock = threading.RLock()
        self._server: Server = serve(
            address,
            self._serve,
            credentials=credentials,
            limits=self._limits.frames,
            max_links=self._limits.links,
            plain=plain,
        )

    @property
    def address(self) -> str:
        """Address to dial, with the port that was chosen."""
        return self._server.address

    @property
    def sessions(self) -> list[str]:
        """Names of the sessions that are open."""
        with self._lock:
            return list(self._sessions)

    @property
    def session_bytes(self) -> int:
        """Weights and optimizer state of all sessions, in bytes."""
        with self._lock:
            return sum(session.nbytes() for session in self._sessions.values())

    def stop(self, grace_s: float = 5.0) -> list[tuple[SessionSpec, Snapshot]]:
        """Freeze every session at the end of its step, hand it to its controller, and stop.

        A session that does not get to the end of its step in time goes on elsewhere from what its
        controller has of it.

        Args:
            grace_s: How long to wait for steps that are begun.

        Returns:
            The sessions that no controller took.
        """
        deadline = time.monotonic() + grace_s
        with self._lock:
            held = list(self._sessions.values())
            self._stopped = True
        left = []
        for session in held:
            snapshot = _frozen(session, deadline)
            if snapshot is None:
                continue
            with self._lock:
                self._sessions.pop(session.spec.id, None)
            if not self._send("handover", session.spec, snapshot):
                left.append((session.spec, snapshot))
        self._server.stop(0.0)
        return left

    def adopt(self, spec: SessionSpec, start: Snapshot) -> None:
        """Hold a session whose controller is not there; it may come and claim it.

        Raises:
            SessionError: It is open already, or this server is full.
            FrameError: It does not fit its own specification.
        """
        self._hold(Session(spec, start, self._device, self._replicate, self._workers))
        with self._lock:
            self._orphaned[spec.id] = time.monotonic()

    def kill(self) -> None:
        """Drop every session and link without a word, as a crash would."""
        with self._lock:
            if self._stopped:  # by another session; waiting for each other helps nobody
                return
            self._stopped = True
            self._sessions.clear()
            self._controllers.clear()
        self._server.stop(0.0)

    # --- links ------------------------------------------------------------------------------------

    def _serve(self, link: Link) -> None:
        try:
            first = link.recv(_HELLO_S)
            if first.kind == "hello":
                self._serve_device(link, first)
            elif first.kind == "probe":
                self._say_whether_here(link, first)
            elif first.kind == "control":
                self._serve_controller(link, first)
            else:
                raise SessionError(f"{first.kind}: a link begins with hello, probe or control")
        except LinkClosed:
            pass
        except FedsysError as error:
            self._count(f"refused_{type(error).__name__}")
            _log.warning("%s refused %s: %s", self.name, link.peer or "a peer", error)
            raise

    def _count(self, event: str, by: int = 1) -> None:
        with self._lock:
            self.counters[event] += by

    # --- devices ----------------------------------------------------------------------------------

    def _serve_device(self, link: Link, hello: Frame) -> None:
        session = self._admit(link, hello)
        if session is None:
            link.send(Frame("unknown"))
            return
        if session.at_work():  # the device lost its link meanwhile; it is not to think us gone
            link.send(Frame("wait"))
        name = session.spec.id
        position = {"step": session.position(), "incarnation": session.incarnation}
        link.send(Frame("welcome", position))
        while True:
            frame = link.recv()
            self._count("bytes_in", frame.encoded_bytes)
            if frame.kind == "done":
                link.send(Frame("done", {"step": session.steps}))
                continue
            before = session.steps
            lost: LinkError | None = None
            self._faults.strike("before_compute", name, link, frame)
            try:
                for reply in session.handle(frame):
                    try:
                        if lost is None:
                            self._faults.strike("after_compute", name, link, frame)
                            link.send(reply)
                    except LinkError as error:  # the operation goes on; its reply is kept
                        lost = error
            except LinkClosed:  # it was frozen; the device finds it elsewhere
                link.close()
                raise
            self._count("steps", session.steps - before)
            if session.steps > before:
                self._faults.strike("after_step", name, link, frame)
            if lost is not None:
                raise lost

    def _say_whether_here(self, link: Link, probe: Frame) -> None:
        """Answer a device whose own link is silent; that link stays as it is."""
        session = self._known(link, probe)
        here = Frame("here", {"incarnation": session.incarnation}) if session else None
        link.send(here or Frame("unknown"))

    def _admit(self, link: Link, hello: Frame) -> Session | None:
        """Return the session that a device may speak with from now on; None if there is none."""
        session = self._known(link, hello)
        if session is None:
            return None
        name = session.spec.id
        with self._lock:
            former, self._devices[name] = self._devices.get(name), link
        if former is not None:
            former.close()  # a device that comes back has lost its link, and may not know it yet
        return session

    def _known(self, link: Link, frame: Frame) -> Session | None:
        """Return the session that a frame names, if its sender may speak with it; None for none.

        Raises:
            SecurityError: It may not.
        """
        name, token = str(frame.meta.get("session", "")), str(frame.meta.get("token", ""))
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            self._count("refused_unknown_session")
            return None
        if not same_token(token, session.spec.token):
            raise SecurityError(f"session {name}: the token is not that of this session")
        if session.spec.holder and link.peer != session.spec.holder:
            raise SecurityError(
                f"session {name}: belongs to {session.spec.holder}, not to {link.peer or '?'}"
            )
        return session

    # --- controllers ------------------------------------------------------------------------------

    def _serve_controller(self, link: Link, first: Frame) -> None:
        trusted = (bool(self._controller) and link.peer == self._controller) or (
            self._control_token
            and same_token(str(first.meta.get("token", "")), self._control_token)
        )
        if not trusted:
            raise SecurityError(f"{link.peer or 'a peer without certificate'} may not control")
        about = {"name": self.name, "arithmetic": arithmetic()}
        link.send(Frame("ready", {**about, "request": first.meta.get("request")}))
        try:
            self._obey(link)
        finally:
            self._orphan(link)

    def _obey(self, link: Link) -> None:
        while True:
            frame = link.recv()
            if frame.kind == "noted":
                self._faults.noted(frame)
                continue
            request = frame.meta.get("request")
            try:
                reply = self._control(link, frame)
            except FedsysError as error:
                self._count(f"refused_{type(error).__name__}")
                reply = Frame("refused", {"reason": f"{type(error).__name__}: {error}"})
            link.send(Frame(reply.kind, {**reply.meta, "request": request}, reply.tensors))

    def _control(self, link: Link, frame: Frame) -> Frame:
        if frame.kind == "open":
            return self._open(link, frame)
        if frame.kind == "ping":
            self._claim(link, frame)
            return Frame("pong", {"sessions": self.sessions, "counters": dict(self.counters)})
        name = str(frame.meta.get("session", ""))
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            raise SessionError(f"{frame.kind}: {self.name} has no session {name!r}")
        if frame.kind == "collect":
            snapshot = session.snapshot()
            return Frame("state", {"step": snapshot.step}, snapshot.tensors())
        if frame.kind == "release":
            self._release(name)
            return Frame("released")
        raise SessionError(f"{frame.kind}: not a request of a controller")

    def _claim(self, link: Link, frame: Frame) -> None:
        """Send to `link` what concerns the sessions that it names: their controller is back."""
        named = frame.meta.get("sessions")
        with self._lock:
            for name in named if isinstance(named, list) else ():
                if isinstance(name, str) and name in self._sessions:
                    self._controllers[name] = link
                    self._orphaned.pop(name, None)

    def _orphan(self, link: Link) -> None:
        """Remember since when the sessions of a controller are without one."""
        with self._lock:
            for name in [n for n, one in self._controllers.items() if one is link]:
                del self._controllers[name]
                self._orphaned[name] = time.monotonic()

    def _forget_orphans(self) -> None:
        """Release sessions whose controller went away and did not come back."""
        since = time.monotonic() - ORPHAN_S
        with self._lock:
            old = [name for name, moment in self._orphaned.items() if moment < since]
        for name in old:
            self._release(name)

    def _open(self, link: Link, frame: Frame) -> Frame:
        spec = SessionSpec.from_meta(_mapping(frame, "spec"))
        self._forget_orphans()
        with self._lock:  # before anything is built, and again when there is something to hold
            self._check_room(spec, 0)
        planned = self._faults.coming_with(frame)
        start = Snapshot.from_frame(frame)
        session = Session(spec, start, self._device, self._replicate, self._workers)
        with self._lock:
            self._hold(session)
            self._controllers[spec.id] = link
            self._faults.plan(spec.id, planned)
        self._count("opened")
        return Frame("opened")

    def _hold(self, session: Session) -> None:
        with self._lock:
            self._check_room(session.spec, session.nbytes())
            self._sessions[session.spec.id] = session

    def _check_room(self, spec: SessionSpec, nbytes: int) -> None:
        if self._stopped:
            raise SessionError(f"{self.name} has stopped")
        if spec.id in self._sessions:
            raise SessionError(f"session {spec.id} is open already")
        if len(self._sessions) >= self._limits.sessions:
            raise SessionError(f"{self.name} is full: {self._limits.sessions} sessions")
        held = self.session_bytes + nbytes
        if held > self._limits.session_bytes:
            raise SessionError(f"{self.name} is full: {held} bytes of {self._limits.session_bytes}")

    def _release(self, name: str) -> None:
        with self._lock:
            self._sessions.pop(name, None)
            self._controllers.pop(name, None)
            self._faults.forget(name)
            self._orphaned.pop(name, None)
            link = self._devices.pop(name, None)
        if link is not None:
            link.close()
        self._count("released")

    def _replicate(self, spec: SessionSpec, snapshot: Snapshot) -> None:
        self._send("replica", spec, snapshot)  # without one training goes on all the same

    def _send(self, kind: str, spec: SessionSpec, snapshot: Snapshot) -> bool:
        """Send a snapshot to the controller of its session; return whether that could be done."""
        meta = {"session": spec.id, "step": snapshot.step}
        return self._tell(spec.id, Frame(kind, meta, snapshot.tensors()))

    def _tell(self, session: str, frame: Frame) -> bool:
        """Send a frame to the controller of a session; return whether that could be done."""
        with self._lock:
            link = self._controllers.get(session)
        if link is None:
            return False
        try:
            link.send(frame)
        except LinkError as error:
            _log.warning("session %s: its %s was not sent: %s", session, frame.kind, error)
            return False
        return True


def _frozen(session: Session, deadline: float) -> Snapshot | None:
    """Freeze a session at the end of its step; return None if that does not come in time."""
    while True:
        try:
            return session.freeze()
        except SessionError as error:  # pieces of the step are on their way
            if time.monotonic() > deadline:
                _log.warning("%s", error)
                return None
        time.sleep(0.005)


def _mapping(frame: Frame, name: str) -> Mapping[str, Any]:
    value = frame.meta.get(name)
    if not isinstance(value, dict):
        raise FrameError(f"{frame.kind}: {name} is missing")
    return value
