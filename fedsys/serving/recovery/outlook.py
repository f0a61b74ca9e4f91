"""What could answer now, and what should stand ready in case a host is lost.

What does not depend on the moment is found when there is time: which routes lead around each host,
who computes what of them, and what their units are expected to take. A decision looks up what was
measured since and what stands ready, and compares.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from fedsys.partition.problem import Partition
from fedsys.serving.chain import ChainEngine, ChainModule
from fedsys.serving.recovery.building import PipelineBuilder
from fedsys.serving.recovery.candidates import ModelWays, Planner, WayAround, routes_around
from fedsys.serving.recovery.decision import (
    RecoveryCandidate,
    RecoveryDecision,
    RecoveryObjective,
    choose,
)
from fedsys.serving.recovery.downtime import BuildSample, Downtimes
from fedsys.serving.recovery.route_latency import RouteLatencies
from fedsys.serving.routes import WHOLE, Route, route_of, working

_BOTH, _LATENCY = frozenset({"latency", "accuracy"}), frozenset({"latency"})
_SHUN_S = 2.0  # for which a route that could not be built is not built again, if others are left


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let no garbage collection begin, for less than a millisecond.

    It would look at all that the process has, which takes longer than the decision it falls into.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What is decided if hosts are away.

    Attributes:
        decision: Among all that could answer.
        chosen: The best that stands ready; the best of all if none does.
        ready: Whether it stands ready.
    """

    decision: RecoveryDecision
    chosen: RecoveryCandidate
    ready: bool


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
        downtimes: What changes took.
        latencies: What requests take on routes.
    """

    def __init__(
        self, engine: ChainEngine, planner: Planner, ways: ModelWays, builder: PipelineBuilder
    ) -> None:
        self._engine, self._planner, self._ways, self._builder = engine, planner, ways, builder
        self.gone: frozenset[int] = frozenset()
        self.leaving: frozenset[int] = frozenset()
        self.home = self.whole = engine.partition
        self.downtimes = Downtimes()
        self.latencies = RouteLatencies(planner.problem, engine.times)
        self._around: dict[tuple[Partition, frozenset[int]], tuple[WayAround, ...]] = {}
        self._hosts: dict[str, frozenset[int]] = {}
        self._shunned: dict[str, float] = {}  # until when, by label
        self._bytes: dict[str, int] = {}

    @property
    def away(self) -> frozenset[int]:
        """Hosts that are not to be used."""
        return self.gone | self.leaving

    @property
    def units(self) -> int:
        """Of the whole model."""
        return len(self._engine.chain.parts)

    def accuracy(self, label: str) -> float:
        """Return the share of right answers on a route."""
        return self._ways.accuracy.get(route_of(label).way, 0.0)

    def stands(self, label: str) -> bool:
        """Whether no host of a route is lost."""
        return self.gone.isdisjoint(self._of(label))

    def broken(self, label: str) -> bool:
        """Whether a host of a route is lost, or was: what stands of it does not answer."""
        if not self.stands(label):
            return True
        there = any(module.label == label for module in self._engine.live)
        return there and self.module(label) is None

    def sound(self, module: ChainModule) -> bool:
        """Whether a pipeline can answer.

        Not if a host of it was lost, even if that is back: its stage is not.
        """
        pipeline = module.pipeline
        left = pipeline.diverted or pipeline.ended or pipeline.closed
        return module.tried and not left and self._engine.chain.is_whole(module)

    def _of(self, label: str) -> frozenset[int]:
        """Return the hosts of a route."""
        if label not in self._hosts:
            route = route_of(label)
            units = len(self._engine.chain.parts_of(route.way))
            self._hosts[label] = frozenset(host for host, _, _ in working(route.partition, units))
        return self._hosts[label]

    def module(self, label: str) -> ChainModule | None:
        """Return the pipeline of a route into which requests may be sent; None: there is none."""
        for module in reversed(self._engine.live):
            if module.label == label and self.sound(module):
                return module
        return None

    def ready(self, label: str) -> bool:
        """Whether requests can be sent along a route now."""
        there = self._builder.ready(label) and self.module(label) is not None
        return there and self.stands(label)

    # ----------------------------------------------------------------------------------------------

    def foresee(self, objective: RecoveryObjective, more: frozenset[int] = frozenset()) -> Foreseen:
        """Return what is decided without the hosts that are away, and without more of them.

        Raises:
            RuntimeFailure: Nothing that is allowed could answer.
        """
        with _no_collection():
            gone = self.gone | more
            standing = self._standing(gone)
            around = self._possible(self.away | more, standing, objective)
            decision = choose(self._costed(around, standing), objective)
            ready = [s.candidate for s in decision.candidates if s.candidate.path in standing]
            some = 0 < len(ready) < len(decision.candidates)
            chosen = choose(ready, objective).choice if some else decision.choice
            return Foreseen(decision, chosen, bool(ready))

    def _standing(self, gone: frozenset[int]) -> frozenset[str]:
        live = {module.label for module in self._engine.live if self.sound(module)}
        return frozenset(
            label for label in self._builder.standing
            if label in live and gone.isdisjoint(self._of(label))
        )  # fmt: skip

    def best(self, objective: RecoveryObjective) -> tuple[str, RecoveryCandidate | None]:
        """Return the label of what should answer in the long run, and what it would be.

        None for the route while all hosts are there, which stands in for nothing.

        Raises:
            RuntimeFailure: Nothing can.
        """
        if not self.away:
            return Route(self.home).label, None
        standing = self._standing(self.gone)
        around = self._possible(self.away, standing, objective)
        choice = choose(self._costed(around, standing), objective.steady()).choice
        return choice.path, choice

    def in_case(
        self, label: str, techniques: tuple[str, ...], objective: RecoveryObjective
    ) -> list[str]:
        """Return what should stand ready: for each host of a route, and each technique, the best.

        Takes its time, and leaves what decisions then look up.

        Args:
            label: Of the route that answers.
            techniques: Those of which pipelines are to stand ready.
            objective: What is asked of them.
        """
        found = []
        self.latencies.learn()
        for host in sorted(self._of(label)):
            around = self._ways_around(self.away | {host})
            for one in around:
                self.latencies.expected(one.label)
                self._bytes[one.label] = self._engine.chain.bytes_to_send(route_of(one.label))
            costed = self._costed(around, frozenset())
            for technique in techniques:
                of_it = [one for one in costed if one.technique == technique]
                if of_it and technique in objective.techniques:
                    found.append(choose(of_it, objective).choice.path)
        return [one for one in dict.fromkeys(found) if one != label]

    def shun(self, label: str) -> bool:
        """Prefer other routes for a while to one that could not be built; whether it was so."""
        now, until = time.monotonic(), self._shunned.get(label, 0.0)
        self._shunned = {name: s for name, s in self._shunned.items() if s > now}
        self._shunned[label] = now + _SHUN_S
        return until > now

    def _possible(
        self, away: frozenset[int], standing: frozenset[str], objective: RecoveryObjective
    ) -> tuple[WayAround, ...]:
        """Return the ways around hosts, but those that could not be built, if others are left."""
        around, now = self._ways_around(away), time.monotonic()
        shunned = {label for label, until in self._shunned.items() if until > now} - standing
        if not shunned:
            return around
        others = tuple(one for one in around if one.label not in shunned)
        fits = any(one.technique in objective.techniques for one in others)
        return others if fits else around

    def _ways_around(self, away: frozenset[int]) -> tuple[WayAround, ...]:
        key = self.whole, away
        if key not in self._around:
            routes = routes_around(self.whole, self.units, away, self._ways, self._planner)
            chain = self._engine.chain
            self._around[key] = tuple(
                WayAround.of(route, self._ways, len(chain.parts_of(route.way))) for route in routes
            )
        return self._around[key]

    def _costed(
        self, around: tuple[WayAround, ...], standing: frozenset[str]
    ) -> list[RecoveryCandidate]:
        found, times = [], self.downtimes
        for one in around:
            took_s, known = self.latencies.seconds(one.label)
            build_s = 0.0
            if one.label not in standing:
                build_s = times.build_s(one.label, one.units, self._bytes.get(one.label, 0))
            measured = one.measured
            if known:
                measured = _BOTH if measured else _LATENCY
            found.append(RecoveryCandidate(
                one.technique, one.label, 1e3 * took_s, one.accuracy,
                1e3 * times.parts(build_s).seconds, measured,
            ))  # fmt: skip
        return found

    # ----------------------------------------------------------------------------------------------

    def built(self, label: str, seconds: float) -> None:
        """Take note of a pipeline that was built."""
        units = len(self._engine.chain.parts_of(route_of(label).way))
        self.downtimes.built(label, BuildSample(units, self._bytes.get(label, 0), seconds))
        self._bytes[label] = 0  # hosts hold them now

    def went(self, label: str) -> None:
        """Take note that a route answers."""
        route = route_of(label)
        if route.way == WHOLE:
            self.whole = route.partition

    def settled(self, home: Partition) -> None:
        """Take note of who computes what from now on while all hosts are there."""
        self.home = self.whole = home

    def errors(self) -> dict[str, Any]:
        """Return how far estimators are off on what they were not given, as plain values.

        Each has ``ours``, its mean absolute error, and ``samples``: relative to what was measured,
        but for those whose ``in`` says otherwise.
        """
        build, latency = self.downtimes.errors, self.latencies.held_out()
        return {
            "latency": {
                "ours": latency.mean,
                "worst": latency.worst,
                "samples": latency.routes,
                **latency.parts,
            },
            "build": {"ours": None if not build.samples else build.ours, "samples": build.samples},
            **self._ways.errors,
        }
