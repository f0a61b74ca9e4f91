"""The fleet of a run, for an agent that scores cuts: what is configured and believed of clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import Indices
from fedsys.planning.correction import Side
from fedsys.planning.learning.knowing import (
    CutTable,
    Knowledge,
    Measurements,
    Rows,
    courses_of,
    table_of,
)
from fedsys.planning.learning.outlook import Features, Outlook, Target, candidates, outlook, target
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.learning.staging import Forecast, Setup
from fedsys.planning.resources import Observation
from fedsys.planning.workload import Array, Workload, mini_batches


@dataclass(frozen=True)
class Look:
    """What an agent sees of a round to come.

    Attributes:
        outlook: What is expected of each cut.
        hoped: What the slowest device may hope for.
        legal: Which cuts may be chosen, ``(R, C)``.
        seen: The candidates.
    """

    outlook: Outlook
    hoped: Target
    legal: NDArray[np.bool_]
    seen: Features


class RunFleet:
    """Clients of a run as arrays, and cuts as assignments.

    Args:
        base: The fleet and model of the run, as they are believed to be.
        forced: Whether a device may not hold the whole model.
        told: Whether the costs of `base` are believed before anything is measured.
        full: Whether all mini-batches are full, as in truncated rounds.
    """

    def __init__(
        self, base: Scenario, *, forced: bool = False, told: bool = True, full: bool = False
    ) -> None:
        self.table: CutTable = table_of(base.load, base.shares, base.cuts)
        self._cuts, self._forced = tuple(base.cuts), forced and len(base.cuts) > 1
        self._courses, self._edges = courses_of(base.load), len(base.load.edges)
        self._rows = _configured(base.load)
        self._fill = np.ones(len(base.load.devices)) if full else _filled(base.load)
        self._first = _believed(base.load, len(base.cuts), told, self._fill)
        self._some: tuple[tuple[int, ...], Setup, Knowledge] | None = None
        self._made: dict[tuple[int, int, int], Assignment] = {}

    def of(self, clients: Sequence[int]) -> tuple[Setup, Knowledge]:
        """Return the setup of some clients, and what is believed of them at first."""
        who = tuple(clients)
        if self._some is None or self._some[0] != who:
            count = len(self._rows.fleet)
            index = np.array([client % count for client in clients], dtype=np.int64)
            edge = np.array([client % self._edges for client in clients], dtype=np.int64)
            rows = dataclasses.replace(_picked(self._rows, index), edge=edge)
            fill = self._fill[index][:, None, None]
            up, down = self.table.up_bits * fill, self.table.down_bits * fill
            table = dataclasses.replace(self.table, up_bits=up, down_bits=down)
            self._some = who, Setup.of(table, rows), _picked(self._first, index)
        return self._some[1:]

    def look(self, setup: Setup, known: Knowledge, made: Forecast | None = None) -> Look:
        """Return what is seen of a round to come."""
        seen = outlook(setup, known, made)
        legal = np.repeat(known.ready[:, None], len(self._cuts), axis=1)
        legal[:, -1] = True
        if self._forced:
            legal[:, :-1], legal[:, -1] = True, False
        hoped = target(setup.rows, seen, legal)
        return Look(seen, hoped, legal, candidates(setup, known, seen, hoped, legal))

    def assignments(
        self, clients: Sequence[int], cut: Indices, course: Indices
    ) -> list[Assignment]:
        """Return what clients do at cuts by courses, by index."""
        known, edges = self._made, [client % self._edges for client in clients]
        chosen = list(zip(cut.tolist(), course.tolist(), edges, strict=True))
        for what in set(chosen).difference(known):
            known[what] = self._assignment(*what)
        return [known[what] for what in chosen]

    def _assignment(self, cut: int, course: int, edge: int) -> Assignment:
        at, (count, codec) = self._cuts[cut], self._courses[course]
        if cut == len(self._cuts) - 1:
            return Assignment(at, micro_batches=1)
        return Assignment(at, edge, codec, codec, count)


def _configured(load: Workload) -> Rows:
    """Return what is configured of the clients of a run; they take the edges in turn."""
    count, names = len(load.devices), [codec for _, codec in courses_of(load)]
    costs = [device.costs for device in load.devices]
    edges = [load.edges[k % len(load.edges)] for k in range(count)]

    def bit_s(machines: Sequence[Any]) -> Array:
        table = [[m.messaging.byte_s.get(name, 0.0) / 8.0 for name in names] for m in machines]
        return np.array(table)

    return Rows(
        np.zeros(1, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        np.arange(count) % len(load.edges),
        np.array([float(edge.workers) for edge in edges]),
        np.array([device.network.latency_s for device in load.devices]),
        np.array([float(load.iterations(device)) for device in load.devices]),
        np.array([c.operation_s for c in costs]),
        np.array([c.messaging.message_s for c in costs]),
        bit_s(costs),
        np.array([edge.operation_s + edge.messaging.message_s for edge in edges]),
        bit_s(edges),
    )


def _filled(load: Workload) -> Array:
    """Return the mean size of the mini-batches of each device, over that of a full one."""
    sizes = {d.examples: mini_batches(d.examples, load.batch_size) for d in load.devices}
    fill = {n: n / (len(batches) * load.batch_size) for n, batches in sizes.items()}
    return np.array([fill[device.examples] for device in load.devices])


def _believed(load: Workload, cuts: int, told: bool, fill: Array) -> Knowledge:
    """Return what is believed of the clients of a run before the first round."""
    count = len(load.devices)
    links = [device.network for device in load.devices]

    def whole_s(machines: Sequence[Any], edge: bool) -> Array:
        known = {id(m): float(Side.of(load, m, edge).seconds.sum()) for m in machines}
        return np.array([known[id(m)] for m in machines])

    zeros, none = np.zeros(count), np.zeros((count, cuts))
    return Knowledge(
        whole_s([device.costs for device in load.devices], False) * fill * float(told),
        none,
        none,
        np.array([1.0 / link.up_bits_s for link in links]),
        np.array([1.0 / link.down_bits_s for link in links]),
        zeros,
        whole_s([load.edges[k % len(load.edges)] for k in range(count)], True) * fill,
        np.full(count, -1),
        np.zeros(count, dtype=np.int64),
        zeros,
        np.array([d.costs.load_s * load.batch_size for d in load.devices]) * fill * float(told),
    )


def _picked(record: Any, index: Indices) -> Any:
    """Return some rows of a record of one fleet."""
    arrays = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    starts = np.zeros(1, dtype=np.int64)
    made = {name: starts if name == "starts" else array[index] for name, array in arrays.items()}
    return dataclasses.replace(record, **made)


def measured(seen: Mapping[int, Observation], clients: Sequence[int]) -> Measurements:
    """Return what clients measured, as arrays; of those that did not, nothing."""
    nothing = Observation()
    got = [seen.get(client, nothing) for client in clients]
    rows = [(s.iteration_s, s.compute_s, s.edge_s, s.up_bit_s, s.down_bit_s) for s in got]
    return Measurements(*np.array(rows, dtype=float).T.copy())
