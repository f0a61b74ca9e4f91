"""The destination's end of a shadow: it does what its session does elsewhere, until that comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedsys.errors import FedsysError, FrameError, SessionError
from fedsys.offload import mirroring
from fedsys.offload.checkpoint import awaited_of
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import Copy, Epoch
from fedsys.offload.mirroring import Shadow
from fedsys.offload.snapshot import SessionPosition, SessionSpec, Snapshot, natural
from fedsys.transport.wire import Frame

IDLE_S = 600.0
"""After how long a shadow is forgotten of which nothing is heard any more, in seconds."""


@dataclass
class _Kept:
    shadow: Shadow
    session: EdgeSession
    fleet: str
    every: int  # steps between replicas, of which the shadow sends none
    heard_s: float
    lock: threading.Lock = field(default_factory=threading.Lock)


class Shadows:
    """Shadows by session. Methods may be called from any thread.

    Args:
        make: Builds a session.
        check_room: Raises if there is no room for so many bytes more.
    """

    def __init__(
        self,
        make: Callable[[SessionSpec, Snapshot], EdgeSession],
        check_room: Callable[[int], None],
    ) -> None:
        self._make, self._check_room = make, check_room
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def begin(
        self, spec: SessionSpec, position: SessionPosition, copy: Copy | None, epoch: Epoch
    ) -> bool:
        """Have a session shadowed from a position on; return whether it is.

        Args:
            spec: What its edge was told.
            position: Where it stands.
            copy: What is here of it.
            epoch: Token of the move.

        Raises:
            FedsysError: It does not fit, or there is no room for it.
        """
        now, known = time.monotonic(), self._get(spec.id)
        due = mirroring.on_ahead(None if known is None else known.shadow, copy, epoch)
        if due is None or due.epoch != epoch:
            return False
        if known is not None and due is known.shadow:
            return True
        session = self._make(replace(spec, replicate_every=0), position.snapshot)
        session.take_up(position)
        made = _Kept(due, session, spec.fleet, spec.replicate_every, now)
        with self._lock:
            self._kept = {
                name: kept
                for name, kept in self._kept.items()
                if name != spec.id and kept.heard_s > now - IDLE_S
            }
            others = sum(kept.session.nbytes() for kept in self._kept.values())
            self._check_room(session.nbytes() + others)
            self._kept[spec.id] = made
        return True

    def mirror(self, name: str, fleet: str, epoch: Epoch, frame: Frame) -> None:
        """Have a shadow do what its session was told.

        Raises:
            SessionError: There is no such shadow, or it is of no use any more.
            FrameError: The frame says something else.
        """
        number, operation = natural(frame, "number"), _operation(frame)
        kept = self._get(name)
        if kept is None or kept.fleet != fleet:
            raise SessionError(f"mirror: no shadow of session {name!r:.40} is here")
        with kept.lock:
            after, due = mirroring.on_mirror(kept.shadow, epoch, number)
            if after is None or after.epoch != epoch:
                self._drop(name, kept if after is None else None)
                raise SessionError(f"mirror: operation {number} of session {name} is not due")
            kept.shadow, kept.heard_s = after, time.monotonic()
            if not due:
                return
            try:
                for _ in kept.session.handle(operation):
                    pass
            except FedsysError:
                self._drop(name, kept)
                raise

    def become(self, name: str, fleet: str, epoch: Epoch, frame: Frame) -> EdgeSession:
        """Return the session that a shadow has become; the shadow is no more, whatever happens.

        Raises:
            SessionError: It is not the session: the source is to send the difference.
            FrameError: The frame says something else.
        """
        kept = self._get(name)
        self._drop(name, kept)
        if kept is None or kept.fleet != fleet:
            raise SessionError(f"transfer: no shadow of session {name!r:.40} is here")
        with kept.lock:
            session = kept.session
            sealed = session.sealed(awaited_of(frame.meta.get("awaiting")))
            same = sealed.digest == frame.meta.get("digest")
            if not mirroring.may_become(kept.shadow, epoch, natural(frame, "mirrored"), same):
                raise SessionError(f"transfer: the shadow of session {name} is not the session")
            session.go_on()
            session.spec = replace(session.spec, replicate_every=kept.every)
            session.incarnation = str(frame.meta.get("incarnation"))
            return session

    def never_came(self, name: str, epoch: Epoch) -> None:
        """Forget the shadow of a session that does not come under a token."""
        kept = self._get(name)
        if kept is not None and kept.shadow.epoch == epoch:
            self._drop(name, kept)

    def forget(self, name: str) -> None:
        """Forget the shadow of a session."""
        self._drop(name, self._get(name))

    def names(self) -> list[str]:
        """Return the names of all sessions that have a shadow here."""
        with self._lock:
            return list(self._kept)

    def _get(self, name: str) -> _Kept | None:
        with self._lock:
            return self._kept.get(name)

    def _drop(self, name: str, kept: _Kept | None) -> None:
        with self._lock:
            if kept is not None and self._kept.get(name) is kept:
                del self._kept[name]


def _operation(frame: Frame) -> Frame:
    told = frame.meta.get("operation")
    if not (isinstance(told, list) and len(told) == 2 and isinstance(told[1], dict)):
        raise FrameError("mirror: operation must be a kind and its values")
    return replace(frame, kind=str(told[0]), meta=told[1])
