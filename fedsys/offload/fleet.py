"""The server app's handle on all edge servers, which also watches and acts during a round.

Flower's server waits for replies while clients train. The fleet does not wait: it keeps a link to
every edge server, notices when one is gone, and opens the sessions that were there again on
another one, from the newest state that it has of them (the start of the round, or a replica). The
devices find them by asking at the edges that their assignment names.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fedsys.config import EdgeAddress
from fedsys.errors import (
    FedsysError,
    LinkError,
    LinkRefused,
    LinkTimeout,
    SecurityError,
    SessionError,
)
from fedsys.faults import AT_EDGE, Faults, from_json, to_json
from fedsys.offload.edge_client import EdgeClient, Hooks
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.dial import dial
from fedsys.transport.link import Link
from fedsys.transport.patience import Patience
from fedsys.transport.security import Credentials
from fedsys.transport.wire import Frame

REDIAL_S = (0.0, 0.2, 0.5)
"""Waits before the attempts to reach an edge again whose link was lost and that does not refuse."""

ANSWER_S = 10.0
"""How long an edge may take to accept the first link, in seconds; then round trips tell."""

LEAST_ANSWER_S = 1.0
"""Shortest such limit, in seconds: certificates are checked on machines that are busy."""

BEAT_S = 1.0
"""Seconds between two looks at the heartbeats of the edges."""

ASKED = 2
"""How many times an edge whose heartbeat is late is asked over new links, until it is given up."""

_log = logging.getLogger("fedsys.offload.fleet")


@dataclass
class _Held:
    """A session that is open somewhere."""

    spec: SessionSpec
    newest: Snapshot  # at a step to which the device can return too
    edge: str
    returned: Snapshot | None = None  # what the edge sent last, at whatever step


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
        self._faults = faults or Faults()
        self._addresses = {edge.name: edge for edge in edges}
        self._credentials, self._plain = credentials, plain
        self._token = control_token
        self._held: dict[str, _Held] = {}
        self._lock = threading.RLock()
        self._recovering = threading.Lock()  # an edge that flaps is dealt with once at a time
        self._recoveries: list[Recovery] = []
        self._closing = threading.Event()
        self._patience = Patience(ANSWER_S, LEAST_ANSWER_S)  # for a new link to an edge
        self._hooks = Hooks(self._on_replica, self._on_struck, self._on_lost, self._answers)
        self._edges: dict[str, EdgeClient] = {}
        with self._recovering:  # an edge that is lost meanwhile is dealt with afterwards, or never
            try:
                for edge in edges:
                    self._edges[edge.name] = self._reach(edge)
            except BaseException:
                self.close()
                raise
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what is open and end the links."""
        self._closing.set()
        for name in list(self._held):
            self.release(name)
        for edge in self._edges.values():
            edge.close()

    @property
    def edges(self) -> list[EdgeAddress]:
        """All edges of the run, whether they can be reached or not."""
        return list(self._addresses.values())

    @property
    def alive(self) -> list[str]:
        """Names of the edges that can be reached."""
        with self._lock:
            return [name for name, edge in self._edges.items() if not edge.lost]

    def device_addresses(self, first: str) -> list[str]:
        """Return where a device asks, beginning with the edge that has its session."""
        names = [first, *(name for name in self._addresses if name != first)]
        return [self._addresses[name].for_devices for name in names]

    def revive(self) -> None:
        """Reach the edges again that were lost: they may have been started anew."""
        for name in set(self._addresses) - set(self.alive):
            with self._recovering, suppress(FedsysError):
                self._edges[name] = self._reach(self._addresses[name], again=True)

    def open(self, spec: SessionSpec, start: Snapshot, edge: str) -> str:
        """Open a session and return the name of its edge: `edge`, or another if that is gone.

        Raises:
            SessionError: No edge can take it; with what the last one said.
        """
        problem = "no edge server is left"
        for name in self._candidates(edge):
            try:
                self._open_at(name, spec, start)
            except (LinkError, SessionError) as error:
                problem = str(error)
                continue
            with self._lock:
                held = self._held[spec.id] = _Held(spec, start, name)
                lost = self._edges[name].lost
            if lost:  # since it answered: whoever took note of that may not have seen the session
                self._on_lost(name)
            return held.edge
        raise SessionError(f"session of client {spec.client}: {problem}")

    def collect(self, session: str) -> Snapshot:
        """Return the state of a session as it stands, or stood when its edge handed it back.

        Raises:
            SessionError: There is no such session, or its edge is gone.
        """
        with self._lock:
            held = self._held.get(session)
        if held is None:
            raise SessionError(f"session {session} is not open")
        asked = held.edge
        try:
            frame = self._request(asked, "collect", {"session": session})
        except (LinkError, SessionError):
            with self._recovering:  # its device may have gone on where it is being opened
                moved = held.edge != asked
            if moved:
                return self.collect(session)
            if held.returned is None:
                raise
            return held.returned  # an edge that stops hands its sessions back
        return Snapshot.from_frame(frame)

    def release(self, session: str) -> None:
        """Close a session; nothing happens if it is not open."""
        with self._lock:
            held = self._held.pop(session, None)
        if held is None:
            return
        try:
            self._request(held.edge, "release", {"session": session})
        except (LinkError, SessionError) as error:  # an edge that is gone has released it
            _log.debug("session %s: %s", session, error)

    def recoveries(self) -> list[Recovery]:
        """Return what was done about losses since the last call."""
        with self._lock:
            done, self._recoveries = self._recoveries, []
        return done

    # --- edges ------------------------------------------------------------------------------------

    def _reach(self, edge: EdgeAddress, *, again: bool = False) -> EdgeClient:
        try:
            link = self._dial(edge.address, retry=not again)
        except (LinkError, SecurityError) as error:
            raise type(error)(f"edge server {edge.name}: {error}") from error
        return EdgeClient(edge.name, link, self._token, self._hooks)

    def _dial(self, address: str, *, retry: bool = False) -> Link:
        began, limit = time.monotonic(), self._patience.limit_s
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
            self._patience.missed()
            raise
        self._patience.saw(time.monotonic() - began)
        return link

    def _watch(self) -> None:
        """Give up edges that fall silent. Runs in a thread of its own."""
        while not self._closing.wait(BEAT_S):
            for name, edge in list(self._edges.items()):
                if edge.is_late() and not self._answers(name):
                    self._give_up(name, edge)

    def _give_up(self, name: str, edge: EdgeClient) -> None:
        if edge.lost:
            return
        with self._lock:
            mine = [s for s, held in self._held.items() if held.edge == name]
        edge.abandon(mine)

    def _answers(self, name: str) -> bool:
        """Ask an edge over a new link whether it is alive."""
        for _ in range(ASKED):
            try:
                link = self._dial(self._addresses[name].address)
            except LinkRefused:
                return False
            except FedsysError:
                continue
            try:
                link.send(Frame("control", {"token": self._token}))
                link.recv(self._patience.limit_s)
                return True
            except LinkError:
                self._patience.missed()
            finally:
                link.close()
        return False

    def _candidates(self, first: str) -> list[str]:
        with self._lock:
            load = {name: 0 for name in self._edges}
            for held in self._held.values():
                load[held.edge] += 1
            others = sorted((n for n in self.alive if n != first), key=lambda n: load[n])
            return [n for n in (first, *others) if n in self.alive]

    def _open_at(self, edge: str, spec: SessionSpec, start: Snapshot) -> None:
        coming = [
            *(f for f in self._faults.of_round("edge", spec.round) if f.who == edge),
            *(
                f
                for f in self._faults.of_round("link", spec.round)
                if f.who == spec.client and f.position in AT_EDGE
            ),
        ]
        meta = {"spec": spec.to_meta(), "step": start.step, "faults": to_json(coming)}
        self._request(edge, "open", meta, start)

    def _on_struck(self, frame: Frame) -> None:
        for fault in from_json(str(frame.meta.get("faults", "[]"))):
            self._faults.fire(fault)

    def _request(
        self,
        edge: str,
        kind: str,
        meta: Mapping[str, object],
        snapshot: Snapshot | None = None,
    ) -> Frame:
        tensors = snapshot.tensors() if snapshot is not None else {}
        client = self._edges[edge]
        try:
            return client.request(kind, meta, tensors)
        except LinkTimeout:  # it was asked; the next request need not find out again
            self._give_up(edge, client)
            raise

    def _on_replica(self, frame: Frame) -> None:
        snapshot = Snapshot.from_frame(frame)
        with self._lock:
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

    def _on_lost(self, name: str) -> None:
        """Reach the edge again, or open its sessions elsewhere. Runs in a thread of its own."""
        began = time.perf_counter()
        with self._recovering:
            if not self._closing.is_set():
                self._move_sessions(name, self._still_there(name), began)

    def _move_sessions(self, name: str, kept: set[str], began: float) -> None:
        """Open the sessions of an edge elsewhere, or there if it was started anew.

        Args:
            name: The edge.
            kept: Sessions that it still has.
            began: When it was lost, by `time.perf_counter`.
        """
        with self._lock:
            orphans = [h for h in self._held.values() if h.edge == name and h.spec.id not in kept]
        if not orphans and name in self.alive:
            return
        _log.warning("edge server %s is lost, with %d sessions", name, len(orphans))
        for held in orphans:
            start = held.newest
            target = self._open_anywhere(held.spec, start, name)
            seconds = time.perf_counter() - began
            with self._lock:
                wanted = self._held.get(held.spec.id) is held
                held.edge = target or name
                self._recoveries.append(
                    Recovery(held.spec.id, held.spec.client, name, target, start.step, seconds)
                )
            if target and not wanted:  # it was released in the meantime
                with suppress(FedsysError):
                    self._request(target, "release", {"session": held.spec.id})

    def _open_anywhere(self, spec: SessionSpec, start: Snapshot, first: str) -> str:
        """Open a session at the first edge that takes it; return its name, or nothing."""
        for name in self._candidates(first):
            try:
                self._open_at(name, spec, start)
            except (LinkError, SessionError) as error:
                _log.warning("edge server %s: %s", name, error)
                continue
            return name
        return ""

    def _still_there(self, name: str) -> set[str]:
        """Reach an edge again; return its sessions of this run, none if it is gone."""
        if self._edges[name].silent:  # it was asked already
            return set()
        for wait in REDIAL_S:
            time.sleep(wait)
            if self._closing.is_set():
                return set()
            with self._lock:
                mine = [s for s, held in self._held.items() if held.edge == name]
            edge: EdgeClient | None = None
            try:
                edge = self._reach(self._addresses[name], again=True)
                there = edge.request("ping", {"sessions": mine}, {}).meta.get("sessions")
            except LinkRefused:  # its process is gone, and its sessions with it
                return set()
            except FedsysError:
                if edge is not None:
                    edge.close()
                continue
            with self._lock:
                self._edges[name] = edge
            return set(mine) & set(there if isinstance(there, list) else [])
        return set()
