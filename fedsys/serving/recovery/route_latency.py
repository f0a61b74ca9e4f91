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
from dataclasses import dataclass, field
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
    """

    mean: float | None
    worst: float | None
    routes: int


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

    def expected(self, label: str) -> _Expected:
        """Return what a route is made of, as its problem says; kept."""
        if label not in self._expected:
            route = route_of(label)
            self._expected[label] = _expected(self._problem(route.way), route)
        return self._expected[label]

    def seconds(self, label: str) -> tuple[float, bool]:
        """Return what a request takes, and whether that was measured."""
        took, rehearsed = self._measured(label)
        if took is not None:
            return took, True
        if rehearsed is not None:
            return rehearsed * self.parts.rehearsal, True
        return self.estimate(label), False

    def _measured(self, label: str) -> tuple[float | None, float | None]:
        found = self._times.requests(label)
        took, rehearsed = (median(o.took_s for o in each) if each else None for each in found)
        return took, rehearsed

    def estimate(self, label: str, parts: PartTimes | None = None) -> float:
        """Return what a request is expected to take, whatever was measured of its route."""
        parts, route = self.parts if parts is None else parts, self.expected(label)
        total = parts.entry_s + parts.rest_s + route.ahead_s
        for host, units_s in route.stages:
            total += parts.call_s + parts.factor * parts.of_hosts.get(host, 1.0) * units_s
        return total + sum(network_s + parts.hop_s for network_s in route.hops)

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
        misses, rehearsal = [], self._rehearsal()
        for label, requests in known.items() if len(known) > 2 else ():
            others = [(self.expected(o), seen) for o, seen in known.items() if o != label]
            guess = self.estimate(label, _fitted(others, rehearsal))
            misses.append(abs(guess / median(one.took_s for one in requests) - 1.0))
        return RouteErrors(
            fmean(misses) if misses else None, max(misses, default=None), len(misses)
        )

    def _usual(self, label: str) -> Sequence[TimedRequest]:
        """Return requests of clients on a route, or rehearsals as if they were such."""
        clients, rehearsed = self._times.requests(label)
        return clients or rehearsed

    def _rehearsal(self) -> float:
        ratios = []
        for label in self._times.labels:
            took, rehearsed = self._measured(label)
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
