"""What an edge server says to devices and to other edge servers when devices move.

It runs the rules of `fedsys.offload.migration`. How sessions leave stands in
`fedsys.offload.edge_departures`, how they come in `fedsys.offload.edge_arrivals`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedsys.errors import FedsysError, SessionError
from fedsys.offload import migration
from fedsys.offload.bases import sign_of
from fedsys.offload.checkpoint import awaited_of
from fedsys.offload.edge_arrivals import Arrivals, Holdings
from fedsys.offload.edge_departures import Departures
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import NONE, Epoch, Presented
from fedsys.offload.migration import Say
from fedsys.offload.packing_up import packed
from fedsys.offload.peers import PeerGroup
from fedsys.offload.snapshot import SessionSpec
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.security import same_token
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")


@dataclass(frozen=True)
class Welcome:
    """A device that may train.

    Attributes:
        session: With what.
        epoch: Under which token.
        began_s: When it asked, of the monotonic clock.
        more: What it is told of how the session came here.
    """

    session: EdgeSession
    epoch: Epoch
    began_s: float
    more: dict[str, Any]

    def told(self) -> dict[str, Any]:
        """Return what the device is told now: with the seconds that it took to find the session."""
        if "moved" not in self.more:
            return self.more
        return {"moved": {**self.more["moved"], "edge_s": time.monotonic() - self.began_s}}


class EdgeMoves:
    """Moves of the sessions of one edge server. Methods may be called from any thread.

    Args:
        own: What the edge server has.
        arrivals: Takes sessions in.
        departures: Hands them over.
    """

    def __init__(self, own: Holdings, arrivals: Arrivals, departures: Departures) -> None:
        self._own, self._arrivals, self._departures = own, arrivals, departures

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
        began = time.monotonic()
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
        return self._answer_device(link, name, said, began, more)

    def _answer_device(
        self, link: Link, name: str, said: Sequence[Say], began: float, more: dict[str, Any]
    ) -> Welcome | None:
        answer, *others = said
        session = self._own.table.get(name)
        if answer.kind == "welcome" and session is not None and answer.epoch is not None:
            for say in others:
                self._arrivals.tell(session, say)
            return Welcome(session, answer.epoch, began, more)
        if answer.kind == "redirect" and session is not None and answer.epoch is not None:
            link.send(self._own.redirect(session, answer.epoch))
            return None
        self._own.table.count("refused_unknown_session")
        link.send(Frame("unknown"))
        return None

    def asked(self, name: str, frame: Frame) -> None:
        """A device says that it leaves, that it is about to, or that it will not."""
        self._departures.asked(name, frame)

    def is_coming(self, name: str) -> bool:
        """Return whether a session is being fetched."""
        return self._arrivals.is_coming(name)

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
            said = self._own.copies.decide(name, lambda copy: migration.on_release(copy, epoch))
            for say in said:
                if session is not None:
                    self._arrivals.tell(session, say)
            return Frame("released")
        if frame.kind == "cancel":
            self._own.copies.decide(name, lambda copy: migration.on_cancel(copy, epoch))
            self._own.bases.never_came(name, sign_of(epoch))
            self._own.shadows.never_came(name, epoch)
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
        self._departures.withdraw(name)
        key = self._own.bases.key_of(name)
        listed = frame.meta.get("starts")
        base = key if isinstance(listed, list) and key in listed else None
        awaited = awaited_of(frame.meta.get("awaiting"))
        made = packed(session, self._own.bases.get(name, base), say.epoch, base, awaited, began)
        self._own.table.count("moved_away")
        parts = {"freeze": made.freeze_s, "encode": made.encode_s}
        more = {"parts": parts, **self._own.faults.going_with(name)}
        return replace(made.frame, meta={**made.frame.meta, **more})

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
