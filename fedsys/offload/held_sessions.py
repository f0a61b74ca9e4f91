"""The sessions that a server app has open somewhere, with the newest state that it has of each."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.wire import Frame


@dataclass
class Held:
    """A session that is open somewhere.

    Attributes:
        spec: What its edge was told.
        newest: Its state at a step to which the device can return, too.
        edge: Name of its edge.
        returned: What the edge sent last, at whatever step; None: nothing.
        start: Its state when it was opened first; None: `newest`.
        trail: Edges that may have a copy of it beside the one that has it.
        wanted: Name of the edge at which its device is, as far as that is known to be another one.
        began_s: When it was opened first, of the monotonic clock.
        gone_s: When its device was gone; None: it is there, for all that is known.
        nowhere_s: The `gone_s` for which every edge server said that it does not have the device.
    """

    spec: SessionSpec
    newest: Snapshot
    edge: str
    returned: Snapshot | None = None
    start: Snapshot | None = None
    trail: set[str] = field(default_factory=set)
    wanted: str = ""
    began_s: float = field(default_factory=time.monotonic)
    gone_s: float | None = None
    nowhere_s: float | None = None


class HeldSessions:
    """Sessions by name. Methods may be called from any thread.

    A request whose answer is lost may have been carried out: a session of which it is not known
    whether an edge has it, and which is not wanted there, is *left*, to be released later.

    Attributes:
        lock: For what is to happen at once; it may be taken again by who holds it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._held: dict[str, Held] = {}
        self._left: dict[str, set[str]] = {}
        self._generations = itertools.count(1)

    def next_generation(self) -> int:
        """Return a number larger than all before, for the token of a session that is opened."""
        with self.lock:
            return next(self._generations)

    def __getitem__(self, session: str) -> Held:
        with self.lock:
            return self._held[session]

    def get(self, session: str) -> Held | None:
        """Return a session; None if it is not open."""
        with self.lock:
            return self._held.get(session)

    def add(self, held: Held) -> None:
        """Take a session in."""
        with self.lock:
            self._held[held.spec.id] = held

    def pop(self, session: str) -> Held | None:
        """Forget a session and return it; None if it is not open."""
        with self.lock:
            return self._held.pop(session, None)

    def names(self) -> list[str]:
        """Return the names of all sessions."""
        with self.lock:
            return list(self._held)

    def all(self) -> list[Held]:
        """Return all sessions."""
        with self.lock:
            return list(self._held.values())

    def leave(self, session: str, edge: str) -> None:
        """Take note that an edge may have a session that is not wanted there."""
        with self.lock:
            self._left.setdefault(edge, set()).add(session)

    def left(self, edge: str) -> list[str]:
        """Return what was left at an edge."""
        with self.lock:
            return sorted(self._left.get(edge, ()))

    def take_left(self, session: str, edge: str) -> bool:
        """Forget that a session was left at an edge; return whether it is to be released there."""
        with self.lock:
            left = self._left.get(edge, set())
            noted = session in left
            left.discard(session)
            return noted and all(held.spec.id != session for held in self.at(edge))

    def at(self, edge: str) -> list[Held]:
        """Return the sessions of an edge."""
        with self.lock:
            return [held for held in self._held.values() if held.edge == edge]

    def load(self) -> Counter[str]:
        """Return the number of sessions by edge."""
        with self.lock:
            return Counter(held.edge for held in self._held.values())

    def take_in(self, frame: Frame) -> None:
        """Take in a replica or a handover that an edge sent."""
        snapshot = Snapshot.from_frame(frame)
        with self.lock:
            held = self._held.get(str(frame.meta.get("session")))
            if held is None:
                return
            held.returned = snapshot
            if frame.kind == "handover":  # between two steps, as its device is
                held.newest = snapshot
                return
            every = held.spec.replicate_every  # only then the device keeps its half too
            if every and snapshot.step % every == 0 and snapshot.step > held.newest.step:
                held.newest = snapshot
