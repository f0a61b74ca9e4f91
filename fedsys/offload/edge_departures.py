"""How sessions leave an edge server for another one of the fleet, over a link between the two.

A session is sent as a difference from what the other one has, if that is smaller, and large ones
are sent ahead while they train on. What their devices send then goes on to a shadow there, which
does the same: in the pause it is only asked whether it has the same bits. Without one, what changed
since moves in the pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedsys import config as configuration
from fedsys.errors import FedsysError, LinkError, SessionError
from fedsys.offload import migration, mirroring
from fedsys.offload.bases import sign_of
from fedsys.offload.checkpoint import awaited_of
from fedsys.offload.edge_arrivals import Arrivals, Holdings
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import Epoch
from fedsys.offload.migration import Say
from fedsys.offload.mirror import Mirror
from fedsys.offload.packing_up import Packed, packed, sealed
from fedsys.offload.turns import Awaited
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")

LEAVES_S = 600.0
"""How long a device that was foreseen to leave may take until it does, in seconds."""

Ask = Callable[[Frame], Frame]
"""Sends a frame to the other edge server and returns its answer."""

WITHDRAWN_S = 10.0
"""How long a device that goes elsewhere waits for an earlier offer to be withdrawn, in seconds."""


@dataclass
class Departure:
    """A session that is about to leave.

    Attributes:
        to: Name of the edge to which it goes.
        epoch: The token that was made for that edge.
        awaited: What the device waits for.
        gone: Set when the device leaves, or will not.
        left_s: When it left, of the monotonic clock: from then on it stands still.
        withdrawn: Whether the device does not go there after all.
        over: Set when nothing more comes of it.
    """

    to: str
    epoch: Epoch
    awaited: Sequence[Awaited] = ()
    gone: threading.Event = field(default_factory=threading.Event)
    left_s: float = 0.0
    withdrawn: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def leaves(self) -> None:
        """Take note that the device leaves."""
        self.left_s = time.monotonic()
        self.gone.set()

    def withdraw(self) -> None:
        """Take note that the device does not go there; nothing happens if it has left."""
        if not self.gone.is_set():
            self.withdrawn = True
            self.gone.set()


@dataclass(frozen=True)
class There:
    """What the other edge server has of a session that is about to come.

    Attributes:
        start: Name of what the session began with; None: it has not.
        base: Name of what the session is sent as a difference from; None: whole.
        nbytes: Bytes that were sent ahead.
        mirror: Has a shadow of it do what it does; None: it has none.
    """

    start: str | None
    base: str | None
    nbytes: int = 0
    mirror: Mirror | None = None

    def end(self) -> None:
        """Mirror no more."""
        if self.mirror is not None:
            self.mirror.end()


class Departures:
    """Hands the sessions of one edge server over. Methods may be called from any thread.

    Args:
        own: What the edge server has.
        arrivals: Tells other edge servers what is not needed any more.
    """

    def __init__(self, own: Holdings, arrivals: Arrivals) -> None:
        self._own, self._arrivals = own, arrivals
        self._leaving: dict[str, Departure] = {}

    def asked(self, name: str, frame: Frame) -> None:
        """A device leaves (``moving``), is about to (``foresee``), or will not (``remain``)."""
        if frame.kind == "remain":
            self.withdraw(name)
            return
        session = self._own.table.get(name)
        group = self._own.peers.group(session.spec.fleet) if session else None
        edge = group.at(str(frame.meta.get("to", ""))) if group else None
        to, awaited = edge.name if edge else "", awaited_of(frame.meta.get("awaiting"))
        leaving = self._leaving.get(name)
        if leaving is not None and leaving.to == to and not leaving.withdrawn:
            leaving.awaited = awaited
            if frame.kind == "moving":
                leaving.leaves()
            return
        if leaving is not None:  # it was foreseen to go to another one
            leaving.withdraw()
            leaving.over.wait(WITHDRAWN_S)
        self.move(name, to, awaited=awaited, now=frame.kind == "moving")

    def withdraw(self, name: str) -> None:
        """Offer a session no more to the edge to which its device was foreseen to go."""
        leaving = self._leaving.get(name)
        if leaving is not None:
            leaving.withdraw()

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
        departure = Departure(to, say.epoch, awaited)
        if now:
            departure.leaves()
        self._leaving[name] = departure  # before the device can say anything more of it
        threading.Thread(
            target=self._depart, args=(session, departure), name=f"moves {name}", daemon=True
        ).start()

    def _depart(self, session: EdgeSession, departure: Departure) -> None:
        name, to = session.spec.id, departure.to
        try:
            self._hand_over(session, departure)
        except FedsysError as error:
            if departure.withdrawn:
                _log.info("session %s does not move to %s: %s", name, to, error)
            else:
                _log.warning("session %s does not move to %s: %s", name, to, error)
            self._stay(session, departure, str(error))
        finally:
            if self._leaving.get(name) is departure:
                del self._leaving[name]
            departure.over.set()

    def _hand_over(self, session: EdgeSession, departure: Departure) -> None:
        """Prepare, send ahead, transfer, and redirect.

        Raises:
            FedsysError: The other edge server refuses, or is gone, or the device goes elsewhere.
        """
        name, epoch = session.spec.id, departure.epoch
        group = self._own.peers.group(session.spec.fleet)
        if group is None:
            raise SessionError(f"{self._own.name} knows no other edge server of this run")
        ask = partial(self._own.peers.ask, group, departure.to)
        about = {"session": name, "epoch": list(epoch), "nbytes": session.nbytes()}
        start = self._own.bases.key_of(name)
        answer = ask(Frame("prepare", {**about, "start": start}))
        start = start if answer.meta.get("start") is True else None
        there = There(start, start)
        try:
            if not departure.gone.is_set():
                there = self._send_ahead(session, ask, departure, there)
                if not departure.gone.wait(LEAVES_S) or departure.withdrawn:
                    raise SessionError("its device does not go there")
            said = self._own.copies.decide(name, lambda copy: migration.on_prepared(copy, epoch))
            if departure.withdrawn or not said:
                raise SessionError("its device went elsewhere")
            told = self._transfer(session, ask, departure, there)
        finally:
            there.end()
        # Before anybody learns that it is elsewhere: a device that asks meanwhile is told so, too
        self._own.copies.went(name, told)
        self._own.copies.decide(name, lambda copy: migration.on_committed(copy, epoch))
        self._own.table.count("moved_away")
        self._tell_device(name, self._own.redirect(session, epoch))

    def _send_ahead(
        self, session: EdgeSession, ask: Ask, departure: Departure, there: There
    ) -> There:
        """Send a session ahead, and have it mirrored from there on; return what is there then."""
        name, epoch = session.spec.id, departure.epoch
        wanted = configuration.parse(session.spec.config).mobility.mirror
        mirror = Mirror(ask, {"session": name, "epoch": list(epoch)}, session.nbytes())
        base = self._own.bases.get(name, there.base)
        follower = mirror if wanted else None
        made = packed(session, base, epoch, there.base, (), stop=False, follower=follower)
        ahead = f"ahead {made.step} {sign_of(epoch)}"
        meta = {**made.frame.meta, "ahead": ahead, "mirror": wanted}
        shadowed = False
        try:
            answer = ask(replace(made.frame, kind="ahead", meta=meta))
            shadowed = answer.meta.get("mirror") is True
        finally:
            if not shadowed:
                mirror.end()
        self._own.bases.came_ahead(name, ahead, made.tensors)
        if shadowed:
            mirror.start(mirroring.expected_difference(made.nbytes, session.nbytes()))
        return There(there.start, ahead, made.nbytes, mirror if shadowed else None)

    def _transfer(
        self, session: EdgeSession, ask: Ask, departure: Departure, there: There
    ) -> dict[str, Any]:
        """Send what is not there yet; return what the device is told of that.

        Raises:
            FedsysError: The other edge server does not take it.
        """
        name, began, before = session.spec.id, departure.left_s, there.nbytes
        faults = self._own.faults.going_with(name)
        found = self._become(session, ask, departure, there, faults)
        if found is None:
            rule = partial(migration.on_other, epoch=departure.epoch)
            if there.mirror is not None and not self._own.copies.decide(name, rule):
                raise SessionError("its device went elsewhere")
            base, to = self._own.bases.get(name, there.base), departure.epoch
            made = packed(session, base, to, there.base, departure.awaited, began)
            answer = ask(replace(made.frame, meta={**made.frame.meta, **faults}))
        else:
            made, answer = found
            assert there.mirror is not None
            before += there.mirror.sent - made.nbytes
        return _parts(made, time.monotonic() - began, answer.meta.get("restore_s"), before)

    def _become(
        self, session: EdgeSession, ask: Ask, departure: Departure, there: There,
        faults: Mapping[str, Any],
    ) -> tuple[Packed, Frame] | None:  # fmt: skip
        """Have the shadow be the session; None if it is not the same, or the difference nearer.

        Raises:
            LinkError: The other edge server does not answer.
        """
        mirror, name = there.mirror, session.spec.id
        if mirror is None:
            return None
        made = sealed(
            session, departure.epoch, departure.awaited, departure.left_s, mirror.waiting()
        )
        done = mirror.settled()
        if done is None:
            self._own.table.count("shadows_left")
            return None
        meta = {**made.frame.meta, "base": there.start, "mirrored": done, **faults}
        try:
            answer = ask(replace(made.frame, meta=meta))
        except SessionError as error:
            _log.warning("session %s: its difference is sent: %s", name, error)
            self._own.table.count("shadows_refused")
            return None
        self._own.table.count("shadows_became")
        return made, answer

    def _stay(self, session: EdgeSession, departure: Departure, reason: str) -> None:
        """Train on: the device was not told to go."""
        name, epoch = session.spec.id, departure.epoch
        said = self._own.copies.decide(name, lambda copy: migration.on_failed(copy, epoch))
        for say in said:
            if say.kind == "staying":
                session.go_on()
                if not departure.withdrawn:  # else it knows, and may be about to go elsewhere
                    self._tell_device(name, Frame("staying", {"reason": reason}))
            else:
                self._arrivals.tell(session, say)
        if not said:  # it is elsewhere by now, and what was sent ahead is of no use
            self._arrivals.tell(session, Say("cancel", departure.to, epoch))

    def _tell_device(self, name: str, frame: Frame) -> None:
        link = self._own.table.device_link(name)
        if link is None:
            return
        try:
            link.send(frame)
        except LinkError as error:  # it asks when it is back
            _log.info("session %s: %s", name, error)


def _parts(made: Packed, took: float, restore: object, ahead: int) -> dict[str, Any]:
    """Return what a device is told of a move that took so many seconds until it was answered."""
    restored = restore if isinstance(restore, float) else 0.0
    parts = {
        "freeze": made.freeze_s,
        "encode": made.encode_s,
        "transfer": max(0.0, took - made.freeze_s - made.encode_s - restored),
        "restore": restored,
    }
    return {"parts": parts, "bytes": made.nbytes, "precopied": ahead, "edge_s": took}
