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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedsys.errors import (
    FedsysError,
    LinkClosed,
    LinkError,
    LinkRefused,
    LinkTimeout,
    SessionError,
)
from fedsys.faults import AT_EDGE, Faults, from_json, to_json
from fedsys.link import Link, dial
from fedsys.security import Credentials
from fedsys.session import SessionSpec, Snapshot, State
from fedsys.wire import Frame

REQUEST_S = 120.0
"""How long a healthy edge server may take for a request: a state of some GB over a slow link."""

REDIAL_S = (0.0, 0.2, 0.5)
"""Waits before the attempts to reach an edge again whose link was lost and that does not refuse."""

ANSWER_S = 2.0
"""How long an edge may take to accept a link in one of these attempts."""

_log = logging.getLogger("fedsys.fleet")


@dataclass(frozen=True)
class EdgeAddress:
    """Where an edge server is.

    Attributes:
        name: Its name.
        address: As the server app reaches it.
        device_address: As the devices reach it; the same if empty.
    """

    name: str
    address: str
    device_address: str = ""

    @property
    def for_devices(self) -> str:
        """Return the address to give to devices."""
        return self.device_address or self.address


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
        self._closing = False
        self._edges: dict[str, _Edge] = {}
        try:
            for edge in edges:
                self._edges[edge.name] = self._reach(edge)
        except FedsysError:
            self.close()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what is open and end the links."""
        self._closing = True
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
        try:
            frame = self._request(held.edge, "collect", {"session": session})
        except (LinkError, SessionError):
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

    def _reach(self, edge: EdgeAddress, *, again: bool = False) -> _Edge:
        more: dict[str, Any] = {"retry": False, "timeout_s": ANSWER_S} if again else {}
        try:
            link = dial(edge.address, credentials=self._credentials, plain=self._plain, **more)
        except LinkError as error:
            raise type(error)(f"edge server {edge.name}: {error}") from error
        return _Edge(edge.name, link, self._token, self._on_replica, self._on_lost, self._on_struck)

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
        return self._edges[edge].request(kind, meta, tensors)

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
            if not self._closing:
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
        for wait in REDIAL_S:
            time.sleep(wait)
            if self._closing:
                return set()
            with self._lock:
                mine = [s for s, held in self._held.items() if held.edge == name]
            edge: _Edge | None = None
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


class _Edge:
    """The link to one edge server: requests and replies, and a thread that listens."""

    def __init__(
        self,
        name: str,
        link: Link,
        token: str,
        on_replica: Callable[[Frame], None],
        on_lost: Callable[[str], None],
        on_struck: Callable[[Frame], None],
    ) -> None:
        self._on_struck = on_struck
        self.name, self.lost = name, False
        self._link, self._on_replica, self._on_lost = link, on_replica, on_lost
        self._pending: dict[int, Future[Frame]] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._listen, name=f"fleet-{name}", daemon=True).start()
        try:
            self.request("control", {"token": token}, {})
        except FedsysError:
            self.close()
            raise

    def request(self, kind: str, meta: Mapping[str, object], tensors: State) -> Frame:
        """Send a request and return its reply.

        Raises:
            SessionError: The edge refused.
            LinkError: The link was lost, or there was no reply in time.
        """
        future: Future[Frame] = Future()
        with self._lock:
            if self.lost:
                raise LinkClosed(f"edge server {self.name} is gone")
            self._next += 1
            number = self._next
            self._pending[number] = future
        try:
            self._link.send(Frame(kind, {**meta, "request": number}, tensors))
            reply = future.result(REQUEST_S)
        except FutureTimeout as error:
            raise LinkTimeout(f"edge server {self.name}: no reply to {kind}") from error
        finally:
            with self._lock:
                self._pending.pop(number, None)
        if reply.kind == "refused":
            raise SessionError(f"edge server {self.name}: {reply.meta.get('reason')}")
        return reply

    def close(self) -> None:
        """End the link on purpose."""
        self._closed = True
        self._link.close()

    def _listen(self) -> None:
        reason: LinkError = LinkClosed(f"edge server {self.name}: what it sent could not be read")
        try:
            while True:
                self._take(self._link.recv())
        except LinkError as error:
            reason = type(error)(f"edge server {self.name}: {error}")
        finally:  # whatever ends this thread, nobody waits for it in vain
            self._end(reason)

    def _take(self, frame: Frame) -> None:
        if frame.kind in ("replica", "handover"):
            self._on_replica(frame)
        elif frame.kind == "struck":
            self._on_struck(frame)
            self._link.send(Frame("noted", frame.meta))
        else:
            number = frame.meta.get("request")
            with self._lock:  # taken out, because a future can be answered once only
                future = self._pending.pop(number, None) if isinstance(number, int) else None
            if future is not None:
                future.set_result(frame)

    def _end(self, reason: LinkError) -> None:
        with self._lock:
            self.lost = True
            pending = list(self._pending.values())
            self._pending.clear()
        for future in pending:
            future.set_exception(reason)
        if not self._closed:
            threading.Thread(
                target=self._on_lost, args=(self.name,), name=f"recover-{self.name}", daemon=True
            ).start()
