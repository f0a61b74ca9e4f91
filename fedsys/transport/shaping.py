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
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from fedsys.errors import ConfigError, LinkClosed, LinkError, LinkTimeout
from fedsys.transport.link import QUEUE_BYTES, Link
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.wire import Buffer, Frame, encode_parts

_LINGER_S: Final = 5.0  # for frames under way when this end closes


@dataclass(frozen=True, slots=True)
class Rate:
    """Bits per second over time: piecewise constant.

    Attributes:
        starts_s: When each piece begins, in seconds, ascending from 0.
        bits_s: Rate in each piece, in bits per second; the last one holds for ever. 0: an outage.
        period_s: If given, the pieces repeat with this period.

    Raises:
        ConfigError: Times do not ascend from 0, a rate is negative, or it stays 0 for ever.
    """

    starts_s: tuple[float, ...]
    bits_s: tuple[float, ...]
    period_s: float | None = None

    def __post_init__(self) -> None:
        if len(self.starts_s) != len(self.bits_s) or not self.starts_s or self.starts_s[0] != 0:
            raise ConfigError.of("network.trace", self.starts_s, "must begin at 0, a rate per time")
        ends = [*self.starts_s[1:], math.inf if self.period_s is None else self.period_s]
        if any(a >= b for a, b in zip(self.starts_s, ends, strict=True)):
            raise ConfigError.of(
                "network.trace", self.starts_s, "must ascend, and end in the period"
            )
        if any(rate < 0 or math.isnan(rate) for rate in self.bits_s):
            raise ConfigError.of("network.trace", self.bits_s, "must hold rates of 0 or more")
        if (self.bits_s[-1] if self.period_s is None else max(self.bits_s)) == 0:
            raise ConfigError.of(
                "network.trace", self.bits_s, "must not stay at 0 for ever", "end with a rate"
            )

    @classmethod
    def constant(cls, bits_s: float) -> Rate:
        """Return the same rate at all times; infinite: no limit."""
        return cls((0.0,), (bits_s,))


def finish_time(start_s: float, nbytes: float, rate: Rate) -> float:
    """Return when the last bit of `nbytes` leaves, if the first one may leave at `start_s`.

    The solution f of  ∫ rate(t) dt from start_s to f  =  8 · nbytes.

    Args:
        start_s: Seconds since the trace began, 0 or more.
        nbytes: Bytes to send.
        rate: Bits per second over time.
    """
    bits = 8.0 * nbytes
    if bits == 0:
        return start_s
    period = rate.period_s
    offset = 0.0
    if period is not None:
        offset = math.floor(start_s / period) * period
        in_period = _bits_between(0.0, period, rate)
        if math.isfinite(in_period):  # whole periods at once: a long transfer costs no loop
            left = _bits_between(start_s - offset, period, rate)
            if bits > left:
                whole = math.ceil((bits - left) / in_period) - 1
                bits -= left + whole * in_period
                offset += (1 + whole) * period
                start_s = offset
    at = start_s - offset
    piece = bisect_right(rate.starts_s, at) - 1
    while True:
        last = piece + 1 == len(rate.starts_s)
        end = (math.inf if period is None else period) if last else rate.starts_s[piece + 1]
        speed = rate.bits_s[piece]
        room = (end - at) * speed if speed else 0.0
        if bits <= room or (last and speed):
            return offset + at + bits / speed
        bits, at, piece = bits - room, end, piece + 1
        if last:
            offset, at, piece = offset + end, 0.0, 0


def _bits_between(start_s: float, end_s: float, rate: Rate) -> float:
    ends = [*rate.starts_s[1:], math.inf]
    return sum(
        (min(end, end_s) - max(begin, start_s)) * speed
        for begin, end, speed in zip(rate.starts_s, ends, rate.bits_s, strict=True)
        if speed and end > start_s and begin < end_s
    )


@dataclass(frozen=True, slots=True)
class Network:
    """A device's connection: bits per second each way, and seconds of latency one way.

    Attributes:
        up_bits_s: From the device; infinite: no limit.
        down_bits_s: To the device.
        latency_s: Added to each frame, one way.
        trace: ``(start_s, up_bits_s, down_bits_s)``, ascending; rates from `start_s` on, in place
            of the two above.
        period_s: If given, the trace repeats with this period.

    Raises:
        ConfigError: A rate or the latency is not usable.
    """

    up_bits_s: float = math.inf
    down_bits_s: float = math.inf
    latency_s: float = 0.0
    trace: tuple[tuple[float, float, float], ...] = ()
    period_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise ConfigError.of("network.latency_s", self.latency_s, "must be seconds, 0 or more")
        for name, value in (("up", self.up_bits_s), ("down", self.down_bits_s)):
            if not value > 0:
                raise ConfigError.of(f"network.{name}_bits_s", value, "must be more than 0")
        _ = self.up, self.down  # a trace that is not usable is refused here, not at the first frame

    @property
    def up(self) -> Rate:
        """Rate from the device over time."""
        return self._rate(self.up_bits_s, 1)

    @property
    def down(self) -> Rate:
        """Rate to the device over time."""
        return self._rate(self.down_bits_s, 2)

    def _rate(self, base: float, column: int) -> Rate:
        points = [(row[0], row[column]) for row in self.trace]
        if not points or points[0][0] > 0:
            points.insert(0, (0.0, base))
        return Rate(tuple(t for t, _ in points), tuple(r for _, r in points), self.period_s)


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


class Shaped:
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
        self._link = link
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

    @property
    def peer(self) -> str:
        """Identity of the peer."""
        return self._link.peer

    def send(self, frame: Frame) -> None:
        """Put a frame on the way; see `fedsys.transport.link.Link`."""
        self.send_encoded(encode_parts(frame))

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
                self._link.send_encoded([data])
        except LinkError as error:
            self._outbox.end(error, discard=True)
        self._link.close()

    def _receive(self) -> None:
        try:
            while True:
                frame = self._link.recv()
                nbytes = frame.encoded_bytes
                self._inbox.put((frame, self._down.arrival(self._clock.now(), nbytes)), nbytes)
        except LinkError as error:
            self._inbox.end(error)
            self._outbox.end(error)
