"""A link as slow as a given network: rate, latency and traces, emulated in real time.

A direction of a network is a queue with one server. A frame of `n` bytes that is ready at `t`
begins when the frame before it has ended, takes its bits at the rate of the moment, and arrives
one latency later. `finish_time` is that formula; the simulator of rounds uses the same one.

`Shaped` waits for the computed moments instead of counting tokens: a wait that ends late by some
microseconds is not carried over to the next frame, so the rate that is set is the rate that is had.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

from fedsys.errors import LinkClosed, LinkError, LinkTimeout
from fedsys.transport.link import QUEUE_BYTES, Link
from fedsys.transport.link_around import LinkAround
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.network import Network, Rate, finish_time
from fedsys.transport.wire import Buffer, Frame

_LINGER_S: Final = 5.0  # for frames under way when this end closes


class Lane:
    """One direction of a network: the moment at which it is free again."""

    def __init__(self, rate: Rate, latency_s: float) -> None:
        self._rate, self._latency_s = rate, latency_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def arrival(self, ready_s: float, nbytes: int) -> float:
        """Take the lane for `nbytes` that are ready at `ready_s`; return when they arrive."""
        with self._lock:
            self._free_s = finish_time(max(ready_s, self._free_s), nbytes, self._rate)
            return self._free_s + self._latency_s


class Clock(Protocol):
    """Time as `Shaped` sees it."""

    def now(self) -> float:
        """Return seconds since an origin that does not change."""
        ...

    def wait_until(self, moment_s: float, stop: threading.Event) -> None:
        """Return at `moment_s`, or earlier if `stop` is set."""
        ...


class RealClock:
    """Seconds of `time.monotonic` since `origin_s`, by default since it was made."""

    def __init__(self, origin_s: float | None = None) -> None:
        self._origin_s = time.monotonic() if origin_s is None else origin_s

    def now(self) -> float:
        """Return seconds since the origin."""
        return time.monotonic() - self._origin_s

    def wait_until(self, moment_s: float, stop: threading.Event) -> None:
        """Return at `moment_s`, or earlier if `stop` is set."""
        left = moment_s - self.now()
        if left > 0:
            stop.wait(left)


class Shaped(LinkAround):
    """The device's end of a link, with the rates and the latency of a network.

    `send` returns at once, as far as the queue has room: the device computes while its frames are
    on the way. Both directions count the bytes of whole frames, headers included. The trace of the
    network runs from the origin of `clock`; links that share a clock share its time.

    Args:
        link: The link to wrap; closed with this one.
        network: Rates and latency; `up` is for what this end sends.
        queue_bytes: Bytes that each direction holds before it makes the sender wait.
        clock: By default real time since now.
    """

    def __init__(
        self,
        link: Link,
        network: Network,
        *,
        queue_bytes: int = QUEUE_BYTES,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(link)
        self._clock: Clock = clock or RealClock()
        self._up = Lane(network.up, network.latency_s)
        self._down = Lane(network.down, network.latency_s)
        self._outbox: Mailbox[tuple[bytes, float]] = Mailbox(queue_bytes)
        self._inbox: Mailbox[tuple[Frame, float]] = Mailbox(queue_bytes)
        self._first: tuple[Frame, float] | None = None
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._never = threading.Event()  # frames under way are carried to the end
        self._sender = threading.Thread(target=self._carry, name="shaped up", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="shaped down", daemon=True).start()

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Put the bytes of a frame on the way; see `fedsys.transport.link.Link`."""
        self._inbox.raise_if_ended()
        data = b"".join(parts)
        with self._sending:
            item = data, self._up.arrival(self._clock.now(), len(data))
            if not self._outbox.try_put(item, len(data)):
                with self._inbox.relaxed():
                    self._outbox.put(item, len(data))

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame once it has arrived; see `fedsys.transport.link.Link`."""
        deadline = math.inf if timeout_s is None else self._clock.now() + timeout_s
        with self._receiving:
            if self._first is None:
                self._first = self._inbox.get(timeout_s)
            frame, arrival_s = self._first
            self._clock.wait_until(min(arrival_s, deadline), self._closed)
            if self._closed.is_set():
                raise LinkClosed("the link was closed on this side")
            if arrival_s > deadline:
                raise LinkTimeout(f"nothing arrived within {timeout_s:g} s")
            self._first = None
            since = max(0.0, self._clock.now() - arrival_s)
            return replace(frame, arrived_s=time.monotonic() - since)

    def close(self) -> None:
        """Carry what was sent to its end, then close the link that is wrapped."""
        reason = LinkClosed("the link was closed on this side")
        self._closed.set()
        self._inbox.end(reason, discard=True)
        self._outbox.end(reason)
        if threading.current_thread() is not self._sender:
            self._sender.join(_LINGER_S)

    def _carry(self) -> None:
        try:
            while True:
                data, arrival_s = self._outbox.get()
                self._clock.wait_until(arrival_s, self._never)
                self.inner.send_encoded([data])
        except LinkError as error:
            self._outbox.end(error, discard=True)
        self.inner.close()

    def _receive(self) -> None:
        try:
            while True:
                frame = self.inner.recv()
                nbytes = frame.encoded_bytes
                self._inbox.put((frame, self._down.arrival(self._clock.now(), nbytes)), nbytes)
        except LinkError as error:
            self._inbox.end(error)
            self._outbox.end(error)
