"""What can be done when hosts are lost, and what each would cost: routes around them, as values.

========== =============================================== ================================
technique  what answers                                    not possible
========== =============================================== ================================
repartition all units, divided among the hosts that are left constraints forbid it
exit       units before the lost hosts, and a trained exit the first host is lost, no exit
skip       all units but those of the lost hosts           first or last units are lost
replica    a variant of the portfolio, on hosts that are left there is no portfolio
========== =============================================== ================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from fedsys.errors import FedsysError
from fedsys.partition.planner import solve
from fedsys.partition.problem import Partition, Problem
from fedsys.serving.routes import (
    EXIT,
    SKIP,
    WHOLE,
    Route,
    around_by_exit,
    around_by_skip,
    run_gone,
    working,
)

_EXITS = 3  # the last ones before lost hosts: those before them are worse and hardly faster


@dataclass(frozen=True)
class ModelWays:
    """What ways a model offers beside that of all its units.

    Attributes:
        exits: Boundaries behind which there is an exit.
        skips: Runs of units that can be left out, with the adapters that stand in for each.
        variants: Names of variants of a portfolio.
        accuracy: Share of right answers by way, that of all units by the empty name.
        measured: Ways whose accuracy was measured; that of others is an estimate.
        errors: How far estimates of accuracy and of latency of units are off, by kind.
    """

    exits: tuple[int, ...] = ()
    skips: Mapping[tuple[int, int], int] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=dict)
    measured: frozenset[str] = frozenset()
    errors: Mapping[str, Any] = field(default_factory=dict)


@final
class Planner:
    """Divides ways among hosts, and remembers how.

    Args:
        problem: Of a way: what its units cost on the hosts.
        objective: What a division minimises: one of `fedsys.config.partition.OBJECTIVES`.
    """

    def __init__(self, problem: Callable[[str], Problem], objective: str = "latency") -> None:
        self._problem, self._objective = problem, objective
        self._problems: dict[str, Problem] = {}
        self._plans: dict[tuple[str, frozenset[int]], Partition | None] = {}

    def problem(self, way: str) -> Problem:
        """Return what the units of a way cost on the hosts."""
        if way not in self._problems:
            self._problems[way] = self._problem(way)
        return self._problems[way]

    def plan(self, way: str, gone: frozenset[int]) -> Partition | None:
        """Return the best division of a way among the hosts that are left; None: there is none."""
        key = way, gone
        if key not in self._plans:
            self._plans[key] = self._solve(way, gone)
        return self._plans[key]

    def _solve(self, way: str, gone: frozenset[int]) -> Partition | None:
        problem = self.problem(way)
        if len(gone) >= len(problem.hosts):
            return None
        rules = problem.constraints
        refused = frozenset((unit, host) for unit in range(len(problem)) for host in gone)
        rules = dataclasses.replace(rules, must_not=rules.must_not | refused)
        try:
            return solve(dataclasses.replace(problem, constraints=rules), self._objective)
        except FedsysError:
            return None


def routes_around(
    whole: Partition, units: int, gone: frozenset[int], ways: ModelWays, planner: Planner
) -> list[Route]:
    """Return the routes that avoid some hosts.

    Args:
        whole: Who computed what of all units: exits and skips leave it as it is where they can.
        units: Of the whole model.
        gone: Hosts that are to be avoided.
        ways: What the model offers.
        planner: Divides ways among hosts.
    """
    found = []
    for way in (WHOLE, *ways.variants):
        if (plan := planner.plan(way, gone)) is not None:
            found.append(Route(plan, way))
    if all(host not in gone for host, _, _ in working(whole, units)):
        found.append(Route(whole))
        return list(dict.fromkeys(found))
    exits = [(b, around_by_exit(whole, b, gone)) for b in ways.exits]
    possible = [(b, around) for b, around in exits if around is not None]
    found += [Route(around, f"{EXIT}{b}") for b, around in possible[-_EXITS:]]
    run = run_gone(whole, units, gone)
    if run is not None and run in ways.skips:
        around = around_by_skip(whole, run, ways.skips[run])
        found.append(Route(around, f"{SKIP}{run[0]}-{run[1]}"))
    return found


@dataclass(frozen=True)
class WayAround:
    """A route around hosts, with all that does not depend on the present moment.

    Attributes:
        label: Of the route.
        technique: What it is.
        accuracy: Share of right answers.
        hosts: That compute something.
        units: Of the way.
        measured: ``accuracy``, if that was measured.
    """

    label: str
    technique: str
    accuracy: float
    hosts: frozenset[int]
    units: int
    measured: frozenset[str]

    @classmethod
    def of(cls, route: Route, ways: ModelWays, units: int) -> WayAround:
        """Return it of a route whose way has so many units."""
        seen = frozenset({"accuracy"}) if route.way in ways.measured else frozenset[str]()
        hosts = frozenset(host for host, _, _ in working(route.partition, units))
        accuracy = ways.accuracy.get(route.way, 0.0)
        return cls(route.label, route.technique, accuracy, hosts, units, seen)
