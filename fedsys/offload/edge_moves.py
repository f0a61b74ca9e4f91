"""What an edge server does when devices move: it runs the rules of `fedsys.offload.migration`.

It hands sessions to other edge servers of the fleet, over links between them, and takes sessions
in. A session is sent as a difference from what the other one has, if that is smaller, and large
ones are sent ahead while they train on, so that only what changed since moves in the pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedsys.errors import FedsysError, LinkError, SessionError
from fedsys.offload import migration
from fedsys.offload.checkpoint import Awaited, awaited_of
from fedsys.offload.edge_arrivals import Arrivals, Holdings
from fedsys.offload.fencing import NONE, Epoch, Presented
from fedsys.offload.migration import Say
from fedsys.offload.packing_up import Packed, packed
from fedsys.offload.peers import PeerGroup
from fedsys.offload.session import Session
from fedsys.offload.snapshot import SessionSpec
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.security import same_token
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")

LEAVES_S = 600.0
"""How long a device that was foreseen to leave may take until it does, in seconds."""


@dataclass
class Departure:
    """A session that is about to leave.

    Attributes:
        to: Name of the edge to which it goes.
        awaited: What the device waits for.
        gone: Set when the device leaves.
        left_s: When that was, of the monotonic clock: from then on it stands still.
    """

    to: str
    awaited: Sequence[Awaited] = ()
    gone: threading.Event = field(default_factory=threading.Event)
    left_s: float = 0.0

    def leaves(self) -> None:
        """Take note that the device leaves."""
        self.left_s = time.monotonic()
        self.gone.set()


@dataclass(frozen=True)
class Welcome:
    """A device that may train.

    Attributes:
        session: With what.
        epoch: Under which token.
        more: What it is told of how the session came here.
    """

    session: Session
    epoch: Epoch
    more: dict[str, Any]


class EdgeMoves:
    """Moves of the sessions of one edge server. Methods may be called from any thread.

    Args:
        own: What the edge server has.
        arrivals: Takes sessions in.
    """

    def __init__(self, own: Holdings, arrivals: Arrivals) -> None:
        self._own, self._arrivals = own, arrivals
        self._leaving: dict[str, Departure] = {}

    # --- devices ----------------------------------------------------------------------------------

    def greet(
        self, link: Link, hello: Frame, allow: Callable[[SessionSpec], None]
    ) -> Welcome | None:
        """Say to a device where its session is; return what it trains with if that is here.

        Args:
            link: Of the device.
            hello: What it presents.
            allow: Raises if it may not have a session.

        Raises:
            SecurityError: It may not.
        """
        name, shown, more = str(hello.meta.get("session", "")), shown_by(hello), dict[str, Any]()
        waits = looked = False
        while True:
            session = self._own.table.get(name)
            if session is not None:
                allow(session.spec)
            rule = partial(migration.on_hello, me=self._own.name, shown=shown)
            said = self._own.copies.decide(name, rule)
            answer = said[0]
            if answer.kind == "unknown" and not looked and hello.meta.get("from"):
                looked = True
                if not waits:
                    link.send(Frame("wait"))
                waits = True
                if hello.meta.get("anew") is True:
                    self._arrivals.want_anew(name, hello)
                    break
                found = self._arrivals.fetch(name, hello, shown)
                if found is not None:
                    shown, more = replace(shown, told=found.epoch), found.told
                    continue
            if answer.kind == "wait":
                if not waits:
                    link.send(Frame("wait"))
                waits = True
                self._own.copies.settled(name)
                continue
            break
        return self._answer_device(link, name, said, more)

    def _answer_device(
        self, link: Link, name: str, said: Sequence[Say], more: dict[str, Any]
    ) -> Welcome | None:
        answer, *others = said
        session = self._own.table.get(name)
        if answer.kind == "welcome" and session is not None and answer.epoch is not None:
            for say in others:  # the edge where it was before need not keep it
                self._arrivals.tell_source(session, say)
            return Welcome(session, answer.epoch, more)
        if answer.kind == "redirect" and session is not None and answer.epoch is not None:
            link.send(self._redirect(session, answer.epoch, {}))
            return None
        self._own.table.count("refused_unknown_session")
        link.send(Frame("unknown"))
        return None

    def _redirect(self, session: Session, epoch: Epoch, more: dict[str, Any]) -> Frame:
        group = self._own.peers.group(session.spec.fleet)
        edge = group.edges.get(epoch.holder) if group else None
        address = edge.device_address if edge else ""
        return Frame("redirect", {"to": address, "epoch": list(epoch), **more})

    def is_coming(self, name: str) -> bool:
        """Return whether a session is being fetched."""
        return self._arrivals.is_coming(name)

    def asked(self, name: str, frame: Frame) -> None:
        """A device says that it leaves (``moving``), or that it is about to (``foresee``)."""
        session = self._own.table.get(name)
        group = self._own.peers.group(session.spec.fleet) if session else None
        edge = group.at(str(frame.meta.get("to", ""))) if group else None
        leaving = self._leaving.get(name)
        if leaving is not None and edge is not None and leaving.to == edge.name:
            leaving.awaited = awaited_of(frame.meta.get("awaiting"))
            if frame.kind == "moving":
                leaving.leaves()
            return
        self.move(
            name,
            edge.name if edge else "",
            awaited=awaited_of(frame.meta.get("awaiting")),
            now=frame.kind == "moving",
        )

    def move(
        self, name: str, to: str, *, awaited: Sequence[Awaited] = (), now: bool = True
    ) -> None:
        """Hand a session to another edge server, in a thread of its own.

        Args:
            name: Of the session.
            to: Name of the edge server.
            awaited: Operations whose answers the device waits for.
            now: Whether to do it at once; else it is sent ahead, until the device says so.
        """
        said = self._own.copies.decide(name, partial(migration.on_move, me=self._own.name, to=to))
        session, say = self._own.table.get(name), said[0]
        if session is None:
            return
        if say.kind != "prepare" or say.epoch is None:
            self._tell_device(name, Frame("staying", {"reason": "it is on its way already"}))
            return
        departure = Departure(to, awaited)
        if now:
            departure.leaves()
        self._leaving[name] = departure  # before the device can say anything more of it
        threading.Thread(
            target=self._depart,
            args=(session, departure, say.epoch),
            name=f"moves {name}",
            daemon=True,
        ).start()

    # --- the way out ------------------------------------------------------------------------------

    def _depart(self, session: Session, departure: Departure, epoch: Epoch) -> None:
        try:
            self._hand_over(session, departure, epoch)
        except FedsysError as error:
            _log.warning("session %s does not move to %s: %s", session.spec.id, departure.to, error)
            self._stay(session, epoch, f"{type(error).__name__}: {error}")
        finally:
            if self._leaving.get(session.spec.id) is departure:
                del self._leaving[session.spec.id]

    def _hand_over(self, session: Session, departure: Departure, epoch: Epoch) -> None:
        """Prepare, send ahead, transfer, and redirect.

        Raises:
            FedsysError: The other edge server refuses, or is gone.
        """
        name, group = session.spec.id, self._own.peers.group(session.spec.fleet)
        if group is None:
            raise SessionError(f"{self._own.name} knows no other edge server of this run")
        about = {"session": name, "epoch": list(epoch), "nbytes": session.nbytes()}
        asked = Frame("prepare", {**about, "start": self._own.bases.key_of(name)})
        answer = self._own.peers.ask(group, departure.to, asked)
        base = self._own.bases.key_of(name) if answer.meta.get("start") is True else None
        ahead = 0
        if not departure.gone.is_set():
            base, ahead = self._send_ahead(session, group, departure, epoch, base)
            if not departure.gone.wait(LEAVES_S):
                raise SessionError("its device does not leave")
        self._own.copies.decide(name, lambda copy: migration.on_prepared(copy, epoch))
        there, began = self._own.bases.get(name, base), departure.left_s
        made = packed(session, there, epoch, base, departure.awaited, began)
        sent = time.monotonic()
        answer = self._own.peers.ask(group, departure.to, made.frame)
        took = time.monotonic() - sent
        self._own.copies.decide(name, lambda copy: migration.on_committed(copy, epoch))
        self._own.table.count("moved_away")
        told = _parts(made, took, answer.meta.get("restore_s"), ahead)
        self._tell_device(name, self._redirect(session, epoch, told))

    def _send_ahead(
        self,
        session: Session,
        group: PeerGroup,
        departure: Departure,
        epoch: Epoch,
        base: str | None,
    ) -> tuple[str | None, int]:
        """Send a session ahead; return the name of what is there then, and its bytes."""
        name = session.spec.id
        made = packed(session, self._own.bases.get(name, base), epoch, base, (), stop=False)
        ahead = f"ahead {made.step}"
        frame = replace(made.frame, kind="ahead", meta={**made.frame.meta, "ahead": ahead})
        self._own.peers.ask(group, departure.to, frame)
        self._own.bases.came_ahead(name, ahead, made.tensors)
        return ahead, made.nbytes

    def _stay(self, session: Session, epoch: Epoch, reason: str) -> None:
        """Train on: the device was not told to go."""
        name = session.spec.id
        said = self._own.copies.decide(name, lambda copy: migration.on_failed(copy, epoch))
        for say in said:
            if say.kind == "staying":
                session.go_on()
                self._tell_device(name, Frame("staying", {"reason": reason}))
            else:
                self._arrivals.tell_source(session, say)

    def _tell_device(self, name: str, frame: Frame) -> None:
        link = self._own.table.device_link(name)
        if link is None:
            return
        try:
            link.send(frame)
        except LinkError as error:  # it asks when it is back
            _log.info("session %s: %s", name, error)

    # --- other edge servers -----------------------------------------------------------------------

    def serve_peer(self, link: AcceptedLink, first: Frame) -> None:
        """Answer another edge server until its link ends.

        Raises:
            SecurityError: It is none of a fleet that is known here.
            LinkError: Its link ended.
        """
        group, peer = self._own.peers.accept(link, first)
        link.admit()
        while True:
            frame = link.recv()
            try:
                answer = self._answer_peer(group, peer, frame)
            except FedsysError as error:
                self._own.table.count(f"refused_{type(error).__name__}")
                answer = Frame("refused", {"reason": f"{type(error).__name__}: {error}"})
            link.send(answer)

    def _answer_peer(self, group: PeerGroup, peer: str, frame: Frame) -> Frame:
        name = str(frame.meta.get("session", ""))
        session = self._own.table.get(name)
        if session is not None and session.spec.fleet != group.secret:
            raise SessionError(f"{self._own.name} has no session {name!r} of this fleet")
        if frame.kind == "fetch":
            return self._fetched(name, peer, frame)
        epoch = Epoch.of(frame.meta.get("epoch"))
        if epoch is None:
            raise SessionError(f"{frame.kind}: a token is missing")
        if frame.kind == "release":
            self._own.copies.decide(name, lambda copy: migration.on_release(copy, epoch))
            return Frame("released")
        if frame.kind == "cancel":
            self._own.copies.decide(name, lambda copy: migration.on_cancel(copy, epoch))
            return Frame("released")
        return self._arrivals.answer(group, peer, frame, epoch)

    def _fetched(self, name: str, peer: str, frame: Frame) -> Frame:
        """Give a session to the edge server at which its device is.

        Raises:
            SessionError: It is not here, or not the device's any more.
        """
        began, session = time.monotonic(), self._own.table.get(name)
        if session is None or not same_token(str(frame.meta.get("token", "")), session.spec.token):
            raise SessionError(f"{self._own.name} has no session {name!r} for this device")
        self._own.copies.settled(name)
        rule = partial(migration.on_fetch, me=self._own.name, to=peer, shown=shown_by(frame))
        (say,) = self._own.copies.decide(name, rule)
        if say.kind == "redirect" and say.epoch is not None:
            return Frame("redirect", {"to": say.epoch.holder})
        if say.kind != "transfer" or say.epoch is None:
            raise SessionError(
                f"the session {name!r} of {self._own.name} is not the device's any more"
            )
        key = self._own.bases.key_of(name)
        listed = frame.meta.get("starts")
        base = key if isinstance(listed, list) and key in listed else None
        awaited = awaited_of(frame.meta.get("awaiting"))
        made = packed(session, self._own.bases.get(name, base), say.epoch, base, awaited, began)
        self._own.table.count("moved_away")
        parts = {"freeze": made.freeze_s, "encode": made.encode_s}
        return replace(made.frame, meta={**made.frame.meta, "parts": parts})

    def opened(self, spec: SessionSpec, epoch: Epoch) -> None:
        """Make room for a session that the server app opens.

        Raises:
            SessionError: A later one is here.
        """
        copy = self._own.copies.get(spec.id)
        said = migration.on_open(copy, epoch)[1]
        if said[0].kind == "refused":
            raise SessionError(f"session {spec.id} is open already")
        if copy is not None:
            self._own.table.release(spec.id)
            self._own.copies.forget(spec.id)


def shown_by(frame: Frame) -> Presented:
    """Return what a device shows by a frame.

    Raises:
        FrameError: A token has another form.
    """
    meta = frame.meta
    return Presented(
        Epoch.of(meta.get("epoch")) or NONE, Epoch.of(meta.get("told")), meta.get("back") is True
    )


def _parts(made: Packed, took: float, restore: object, ahead: int) -> dict[str, Any]:
    restored = restore if isinstance(restore, float) else 0.0
    parts = {
        "freeze": made.freeze_s,
        "encode": made.encode_s,
        "transfer": max(0.0, took - restored),
        "restore": restored,
    }
    return {"parts": parts, "bytes": made.nbytes, "precopied": ahead}
