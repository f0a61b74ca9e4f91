"""Devices that go on to the next edge server when their link has become poor.

Where links are modelled, a device's link is looked at once a second, as its trace has it at
whichever edge server the device is. Where they are real, devices watch them (`clients.watching`),
and a round begins where the one before ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fedsys.config import Config, MobilityConfig
from fedsys.planning.mobility.link_trigger import LinkLimits, LinkWatch, observed
from fedsys.planning.mobility.positions import EvenRounds, RoundTimes
from fedsys.planning.mobility.scripted import movers
from fedsys.planning.moves import How, Move
from fedsys.transport.network import Network

LOOK_S = 1.0
"""Seconds from one look at a modelled link to the next."""


@dataclass(frozen=True, slots=True)
class PoorLink:
    """A device leaves because its link is poor.

    Attributes:
        at_s: When.
        noticed_s: Seconds between the first sign of it and then.
        why: In words.
    """

    at_s: float
    noticed_s: float
    why: str


@dataclass
class _Looked:
    """How far a modelled link was looked at."""

    now_s: float = 0.0
    watch: LinkWatch = field(default_factory=LinkWatch)
    sign_s: float | None = None
    found: list[PoorLink] = field(default_factory=list)


def is_watched(config: Config) -> bool:
    """Return whether devices measure their links and leave them: these are real, or seem so."""
    real = config.runtime.kind == "deployment" or config.network.emulate
    return config.mobility.kind == "network" and real


def limits_of(mobility: MobilityConfig) -> LinkLimits:
    """Return what links must carry."""
    above = mobility.above_ms
    return LinkLimits(
        1e6 * (mobility.below_mbit_s or 0.0),
        math.inf if above is None else above / 1e3,
        mobility.hysteresis,
        mobility.steady_s,
        0.0 if mobility.how == "unannounced" else mobility.foresee_s,
    )


class ModelledLinks:
    """A mobility source whose devices go when their modelled link is poor.

    Device i is at edge server i modulo their number at first, and each move takes it on to the next
    one.

    Args:
        mobility: The group.
        network: Returns the network of a device.
        num_clients: Devices of the run.
        seed: Of the run.
        times: How long rounds last, until `follow` names somebody who knows better.

    Attributes:
        notes: What is to be said about it: nothing.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        mobility: MobilityConfig,
        network: Callable[[int], Network],
        num_clients: int,
        seed: int,
        times: EvenRounds,
    ) -> None:
        self._mobility, self._limits, self._network = mobility, limits_of(mobility), network
        self._movers = movers(mobility, num_clients, seed)
        self._even, self._times = times, cast(RoundTimes, times)
        self._looked: dict[int, _Looked] = {}

    def follow(self, times: RoundTimes) -> None:
        """Take the times of rounds from somebody else, unless the configuration names them."""
        if self._mobility.seconds_per_round is None:
            self._times = times

    def places(
        self, round_: int, clients: Sequence[int], edges: Sequence[str]
    ) -> Mapping[int, int | None]:
        """Return where devices are when a round begins."""
        begin = self._begin(round_)
        return {c: (c + len(self._before(c, begin))) % len(edges) for c in clients}

    def moves(self, round_: int, clients: Sequence[int], edges: Sequence[str]) -> tuple[Move, ...]:
        """Return the moves of some clients in a round, those of each in their order."""
        begin, found = self._begin(round_), []
        for client in clients:
            told_s = self._times.takes_s(round_, client)
            takes_s = self._even.takes_s(round_, client) if told_s is None else told_s
            done = len(self._before(client, begin))
            for k, one in enumerate(self._before(client, begin + takes_s)[done:], done + 1):
                edge = (client + k) % len(edges)
                found.append(self._move(client, round_, edge, one, begin, takes_s))
        return tuple(found)

    def _move(
        self, client: int, round_: int, edge: int, one: PoorLink, begin: float, takes_s: float
    ) -> Move:
        at, how = (one.at_s - begin) / takes_s, self._mobility.how
        notice = min(at, one.noticed_s / takes_s)
        if notice > 0 and how != "unannounced":
            how = "foreseen"
        return Move(
            client, round_, at, edge, cast(How, how), notice=notice, cut=self._mobility.cut,
            why=one.why,
        )  # fmt: skip

    def _begin(self, round_: int) -> float:
        told_s = self._times.begins_s(round_)
        return self._even.begins_s(round_) if told_s is None else told_s

    def _before(self, client: int, until_s: float) -> list[PoorLink]:
        """Return when a device leaves, before a second."""
        if client not in self._movers:
            return []
        looked = self._looked.setdefault(client, _Looked())
        if looked.now_s < until_s:
            self._look(looked, self._network(client), until_s)
        return [one for one in looked.found if one.at_s < until_s]

    def _look(self, looked: _Looked, network: Network, until_s: float) -> None:
        """Look at a link once a second until a second is reached."""
        while looked.now_s < until_s:
            now = network.at(looked.now_s, LOOK_S)
            rate = min(now.up_bits_s, now.down_bits_s)
            seen = rate, network.latency_s
            looked.watch, due = observed(looked.watch, self._limits, looked.now_s, *seen)
            if due == "foresee":
                looked.sign_s = looked.now_s
            elif due == "remain":
                looked.sign_s = None
            elif due == "leave":
                sign = looked.now_s if looked.sign_s is None else looked.sign_s
                why = self._limits.in_words(*seen)
                looked.found.append(PoorLink(looked.now_s, looked.now_s - sign, why))
                looked.sign_s = None
            looked.now_s += LOOK_S


class WatchedLinks:
    """A mobility source whose devices watch their links: a round begins where one before ended.

    Args:
        mobility: The group.

    Attributes:
        notes: What is to be said about it: nothing.
        ended: Handovers of the run so far, as records.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, mobility: MobilityConfig) -> None:
        self._mobility = mobility
        self.ended: Sequence[Mapping[str, Any]] = ()

    def places(
        self, round_: int, clients: Sequence[int], edges: Sequence[str]
    ) -> Mapping[int, int | None]:
        """Return where devices are when a round begins."""
        last = {m["client"]: m["target"] for m in self.ended if m["round"] < round_}
        known = {client: edges.index(name) for client, name in last.items() if name in edges}
        return {client: known.get(client, client % len(edges)) for client in clients}

    def is_armed(self, client: int) -> bool:
        """Return whether a device leaves its link if that is poor: it did not, or that was good."""
        own = [m for m in self.ended if m["client"] == client]
        return not own or not own[-1].get("why") or bool(own[-1].get("good_again", True))

    def moves(self, round_: int, clients: Sequence[int], edges: Sequence[str]) -> tuple[Move, ...]:
        """Return none: nobody knows them beforehand."""
        return ()
