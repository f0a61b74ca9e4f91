"""Sessions that come to an edge server: handed over by another one, or fetched for their device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedsys.errors import FedsysError, SessionError
from fedsys.faults import Fault
from fedsys.offload import migration
from fedsys.offload.bases import Bases, sign_of
from fedsys.offload.checkpoint import SessionCheckpoint
from fedsys.offload.copies import Copies
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import Epoch, Presented
from fedsys.offload.migration import Say
from fedsys.offload.peers import PeerGroup, Peers
from fedsys.offload.session_table import ORPHAN_S, SessionTable
from fedsys.offload.shadows import Shadows
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")

SOURCES = 4
"""How many edge servers are asked one after the other for a session that moved on and on."""


@dataclass(frozen=True)
class Fetched:
    """A session that was fetched.

    Attributes:
        epoch: Its token.
        told: What its device is told of that.
    """

    epoch: Epoch
    told: dict[str, Any]


@dataclass(frozen=True)
class Holdings:
    """What an edge server has that moves concern.

    Attributes:
        name: Of the edge server.
        table: Its sessions.
        copies: Which of them may train.
        bases: What it has of others.
        shadows: Of sessions that will come.
        peers: The other edge servers.
        faults: What strikes its sessions.
    """

    name: str
    table: SessionTable
    copies: Copies
    bases: Bases
    shadows: Shadows
    peers: Peers
    faults: EdgeFaults

    def redirect(self, session: EdgeSession, epoch: Epoch) -> Frame:
        """Return what a device is told whose session has that token now, at another edge."""
        group = self.peers.group(session.spec.fleet)
        edge = group.edges.get(epoch.holder) if group else None
        address = edge.device_address if edge else ""
        told = self.copies.told(session.spec.id)
        return Frame("redirect", {"to": address, "epoch": list(epoch), **told})


class Arrivals:
    """Takes sessions in. Methods may be called from any thread.

    Args:
        own: What the edge server has.
        make: Builds a session.
    """

    def __init__(self, own: Holdings, make: Callable[[SessionSpec, Snapshot], EdgeSession]) -> None:
        self._own, self._make = own, make
        self._controllers: dict[str, Link] = {}  # by the secret of the fleet
        self._left: dict[str, float] = {}  # when the controller of a fleet went away
        self._lock = threading.Lock()
        self._coming: set[str] = set()  # sessions that are being fetched

    def told(self, secret: str, controller: Link) -> None:
        """Take note of who controls the sessions of a fleet; forget fleets that are long gone."""
        since, held = time.monotonic() - ORPHAN_S, self._own.table.fleets
        with self._lock:
            self._controllers[secret] = controller
            self._left.pop(secret, None)
            gone = [s for s, moment in self._left.items() if moment < since and s not in held]
            for fleet in gone:
                del self._left[fleet]
        for fleet in gone:
            self._own.peers.forget(fleet)

    def left(self, controller: Link) -> None:
        """Take note that the link of a controller ended; it may come back over another one."""
        with self._lock:
            for secret in [s for s, link in self._controllers.items() if link is controller]:
                del self._controllers[secret]
                self._left[secret] = time.monotonic()

    def is_coming(self, name: str) -> bool:
        """Return whether a session is being fetched."""
        return name in self._coming

    def answer(self, group: PeerGroup, peer: str, frame: Frame, epoch: Epoch) -> Frame:
        """Answer an edge server that hands a session over.

        Raises:
            FedsysError: The session is not taken.
        """
        name = str(frame.meta.get("session", ""))
        if frame.kind == "prepare":
            rule = partial(migration.on_prepare, source=peer, epoch=epoch)
            (say,) = self._own.copies.decide(name, rule)
            if say.kind == "refused":
                raise SessionError(f"{self._own.name} has a later one of session {name}")
            nbytes = frame.meta.get("nbytes")
            self._own.table.check_room_for(nbytes if isinstance(nbytes, int) else 0)
            start = frame.meta.get("start")
            return Frame("prepared", {"start": self._own.bases.expect(name, start, sign_of(epoch))})
        if frame.kind == "ahead":
            return Frame("copied", {"mirror": self._came_ahead(group, frame, epoch)})
        if frame.kind == "mirror":
            self._own.shadows.mirror(name, group.secret, epoch, frame)
            return Frame("mirrored")
        if frame.kind == "transfer":
            return Frame("committed", {"restore_s": self._stage(group, peer, frame, epoch)})
        raise SessionError(f"{frame.kind}: not a request of an edge server")

    def _came_ahead(self, group: PeerGroup, frame: Frame, epoch: Epoch) -> bool:
        """Keep what was sent ahead of a session; return whether it is shadowed here.

        Raises:
            FedsysError: It is damaged, or does not fit.
        """
        name = str(frame.meta.get("session", ""))
        made = SessionCheckpoint.of(frame, self._own.bases.get(name, frame.meta.get("base")))
        _check_belongs(made.spec, name, group)
        ahead = str(frame.meta.get("ahead", ""))
        mirror, came = frame.meta.get("mirror") is True, made.position.snapshot.tensors()
        if mirror:  # a shadow trains with them, and the difference may be needed yet
            came = {n: tensor.clone() for n, tensor in came.items()}
        self._own.bases.came_ahead(name, ahead, came)
        if not mirror:
            return False
        copy = self._own.copies.get(name)
        return self._own.shadows.begin(made.spec, made.position, copy, epoch)

    def fetch(self, name: str, hello: Frame, shown: Presented) -> Fetched | None:
        """Fetch the session of a device that is here from where it was; None if that fails."""
        about = {key: hello.meta.get(key) for key in ("token", "epoch", "told", "awaiting")}
        self._coming.add(name)
        try:
            with self._own.bases.lent() as starts:
                question = Frame("fetch", {**about, "session": name, "starts": starts})
                tried = (self._ask_sources(*place, question) for place in self._places(hello))
                return next((found for found in tried if found is not None), None)
        finally:
            self._coming.discard(name)

    def _places(self, hello: Frame) -> list[tuple[PeerGroup, str]]:
        """Return where a device may have been: only in runs that go on, if there are any."""
        places = self._own.peers.known_as(str(hello.meta.get("from", "")))
        # A run that is over would be waited for, where its edge server is gone as well
        return [(g, name) for g, name in places if g.secret in self._controllers] or places

    def _ask_sources(self, group: PeerGroup, source: str, question: Frame) -> Fetched | None:
        """Ask for a session where it was, and where it went from there."""
        name, asked = str(question.meta["session"]), time.monotonic()
        for _ in range(SOURCES):
            try:
                answer = self._own.peers.ask(group, source, question)
                if answer.kind != "redirect":
                    return self._fetched(group, source, answer, time.monotonic() - asked)
            except SessionError as error:
                _log.info("session %s is not fetched from %s: %s", name, source, error)
                return None
            except FedsysError as error:
                _log.warning("session %s is not fetched from %s: %s", name, source, error)
                self._say_wanted(group, name, source)
                return None
            source = str(answer.meta.get("to", ""))
            if source == self._own.name:
                return None
        return None

    def _fetched(self, group: PeerGroup, source: str, frame: Frame, took: float) -> Fetched:
        epoch = Epoch.of(frame.meta.get("epoch"))
        if epoch is None or frame.kind != "transfer":
            raise SessionError(f"{frame.kind}: not a session")
        restored = self._stage(group, source, frame, epoch)
        told = frame.meta.get("parts")
        parts = {k: float(v) for k, v in told.items()} if isinstance(told, dict) else {}
        parts |= {"transfer": max(0.0, took - sum(parts.values())), "restore": restored}
        nbytes = sum(tensor.nbytes for tensor in frame.tensors.values())
        return Fetched(epoch, {"moved": {"parts": parts, "bytes": nbytes, "precopied": 0}})

    def _stage(self, group: PeerGroup, source: str, frame: Frame, epoch: Epoch) -> float:
        """Take a session in that waits for its device; return the seconds that it took.

        Raises:
            FedsysError: It is damaged, too old, or does not fit.
        """
        began, name = time.monotonic(), str(frame.meta.get("session", ""))
        rule = partial(migration.on_transfer, source=source, epoch=epoch)
        copy = self._own.copies.get(name)
        if rule(copy)[1][0].kind == "refused" or epoch.holder != self._own.name:
            raise SessionError(f"{self._own.name} has a later one of session {name}")
        if copy is not None and copy.epoch == epoch:
            return 0.0  # it came before, and the answer was lost
        planned = self._own.faults.coming_with(frame)
        if "mirrored" in frame.meta:
            session = self._own.shadows.become(name, group.secret, epoch, frame)
        else:
            session = self._built(group, name, frame)
        (say,) = self._own.copies.staged(session, rule, lambda: self._hold(session, planned))
        if say.kind == "refused":
            raise SessionError(f"{self._own.name} has a later one of session {name}")
        self._own.bases.goes_on(name, str(frame.meta.get("base")))
        self._own.bases.never_came(name, "")  # what came ahead of it was used
        self._own.shadows.forget(name)
        self._own.table.count("moved_here")
        self._own.table.tell(name, Frame("staged", {"session": name, "from": source}))
        return time.monotonic() - began

    def _built(self, group: PeerGroup, name: str, frame: Frame) -> EdgeSession:
        made = SessionCheckpoint.of(frame, self._own.bases.get(name, frame.meta.get("base")))
        _check_belongs(made.spec, name, group)
        session = self._make(made.spec, made.position.snapshot)
        session.take_up(made.position)
        return session

    def _hold(self, session: EdgeSession, planned: list[Fault]) -> None:
        self._own.table.hold(session, self._controllers.get(session.spec.fleet))
        self._own.faults.plan(session.spec.id, planned)

    def tell(self, session: EdgeSession, say: Say) -> None:
        """Tell the server app where a session is, or another edge server that its copy may go.

        The latter in a thread of its own.
        """
        group = self._own.peers.group(session.spec.fleet)
        if group is None or say.epoch is None:
            return
        name = session.spec.id
        if say.kind == "moved":
            about = {"session": name, "from": say.to, "step": session.steps}
            self._own.table.tell(name, Frame("moved", {**about, "epoch": list(say.epoch)}))
            return
        frame = Frame(say.kind, {"session": name, "epoch": list(say.epoch)})
        threading.Thread(
            target=self._say, args=(group, say.to, frame), name=f"{say.kind} {name}", daemon=True
        ).start()

    def _say(self, group: PeerGroup, to: str, frame: Frame) -> None:
        try:
            self._own.peers.ask(group, to, frame)
        except FedsysError as error:  # it is released at the end of the round
            _log.info("%s to %s: %s", frame.kind, to, error)

    def want_anew(self, name: str, hello: Frame) -> None:
        """Tell the server app that a device is here that begins its round anew."""
        for group, source in self._places(hello):
            self._say_wanted(group, name, source, anew=True)

    def _say_wanted(self, group: PeerGroup, name: str, source: str, *, anew: bool = False) -> None:
        """Tell the server app that a device is here whose session cannot be fetched."""
        link = self._controllers.get(group.secret)
        if link is None:
            return
        try:
            link.send(Frame("wanted", {"session": name, "from": source, "anew": anew}))
        except FedsysError as error:
            _log.info("session %s: %s", name, error)


def _check_belongs(spec: SessionSpec, name: str, group: PeerGroup) -> None:
    if spec.id != name or spec.fleet != group.secret:
        raise SessionError(f"{name}: what came is another session")
