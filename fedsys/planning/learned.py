"""A planner that learns what machines take: `policy.learn=true`.

It plans as the other planners do, for costs that `fedsys.planning.correction` has corrected by what
was measured, at the lower end of what they may be. So it tries what may be better, and each trial
tells what it takes: a plan that is kept has no rival that could still be much better. Machines of a
kind share what they learn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.correction import (
    UNLIKELY,
    Doubt,
    Factors,
    Ratios,
    Side,
    changed,
    kind_factors,
    kind_of,
    noted,
    own_speeds,
    ratio_of,
)
from fedsys.planning.costs import MachineCosts
from fedsys.planning.measured_rates import Links
from fedsys.planning.measured_speeds import believed
from fedsys.planning.options import PlanOptions
from fedsys.planning.planner import Plan, evaluate
from fedsys.planning.replanning import must_offload, replanned
from fedsys.planning.resources import Observation
from fedsys.planning.workload import Workload

_SURE = 2.0
"""Standard deviations of noise up to which what is measured is what was expected."""

State = dict[str, Any]

Believed = Callable[[LayeredModel, Sequence[int]], Workload]
"""Returns the workload of some clients as it is believed before anything is measured."""


@dataclass(frozen=True)
class LearningOptions:
    """How it is planned and learned.

    Attributes:
        method: A name of `fedsys.planning.planner.METHODS`.
        offload: Whether each device must offload.
        drift: Relative change of what is measured from which on it is planned anew.
        hysteresis: Share of the time that a new plan must save.
        forget: Rounds without a measurement after which a link is believed to be as configured.
        optimism: Standard deviations by which costs may be better than what is believed.
        doubt: How far profiles may be wrong.
        most_bytes: Largest model that a device holds alone; above, all devices offload.
    """

    method: str = "auto"
    offload: bool = False
    drift: float = 0.2
    hysteresis: float = 0.02
    forget: int = 5
    optimism: float = 1.0
    doubt: Doubt = field(default_factory=Doubt)
    most_bytes: int | None = None

    @classmethod
    def of(cls, options: PlanOptions, most_bytes: int | None = None) -> LearningOptions:
        """Return how a policy plans and learns.

        What is learned is a mean of rounds and moves little, so that a plan that saves less than
        the hysteresis of measured costs is taken too.

        Args:
            options: The policy's.
            most_bytes: The largest model that a device holds alone.
        """
        return cls(
            options.kind,
            options.offload,
            options.drift,
            min(options.hysteresis, cls.hysteresis),
            options.forget,
            options.optimism,
            Doubt(unit=options.doubt),
            most_bytes,
        )


class LearnedPlanner:
    """Plans by what it learns. It is a policy: state in, state out.

    Its state is a dict of plain values: ``devices`` and ``edges`` (`Ratios` of each), ``went``
    (which way the speed of each of these changed last), ``rates`` and ``alone`` (`Links`),
    ``choices`` of each client, ``clients`` of the last plan, and ``plans``, their number.

    Args:
        believed: What is believed at first.
        options: How it is planned.
    """

    def __init__(self, believed: Believed, options: LearningOptions | None = None) -> None:
        self._believed, self._options = believed, options or LearningOptions()
        self._layers: LayeredModel | None = None

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> State:
        """Return the state before the first round."""
        self._layers = layers
        self._believed(layers, list(nodes))  # refuses what cannot be planned
        names = ("devices", "edges", "rates", "alone", "went")
        parts: dict[str, Any] = {name: {} for name in names}
        return parts | {"choices": {}, "clients": [], "plans": 0}

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Learn from what was measured, and plan anew if that says something new."""
        clients = sorted(seen)
        if not clients:
            return state, {}
        load = self._load(clients)
        after, news = self._informed(state, load, clients, seen)
        known = all(client in state["choices"] for client in clients)
        if news or not known or state["clients"] != clients:
            after = self._replanned(after, load, clients)
        return after, {client: Assignment.of_list(after["choices"][client]) for client in clients}

    def predicted(self, state: State, clients: Sequence[int]) -> Plan:
        """Return what is expected of some clients, by what is believed and chosen."""
        load = self._corrected(state, self._load(clients), clients, 0.0)
        return evaluate(load, [Assignment.of_list(state["choices"][client]) for client in clients])

    def reasons(self, state: State, clients: Sequence[int]) -> Mapping[int, str]:
        """Return for each client a sentence about what it does."""
        load = self._load(clients)
        kinds = _Kinds(load, state["devices"], self._options, edge=False)
        return {
            client: kinds.reason(device.costs, client, state["choices"][client][0])
            for client, device in zip(clients, load.devices, strict=True)
        }

    def _load(self, clients: Sequence[int]) -> Workload:
        if self._layers is None:
            raise ConfigError.of("policy", self._options.method, "must be initialised first")
        return self._believed(self._layers, clients)

    def _replanned(self, state: State, load: Workload, clients: list[int]) -> State:
        o = self._options
        hopeful = self._corrected(state, load, clients, o.optimism)
        offload = must_offload(load, o.offload, o.most_bytes)
        return replanned(
            state, hopeful, clients, o.method, offload=offload, hysteresis=o.hysteresis
        )

    # --- what is believed -------------------------------------------------------------------------

    def _corrected(
        self, state: State, load: Workload, clients: Sequence[int], optimism: float
    ) -> Workload:
        """Return a workload with the rates and costs that are believed."""
        links = Links(state["rates"], state["alone"])
        devices = _Kinds(load, state["devices"], self._options, edge=False)
        edges = _Kinds(load, state["edges"], self._options, edge=True)
        believed = links.applied(load, clients)
        return dataclasses.replace(
            believed,
            devices=tuple(
                dataclasses.replace(device, costs=devices.costs(device.costs, client, optimism))
                for client, device in zip(clients, believed.devices, strict=True)
            ),
            edges=tuple(edges.costs(costs, i, optimism) for i, costs in enumerate(load.edges)),
        )

    def _informed(
        self, state: State, load: Workload, clients: Sequence[int], seen: Mapping[int, Observation]
    ) -> tuple[State, bool]:
        """Return the state with what was measured, and whether it was not expected."""
        o = self._options
        chosen = {
            c: Assignment.of_list(state["choices"][c]) for c in clients if c in state["choices"]
        }
        offloaded = {client: choice.cut < load.units for client, choice in chosen.items()}
        before = Links(state["rates"], state["alone"])
        links = before.informed(load, clients, seen, offloaded, drift=o.drift, forget=o.forget)
        went = state.get("went", {})
        devices = _Kinds(load, state["devices"], o, edge=False, went=went.get("devices", {}))
        edges = _Kinds(load, state["edges"], o, edge=True, went=went.get("edges", {}))
        there: dict[tuple[int, int], list[float]] = {}
        for client, device in zip(clients, load.devices, strict=True):
            got, choice = seen[client], chosen.get(client)
            if choice is None or got.iteration_s <= 0:
                continue
            ratio = ratio_of(load, device, choice, got.compute_s, edge=False)
            devices.note(device.costs, client, choice.cut, ratio)
            if choice.cut < load.units:
                ratio = ratio_of(load, device, choice, got.edge_s, edge=True)
                there.setdefault((choice.edge, choice.cut), []).append(ratio)
        for (edge, cut), ratios in there.items():
            edges.note(load.edges[edge], edge, cut, float(np.median(ratios)))
        news = devices.news or edges.news or links.rates != before.rates
        fresh: State = {"rates": links.rates, "alone": links.alone}
        fresh |= {"went": {"devices": devices.went, "edges": edges.went}}
        return state | fresh | {"devices": devices.records, "edges": edges.records}, news


class _Kinds:
    """What is known of the machines of each kind in a round, and what is new of them.

    Args:
        load: What is trained, with the costs of profiles.
        records: Of each kind, of each machine, its `Ratios`.
        options: How it is learned.
        edge: Whether the machines are edge servers.
        went: Of each kind, of each machine, which way its speed changed last: 1 slower, -1 faster.
    """

    def __init__(
        self,
        load: Workload,
        records: Mapping[str, Mapping[int, Ratios]],
        options: LearningOptions,
        *,
        edge: bool,
        went: Mapping[str, Mapping[int, int]] | None = None,
    ) -> None:
        self._load, self._options, self._edge = load, options, edge
        self.went: dict[str, dict[int, int]] = {k: dict(v) for k, v in (went or {}).items()}
        self._before = records
        self.records: dict[str, dict[int, Ratios]] = {k: dict(v) for k, v in records.items()}
        self.news = False
        self._known: dict[str, tuple[Side, Factors, dict[int, float]]] = {}
        self._costs: dict[tuple[int, float], MachineCosts] = {}

    def _of(self, costs: MachineCosts) -> tuple[Side, Factors, dict[int, float]]:
        """Return a kind: its side, its factors, and which machines are slower by how much."""
        kind = kind_of(costs)
        if kind not in self._known:
            side = Side.of(self._load, costs, self._edge)
            own = self._before.get(kind, {})
            ratios, doubt = list(own.values()), self._options.doubt
            speeds = own_speeds(side, ratios, doubt, self._options.drift)
            factors = kind_factors(side, ratios, speeds, doubt)
            self._known[kind] = side, factors, dict(zip(own, speeds, strict=True))
        return self._known[kind]

    def costs(self, costs: MachineCosts, machine: int, optimism: float) -> MachineCosts:
        """Return what a machine is believed to take."""
        side, factors, speeds = self._of(costs)
        speed = speeds.get(machine, 1.0)
        if not self._before.get(kind_of(costs)) and optimism == 0.0:
            return costs
        key = id(costs), speed
        if key not in self._costs:
            made = side.corrected(costs, factors, optimism)
            self._costs[key] = made if speed == 1.0 else made.slower(speed)
        return self._costs[key]

    def reason(self, costs: MachineCosts, machine: int, cut: int) -> str:
        """Return in a sentence what is known of a machine at a cut."""
        side, factors, speeds = self._of(costs)
        mean, spread = (float(part[0]) for part in factors.of(side.shares([cut])))
        speed = speeds.get(machine, 1.0)
        others = self._before.get(kind_of(costs), {}).values()
        rounds = sum(own[cut][1] for own in others if cut in own)
        kind = kind_of(costs).rpartition(".")[2]
        takes = f"{kind} takes {speed * mean:.2f} ± {speed * spread:.2f} times its profile"
        where = "for the whole model" if cut == self._load.units else f"up to cut {cut}"
        if rounds < 1:
            return f"tries what may be faster: {takes} {where}, as far as can be told"
        return f"nothing else may be much faster: {takes} {where}, measured in {rounds:.0f} rounds"

    def note(self, costs: MachineCosts, machine: int, cut: int, ratio: float) -> None:
        """Take down what a machine measured."""
        if ratio <= 0:
            return
        doubt, drift = self._options.doubt, self._options.drift
        side, factors, speeds = self._of(costs)
        mine = self.records.setdefault(kind_of(costs), {})
        own = mine.get(machine, {})
        mean, spread = (float(part[0]) for part in factors.of(side.shares([cut])))
        expected = mean * speeds.get(machine, 1.0)
        off = abs(ratio - expected)
        chance = float(np.hypot(spread, np.hypot(doubt.noise, doubt.own)))
        if own and off > max(UNLIKELY * chance * expected / mean, drift * expected):
            ways = self.went.setdefault(kind_of(costs), {})
            factor, ways[machine] = believed(1.0, ways.get(machine, 0), ratio / expected, 0.0)
            own, ratio = changed(own, factor), factor * expected
        new_cut = all(cut not in other for other in mine.values())
        mine[machine] = noted(own, cut, ratio)
        self.news |= new_cut or off > _SURE * doubt.noise * expected
