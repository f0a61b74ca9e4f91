"""How sessions leave an edge server for another one of the fleet, over a link between the two.

A session is sent as a difference from what the other one has, if that is smaller, and large ones
are sent ahead while they train on, so that only what changed since moves in the pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedsys.errors import FedsysError, LinkError, SessionError
from fedsys.offload import migration
from fedsys.offload.bases import sign_of
from fedsys.offload.checkpoint import Awaited, awaited_of
from fedsys.offload.edge_arrivals import Arrivals, Holdings
from fedsys.offload.fencing import Epoch
from fedsys.offload.migration import Say
from fedsys.offload.packing_up import Packed, packed
from fedsys.offload.peers import PeerGroup
from fedsys.offload.session import Session
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")

LEAVES_S = 600.0
"""How long a device that was foreseen to leave may take until it does, in seconds."""

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

    def _depart(self, session: Session, departure: Departure) -> None:
        name, to = session.spec.id, departure.to
        try:
            self._hand_over(session, departure)
        except FedsysError as error:
            if departure.withdrawn:
                _log.info("session %s does not move to %s: %s", name, to, error)
            else:
                _log.warning("session %s does not move to %s: %s", name, to, error)
            self._stay(session, departure, f"{type(error).__name__}: {error}")
        finally:
            if self._leaving.get(name) is departure:
                del self._leaving[name]
            departure.over.set()

    def _hand_over(self, session: Session, departure: Departure) -> None:
        """Prepare, send ahead, transfer, and redirect.

        Raises:
            FedsysError: The other edge server refuses, or is gone, or the device goes elsewhere.
        """
        name, epoch = session.spec.id, departure.epoch
        group = self._own.peers.group(session.spec.fleet)
        if group is None:
            raise SessionError(f"{self._own.name} knows no other edge server of this run")
        about = {"session": name, "epoch": list(epoch), "nbytes": session.nbytes()}
        asked = Frame("prepare", {**about, "start": self._own.bases.key_of(name)})
        answer = self._own.peers.ask(group, departure.to, asked)
        base = self._own.bases.key_of(name) if answer.meta.get("start") is True else None
        ahead = 0
        if not departure.gone.is_set():
            base, ahead = self._send_ahead(session, group, departure, base)
            if not departure.gone.wait(LEAVES_S) or departure.withdrawn:
                raise SessionError("its device does not go there")
        said = self._own.copies.decide(name, lambda copy: migration.on_prepared(copy, epoch))
        if departure.withdrawn or not said:
            raise SessionError("its device went elsewhere")
        there, began = self._own.bases.get(name, base), departure.left_s
        made = packed(session, there, epoch, base, departure.awaited, began)
        meta = {**made.frame.meta, **self._own.faults.going_with(name)}
        answer = self._own.peers.ask(group, departure.to, replace(made.frame, meta=meta))
        took = time.monotonic() - began
        told = _parts(made, took, answer.meta.get("restore_s"), ahead)
        # Before anybody learns that it is elsewhere: a device that asks meanwhile is told so, too
        self._own.copies.went(name, told)
        self._own.copies.decide(name, lambda copy: migration.on_committed(copy, epoch))
        self._own.table.count("moved_away")
        self._tell_device(name, self._own.redirect(session, epoch))

    def _send_ahead(
        self, session: Session, group: PeerGroup, departure: Departure, base: str | None
    ) -> tuple[str | None, int]:
        """Send a session ahead; return the name of what is there then, and its bytes."""
        name, epoch = session.spec.id, departure.epoch
        made = packed(session, self._own.bases.get(name, base), epoch, base, (), stop=False)
        ahead = f"ahead {made.step} {sign_of(epoch)}"
        frame = replace(made.frame, kind="ahead", meta={**made.frame.meta, "ahead": ahead})
        self._own.peers.ask(group, departure.to, frame)
        self._own.bases.came_ahead(name, ahead, made.tensors)
        return ahead, made.nbytes

    def _stay(self, session: Session, departure: Departure, reason: str) -> None:
        """Train on: the device was not told to go."""
        name, epoch = session.spec.id, departure.epoch
        said = self._own.copies.decide(name, lambda copy: migration.on_failed(copy, epoch))
        for say in said:
            if say.kind == "staying":
                session.go_on()
                if not departure.withdrawn:  # else it knows, and may be about to go elsewhere
                    self._tell_device(name, Frame("staying", {"reason": reason}))
            else:
                self._arrivals.tell_source(session, say)
        if not said:  # it is elsewhere by now, and what was sent ahead is of no use
            self._arrivals.tell_source(session, Say("cancel", departure.to, epoch))

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
