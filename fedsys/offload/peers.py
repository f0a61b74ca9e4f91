"""Edge servers among each other: who belongs to the fleet of a run, and links between them.

A server app tells each of its edge servers of all of them, with a secret of the run. An edge
accepts another one that has both: the secret, and, where links are protected, a certificate whose
name is that of the edge which it says it is.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.errors import (
    FrameError,
    LinkError,
    LinkTimeout,
    RemoteError,
    SecurityError,
    SessionError,
)
from fedsys.transport.addresses import dial
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.network import Network
from fedsys.transport.security import Credentials, same_token
from fedsys.transport.shaping import Shaped
from fedsys.transport.wire import Frame, Limits

CONNECT_S = 5.0
"""How long an edge server waits for another one to accept a link, in seconds."""

ANSWER_S = 10.0
"""How long it waits for an answer, in seconds, besides the time for the bytes of the question."""

LEAST_BYTES_S = 1 << 18
"""Bytes per second that a link between edge servers is expected to carry at least."""

_IDLE = 4  # links to one edge that are kept for later


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where another edge server is, for edge servers and for devices."""

    name: str
    address: str
    device_address: str


@dataclass(frozen=True, slots=True)
class PeerGroup:
    """The edge servers of one run.

    Attributes:
        secret: What they know each other by.
        edges: By name.
        network: How slow the links between them are made; None leaves them as they are.
    """

    secret: str
    edges: Mapping[str, PeerAddress]
    network: Network | None = None

    def at(self, device_address: str) -> PeerAddress | None:
        """Return the edge server that devices know by an address; None for none."""
        found = (edge for edge in self.edges.values() if edge.device_address == device_address)
        return next(found, None)


class Peers:
    """The other edge servers, as one of them knows them. Methods may be called from any thread.

    Args:
        name: Of this edge server.
        credentials: For mutual TLS.
        limits: What is accepted in a frame.
        plain: Accept unprotected links from and to other hosts.
    """

    def __init__(
        self, name: str, credentials: Credentials | None, limits: Limits, *, plain: bool = False
    ) -> None:
        self.name = name
        self._credentials, self._limits, self._plain = credentials, limits, plain
        self._groups: dict[str, PeerGroup] = {}
        self._idle: dict[str, list[Link]] = {}
        self._lock = threading.Lock()

    def tell(self, meta: Mapping[str, Any]) -> PeerGroup:
        """Take in what a server app says of its fleet.

        Raises:
            FrameError: It says something else.
        """
        listed, secret = meta.get("edges"), meta.get("secret")
        if not isinstance(listed, Sequence) or not isinstance(secret, str) or len(secret) < 20:
            raise FrameError("fleet: must tell edges and a secret")
        try:
            edges = [
                PeerAddress(*map(str, (e["name"], e["address"], e["devices"]))) for e in listed
            ]
        except (TypeError, KeyError) as error:
            raise FrameError("fleet: an edge has no name or no address") from error
        group = PeerGroup(secret, {e.name: e for e in edges}, _network(meta))
        with self._lock:
            self._groups.pop(secret, None)  # the latest is the last
            self._groups[secret] = group
        return group

    def forget(self, secret: str) -> None:
        """Know a fleet no more."""
        with self._lock:
            self._groups.pop(secret, None)

    def group(self, secret: str) -> PeerGroup | None:
        """Return the fleet with a secret; None if it is not known."""
        with self._lock:
            return self._groups.get(secret)

    def known_as(self, device_address: str) -> list[tuple[PeerGroup, str]]:
        """Return the fleets, the latest first, that have an edge with an address for devices.

        An edge server outlives the runs that it serves, and may serve several: a device says where
        it was, which only one of their server apps can tell from where others' devices were.

        Returns:
            Each with the name of that edge.
        """
        with self._lock:
            groups = list(reversed(self._groups.values()))
        found = [(group, group.at(device_address)) for group in groups]
        return [(group, e.name) for group, e in found if e is not None and e.name != self.name]

    def accept(self, link: AcceptedLink, first: Frame) -> tuple[PeerGroup, str]:
        """Return the fleet of an edge server that connects, and its name.

        Raises:
            SecurityError: It belongs to none.
        """
        secret, name = str(first.meta.get("secret", "")), str(first.meta.get("name", ""))
        with self._lock:
            known = [g for s, g in self._groups.items() if same_token(s, secret)]
        if not known or name not in known[0].edges or name == self.name:
            raise SecurityError(f"{name[:40]!r} is no edge server of a fleet that is known here")
        if self._credentials is not None and link.peer != name:
            raise SecurityError(f"{link.peer or '?'} says that it is {name}")
        return known[0], name

    def ask(self, group: PeerGroup, name: str, question: Frame) -> Frame:
        """Send a question to another edge server and return its answer.

        Raises:
            SessionError: It refuses.
            LinkError: It cannot be reached, or does not answer in time.
            SecurityError: One end does not accept the other.
        """
        nbytes = sum(t.nbytes for t in question.tensors.values())
        link = self._take(group, name)
        try:
            link.send(question)
            answer = link.recv(ANSWER_S + max(nbytes, 16 << 20) / LEAST_BYTES_S)
        except RemoteError as error:
            link.close()
            raise SessionError(f"edge server {name}: {error}") from error
        except LinkError:
            link.close()
            raise
        self._give(group, name, link)
        if answer.kind == "refused":
            raise SessionError(f"edge server {name}: {answer.meta.get('reason', '')}")
        return answer

    def close(self) -> None:
        """End the links that are kept."""
        with self._lock:
            links = [link for kept in self._idle.values() for link in kept]
            self._idle.clear()
        for link in links:
            link.close()

    def _take(self, group: PeerGroup, name: str) -> Link:
        edge = group.edges.get(name)
        if edge is None or name == self.name:
            raise SessionError(f"{name!r} is no other edge server of this fleet")
        key = f"{group.secret} {name}"
        while True:
            with self._lock:
                kept = self._idle.get(key)
                link = kept.pop() if kept else None
            if link is None:
                return self._connect(group, edge)
            if not _ended(link):
                return link
            link.close()

    def _connect(self, group: PeerGroup, edge: PeerAddress) -> Link:
        link = dial(
            edge.address,
            credentials=self._credentials,
            limits=self._limits,
            plain=self._plain,
            timeout_s=CONNECT_S,
            retry=False,
        )
        if group.network is not None:
            link = Shaped(link, group.network)
        link.send(Frame("peer", {"secret": group.secret, "name": self.name}))
        return link

    def _give(self, group: PeerGroup, name: str, link: Link) -> None:
        with self._lock:
            kept = self._idle.setdefault(f"{group.secret} {name}", [])
            if len(kept) < _IDLE:
                kept.append(link)
                return
        link.close()


def _ended(link: Link) -> bool:
    try:
        link.recv(0.0)
    except LinkTimeout:
        return False
    except LinkError:
        return True
    return True  # nobody asked for anything


def _network(meta: Mapping[str, Any]) -> Network | None:
    rate, latency = meta.get("mbit_s"), meta.get("latency_ms", 0.0)
    if not isinstance(latency, int | float) or not latency >= 0:
        raise FrameError(f"fleet: latency_ms={latency!r:.20}")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not rate > 0:
        return Network(latency_s=latency / 1e3) if latency else None
    return Network(1e6 * rate, 1e6 * rate, latency / 1e3)
