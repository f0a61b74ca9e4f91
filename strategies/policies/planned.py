"""Policies that plan by a model of the run's machines: auto, exhaustive, pipar, splitfed.

What a fleet file says of machines and networks is what is believed at first. What is measured in a
round replaces it where it differs by more than ``policy.drift``; then a new plan is made, and taken
if it saves ``policy.hysteresis`` of the time of the old one. A machine's speed that turns back is
believed half of the way, so that plans do not go to and fro (`fedsys.planning.measured_speeds`). A
device that trains alone measures how fast it computes, but no link: after ``policy.forget`` rounds
the fleet file is believed again of that. PiPar's code decides once, at the start (Zhang et al.,
JPDC 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.costs import MachineCosts
from fedsys.planning.hardware import Hardware
from fedsys.planning.measured_rates import BOUNDS
from fedsys.planning.measured_speeds import believed
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.planning.ordering import Order, ordered
from fedsys.planning.planner import Plan, evaluate
from fedsys.planning.replanning import must_offload, replanned
from fedsys.planning.workload import Device, Menu, Workload, mini_batches
from fedsys.runs.reasons import Reasons
from fedsys.transport.network import Network
from strategies.policies.policy import Assignment, Observation

State = dict[str, Any]

UP, DOWN, DEVICE = 0, 1, 2
"""What is believed of a client: bits per second each way, and how much slower it computes."""


class Planned:
    """Plans at the first round, and again when what is measured drifts.

    Its state is a dict of plain values: ``beliefs`` of each client (`UP`, `DOWN`, `DEVICE`),
    ``edges`` (how much slower each computes), ``went`` (which way these two changed last, by
    ``device`` and ``edge``), ``shares`` (of a gradient that are sent, by cut), ``choices`` of each
    client, ``clients`` for which the last plan was made, ``plans``, their number, and ``alone``,
    for how many rounds a client has measured no link.

    Args:
        config: The run; ``policy`` holds the options.
        examples: Examples of each client.
    """

    def __init__(self, config: Config, examples: Sequence[int]) -> None:
        self._options = PlanOptions.of(config.policy)
        refuse_private(config)
        self._config, self._examples = config, list(examples) or [config.client.batch_size]
        self._layers: LayeredModel | None = None
        self._machines: Hardware | None = None

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> State:
        """Return what the fleet file says, and no plan yet.

        Raises:
            ConfigError: The fleet has no machines, or these have no costs for the model.
        """
        self._layers, self._machines = layers, machines_of(self._config, layers)
        self._load([])  # refuses what cannot be planned, before the first round
        return {
            "beliefs": {},
            "edges": {},
            "choices": {},
            "clients": [],
            "plans": 0,
            "alone": {},
            "went": {},
            "shares": {},
        }

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Take in what was measured, and plan anew if that or who takes part has changed."""
        clients = sorted(seen)
        state = self._forgetful(self._informed(state, seen), clients, seen)
        if clients and (state["drifted"] or state["clients"] != clients):
            state = self._replanned(state, clients)
        chosen = {client: Assignment.of_list(state["choices"][client]) for client in clients}
        return state | {"drifted": False}, chosen

    def predicted(self, state: State, clients: Sequence[int]) -> Plan:
        """Return what is expected of some clients, by what is believed and chosen."""
        choices = [Assignment.of_list(state["choices"][client]) for client in clients]
        return evaluate(self._load(clients, state), choices)

    def reasons(self, state: State, clients: Sequence[int]) -> Mapping[int, str]:
        """Return a sentence for each client about what it does, by what is believed."""
        made = Reasons(self._load(clients, state), self.predicted(state, clients))
        return {client: made.of(k) for k, client in enumerate(clients)}

    def orders(
        self, state: State, clients: Sequence[int], free: Sequence[int], round_: int
    ) -> dict[int, Order]:
        """Return the moves that shorten the round, by what is believed; with ``policy.migrate``."""
        if not self._options.migrate or not free:
            return {}
        choices = [Assignment.of_list(state["choices"][client]) for client in clients]
        load, may = self._load(clients, state), {clients.index(client) for client in free}
        found = ordered(load, choices, may, round_, hysteresis=self._options.hysteresis)
        return {
            clients[order.move.client]: dataclasses.replace(
                order, move=dataclasses.replace(order.move, client=clients[order.move.client])
            )
            for order in found
        }

    def _replanned(self, state: State, clients: list[int]) -> State:
        load, o = self._load(clients, state), self._options
        offload = must_offload(load, o.offload, self._config.client.max_model_bytes)
        return replanned(state, load, clients, o.kind, offload=offload, hysteresis=o.hysteresis)

    # --- what is believed -------------------------------------------------------------------------

    def _load(self, clients: Sequence[int], state: State | None = None) -> Workload:
        """Return the workload of some clients (of all, if there are none) as it is believed."""
        if self._layers is None or self._machines is None:
            raise ConfigError.of("policy.kind", self._options.kind, "must be initialised first")
        load = run_workload(
            self._config, self._layers, self._machines, self._examples, self._options,
            clients or None,
        )  # fmt: skip
        if state is None:
            return load
        made: dict[tuple[int, float], MachineCosts] = {}

        def slower(costs: MachineCosts, factor: float) -> MachineCosts:
            if factor == 1.0:
                return costs
            return made.setdefault((id(costs), factor), costs.slower(factor))

        devices = []
        for client, device in zip(clients, load.devices, strict=True):
            up, down, factor = self._belief(state, client, device)
            network = Network(up, down, device.network.latency_s)
            costs = slower(device.costs, factor)
            devices.append(dataclasses.replace(device, costs=costs, network=network))
        edges = [slower(e, state["edges"].get(i, 1.0)) for i, e in enumerate(load.edges)]
        crossings = tuple(
            dataclasses.replace(crossing, gradient_share=_share(state, cut))
            for cut, crossing in enumerate(load.crossings, 1)
        )
        return dataclasses.replace(
            load, devices=tuple(devices), edges=tuple(edges), crossings=crossings
        )

    def _belief(self, state: State, client: int, device: Device) -> list[float]:
        rates = [device.network.up_bits_s, device.network.down_bits_s, 1.0]
        return list(state["beliefs"].get(client, rates))

    def _informed(self, state: State, seen: Mapping[int, Observation]) -> State:
        """Return the state with what was measured, where it differs from what is believed."""
        measured = [
            client
            for client in sorted(seen)
            if seen[client].iteration_s > 0 and client in state["choices"]
        ]
        if not measured:
            return state | {"drifted": False}
        load = self._load(measured)
        beliefs, drifted, drift = dict(state["beliefs"]), False, self._options.drift
        went = {who: dict(state.get("went", {}).get(who, {})) for who in ("device", "edge")}
        edges: dict[int, list[float]] = {}
        for client, device in zip(measured, load.devices, strict=True):
            choice, got = Assignment.of_list(state["choices"][client]), seen[client]
            own, there = _busy(load, device, choice)
            before = self._belief(state, client, device)
            after = [
                self._rate(before[UP], got.up_bit_s),
                self._rate(before[DOWN], got.down_bit_s),
                before[DEVICE],
            ]
            if got.compute_s > 0 and own > 0:
                after[DEVICE], went["device"][client] = believed(
                    before[DEVICE], went["device"].get(client, 0), got.compute_s / own, drift
                )
            if after != before:
                beliefs[client], drifted = after, True
            if choice.cut < load.units and got.edge_s > 0 and there > 0:
                edges.setdefault(choice.edge, []).append(got.edge_s / there)
        factors = dict(state["edges"])
        for edge, ratios in edges.items():
            slowness, way = factors.get(edge, 1.0), went["edge"].get(edge, 0)
            factor, went["edge"][edge] = believed(slowness, way, median(ratios), drift)
            if factor != slowness:
                factors[edge], drifted = factor, True
        shares = self._shares(state, seen, measured)
        drifted |= any(abs(s / _share(state, cut) - 1) > drift for cut, s in shares.items())
        informed = {"beliefs": beliefs, "edges": factors, "went": went, "shares": shares}
        return state | informed | {"drifted": drifted}

    def _shares(
        self, state: State, seen: Mapping[int, Observation], measured: Sequence[int]
    ) -> dict[int, float]:
        """Return what share of a gradient is believed to be sent at each cut.

        What is seen there first, and then what drifts: shares creep, so that those of one round
        after another would never differ by much.
        """
        sent: dict[int, list[float]] = {}
        for client in measured:
            if seen[client].gradient_share > 0:
                cut = Assignment.of_list(state["choices"][client]).cut
                sent.setdefault(cut, []).append(seen[client].gradient_share)
        shares: dict[int, float] = dict(state.get("shares", {}))
        for cut, each in sent.items():
            share = median(each)
            if cut not in shares or abs(share / shares[cut] - 1) > self._options.drift:
                shares[cut] = share
        return shares

    def _forgetful(
        self, state: State, clients: Sequence[int], seen: Mapping[int, Observation]
    ) -> State:
        """Return the state without beliefs about links that were long not measured."""
        alone, beliefs, drifted = dict(state["alone"]), dict(state["beliefs"]), state["drifted"]
        if not any(client in beliefs for client in clients):
            return state
        load = self._load(clients)
        for client, device in zip(clients, load.devices, strict=True):
            belief = beliefs.get(client)
            rates = self._belief({"beliefs": {}}, client, device)[:DEVICE]
            measured = state["choices"].get(client, [0])[0] < load.units or seen[client].up_bit_s
            if belief is None or measured or belief[:DEVICE] == rates:
                alone.pop(client, None)
                continue
            alone[client] = alone.get(client, 0) + 1
            if alone[client] > self._options.forget:
                del alone[client]
                beliefs[client] = [*rates, belief[DEVICE]]
                drifted = True
        return state | {"alone": alone, "beliefs": beliefs, "drifted": drifted}

    def _rate(self, before: float, bit_s: float) -> float:
        """Return what to believe of a link's rate, with the seconds of a bit as measured, or 0."""
        if bit_s <= 0:
            return before
        lowest, highest = BOUNDS
        now = min(max(1 / bit_s, lowest), highest)
        return now if abs(now / before - 1) > self._options.drift else before


def _share(state: State, cut: int) -> float:
    """Return the share of a gradient that is sent at a cut, as far as was seen; else all of it."""
    return float(state.get("shares", {}).get(cut, 1.0))


def refuse_private(config: Config) -> None:
    """Refuse runs whose labels stay on the devices.

    Raises:
        ConfigError: ``client.label_private`` is true.
    """
    if config.client.label_private:
        raise ConfigError.of(
            "policy.kind", config.policy.get("kind"),
            "must be fixed with client.label_private=true: planners know one cut only",
        )  # fmt: skip


def _busy(load: Workload, device: Device, choice: Assignment) -> tuple[float, float]:
    """Return the seconds in which device and edge compute in a mini-batch: means, as measured."""
    sizes = mini_batches(device.examples, load.batch_size)
    s = Menu(load, [choice]).resized(sizes).stages(device)
    own = s.pieces * (s.forward + s.backward) + s.device_update
    return float(own.mean()), float((s.pieces * s.edge).mean())
