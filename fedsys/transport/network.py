"""Networks as values: rates over time, latency, and the formula of what a transfer takes.

A direction of a network is a queue with one server. A frame of `n` bytes that is ready at `t`
begins when the frame before it has ended, takes its bits at the rate of the moment, and arrives
one latency later. `finish_time` is that formula: emulated links and the simulator of rounds both
use it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from fedsys.errors import ConfigError


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
    # Traces of packets have a piece for each millisecond: what is summed and hashed is kept
    _sent: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

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
        lengths = zip(self.starts_s, ends, self.bits_s, strict=True)
        bits = [speed * (end - start) if speed else 0.0 for start, end, speed in lengths]
        object.__setattr__(self, "_sent", tuple(accumulate(bits, initial=0.0)))
        object.__setattr__(self, "_hash", hash((self.starts_s, self.bits_s, self.period_s)))

    def __hash__(self) -> int:
        return self._hash

    def bits_until(self, t: float) -> float:
        """Return the bits that pass from 0 to `t` seconds: the integral of the rate."""
        whole = 0.0
        if self.period_s is not None:
            periods, t = divmod(t, self.period_s)
            whole = periods * self._sent[-1] if periods else 0.0
        piece = bisect_right(self.starts_s, t) - 1
        speed = self.bits_s[piece]
        return whole + self._sent[piece] + (speed * (t - self.starts_s[piece]) if speed else 0.0)

    def mean(self, start_s: float, seconds: float) -> float:
        """Return the mean rate, in bits per second, of a span; of 0 s: that at its beginning."""
        if seconds <= 0.0 or not math.isfinite(self._sent[len(self.bits_s) - 1]):
            at = start_s if self.period_s is None else start_s % self.period_s
            return self.bits_s[bisect_right(self.starts_s, at) - 1]
        return (self.bits_until(start_s + seconds) - self.bits_until(start_s)) / seconds

    def piece_of(self, first: int, bits: float) -> int:
        """Return the piece in which the last of `bits` passes that begin with piece `first`."""
        last = bisect_left(self._sent, self._sent[first] + bits, first + 1, len(self.bits_s)) - 1
        return last if math.isfinite(self._sent[last]) else first

    def bits_between(self, first: int, last: int) -> float:
        """Return the bits that pass from the beginning of piece `first` to that of piece `last`."""
        return self._sent[last] - self._sent[first] if last > first else 0.0

    @classmethod
    def constant(cls, bits_s: float) -> Rate:
        """Return the same rate at all times; infinite: no limit."""
        return cls((0.0,), (bits_s,))


def narrowest(rates: Sequence[Rate]) -> Rate:
    """Return the least of several rates at each moment: what passes links that follow each other.

    Raises:
        ConfigError: They repeat with other periods.
    """
    periods = {rate.period_s for rate in rates if rate.period_s is not None or len(rate.bits_s) > 1}
    if len(periods) > 1:
        raise ConfigError.of(
            "network.period_s", sorted(map(str, periods)), "must be one for traces of links that "
            "follow each other",
        )  # fmt: skip
    starts = sorted({start for rate in rates for start in rate.starts_s})
    least = (min(r.bits_s[bisect_right(r.starts_s, start) - 1] for r in rates) for start in starts)
    return Rate(tuple(starts), tuple(least), next(iter(periods), None))


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
        in_period = rate.bits_between(0, len(rate.bits_s))
        if math.isfinite(in_period):  # whole periods at once: a long transfer costs no loop
            left = in_period - rate.bits_until(start_s - offset)
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
        elif (ahead := rate.piece_of(piece, bits)) > piece:  # many short pieces at once
            bits -= rate.bits_between(piece, ahead)
            at, piece = rate.starts_s[ahead], ahead


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
        up_trace: Rate from the device over time, in place of `trace`; so each way may have pieces
            and a period of its own.
        down_trace: Likewise, to the device.
        by_rounds: Whether the time of traces is rounds instead of seconds, the first one 0.

    Raises:
        ConfigError: A rate or the latency is not usable.
    """

    up_bits_s: float = math.inf
    down_bits_s: float = math.inf
    latency_s: float = 0.0
    trace: tuple[tuple[float, float, float], ...] = ()
    period_s: float | None = None
    up_trace: Rate | None = None
    down_trace: Rate | None = None
    by_rounds: bool = False

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
        return self.up_trace or self._rate(self.up_bits_s, 1)

    @property
    def down(self) -> Rate:
        """Rate to the device over time."""
        return self.down_trace or self._rate(self.down_bits_s, 2)

    @property
    def changes(self) -> bool:
        """Whether the rates change over time."""
        return bool(self.trace) or self.up_trace is not None or self.down_trace is not None

    def at(self, moment: float, span: float = 0.0) -> Network:
        """Return a network that has the mean rates of a span of time, and keeps them.

        Args:
            moment: When it begins: seconds, or with `by_rounds` the round, from 0.
            span: How long it is; 0: as at that moment. What is 0 over all of the span becomes a
                bit per second: nothing passes, and times stay finite.
        """
        if not self.changes:
            return self
        up, down = (max(1.0, rate.mean(moment, span)) for rate in (self.up, self.down))
        return Network(up, down, self.latency_s)

    def _rate(self, base: float, column: int) -> Rate:
        points = [(row[0], row[column]) for row in self.trace]
        if not points or points[0][0] > 0:
            points.insert(0, (0.0, base))
        return Rate(tuple(t for t, _ in points), tuple(r for _, r in points), self.period_s)
