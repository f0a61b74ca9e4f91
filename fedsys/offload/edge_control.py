"""What an edge server does for server apps: it opens, collects and releases their sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedsys.errors import FedsysError, FrameError, LinkClosed, SecurityError, SessionError
from fedsys.identity import arithmetic
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import Epoch
from fedsys.offload.link_probes import LinkProbes
from fedsys.offload.moving import Moving
from fedsys.offload.session_table import SessionTable
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.security import same_token
from fedsys.transport.wire import Frame


@dataclass
class Build:
    """A session that is being built.

    Attributes:
        wanted: Whether it is to be held.
    """

    wanted: bool = True


class EdgeControl:
    """Serves links of controllers.

    Args:
        name: Of the edge server.
        table: The sessions.
        faults: What strikes them.
        make: Builds a session.
        probes: Of devices without a session.
        moving: What moves sessions between edge servers.
        token: What a controller without a certificate presents; empty: none may come.
        controller: Name in the certificate of others; empty: none may come.
    """

    def __init__(
        self,
        name: str,
        table: SessionTable,
        faults: EdgeFaults,
        make: Callable[[SessionSpec, Snapshot], EdgeSession],
        probes: LinkProbes,
        moving: Moving,
        *,
        token: str,
        controller: str,
    ) -> None:
        self._name, self._table, self._faults, self._make = name, table, faults, make
        self._probes, self._token, self._controller = probes, token, controller
        self._moving = moving
        self._builds: dict[str, Build] = {}  # sessions that are being built

    def serve(self, link: AcceptedLink, first: Frame) -> None:
        """Obey a controller until its link ends.

        Raises:
            FedsysError: It may not control, or its link ended.
        """
        known = bool(self._controller) and link.peer == self._controller
        given = str(first.meta.get("token", ""))
        if not known and not (self._token and same_token(given, self._token)):
            raise SecurityError(f"{link.peer or 'a peer without certificate'} may not control")
        link.admit(vital=True)
        about = {"name": self._name, "arithmetic": arithmetic()}
        link.send(Frame("ready", {**about, "request": first.meta.get("request")}))
        try:
            self._obey(link)
        finally:
            self._table.orphan(link)
            self._moving.left(link)

    def _obey(self, link: Link) -> None:
        while True:
            frame = link.recv()
            if frame.kind == "noted":
                self._faults.noted(frame)
                continue
            request = frame.meta.get("request")
            try:
                reply = self._answer(link, frame)
            except LinkClosed:  # a process of this edge server is gone: to this controller, all is
                raise
            except FedsysError as error:
                self._table.count(f"refused_{type(error).__name__}")
                reply = Frame("refused", {"reason": f"{type(error).__name__}: {error}"})
            link.send(Frame(reply.kind, {**reply.meta, "request": request}, reply.tensors))

    def _answer(self, link: Link, frame: Frame) -> Frame:
        table = self._table
        if frame.kind == "open":
            return self._open(link, frame)
        if frame.kind == "ping":
            named = frame.meta.get("sessions")
            table.claim(named if isinstance(named, list) else (), link)
            return Frame("pong", {"sessions": table.names, "counters": dict(table.counters)})
        if frame.kind == "expect":
            self._probes.expect(str(frame.meta.get("token", "")))
            return Frame("expected")
        if frame.kind == "fleet":
            self._moving.tell(frame, link)
            return Frame("told")
        if frame.kind == "move":
            return Frame("moving", {"sessions": self._moving.command(frame)})
        name = str(frame.meta.get("session", ""))
        session = table.get(name)
        if session is None and frame.kind == "release" and self._stop_building(name):
            return Frame("released")
        if session is None and frame.kind != "release" and table.was_lost(name):
            raise LinkClosed(f"session {name}: its process has ended")
        if session is None:
            raise SessionError(f"{frame.kind}: {self._name} has no session {name!r}")
        if frame.kind == "collect":
            snapshot = session.snapshot()
            return Frame("state", snapshot.to_meta(), snapshot.tensors())
        if frame.kind == "present":
            return Frame("present", {"device": table.device_link(name) is not None})
        if frame.kind == "release":
            self._release(name)
            return Frame("released")
        raise SessionError(f"{frame.kind}: not a request of a controller")

    def _open(self, link: Link, frame: Frame) -> Frame:
        described = frame.meta.get("spec")
        if not isinstance(described, dict):
            raise FrameError(f"{frame.kind}: spec is missing")
        spec = SessionSpec.from_meta(described)
        for name in self._table.long_orphaned():
            self._release(name)
        epoch = Epoch.of(frame.meta.get("epoch")) or Epoch(1, 0, self._name)
        self._moving.make_room(spec, epoch)
        self._table.check_room(spec)  # before anything is built, and again when there is something
        planned, start = self._faults.coming_with(frame), Snapshot.from_frame(frame)
        with self._building(spec.id) as build:
            session = self._make(spec, start)
            with self._table.lock:
                if not build.wanted:
                    raise SessionError(f"session {spec.id} was released while it was built")
                self._table.hold(session, link)
                self._moving.opened(spec, start, epoch)
                self._faults.plan(spec.id, planned)
        self._table.count("opened")
        return Frame("opened")

    @contextmanager
    def _building(self, name: str) -> Iterator[Build]:
        """Have it known that a session is being built; an earlier attempt is wanted no more.

        Who opened it may have lost its link meanwhile, and speak over another one.
        """
        build = Build()
        with self._table.lock:
            self._stop_building(name)
            self._builds[name] = build
        try:
            yield build
        finally:
            with self._table.lock:
                if self._builds.get(name) is build:
                    del self._builds[name]

    def _stop_building(self, name: str) -> bool:
        """Have a session not held that is being built; return whether one is."""
        with self._table.lock:
            build = self._builds.get(name)
            if build is not None:
                build.wanted = False
            return build is not None

    def _release(self, name: str) -> None:
        with self._table.lock:
            self._table.release(name)
            self._moving.forget(name)
