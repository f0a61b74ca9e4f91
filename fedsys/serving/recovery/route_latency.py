"""What a request takes on a route: measured where it was, else the sum of what its parts take.

A request is the sum of its parts: from the entry to the first host; on each host the queue, what is
not computing (reading, writing, calling), and the units; between hosts the network, and what a hop
takes besides (waking threads, framing). Every request tells all of these, so the parts of routes
that were used, in service or in rehearsal, give what the others take::

    took = entry + Σ hosts (queue + call + factor · units) + Σ hops (network + hop) + rest

Units are what `Problem` says they take: measured one by one, or estimated from their shapes
(`fedsys.serving.recovery.unit_latency`). `call` and `factor` are fitted to all stages that were
seen, then each host's own factor; what is left over is a factor for all. CONTINUER (Abdul Majeed et
al., IEEE EDGE 2022) adds up layers, and reports a mean error of 13.06 % at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import final

from fedsys.partition.evaluation import evaluate
from fedsys.partition.problem import Problem
from fedsys.serving.route_times import RouteTimes, TimedRequest
from fedsys.serving.routes import Route, route_of

_MOST = 10.0  # by which a factor is believed to be off, either way


@dataclass(frozen=True)
class RouteErrors:
    """How far estimates of routes are off that were left out.

    Attributes:
        mean: Mean absolute error, relative to what was measured; None: too few routes.
        worst: The largest.
        routes: That were left out in turn.
        parts: What each part is off in the mean, relative to all of the request: ``entry``,
            ``hosts``, ``links`` and ``rest``.
    """

    mean: float | None
    worst: float | None
    routes: int
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spent:
    """Where a request of a route spends its time, in seconds.

    Attributes:
        entry: Between entry and first host.
        hosts: Computing and calling on all hosts.
        links: Between hosts.
        rest: Queues, and what is left.
    """

    entry: float
    hosts: float
    links: float
    rest: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.entry + self.hosts + self.links + self.rest

    @classmethod
    def of(cls, requests: Sequence[TimedRequest]) -> Spent:
        """Return the median of each of requests."""
        rows = [
            (
                one.link_s,
                sum(float(part["compute_s"]) for part in one.parts),
                sum(float(part.get("link_s", 0.0)) for part in one.parts),
                _rest(one),
            )
            for one in requests
        ]
        return cls(*(median(column) for column in zip(*rows, strict=True)))

    def off(self, seen: Spent, took_s: float) -> dict[str, float]:
        """Return by how much each part is off, as a share of what the request took."""
        pairs = zip(asdict(self).items(), asdict(seen).values(), strict=True)
        return {name: abs(ours - its) / took_s for (name, ours), its in pairs}


@dataclass(frozen=True)
class PartTimes:
    """What parts of requests take here, in seconds.

    Attributes:
        entry_s: Between entry and first host, there and back.
        call_s: On a host besides its units.
        hop_s: Between two hosts besides the network.
        rest_s: Of a request besides its parts.
        factor: Of what units were said to take.
        of_hosts: Further factors, by host.
        rehearsal: Of a rehearsal, to a request of a client.
    """

    entry_s: float = 0.0
    call_s: float = 0.0
    hop_s: float = 0.0
    rest_s: float = 0.0
    factor: float = 1.0
    of_hosts: Mapping[str, float] = field(default_factory=dict)
    rehearsal: float = 1.0


@final
class RouteLatencies:
    """Knows or estimates what a request of one image takes on a route.

    Args:
        problem: Of a way: what its units cost on the hosts.
        times: What was measured.
    """

    def __init__(self, problem: Callable[[str], Problem], times: RouteTimes) -> None:
        self._problem, self._times = problem, times
        self._expected: dict[str, _Expected] = {}
        self.parts = PartTimes()
        self._estimates: tuple[PartTimes, dict[str, float]] = (self.parts, {})

    def expected(self, label: str) -> _Expected:
        """Return what a route is made of, as its problem says; kept."""
        if label not in self._expected:
            route = route_of(label)
            self._expected[label] = _expected(self._problem(route.way), route)
        return self._expected[label]

    def seconds(self, label: str) -> tuple[float, bool]:
        """Return what a request takes, and whether that was measured."""
        took, rehearsed = self._times.medians(label)
        if took is not None:
            return took, True
        if rehearsed is not None:
            return rehearsed * self.parts.rehearsal, True
        return self.estimate(label), False

    def estimate(self, label: str) -> float:
        """Return what a request is expected to take, whatever was measured of its route."""
        if self._estimates[0] is not self.parts:
            self._estimates = self.parts, {}
        parts, known = self._estimates
        if label not in known:
            known[label] = self._spent(label, parts).seconds
        return known[label]

    def _spent(self, label: str, parts: PartTimes) -> Spent:
        route = self.expected(label)
        hosts_s = sum(
            parts.call_s + parts.factor * parts.of_hosts.get(host, 1.0) * units_s
            for host, units_s in route.stages
        )
        links_s = sum(network_s + parts.hop_s for network_s in route.hops)
        return Spent(parts.entry_s + route.ahead_s, hosts_s, links_s, parts.rest_s)

    def learn(self) -> PartTimes:
        """Take the parts anew from what was measured; returns them."""
        found = {label: self._usual(label) for label in self._times.labels}
        self.parts = _fitted([
            (self.expected(label), requests) for label, requests in found.items() if requests
        ], self._rehearsal())  # fmt: skip
        return self.parts

    def held_out(self) -> RouteErrors:
        """Return how far estimates are off for each route that was measured, from all others."""
        found = {label: self._usual(label) for label in self._times.labels}
        known = {label: requests for label, requests in found.items() if requests}
        misses, places, rehearsal = [], [], self._rehearsal()
        for label, requests in known.items() if len(known) > 2 else ():
            others = [(self.expected(o), seen) for o, seen in known.items() if o != label]
            guess = self._spent(label, _fitted(others, rehearsal))
            took_s = median(one.took_s for one in requests)
            misses.append(abs(guess.seconds / took_s - 1.0))
            places.append(guess.off(Spent.of(requests), took_s))
        if not misses:
            return RouteErrors(None, None, 0)
        parts = {name: fmean(one[name] for one in places) for name in places[0]}
        return RouteErrors(fmean(misses), max(misses), len(misses), parts)

    def _usual(self, label: str) -> Sequence[TimedRequest]:
        """Return requests of clients on a route, or rehearsals as if they were such."""
        clients, rehearsed = self._times.requests(label)
        return clients or rehearsed

    def _rehearsal(self) -> float:
        ratios = []
        for label in self._times.labels:
            took, rehearsed = self._times.medians(label)
            if took is not None and rehearsed is not None:
                ratios.append(took / rehearsed)
        return _within(median(ratios)) if ratios else 1.0


@dataclass(frozen=True)
class _Expected:
    """A route as its problem says.

    Hosts with the seconds of their units, seconds of networks between them, and of the network
    before the first one that computes.
    """

    stages: tuple[tuple[str, float], ...]
    hops: tuple[float, ...]
    ahead_s: float


def _expected(problem: Problem, route: Route) -> _Expected:
    cost = evaluate(problem, route.partition)
    stages = tuple(
        (problem.hosts[p.host].name, p.compute_s) for p in cost.portions if p.last > p.first
    )
    hops = tuple(t.up_s + t.down_s + t.latency_s for t in cost.transfers)
    first = len(hops) - len(stages) + 1  # 1 where the first host only passes inputs on
    return _Expected(stages, hops[first:], sum(hops[:first]))


def _fitted(
    routes: Sequence[tuple[_Expected, Sequence[TimedRequest]]], rehearsal: float
) -> PartTimes:
    stages: list[tuple[str, float, float]] = []  # host, expected and measured seconds
    hops, entries, rests = [], [], []
    for expected, requests in routes:
        named = dict(expected.stages)
        rows = [[dict(part) for part in one.parts] for one in requests]
        for place, host in enumerate(named):
            seen = [float(r[place]["compute_s"]) for r in rows if place < len(r)]
            if seen:
                stages.append((host, named[host], median(seen)))
        links = [float(p["link_s"]) for r in rows for p in r if "link_s" in p]
        if links and expected.hops:
            hops.append(max(0.0, median(links) - fmean(expected.hops)))
        entries.append(max(0.0, median(one.link_s for one in requests) - expected.ahead_s))
        rests.append(median(_rest(one) for one in requests))
    if not stages:
        return PartTimes()
    call_s, factor = _line([(units_s, took_s) for _, units_s, took_s in stages])
    of_hosts = {}
    for host in dict.fromkeys(host for host, _, _ in stages):
        ratios = [
            took / max(1e-9, call_s + factor * units) for h, units, took in stages if h == host
        ]
        of_hosts[host] = _within(median(ratios))
    return PartTimes(
        median(entries), call_s, median(hops) if hops else 0.0, median(rests), factor, of_hosts,
        rehearsal,
    )  # fmt: skip


def _rest(one: TimedRequest) -> float:
    """Return what a request took besides what its parts told, with its waiting in queues."""
    parts = sum(float(part["compute_s"]) + float(part.get("link_s", 0.0)) for part in one.parts)
    return max(0.0, one.took_s - one.link_s - parts)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return offset and slope of least relative squared error, neither of them below 0."""
    weights = [1.0 / max(y, 1e-9) ** 2 for _, y in points]
    total = sum(weights)
    x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    both = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True))
    through = y0 / max(x0, 1e-12)
    slope = both / spread if spread > 1e-4 * total * x0**2 else through
    slope = min(max(slope, 0.0), through)
    return max(0.0, y0 - slope * x0), slope


def _within(factor: float) -> float:
    return min(_MOST, max(1 / _MOST, factor))
