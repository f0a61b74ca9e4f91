"""The server app's handle on all edge servers, which also watches and acts during a round.

Flower's server waits for replies while clients train. The fleet does not wait: it keeps a link to
every edge server, notices when one is gone, and opens the sessions that were there again on
another one, from the newest state that it has of them (the start of the round, or a replica). The
devices find them by asking at the edges that their assignment names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedsys.config import EdgeAddress
from fedsys.errors import LinkError, SessionError
from fedsys.faults import Faults, from_json
from fedsys.offload.edge_client import EdgeClient
from fedsys.offload.fleet_edges import FleetEdges
from fedsys.offload.fleet_moves import FleetMoves
from fedsys.offload.held_sessions import Held, HeldSessions
from fedsys.offload.placing import Placing
from fedsys.offload.recovery import EdgeRecovery, Recovery
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.security import Credentials
from fedsys.transport.wire import Frame

_log = logging.getLogger(__name__)

TRIES = 4
"""How many times a request is made of edges whose links are lost and made again."""


class Unreachable(SessionError):
    """No edge can be reached that might take the session: those that are there refused nothing."""


class Fleet:
    """All edge servers of a run. Methods may be called from any thread.

    Args:
        edges: Where they are.
        credentials: For mutual TLS.
        control_token: For edges that were started with one.
        plain: Accept unprotected links to other hosts.
        faults: What is to strike edges and links; sessions are opened with theirs.
        between: How slow links between edges are made: ``mbit_s``, ``latency_ms``; None: as they
            are.

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
        between: Mapping[str, float] | None = None,
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
            told=lambda name, frame: self._moves.told(name, frame),
            between=between,
        )
        self._placing = Placing(self._edges, self._held, self._faults)
        self._moves = FleetMoves(self._edges, self._held, self._placing)
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
        with self._recovery.lock:
            self._edges.reach_lost()

    def open(self, spec: SessionSpec, start: Snapshot, edge: str) -> str:
        """Open a session and return the name of its edge: `edge`, or another if that is gone.

        An edge whose link is lost meanwhile is reached again, and asked again, as long as there is
        time for that in this phase (`fedsys.offload.fleet_edges.AGAIN_S`).

        Raises:
            SessionError: An edge refuses it, and no other takes it; with what it said.
            Unreachable: No edge is left.
        """
        spec = replace(spec, fleet=self._edges.secret)
        refused: dict[str, str] = {}
        problem = "no edge server is left"
        for _ in range(TRIES):
            for name in self._placing.candidates(edge):
                if name in refused:
                    continue
                link = self._edges.clients[name]
                try:
                    self._placing.open_at(name, spec, start)
                except SessionError as error:
                    refused[name] = problem = str(error)
                except LinkError as error:
                    problem = str(error)
                else:
                    return self._hold(Held(spec, start, name, start=start), link)
            lost = [n for n in self._edges.addresses if n not in refused]
            if not [name for name in lost if self._recovery.regained(name)]:
                break
        kind = SessionError if refused else Unreachable
        raise kind(f"session of client {spec.client}: {problem}")

    def _hold(self, held: Held, link: EdgeClient) -> str:
        """Take in a session that was opened over a link; return its edge."""
        with self._held.lock:
            self._held.add(held)
            lost = link.lost or self._edges.clients[held.edge] is not link
        if lost:  # since it answered: whoever took note of that may not have seen the session
            self._recovery.on_lost(held.edge, again=True)
        return held.edge

    def collect(self, session: str, at: str = "") -> Snapshot:
        """Return the state of a session as it stands, or stood when its edge handed it back.

        Args:
            session: Its name.
            at: Edge at which its device trained last; empty: where it was opened last.

        Raises:
            SessionError: There is no such session.
            LinkError: Its edge is gone.
        """
        held = self._held.get(session)
        if held is None:
            raise SessionError(f"session {session} is not open")
        self._moves.is_at(held, at)
        for _ in range(TRIES):
            asked = held.edge
            try:
                frame = self._edges.request(asked, "collect", {"session": session})
                return Snapshot.from_frame(frame)
            except (LinkError, SessionError) as error:
                problem = error
            # Its device may have gone on where it is being opened, or its edge be reached again.
            again = self._recovery.regained(asked) and isinstance(problem, LinkError)
            if held.edge == asked and not again:
                break
        if held.returned is None:
            raise problem
        return held.returned  # an edge that stops hands its sessions back

    def release(self, session: str) -> None:
        """Close a session; nothing happens if it is not open."""
        held = self._held.pop(session)
        if held is None:
            return
        for edge in {held.edge, *held.trail}:
            try:
                self._edges.request(edge, "release", {"session": session})
            except LinkError:  # it is released when the edge is reached again, if it is not gone
                self._edges.leave(session, edge)
            except SessionError as error:
                _log.debug("session %s: %s", session, error)

    def move(self, session: str, edge: str) -> None:
        """Have a session go to another edge; its device learns of it when it is there.

        Raises:
            SessionError: There is no such session, or no such edge.
            LinkError: The edge that has it is gone.
        """
        held = self._held.get(session)
        if held is None:
            raise SessionError(f"session {session} is not open")
        self._edges.request(held.edge, "move", {"session": session, "to": edge})

    def missing(self, away_s: Mapping[int, float]) -> dict[int, str]:
        """Return why clients are not waited for any more: they left, and arrived nowhere in time.

        Args:
            away_s: Seconds for which some clients are known to be out of reach.
        """
        return self._moves.missing(away_s)

    def expect(self, edge: str, token: str) -> None:
        """Have an edge let a device measure its link that presents a token.

        Raises:
            SessionError: The edge refused.
            LinkError: It is gone.
        """
        self._edges.request(edge, "expect", {"token": token})

    def recoveries(self) -> list[Recovery]:
        """Return what was done about losses since the last call."""
        with self._held.lock:
            done, self._recovery.done = self._recovery.done, []
        return done

    def _on_struck(self, frame: Frame) -> bool:
        struck = from_json(str(frame.meta.get("faults", "[]")))
        return not any([self._faults.fire(fault) for fault in struck])
