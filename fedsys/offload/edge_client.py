"""The server app's end of the link to one edge server: requests, replies, and its heartbeat.

What is late is not lost: before a request or a heartbeat is given up, the edge is asked over a new
link whether it is alive (`fedsys.transport.patience` says when).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass

from fedsys.errors import FedsysError, LinkClosed, LinkError, LinkTimeout, SessionError
from fedsys.offload.snapshot import State
from fedsys.transport.link import Link
from fedsys.transport.patience import Patience
from fedsys.transport.wire import Frame

ASK_S = 5.0
"""How long a request takes until the edge is asked whether it is alive; then twice as long."""

LONGEST_S = 3600.0
"""How long a request may take whatever the edge says of itself."""


@dataclass(frozen=True)
class Hooks:
    """What an edge client calls. All but `alive` are called in its own threads.

    Attributes:
        replica: With a replica or a handover of a session.
        struck: With faults that are about to strike; returns whether all of them had before.
        told: With the name of the edge and what it says of moves of sessions.
        lost: With the name of the edge, once its link is lost.
        alive: Asks an edge over a new link whether it is alive.
    """

    replica: Callable[[Frame], None]
    struck: Callable[[Frame], bool]
    told: Callable[[str, Frame], None]
    lost: Callable[[str], None]
    alive: Callable[[str], bool]


class EdgeClient:
    """A link on which a server app controls one edge server.

    Args:
        name: Of the edge server.
        link: The link; this object ends it.
        token: What a server app without a certificate presents.
        hooks: What is called when something comes or is lost.

    Attributes:
        lost: Whether the link has ended.
        silent: Whether it was ended because the edge did not answer any more.
        arithmetic: What bits depend on there (`fedsys.identity.arithmetic`).

    Raises:
        SessionError: The edge refuses to be controlled.
        LinkError: It does not answer.
    """

    def __init__(self, name: str, link: Link, token: str, hooks: Hooks) -> None:
        self.name, self.lost, self.silent = name, False, False
        self._link, self._hooks = link, hooks
        self._pending: dict[int, Future[Frame]] = {}
        self._sends: dict[int, float] = {}  # since when requests are being sent, by number
        self._next = 0
        self._ping: tuple[int, float] | None = None  # number and time of the one without a reply
        self._heard = time.monotonic()
        self._patience = Patience()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._listen, name=f"fleet-{name}", daemon=True).start()
        try:
            ready = self.request("control", {"token": token}, {})
        except FedsysError:
            self.close()
            raise
        self.arithmetic: object = ready.meta.get("arithmetic")

    def request(self, kind: str, meta: Mapping[str, object], tensors: State) -> Frame:
        """Send a request and return its reply.

        Raises:
            SessionError: The edge refused.
            LinkError: The link was lost, or the edge does not answer any more.
        """
        future: Future[Frame] = Future()
        with self._lock:
            if self.lost:
                raise LinkClosed(f"edge server {self.name} is gone")
            self._next += 1
            number = self._next
            self._pending[number] = future
            self._sends[number] = time.monotonic()
        try:
            self._link.send(Frame(kind, {**meta, "request": number}, tensors))
            self._sends.pop(number, None)
            reply = self._result(future, kind)
        except LinkClosed as error:  # whoever asks next is to know, if the listener does not yet
            self._end(error)
            raise
        finally:
            with self._lock:
                self._pending.pop(number, None)
                self._sends.pop(number, None)
        if reply.kind == "refused":
            raise SessionError(f"edge server {self.name}: {reply.meta.get('reason')}")
        return reply

    def is_late(self) -> bool:
        """Send a heartbeat if none is under way; return whether the last one is late.

        It is not while requests are: they are answered in their order. A request that cannot even
        be sent counts as one: who stands still takes nothing, and the system answers for him.
        """
        now = time.monotonic()
        with self._lock:
            if self.lost or self._closed or self._pending:
                self._ping = None
                return not self.lost and self._send_is_late(now)
            if self._ping is not None:
                late = now - max(self._ping[1], self._heard) > self._patience.limit_s
                if late:
                    self._patience.missed()
                return late
            self._next += 1
            self._ping = (self._next, now)
            ping = Frame("ping", {"request": self._next})
        with suppress(LinkError):  # the thread that listens learns of it too
            self._link.send(ping)
        return False

    def _send_is_late(self, now: float) -> bool:
        """Return whether a request has been on its way out for long, once for each `ASK_S`."""
        late = [number for number, began in self._sends.items() if now - began > ASK_S]
        self._sends.update(dict.fromkeys(late, now))
        return bool(late)

    def abandon(self, sessions: Sequence[str]) -> None:
        """Give the edge up; should it wake up again, it finds that its sessions are released."""
        self.silent = True
        self._end(LinkTimeout(f"edge server {self.name} does not answer any more"))
        threading.Thread(
            target=self._let_go, args=(sessions,), name=f"ends {self.name}", daemon=True
        ).start()

    def _let_go(self, sessions: Sequence[str]) -> None:
        if not self._sends:  # else it takes nothing more
            for name in sessions:
                with suppress(LinkError):
                    self._link.send(Frame("release", {"session": name}))
        self._link.close()  # waits for what is under way

    def close(self) -> None:
        """End the link on purpose."""
        self._closed = True
        self._link.close()

    def _result(self, future: Future[Frame], kind: str) -> Frame:
        limit = waited = ASK_S
        while True:
            try:
                return future.result(limit)
            except FutureTimeout as error:
                if waited > LONGEST_S or not self._hooks.alive(self.name):
                    raise LinkTimeout(f"edge server {self.name}: no reply to {kind}") from error
            waited += 2 * limit
            limit *= 2

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
        self._heard = time.monotonic()
        if frame.kind in ("replica", "handover"):
            self._hooks.replica(frame)
            return
        if frame.kind in ("staged", "moved", "wanted", "gone", "back"):
            self._hooks.told(self.name, frame)
            return
        if frame.kind == "struck":
            again = self._hooks.struck(frame)
            self._link.send(Frame("noted", {**frame.meta, "again": again}))
            return
        number = frame.meta.get("request")
        with self._lock:  # taken out, because a future can be answered once only
            future = self._pending.pop(number, None) if isinstance(number, int) else None
            if self._ping is not None and number == self._ping[0]:
                self._patience.saw(self._heard - self._ping[1])
                self._ping = None
        if future is not None:
            future.set_result(frame)

    def _end(self, reason: LinkError) -> None:
        with self._lock:
            if self.lost:
                return
            self.lost = True
            pending = list(self._pending.values())
            self._pending.clear()
        for future in pending:
            future.set_exception(reason)
        if not self._closed:
            threading.Thread(
                target=self._hooks.lost, args=(self.name,), name=f"recover-{self.name}", daemon=True
            ).start()
