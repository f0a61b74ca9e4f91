"""The server app's handle on all edge servers, which also watches and acts during a round.

Flower's server waits for replies while clients train. The fleet does not wait: it keeps a link to
every edge server, notices when one is gone, and opens the sessions that were there again on
another one, from the newest state that it has of them (the start of the round, or a replica). The
devices find them by asking at the edges that their assignment names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from fedsys.config import EdgeAddress
from fedsys.errors import FedsysError, LinkError, SessionError
from fedsys.faults import Faults, from_json
from fedsys.offload.fleet_edges import FleetEdges
from fedsys.offload.held_sessions import Held, HeldSessions
from fedsys.offload.placing import Placing
from fedsys.offload.recovery import EdgeRecovery, Recovery
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.security import Credentials
from fedsys.transport.wire import Frame

_log = logging.getLogger(__name__)


class Fleet:
    """All edge servers of a run. Methods may be called from any thread.

    Args:
        edges: Where they are.
        credentials: For mutual TLS.
        control_token: For edges that were started with one.
        plain: Accept unprotected links to other hosts.
        faults: What is to strike edges and links; sessions are opened with theirs.

    Raises:
        LinkError: An edge does not answer; the message names it.
    """

    def __init__(
        self,
        edges: Sequence[EdgeAddress],
        *,
        credentials: Credentials | None = None,
        control_token: str = "",
        plain: bool = False,
        faults: Faults | None = None,
    ) -> None:
        self._faults, self._held = faults or Faults(), HeldSessions()
        self._edges = FleetEdges(
            edges,
            self._held,
            credentials=credentials,
            token=control_token,
            plain=plain,
            struck=self._on_struck,
            lost=lambda name: self._recovery.on_lost(name),
        )
        self._placing = Placing(self._edges, self._held, self._faults)
        self._recovery = EdgeRecovery(self._edges, self._held, self._placing)
        with self._recovery.lock:  # an edge that is lost meanwhile is dealt with later, or never
            try:
                for edge in edges:
                    self._edges.clients[edge.name] = self._edges.reach(edge)
            except BaseException:
                self.close()
                raise
        self._edges.watch()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what is open and end the links."""
        self._edges.closing.set()
        for name in self._held.names():
            self.release(name)
        self._edges.close()

    @property
    def edges(self) -> list[EdgeAddress]:
        """All edges of the run, whether they can be reached or not."""
        return list(self._edges.addresses.values())

    @property
    def alive(self) -> list[str]:
        """Names of the edges that can be reached."""
        return self._edges.alive

    def device_addresses(self, first: str) -> list[str]:
        """Return where a device asks, beginning with the edge that has its session."""
        addresses = self._edges.addresses
        names = [first, *(name for name in addresses if name != first)]
        return [addresses[name].for_devices for name in names]

    def revive(self) -> None:
        """Reach the edges again that were lost: they may have been started anew."""
        edges = self._edges
        for name in set(edges.addresses) - set(edges.alive):
            with self._recovery.lock, suppress(FedsysError):
                edges.clients[name] = edges.reach(edges.addresses[name], again=True)

    def open(self, spec: SessionSpec, start: Snapshot, edge: str) -> str:
        """Open a session and return the name of its edge: `edge`, or another if that is gone.

        Raises:
            SessionError: No edge can take it; with what the last one said.
        """
        problem = "no edge server is left"
        for name in self._placing.candidates(edge):
            try:
                self._placing.open_at(name, spec, start)
            except (LinkError, SessionError) as error:
                problem = str(error)
                continue
            held = Held(spec, start, name)
            with self._held.lock:
                self._held.add(held)
                lost = self._edges.clients[name].lost
            if lost:  # since it answered: whoever took note of that may not have seen the session
                self._recovery.on_lost(name)
            return held.edge
        raise SessionError(f"session of client {spec.client}: {problem}")

    def collect(self, session: str) -> Snapshot:
        """Return the state of a session as it stands, or stood when its edge handed it back.

        Raises:
            SessionError: There is no such session, or its edge is gone.
        """
        held = self._held.get(session)
        if held is None:
            raise SessionError(f"session {session} is not open")
        asked = held.edge
        try:
            frame = self._edges.request(asked, "collect", {"session": session})
        except (LinkError, SessionError):
            with self._recovery.lock:  # its device may have gone on where it is being opened
                moved = held.edge != asked
            if moved:
                return self.collect(session)
            if held.returned is None:
                raise
            return held.returned  # an edge that stops hands its sessions back
        return Snapshot.from_frame(frame)

    def release(self, session: str) -> None:
        """Close a session; nothing happens if it is not open."""
        held = self._held.pop(session)
        if held is None:
            return
        try:
            self._edges.request(held.edge, "release", {"session": session})
        except (LinkError, SessionError) as error:  # an edge that is gone has released it
            _log.debug("session %s: %s", session, error)

    def recoveries(self) -> list[Recovery]:
        """Return what was done about losses since the last call."""
        with self._held.lock:
            done, self._recovery.done = self._recovery.done, []
        return done

    def _on_struck(self, frame: Frame) -> None:
        for fault in from_json(str(frame.meta.get("faults", "[]"))):
            self._faults.fire(fault)
