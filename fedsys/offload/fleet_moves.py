"""What the server app learns of sessions that move, and what it does where edges cannot."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from fedsys.errors import FedsysError
from fedsys.offload.absences import limit_s
from fedsys.offload.fleet_edges import FleetEdges
from fedsys.offload.held_sessions import Held, HeldSessions
from fedsys.offload.placing import Placing
from fedsys.offload.snapshot import Snapshot
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.fleet")


class FleetMoves:
    """Follows sessions from edge to edge. Methods may be called from any thread.

    Args:
        edges: The edge servers.
        held: The sessions that are open.
        placing: Opens them.
    """

    def __init__(self, edges: FleetEdges, held: HeldSessions, placing: Placing) -> None:
        self._edges, self._held, self._placing = edges, held, placing
        self._opening: set[str] = set()

    def told(self, edge: str, frame: Frame) -> None:
        """Take in what an edge says: that it has a copy, has the device, or cannot fetch one.

        Or that the device's link ended before its round was done, or that it is back.
        """
        with self._held.lock:
            held = self._held.get(str(frame.meta.get("session", "")))
            if held is None:
                return
            if frame.kind == "staged":
                held.trail.add(edge)
            elif frame.kind == "gone":
                if edge == held.edge:  # else it is elsewhere by now
                    held.gone_s = time.monotonic()
            elif frame.kind == "back":
                held.gone_s = None
            elif frame.kind == "moved":
                held.gone_s = None
                self.is_at(held, edge)
            else:
                held.wanted = edge
                self._open_there(held, edge, frame)

    def missing(self, away_s: Mapping[int, float]) -> dict[int, str]:
        """Return why clients are not waited for any more: they left, and arrived nowhere in time.

        Args:
            away_s: Seconds for which some are known to be out of reach.
        """
        found = {}
        with self._held.lock:
            left = [(held, held.gone_s) for held in self._held.all() if held.gone_s is not None]
        for held, gone_s in left:
            limit = limit_s(held.began_s, gone_s, away_s.get(held.spec.client, 0.0))
            if time.monotonic() - gone_s > limit and not self._is_back(held, gone_s):
                found[held.spec.client] = (
                    f"it left {held.edge} and arrived at no edge server within {limit:.0f} s"
                )
        return found

    def _is_back(self, held: Held, gone_s: float) -> bool:
        """Return whether a device that left is somewhere; edge servers are asked once for that.

        Args:
            held: Its session.
            gone_s: When it was gone; it may be told meanwhile that it came.
        """
        if held.gone_s == gone_s and held.nowhere_s != gone_s:
            somewhere = self._is_somewhere(held.spec.id)
            with self._held.lock:
                if held.gone_s == gone_s and somewhere:
                    held.gone_s = None
                elif held.gone_s == gone_s:
                    held.nowhere_s = gone_s
        return held.gone_s != gone_s

    def _is_somewhere(self, session: str) -> bool:
        """Ask all edge servers whether a device is there: the word of that may have been lost."""
        for edge in self._edges.alive:
            try:
                if self._edges.request(edge, "present", {"session": session}).meta.get("device"):
                    return True
            except FedsysError:  # it does not have it, or is gone
                continue
        return False

    def is_at(self, held: Held, edge: str) -> None:
        """Take note of the edge that has a session."""
        with self._held.lock:
            if edge and edge != held.edge and edge in self._edges.addresses:
                held.trail.add(held.edge)
                held.edge, held.wanted = edge, ""

    def _open_there(self, held: Held, edge: str, frame: Frame) -> None:
        """Open a session at the edge where its device is, if nobody else does."""
        anew, source = frame.meta.get("anew") is True, str(frame.meta.get("from", ""))
        client = self._edges.clients.get(source)
        lost = client is None or client.lost
        if held.spec.id in self._opening or (lost and not anew):
            return  # whoever deals with the loss opens it there
        self._opening.add(held.spec.id)
        threading.Thread(
            target=self._relay, args=(held, edge, source, anew), name=f"opens at {edge}",
            daemon=True,
        ).start()  # fmt: skip

    def _relay(self, held: Held, edge: str, source: str, anew: bool) -> None:
        """Bring a session to an edge that cannot reach the one that has it."""
        session = held.spec.id
        try:
            if anew:
                start = held.start or held.newest
            else:
                frame = self._edges.request(source, "collect", {"session": session})
                start = Snapshot.from_frame(frame)
            self._placing.open_at(edge, held.spec, start)
            with self._held.lock:
                wanted = self._held.get(session) is held
                if wanted and anew:
                    held.newest = start
            if wanted:
                self.is_at(held, edge)
            else:  # it was released meanwhile
                self._edges.leave(session, edge)
        except FedsysError as error:
            _log.warning("session %s is not opened at %s: %s", session, edge, error)
        finally:
            self._opening.discard(session)
