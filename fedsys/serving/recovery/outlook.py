"""What could answer now, and what should stand ready in case a host is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fedsys.partition.problem import Partition
from fedsys.serving.chain import ChainEngine, ChainModule
from fedsys.serving.recovery.building import PipelineBuilder
from fedsys.serving.recovery.candidates import (
    KnownTimes,
    ModelWays,
    Planner,
    candidates_of,
    routes_around,
)
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective, choose
from fedsys.serving.routes import WHOLE, Route, route_of, working

_BUILD_S, _APPLY_S = 0.5, 0.002  # before either was measured
_LEARN = 0.3


@dataclass
class ChangeTimes:
    """What building a pipeline, and sending requests into one, took lately, in seconds."""

    build_s: float = _BUILD_S
    apply_s: float = _APPLY_S

    def built(self, seconds: float) -> None:
        """Take note of a pipeline that was built."""
        self.build_s += _LEARN * (seconds - self.build_s)

    def applied(self, seconds: float) -> None:
        """Take note of requests that were sent into a pipeline."""
        self.apply_s += _LEARN * (seconds - self.apply_s)


@final
class RecoveryOutlook:
    """Knows which hosts are there, and what can be done without the others.

    Args:
        engine: Its pipelines.
        planner: Divides ways among hosts.
        ways: What the model offers.
        builder: Knows which pipelines stand.

    Attributes:
        gone: Hosts that are lost, by index.
        leaving: Hosts that want to be left out.
        home: Who computes what while all hosts are there.
        whole: Who computed all units last.
        measured: What changes took.
    """

    def __init__(
        self, engine: ChainEngine, planner: Planner, ways: ModelWays, builder: PipelineBuilder
    ) -> None:
        self._engine, self._planner, self._ways, self._builder = engine, planner, ways, builder
        self.gone: frozenset[int] = frozenset()
        self.leaving: frozenset[int] = frozenset()
        self.home = self.whole = engine.partition
        self.measured = ChangeTimes()

    @property
    def away(self) -> frozenset[int]:
        """Hosts that are not to be used."""
        return self.gone | self.leaving

    @property
    def units(self) -> int:
        """Of the whole model."""
        return len(self._engine.chain.parts)

    def stands(self, label: str) -> bool:
        """Whether no host of a route is lost."""
        route = route_of(label)
        units = len(self._engine.chain.parts_of(route.way))
        return all(host not in self.gone for host, _, _ in working(route.partition, units))

    def module(self, label: str) -> ChainModule | None:
        """Return the pipeline of a route into which requests may be sent; None: there is none."""
        for module in reversed(self._engine.live):
            if module.route.label == label and not module.pipeline.diverted:
                return module
        return None

    def ready(self, label: str) -> bool:
        """Whether requests can be sent along a route now."""
        there = self._builder.ready(label) and self.module(label) is not None
        return there and self.stands(label)

    def candidates(self) -> list[RecoveryCandidate]:
        """Return all that could answer without the hosts that are away."""
        routes = self._routes(self.away)
        standing = {route.label for route in routes if self.ready(route.label)}
        return self._costed(routes, standing)

    def best(self, label: str, objective: RecoveryObjective) -> str:
        """Return the label of what should answer in the long run.

        Raises:
            RuntimeFailure: Nothing can.
        """
        if not self.away:
            return Route(self.home).label
        return choose(self.candidates(), objective.steady()).choice.path

    def in_case(
        self, label: str, techniques: tuple[str, ...], objective: RecoveryObjective
    ) -> list[str]:
        """Return what should stand ready: for each host of a route, and each technique, the best.

        Args:
            label: Of the route that answers.
            techniques: Those of which pipelines are to stand ready.
            objective: What is asked of them.
        """
        route, found = route_of(label), []
        for host, _, _ in working(route.partition, len(self._engine.chain.parts_of(route.way))):
            costed = self._costed(self._routes(self.away | {host}), ())
            for technique in techniques:
                of_it = [one for one in costed if one.technique == technique]
                if of_it and technique in objective.techniques:
                    found.append(choose(of_it, objective).choice.path)
        return [one for one in dict.fromkeys(found) if one != label]

    def _routes(self, away: frozenset[int]) -> list[Route]:
        return routes_around(self.whole, self.units, away, self._ways, self._planner)

    def _costed(
        self, routes: list[Route], standing: set[str] | tuple[str, ...]
    ) -> list[RecoveryCandidate]:
        took = dict(self._engine.took_s)
        known = KnownTimes(took, self.measured.build_s, self.measured.apply_s, standing)
        return candidates_of(routes, self._ways, self._planner, known)

    def went(self, label: str) -> None:
        """Take note that a route answers."""
        route = route_of(label)
        if route.way == WHOLE:
            self.whole = route.partition

    def settled(self, home: Partition) -> None:
        """Take note of who computes what from now on while all hosts are there."""
        self.home = self.whole = home
