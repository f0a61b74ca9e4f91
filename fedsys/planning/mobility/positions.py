"""Moves of devices that have positions: at which edge servers they are while a round lasts."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from fedsys.config import MobilityConfig
from fedsys.planning.mobility.coverage import Coverage, EdgeStay, stays
from fedsys.planning.mobility.tracks import Track
from fedsys.planning.moves import How, Move

LONGEST_WAIT_S = 86_400.0
"""Seconds ahead in which an edge server is looked for that a device will reach."""


class RoundTimes(Protocol):
    """Knows when rounds begin and how long devices train in them."""

    def begins_s(self, round_: int) -> float | None:
        """Return when a round begins, in seconds since the first one did; None if not known."""
        ...

    def takes_s(self, round_: int, client: int) -> float | None:
        """Return how long a device trains in a round; None if not known.

        It is asked when it is settled what the device does.
        """
        ...


@runtime_checkable
class FollowsTimes(Protocol):
    """A mobility source that depends on when rounds begin and how long they last."""

    def follow(self, times: RoundTimes) -> None:
        """Take the times of rounds from somebody else, unless the configuration names them."""
        ...


@dataclass(frozen=True)
class EvenRounds:
    """Rounds of one length.

    Attributes:
        seconds: Of each.
    """

    seconds: float

    def begins_s(self, round_: int) -> float:
        """Return when a round begins."""
        return (round_ - 1) * self.seconds

    def takes_s(self, round_: int, client: int) -> float:
        """Return how long a device trains in a round."""
        return self.seconds


@dataclass(frozen=True)
class Walkers:
    """Devices with positions, and the edge servers that they pass.

    Attributes:
        track: Returns where a device is until a second at least; None for one that has no position.
        coverage: Where edge servers are.
        begin_s: Second of the tracks at which the first round begins.
        end_s: Second after which nobody moves; infinite if there is none.
    """

    track: Callable[[int, float], Track | None]
    coverage: Coverage
    begin_s: float = 0.0
    end_s: float = math.inf


class Positioned:
    """A mobility source whose devices have positions.

    A device that reaches no edge server waits until it does: before its first mini-batch, or
    between two of them. The pauses of moves are not counted in when the next one comes.

    Args:
        mobility: The group.
        walkers: Where devices and edge servers are.
        times: How long rounds last, until `follow` names somebody who knows better.
        notes: Sentences about what was chosen where the configuration says nothing.

    Attributes:
        notes: As given.
    """

    def __init__(
        self,
        mobility: MobilityConfig,
        walkers: Walkers,
        times: EvenRounds,
        notes: Sequence[str] = (),
    ) -> None:
        self._mobility, self._walkers = mobility, walkers
        self._even, self._times = times, cast(RoundTimes, times)
        self.notes = tuple(notes)
        self._known: dict[int, tuple[float, tuple[EdgeStay, ...]]] = {}

    def follow(self, times: RoundTimes) -> None:
        """Take the times of rounds from somebody else, unless the configuration names them.

        What they do not know is as it was.
        """
        if self._mobility.seconds_per_round is None:
            self._times = times

    def places(
        self, round_: int, clients: Sequence[int], edges: Sequence[str]
    ) -> Mapping[int, int | None]:
        """Return where devices are when a round begins.

        One that waits for an edge server is at the one that it will reach, unless
        ``mobility.unreachable`` has it train alone; None is for those that reach none any more.
        """
        found: dict[int, int | None] = {}
        for client in clients:
            if not self._has_position(client):
                continue
            first = self._stay_at(client, self._begin(round_))
            if first.edge is None and self._mobility.unreachable == "wait":
                first = self._next_reached(client, self._begin(round_)) or first
            found[client] = first.edge
        return found

    def waits(self, round_: int, clients: Sequence[int]) -> Mapping[int, float]:
        """Return the seconds for which some devices wait for their first edge server."""
        begin, found = self._begin(round_), dict[int, float]()
        for client in clients:
            if not self._has_position(client) or self._stay_at(client, begin).edge is not None:
                continue
            reached = self._next_reached(client, begin)
            if reached is not None and self._mobility.unreachable == "wait":
                found[client] = reached.from_s - begin
        return found

    def moves(self, round_: int, clients: Sequence[int], edges: Sequence[str]) -> tuple[Move, ...]:
        """Return the moves of some clients in a round, those of each in their order."""
        return tuple(move for move, source in self._events(round_, clients) if move.edge != source)

    def gaps(self, round_: int, clients: Sequence[int]) -> tuple[Move, ...]:
        """Return when some clients lose their edge server for a while and find the same one."""
        return tuple(move for move, source in self._events(round_, clients) if move.edge == source)

    def _events(self, round_: int, clients: Sequence[int]) -> Iterator[tuple[Move, int]]:
        """Yield moves and gaps, with the edge server at which a device was before."""
        for client in clients:
            if self._has_position(client):
                yield from self._events_of(client, round_)

    def _events_of(self, client: int, round_: int) -> Iterator[tuple[Move, int]]:
        told_s = self._times.takes_s(round_, client)
        takes_s = self._even.takes_s(round_, client) if told_s is None else told_s
        begin = self._begin(round_)
        now: EdgeStay | None = self._stay_at(client, begin)
        if now is not None and now.edge is None:
            waits = self._mobility.unreachable == "wait"
            now = self._next_reached(client, begin) if waits else None
            begin = begin if now is None else now.from_s
        trained_s = 0.0
        while now is not None:
            after = self._after(client, now, begin + takes_s - trained_s)
            if after is None or trained_s + after.from_s - begin >= takes_s:
                return
            trained_s += after.from_s - begin
            # One that is gone for good is done with this round before
            then = after if after.edge is not None else self._next_reached(client, after.from_s)
            if then is not None:
                away_s = then.from_s - after.from_s
                move = self._move(client, round_, trained_s / takes_s, then, away_s, takes_s)
                yield move, cast(int, now.edge)
                begin = then.from_s
            now = then

    def _move(
        self, client: int, round_: int, at: float, target: EdgeStay, away_s: float, takes_s: float
    ) -> Move:
        how = self._mobility.how
        notice = min(at, target.foreseen_s / takes_s)
        if notice > 0 and how != "unannounced":
            how = "foreseen"
        return Move(
            client, round_, at, cast(int, target.edge), cast(How, how), notice=notice,
            away_s=away_s, cut=self._mobility.cut,
        )  # fmt: skip

    # --- where a device is ------------------------------------------------------------------------

    def _begin(self, round_: int) -> float:
        told_s = self._times.begins_s(round_)
        return self._walkers.begin_s + (self._even.begins_s(round_) if told_s is None else told_s)

    def _has_position(self, client: int) -> bool:
        return self._walkers.track(client, 0.0) is not None

    def _stays(self, client: int, until_s: float) -> tuple[EdgeStay, ...]:
        """Return where a device is, until a second at least."""
        until_s = min(until_s, self._walkers.end_s)
        if client not in self._known or self._known[client][0] < until_s:
            known = self._known[client][0] if client in self._known else 0.0
            reach = max(until_s, 2 * known, 600.0)  # so that looking ahead again costs little
            track = self._walkers.track(client, reach)
            assert track is not None
            own = self._mobility
            found = stays(track, self._walkers.coverage, own.hysteresis_m, own.foresee_s)
            self._known[client] = reach, found
        return self._known[client][1]

    def _stay_at(self, client: int, moment_s: float) -> EdgeStay:
        found = self._stays(client, moment_s)
        index = bisect.bisect_right(found, moment_s, key=lambda stay: stay.from_s)
        return found[max(0, index - 1)]

    def _after(self, client: int, now: EdgeStay, until_s: float) -> EdgeStay | None:
        """Return the stay that follows another one, if it begins before a second."""
        found = self._stays(client, until_s)
        index = bisect.bisect_right(found, now.from_s, key=lambda stay: stay.from_s)
        return found[index] if index < len(found) else None

    def _next_reached(self, client: int, from_s: float) -> EdgeStay | None:
        """Return the next stay at an edge server; None if there is none any more."""
        span = 600.0
        while True:
            for stay in self._stays(client, from_s + span):
                if stay.from_s > from_s and stay.edge is not None:
                    return stay
            if span >= LONGEST_WAIT_S or from_s + span >= self._walkers.end_s:
                return None
            span *= 2
