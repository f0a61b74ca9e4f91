"""Where sessions are opened: at the edge that is wanted, else at the one with the fewest."""

from __future__ import annotations

import dataclasses

from fedsys.errors import LinkError
from fedsys.faults import AT_EDGE, Faults, to_json
from fedsys.offload.fencing import Epoch
from fedsys.offload.fleet_edges import FleetEdges
from fedsys.offload.held_sessions import HeldSessions
from fedsys.offload.snapshot import SessionSpec, Snapshot


class Placing:
    """Opens sessions, each with the faults that strike it.

    Args:
        edges: The edge servers.
        held: The sessions that are open.
        faults: What is to strike edges and links.
    """

    def __init__(self, edges: FleetEdges, held: HeldSessions, faults: Faults) -> None:
        self._edges, self._held, self._faults = edges, held, faults

    def candidates(self, first: str) -> list[str]:
        """Return the edges that can be reached in the order in which they are to be asked."""
        with self._held.lock:
            load, alive = self._held.load(), self._edges.alive
            others = sorted((name for name in alive if name != first), key=load.__getitem__)
            return [name for name in (first, *others) if name in alive]

    def open_at(self, edge: str, spec: SessionSpec, start: Snapshot) -> None:
        """Open a session at an edge, under a token that outranks all others.

        It has the units of `start`, which may be others than when it was opened first.

        Raises:
            LinkError: The edge is gone.
            SessionError: It does not take the session.
        """
        coming = [
            *self._faults.of_round("edge", spec.round),  # of others, too: it may move there
            *(
                f
                for f in self._faults.of_round("link", spec.round)
                if f.who == spec.client and f.position in AT_EDGE
            ),
        ]
        first = spec.first if start.first is None else start.first
        spec = dataclasses.replace(spec, first=first)
        meta = {"spec": spec.to_meta(), "step": start.step, "faults": to_json(coming)}
        meta["epoch"] = list(Epoch(self._held.next_generation(), 0, edge))
        try:
            self._edges.request(edge, "open", meta, start)
        except LinkError:
            self._edges.leave(spec.id, edge)
            raise
