"""The links of a server app to its edge servers: made, asked over, watched, and made again."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from fedsys.config import EdgeAddress
from fedsys.errors import (
    FedsysError,
    LinkClosed,
    LinkError,
    LinkRefused,
    LinkTimeout,
    SecurityError,
    SessionError,
)
from fedsys.offload.edge_client import EdgeClient, Hooks
from fedsys.offload.held_sessions import HeldSessions
from fedsys.offload.snapshot import Snapshot
from fedsys.transport.addresses import dial
from fedsys.transport.link import Link
from fedsys.transport.patience import Allowance, Patience
from fedsys.transport.security import Credentials, new_token
from fedsys.transport.wire import Frame

REDIAL_S = (0.0, 0.2, 0.5)
"""Waits before the attempts to reach an edge again whose link was lost and that does not refuse."""

LAST_REDIALS = 3
"""How many more attempts there are where no other edge is left; before each of them stands the
time limit of a link, twice as long each time."""

AGAIN_S = 30.0
"""How long a phase of a round waits at most, all edges and sessions together, for edges whose links
are lost. Then sessions are opened at edges that are there, or their devices train alone."""

REVIVE_S = 5.0
"""How long at most, in seconds, a round that begins tries to reach edges that were lost before."""

FIRST_DIALS = 5
"""How many times a run that begins tries to reach an edge whose link is lost again at once."""

ANSWER_S = 10.0
"""How long an edge may take to accept the first link, in seconds; then round trips tell."""

LEAST_ANSWER_S = 1.0
"""Shortest such limit, in seconds: certificates are checked on machines that are busy."""

BEAT_S = 1.0
"""Seconds between two looks at the heartbeats of the edges."""

ASKED = 2
"""How many times an edge whose heartbeat is late is asked over new links, until it is given up."""


class FleetEdges:
    """Links to edge servers by name. Methods may be called from any thread.

    Args:
        edges: Where they are.
        held: The sessions that are open at them.
        credentials: For mutual TLS.
        token: For edges that were started with one.
        plain: Accept unprotected links to other hosts.
        struck: Called with faults that are about to strike; returns whether they had before.
        lost: Called with the name of an edge whose link is lost, in a thread of its own.
        told: Called with the name of an edge and what it says of moves of sessions.
        between: What edges are told of the links between them: ``mbit_s`` and ``latency_ms``, to
            make them as slow as that; empty leaves them as they are.

    Attributes:
        addresses: Where the edges are, by name.
        clients: The links, by name; those that are lost too, until they are made again.
        closing: Set when all is over.
        allowance: What waiting for lost edges may take; granted anew by `reach_lost`.
        secret: What the edges know each other by; empty where there is only one.
    """

    def __init__(
        self,
        edges: Sequence[EdgeAddress],
        held: HeldSessions,
        *,
        credentials: Credentials | None,
        token: str,
        plain: bool,
        struck: Callable[[Frame], bool],
        lost: Callable[[str], None],
        told: Callable[[str, Frame], None],
        between: Mapping[str, float] | None = None,
    ) -> None:
        self.secret, self._between = new_token() if len(edges) > 1 else "", dict(between or {})
        self.addresses = {edge.name: edge for edge in edges}
        self.clients: dict[str, EdgeClient] = {}
        self.closing = threading.Event()
        self._held, self._credentials, self._token, self._plain = held, credentials, token, plain
        self._patience = Patience(ANSWER_S, LEAST_ANSWER_S)  # for a new link to an edge
        self.allowance = Allowance(AGAIN_S)
        self._hooks = Hooks(held.take_in, struck, told, lost, self.answers)

    @property
    def alive(self) -> list[str]:
        """Names of the edges that can be reached."""
        with self._held.lock:
            return [name for name, edge in self.clients.items() if not edge.lost]

    def watch(self) -> None:
        """Give up edges that fall silent, from now on in a thread of its own."""
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()

    def close(self) -> None:
        """End the links."""
        for edge in self.clients.values():
            edge.close()

    def reach_lost(self) -> None:
        """Reach the edges again that were lost, all at the same time: they may be there anew."""
        self.allowance.renew()
        lost = sorted(set(self.addresses) - set(self.alive))
        if lost:
            with ThreadPoolExecutor(len(lost), thread_name_prefix="revives") as pool:
                list(pool.map(self._revive, lost))

    def _revive(self, name: str) -> None:
        with suppress(FedsysError):
            self.clients[name] = self.reach(self.addresses[name], again=True, most_s=REVIVE_S)
            self.settle(name)

    def reach(
        self, edge: EdgeAddress, *, again: bool = False, most_s: float = math.inf
    ) -> EdgeClient:
        """Return a new link to an edge.

        Args:
            edge: The edge.
            again: Whether it was reached before; then one that refuses is not waited for.
            most_s: Longest time for its system to accept, in seconds.

        Raises:
            LinkError: It does not answer; the message names it.
            SecurityError: One end does not accept the other.
        """
        attempts = 1 if again else FIRST_DIALS
        while True:
            attempts -= 1
            try:
                link = self._dial(edge.address, retry=not again, most_s=most_s)
            except (LinkError, SecurityError) as error:
                raise type(error)(f"edge server {edge.name}: {error}") from error
            try:
                client = EdgeClient(edge.name, link, self._token, self._hooks)
                self._introduce(client)
                return client
            except LinkClosed:
                if not attempts or self.closing.wait(REDIAL_S[1]):
                    raise

    def _introduce(self, client: EdgeClient) -> None:
        """Tell an edge of the others, between which sessions move."""
        if not self.secret:
            return
        edges = [
            {"name": edge.name, "address": edge.address, "devices": edge.for_devices}
            for edge in self.addresses.values()
        ]
        client.request("fleet", {"secret": self.secret, "edges": edges, **self._between}, {})

    def request(
        self, name: str, kind: str, meta: Mapping[str, object], snapshot: Snapshot | None = None
    ) -> Frame:
        """Send a request to an edge and return its reply.

        Raises:
            SessionError: The edge refused.
            LinkError: It is gone, or does not answer any more.
        """
        tensors = snapshot.tensors() if snapshot is not None else {}
        client = self.clients[name]
        try:
            return client.request(kind, meta, tensors)
        except LinkTimeout:  # it was asked; the next request need not find out again
            self._give_up(name, client)
            raise

    def answers(self, name: str) -> bool:
        """Ask an edge over a new link whether it is alive."""
        with self.allowance.spending():
            for _ in range(ASKED):
                try:
                    link = self._dial(self.addresses[name].address, most_s=self._left_s)
                except LinkRefused:
                    return False
                except FedsysError:
                    continue
                if self._greeted(link):
                    return True
            return False

    def _greeted(self, link: Link) -> bool:
        """Return whether an edge says over a new link that it may be controlled; ends the link."""
        began = time.monotonic()
        try:
            link.send(Frame("control", {"token": self._token}))
            link.recv(min(self._patience.limit_s, self._left_s))
            return True
        except LinkError:
            self._patience.failed(time.monotonic() - began)
            return False
        finally:
            link.close()

    @property
    def _left_s(self) -> float:
        """How long one more question may take: who asks gets at least a moment."""
        return max(self.allowance.left_s, LEAST_ANSWER_S)

    def still_there(self, name: str) -> set[str]:
        """Reach an edge again if its link is lost; return its sessions of this run.

        Returns:
            None of them if it is gone.
        """
        if self.clients[name].silent:  # it was asked already
            return set()
        with self.allowance.spending():
            return self._sessions_found(name)

    def _sessions_found(self, name: str) -> set[str]:
        for wait in self._waits(name):
            if wait >= self.allowance.left_s or self.closing.wait(wait):
                return set()
            edge = self.clients[name]
            new = edge.lost
            try:
                if new:
                    edge = self.reach(self.addresses[name], again=True, most_s=self._left_s)
                return self._claimed(name, edge)
            except LinkRefused:  # its process is gone, and its sessions with it
                return set()
            except FedsysError:
                if new and edge is not self.clients[name]:
                    edge.close()
        return set()

    def leave(self, session: str, name: str) -> None:
        """Have a session that an edge may have released there, once the edge can be reached.

        Who makes it again may have looked for what was left before this was noted.
        """
        self._held.leave(session, name)
        self._release_left(session, name)

    def settle(self, name: str) -> None:
        """Release what was left at an edge when links to it were lost."""
        for session in self._held.left(name):
            self._release_left(session, name)

    def _release_left(self, session: str, name: str) -> None:
        while not self.clients[name].lost and self._held.take_left(session, name):
            try:
                self.request(name, "release", {"session": session})
            except LinkError:
                self._held.leave(session, name)
            except SessionError:  # it never had it
                return

    def _claimed(self, name: str, edge: EdgeClient) -> set[str]:
        """Take the sessions of an edge over to a link; return those that are there.

        Raises:
            FedsysError: The link is lost.
        """
        mine = self._sessions_at(name)
        there = edge.request("ping", {"sessions": mine}, {}).meta.get("sessions")
        with self._held.lock:
            self.clients[name] = edge
        self.settle(name)
        return set(mine) & set(there if isinstance(there, list) else [])

    def _waits(self, name: str) -> Iterator[float]:
        yield from REDIAL_S
        for doubled in range(LAST_REDIALS):
            if set(self.alive) - {name}:
                return
            yield self._patience.limit_s * 2**doubled

    def _watch(self) -> None:
        while not self.closing.wait(BEAT_S):
            for name, edge in list(self.clients.items()):
                if edge.is_late() and not self.answers(name):
                    self._give_up(name, edge)

    def _give_up(self, name: str, edge: EdgeClient) -> None:
        if not edge.lost:
            edge.abandon(self._sessions_at(name))

    def _sessions_at(self, name: str) -> list[str]:
        return [held.spec.id for held in self._held.at(name)]

    def _dial(self, address: str, *, retry: bool = False, most_s: float = math.inf) -> Link:
        began, limit = time.monotonic(), min(self._patience.limit_s, most_s)
        try:
            link = dial(
                address,
                credentials=self._credentials,
                plain=self._plain,
                timeout_s=limit,
                retry=retry,
            )
        except LinkRefused:
            raise
        except LinkError:
            self._patience.failed(time.monotonic() - began)
            raise
        self._patience.saw(time.monotonic() - began)
        return link
