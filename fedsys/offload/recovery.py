"""What is done about an edge server that is lost: its sessions are opened again elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from fedsys.errors import LinkError, SessionError
from fedsys.offload.edge_client import EdgeClient
from fedsys.offload.fleet_edges import FleetEdges
from fedsys.offload.held_sessions import Held, HeldSessions
from fedsys.offload.placing import Placing
from fedsys.offload.snapshot import Snapshot

_log = logging.getLogger("fedsys.offload.fleet")


@dataclass(frozen=True)
class Recovery:
    """What the fleet did about a loss.

    Attributes:
        session: Which session.
        client: Its client.
        source: Edge that was lost.
        target: Edge that has it now; empty if there was none.
        step: Step from which it goes on.
        seconds: From the loss until it was open again.
    """

    session: str
    client: int
    source: str
    target: str
    step: int
    seconds: float


class EdgeRecovery:
    """Moves the sessions of edges that are lost. Methods may be called from any thread.

    Args:
        edges: The edge servers.
        held: The sessions that are open.
        placing: Opens them.

    Attributes:
        lock: Held while a loss is dealt with: an edge that flaps is dealt with once at a time.
        done: What was done.
    """

    def __init__(self, edges: FleetEdges, held: HeldSessions, placing: Placing) -> None:
        self.lock, self.done = threading.Lock(), list[Recovery]()
        self._dealt: dict[str, EdgeClient] = {}  # by edge: the link whose loss was dealt with
        self._edges, self._held, self._placing = edges, held, placing

    def on_lost(self, name: str, *, again: bool = False) -> None:
        """Reach an edge again, or open its sessions elsewhere; returns when that is done.

        Args:
            name: The edge.
            again: Whether to look anew at a loss that was dealt with: there is another session.
        """
        began = time.perf_counter()
        with self.lock:
            if self._edges.closing.is_set():
                return
            lost = self._edges.clients[name]
            if not again and (not lost.lost or self._dealt.get(name) is lost):
                return
            self._dealt[name] = lost
            self._move_sessions(name, self._edges.still_there(name), began)

    def regained(self, name: str) -> bool:
        """Return whether an edge can be reached, once the loss of its link was dealt with."""
        self.on_lost(name)
        return not self._edges.clients[name].lost

    def _move_sessions(self, name: str, kept: set[str], began: float) -> None:
        """Open the sessions of an edge elsewhere, or there if it was started anew.

        Args:
            name: The edge.
            kept: Sessions that it still has.
            began: When it was lost, by `time.perf_counter`.
        """
        orphans = [held for held in self._held.at(name) if held.spec.id not in kept]
        if not orphans and name in self._edges.alive:
            return
        _log.warning("edge server %s is lost, with %d sessions", name, len(orphans))
        for held in orphans:
            session, start = held.spec.id, held.newest
            target = self._open_anywhere(held, start, name)
            seconds = time.perf_counter() - began
            with self._held.lock:
                wanted = self._held.get(session) is held
                held.edge, held.gone_s = target or name, None
                self.done.append(
                    Recovery(session, held.spec.client, name, target, start.step, seconds)
                )
            if target and not wanted:  # it was released in the meantime
                self._edges.leave(session, target)

    def _open_anywhere(self, held: Held, start: Snapshot, first: str) -> str:
        """Open a session at the first edge that takes it; return its name, or nothing.

        It is a move whose source is gone: what is still trained elsewhere has an older token.
        """
        for name in self._placing.candidates(held.wanted or first):
            try:
                self._placing.open_at(name, held.spec, start)
            except (LinkError, SessionError) as error:
                _log.warning("edge server %s: %s", name, error)
                continue
            return name
        return ""
