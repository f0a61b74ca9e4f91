"""The sessions of one edge server: which there are, who speaks with each, and who opened it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable

from fedsys.config import EdgeConfig
from fedsys.errors import LinkClosed, LinkError, SessionError
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.snapshot import SessionSpec
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

ORPHAN_S = 900.0
"""How long a session outlives the link of its controller, in seconds."""

_log = logging.getLogger("fedsys.offload.edge")


class SessionTable:
    """Sessions by name. Methods may be called from any thread.

    Args:
        name: Of the edge server, for messages.
        limits: What it takes upon itself: ``max_sessions`` and ``max_session_bytes``.

    Attributes:
        lock: For what is to happen at once; it may be taken again by who holds it.
        counters: Events by name since the start.
    """

    def __init__(self, name: str, limits: EdgeConfig) -> None:
        self.lock, self.counters = threading.RLock(), Counter[str]()
        self._name, self._limits, self._stopped = name, limits, False
        self._sessions: dict[str, EdgeSession] = {}
        self._devices: dict[str, Link] = {}  # the link of each session's device
        self._controllers: dict[str, Link] = {}  # by session: who opened it
        self._orphaned: dict[str, float] = {}  # by session: since when it has no controller
        self._lost: set[str] = set()  # sessions that ended with the process that computed them

    @property
    def names(self) -> list[str]:
        """Names of the sessions that are open."""
        with self.lock:
            return list(self._sessions)

    @property
    def fleets(self) -> set[str]:
        """Secrets of the fleets that have sessions here."""
        with self.lock:
            return {session.spec.fleet for session in self._sessions.values()}

    @property
    def nbytes(self) -> int:
        """Weights and optimizer state of all sessions, in bytes."""
        with self.lock:
            return sum(session.nbytes() for session in self._sessions.values())

    def count(self, event: str, by: int = 1) -> None:
        """Count an event."""
        with self.lock:
            self.counters[event] += by

    def get(self, name: str) -> EdgeSession | None:
        """Return a session; None if there is none."""
        with self.lock:
            return self._sessions.get(name)

    def check_room(self, spec: SessionSpec, nbytes: int = 0) -> None:
        """Check that a session with so many bytes may be held.

        Raises:
            SessionError: It is open already, or there is no room for it.
        """
        with self.lock:
            if self._stopped:
                raise SessionError(f"{self._name} has stopped")
            if spec.id in self._sessions:
                raise SessionError(f"session {spec.id} is open already")
            self.check_room_for(nbytes)

    def check_room_for(self, nbytes: int) -> None:
        """Check that one more session with so many bytes may be held.

        Raises:
            SessionError: There is no room for it.
        """
        limits = self._limits
        with self.lock:
            if self._stopped:
                raise SessionError(f"{self._name} has stopped")
            if len(self._sessions) >= limits.max_sessions:
                raise SessionError(f"{self._name} is full: {limits.max_sessions} sessions")
            held, most = self.nbytes + nbytes, limits.max_session_bytes
            if held > most:
                raise SessionError(f"{self._name} is full: {held} bytes of {most}")

    def check_growth(self, nbytes: int) -> None:
        """Check that a session that is held may have so many bytes more.

        Raises:
            SessionError: There is no room for them.
        """
        with self.lock:
            held, most = self.nbytes + nbytes, self._limits.max_session_bytes
            if held > most:
                raise SessionError(f"{self._name} is full: {held} bytes of {most}")

    def hold(self, session: EdgeSession, controller: Link | None) -> None:
        """Take a session in; without a controller it waits for one that claims it.

        Raises:
            SessionError: As `check_room`.
            LinkClosed: The process is gone that would compute it.
        """
        name = session.spec.id
        with self.lock:
            self.check_room(session.spec, session.nbytes())
            if session.lost:
                raise LinkClosed(f"session {name}: its process has ended")
            self._sessions[name] = session
            self._lost.discard(name)
            if controller is None:
                self._orphaned[name] = time.monotonic()
            else:
                self._controllers[name] = controller

    def attach(self, name: str, link: Link) -> None:
        """Have a device speak over a link, and end the one that it spoke over before."""
        with self.lock:
            former, self._devices[name] = self._devices.get(name), link
        if former is not None:
            former.close()  # a device that comes back has lost its link, and may not know it yet

    def detach(self, name: str, link: Link) -> bool:
        """Take note that a device's link ended; return whether it has no other one by now."""
        with self.lock:
            if self._devices.get(name) is not link:
                return False
            del self._devices[name]
            return name in self._sessions

    def device_link(self, name: str) -> Link | None:
        """Return the link over which a session's device speaks; None if it has none."""
        with self.lock:
            return self._devices.get(name)

    def claim(self, names: Iterable[object], link: Link) -> None:
        """Send to `link` what concerns some sessions: their controller is back.

        It is told which of them there are: those that were lost are as any that never were here.
        """
        with self.lock:
            for name in names:
                self._lost.discard(str(name))
                if isinstance(name, str) and name in self._sessions:
                    self._controllers[name] = link
                    self._orphaned.pop(name, None)

    def orphan(self, link: Link) -> None:
        """Remember since when the sessions of a controller are without one."""
        with self.lock:
            for name in [n for n, one in self._controllers.items() if one is link]:
                del self._controllers[name]
                self._orphaned[name] = time.monotonic()

    def long_orphaned(self) -> list[str]:
        """Return the sessions whose controller went away and did not come back."""
        since = time.monotonic() - ORPHAN_S
        with self.lock:
            return [name for name, moment in self._orphaned.items() if moment < since]

    def release(self, name: str) -> None:
        """Forget a session and end the link of its device."""
        with self.lock:
            self._sessions.pop(name, None)
            self._controllers.pop(name, None)
            self._orphaned.pop(name, None)
            link = self._devices.pop(name, None)
        if link is not None:
            link.close()
        self.count("released")

    def lose(self, sessions: Iterable[EdgeSession]) -> tuple[list[str], list[Link]]:
        """Forget sessions that ended with the process that computed them.

        Returns:
            Their names, and the links of those who had to do with them: first of controllers.
        """
        with self.lock:
            names = [s.spec.id for s in sessions if self._sessions.get(s.spec.id) is s]
            self._lost.update(names)
            for name in names:
                del self._sessions[name]
                self._orphaned.pop(name, None)
            whose = self._controllers, self._devices
            links = [found.pop(name, None) for found in whose for name in names]
        return names, list(dict.fromkeys(link for link in links if link is not None))

    def was_lost(self, name: str) -> bool:
        """Return whether a session was lost, and its controller was not back since."""
        with self.lock:
            return name in self._lost

    def tell(self, name: str, frame: Frame) -> bool:
        """Send a frame to the controller of a session; return whether that could be done."""
        with self.lock:
            link = self._controllers.get(name)
        if link is None:
            return False
        try:
            link.send(frame)
        except LinkError as error:
            _log.warning("session %s: its %s was not sent: %s", name, frame.kind, error)
            return False
        return True

    def stop(self) -> list[EdgeSession]:
        """Take in no more; return the sessions that are there, whose controllers stay known."""
        with self.lock:
            self._stopped = True
            return list(self._sessions.values())

    def discard(self, name: str) -> None:
        """Have a session no more, and leave its links as they are."""
        with self.lock:
            self._sessions.pop(name, None)

    def kill(self) -> bool:
        """Forget everything; return whether that is new."""
        with self.lock:
            if self._stopped:  # by another session; waiting for each other helps nobody
                return False
            self._stopped = True
            self._sessions.clear()
            self._controllers.clear()
            return True
