"""The best division of a graph between two hosts, where several tensors may cross.

A chain of units can be cut where one tensor is alive. A graph can be divided anywhere, as long as
nothing flows back: a branch may stay on the device while another goes to the server. The best such
division is a minimum cut (DADS; Hu et al., INFOCOM 2019)::

    device ──server_s(v)──▶ v ──device_s(v)──▶ server       v on the server's side pays the first
                            v ──send_s(v)──▶ v' ──∞──▶ w    once, however many w read it there
                            w ──∞──▶ v                      nothing flows back

The flow is that of networkx.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import networkx as nx
import torch

from fedsys.errors import ConfigError
from fedsys.models.chain import in_place
from fedsys.models.layers import LayeredModel
from fedsys.models.measure import measure
from fedsys.models.origins import sourceless
from fedsys.partition.problem import RAW, Problem
from fedsys.planning.costs import FRAME_BYTES
from fedsys.transport.codecs import encoded_bytes

_ROWS = 2  # of measurements
_PRECISION = 1 << 60  # what all costs together are
_DEVICE, _SERVER = "device", "server"


@dataclass(frozen=True)
class GraphStep:
    """One step of a graph.

    Attributes:
        name: Its name.
        reads: Names of the steps whose values it reads; they stand before it.
        device_s: What it costs on the device: seconds, or joules.
        server_s: What it costs on the server.
        send_s: What it costs to send its value; infinite if that cannot be sent.
    """

    name: str
    reads: tuple[str, ...]
    device_s: float
    server_s: float
    send_s: float


@dataclass(frozen=True)
class GraphDivision:
    """Which steps are on the device.

    Attributes:
        device: Their names, in order.
        crossing: Steps whose values are sent, in order.
        cost: Of a request: what all steps, all that is sent, and the way back cost.
    """

    device: tuple[str, ...]
    crossing: tuple[str, ...]
    cost: float


def divide(
    steps: Sequence[GraphStep], back_s: float = 0.0, together: Sequence[Sequence[str]] = ()
) -> GraphDivision:
    """Return the best division.

    Args:
        steps: In an order in which they can be computed. The first is the input, which is on the
            device; the last makes the answer.
        back_s: What it costs besides if the answer comes from the server.
        together: Names of steps that must be on one side.
    """
    flow = _Flow(steps, back_s)
    for step in steps:
        flow.add((_DEVICE,), (step.name,), step.server_s)
        flow.add((step.name,), (_SERVER,), step.device_s)
        flow.add((step.name,), (step.name, "sent"), step.send_s)
        for read in step.reads:
            flow.add((step.name,), (read,), math.inf)
            flow.add((read, "sent"), (step.name,), math.inf)
    flow.add((_DEVICE,), (steps[0].name,), math.inf)
    flow.add((_DEVICE,), (steps[-1].name,), back_s)
    for names in together:
        for one, other in pairwise(names):
            flow.add((one,), (other,), math.inf)
            flow.add((other,), (one,), math.inf)
    near = flow.near((_DEVICE,), (_SERVER,))
    return _division(steps, frozenset(s.name for s in steps if (s.name,) in near), back_s)


@final
class _Flow:
    """A graph of capacities as integers: sums of floats would not tell what is saturated.

    Args:
        steps: Whose costs give the scale.
        back_s: Another cost.
    """

    def __init__(self, steps: Sequence[GraphStep], back_s: float) -> None:
        costs = [c for s in steps for c in (s.device_s, s.server_s, s.send_s) if math.isfinite(c)]
        self._whole = sum(costs) + back_s or 1.0
        self._infinite = 2 * _PRECISION
        self._graph = nx.DiGraph()

    def add(self, tail: tuple[str, ...], head: tuple[str, ...], more: float) -> None:
        """Let so much more flow from one to the other."""
        units = self._infinite if math.isinf(more) else round(more / self._whole * _PRECISION)
        edge = self._graph.get_edge_data(tail, head, {"capacity": 0})
        self._graph.add_edge(tail, head, capacity=edge["capacity"] + units)

    def near(self, source: tuple[str, ...], sink: tuple[str, ...]) -> set[tuple[str, ...]]:
        """Return the side of the source."""
        near: set[tuple[str, ...]] = nx.minimum_cut(self._graph, source, sink)[1][0]
        return near


def _division(steps: Sequence[GraphStep], near: frozenset[str], back_s: float) -> GraphDivision:
    crossing = crossing_of(steps, near)
    sent = {step.name: step.send_s for step in steps}
    cost = sum(step.device_s if step.name in near else step.server_s for step in steps)
    cost += sum(sent[name] for name in crossing)
    cost += 0.0 if steps[-1].name in near else back_s
    return GraphDivision(tuple(s.name for s in steps if s.name in near), crossing, cost)


def crossing_of(steps: Sequence[GraphStep], near: frozenset[str]) -> tuple[str, ...]:
    """Return the steps of the device whose values the server reads."""
    read = {name for step in steps if step.name not in near for name in step.reads}
    return tuple(step.name for step in steps if step.name in near and step.name in read)


def best_division(
    problem: Problem,
    layers: LayeredModel,
    input_shape: Sequence[int],
    objective: str = "latency",
) -> GraphDivision:
    """Return the best division of a model between the two hosts of a problem.

    The seconds of a unit are divided among its steps by their multiply-accumulates. What crosses
    is written in the first codec; units that share a parameter stay on one side.

    Args:
        problem: Has two hosts.
        layers: Its model.
        input_shape: Of an example, without the batch.
        objective: ``latency`` or ``energy``.

    Raises:
        ConfigError: The problem has other than two hosts, or constraints or an objective that a
            minimum cut does not have.
    """
    _check(problem, objective)
    steps, together = steps_of(problem, layers, input_shape, objective)
    return divide(steps, _back(problem, objective), together)


def _check(problem: Problem, objective: str) -> None:
    rules, way_out = problem.constraints, "take partition.solver=dynamic"
    limited = any(problem.memory_bytes(0, len(problem)) > h.memory_bytes for h in problem.hosts)
    named = rules.must or rules.must_not or rules.upload_bytes
    refusals = {
        "must have two hosts": len(problem.hosts) != 2,
        "must have no constraints that bind": named or limited or math.isfinite(rules.time_limit_s),
        "must minimise latency or energy": objective not in ("latency", "energy"),
        "must have one request at a time": problem.requests_per_s > 0,
    }
    for rule, holds in refusals.items():
        if holds:
            raise ConfigError.of("partition.solver", "min_cut", rule, way_out)


def _back(problem: Problem, objective: str) -> float:
    """Return what it costs that the answer comes from the server, beside steps and tensors."""
    device, server = problem.hosts
    network, answer = problem.path(0, 1), problem.answer_bytes
    moved = 8 * answer / network.down_bits_s + 8 * FRAME_BYTES / network.up_bits_s
    handled = [
        host.costs.messaging.seconds(answer, RAW)
        + host.costs.messaging.seconds(FRAME_BYTES, problem.codecs[0])
        for host in problem.hosts
    ]
    handled[1] += server.costs.operation_s
    if objective == "energy":
        busy = (handled[0] * (device.power_w or 0.0), handled[1] * (server.power_w or 0.0))
        return moved * (device.radio_w + server.radio_w) + sum(busy)
    return moved + 2 * network.latency_s + server.waiting_s + sum(handled)


def steps_of(
    problem: Problem, layers: LayeredModel, input_shape: Sequence[int], objective: str
) -> tuple[list[GraphStep], list[list[str]]]:
    """Return the steps of a model, the input first, and which must stay together.

    A step that works in place stays with what makes and what reads the tensor that it changes.
    """
    nodes = {node.name: node for node in layers.graph.graph.nodes}
    entry = next(node.name for node in nodes.values() if node.op == "placeholder")
    costs = measure(layers.graph, torch.empty((_ROWS, *input_shape), device="meta"))
    sizes = {
        name: cost.bytes / _ROWS if cost.shape and cost.shape[0] == _ROWS else math.inf
        for name, cost in costs.items()
    }
    steps = [GraphStep(entry, (), 0.0, 0.0, _sending(problem, sizes[entry], RAW, objective))]
    for index, unit in enumerate(layers.units):
        work = [max(costs[name].macs, 0) for name in unit.nodes]
        shares = [w / sum(work) for w in work] if sum(work) else [1 / len(work)] * len(work)
        for name, share in zip(unit.nodes, shares, strict=True):
            reads = tuple(n.name for n in nodes[name].all_input_nodes if not sourceless(n))
            near, far = _computing(problem, index, share, len(steps) == 1, objective)
            send = _sending(problem, sizes[name], problem.codecs[0], objective)
            steps.append(GraphStep(name, reads, near, far, send))
    together = [
        [n for u in users for n in layers.units[u].nodes] for users in layers.shared.values()
    ]
    for node in nodes.values():
        if in_place(layers.graph, node):
            given = node.all_input_nodes[0]
            together.append([given.name, node.name, *(user.name for user in given.users)])
    return steps, together


def _computing(
    problem: Problem, unit: int, share: float, begins: bool, objective: str
) -> tuple[float, float]:
    costs = []
    for index, host in enumerate(problem.hosts):
        done = problem.forward_s(index)
        seconds = float(done[unit + 1] - done[unit]) * share
        seconds += host.costs.operation_s if begins and index == 0 else 0.0
        costs.append(seconds * (host.power_w or 0.0) if objective == "energy" else seconds)
    return costs[0], costs[1]


def _sending(problem: Problem, nbytes: float, codec: str, objective: str) -> float:
    if not math.isfinite(nbytes):
        return math.inf
    elements = round(nbytes * problem.rows / 4)
    written = encoded_bytes(elements, 1, codec)
    moved = 8 * written / problem.path(0, 1).up_bits_s
    handled = [h.costs.messaging.byte_s.get(codec, 0.0) * written for h in problem.hosts]
    if objective == "latency":
        return moved + sum(handled)
    busy = sum((h.power_w or 0.0) * s for h, s in zip(problem.hosts, handled, strict=True))
    return moved * sum(h.radio_w for h in problem.hosts) + busy
