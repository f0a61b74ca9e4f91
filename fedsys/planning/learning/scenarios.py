"""Fleets to learn on: what an iteration takes each device at each cut, on the timeline's formulas.

A `Scenario` is one fleet with its links at one moment. It knows the device-side share of each legal
cut, so agents need no layer numbers, and for each device and cut the best number of micro-batches
and codec, so that choosing a cut composes with pipelining. `draw` makes up scenarios around the
machines of a run: other numbers of devices, speeds, rates, latencies and edges, and units that take
longer or shorter than their multiply-accumulates say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import Indices
from fedsys.planning.costs import MachineCosts, frame_bytes
from fedsys.planning.learning.view import Times
from fedsys.planning.stage_table import StageTable
from fedsys.planning.workload import Array, Device, Workload
from fedsys.transport.network import Network

LATENCY_S: Final = (0.0005, 0.03)


@dataclass(frozen=True)
class Ranges:
    """What scenarios are drawn from; each range is gone through in equal ratios.

    Attributes:
        devices: Number of devices.
        speed: Factor on the seconds of a device.
        unit: Factor on the seconds of each unit, for each device by itself.
        edge: Factor on the seconds of the edge servers.
        mbit_s: Rates of links.
    """

    devices: tuple[int, int] = (2, 5)
    speed: tuple[float, float] = (0.25, 4.0)
    unit: tuple[float, float] = (0.7, 1.4)
    edge: tuple[float, float] = (0.5, 4.0)
    mbit_s: tuple[float, float] = (2.0, 100.0)


class Scenario:
    """A fleet at one moment, asked for the times of cuts.

    Args:
        load: What is trained, and on which machines; rates are those without the trace.
        shares: Device-side share of the work at each cut that may be chosen, ascending; the last
            one is 1, the whole model.
        cuts: These cuts.
    """

    def __init__(self, load: Workload, shares: Sequence[float], cuts: Sequence[int]) -> None:
        self.load, self.shares, self.cuts = load, tuple(shares), tuple(cuts)
        self._known: dict[bytes, Array] = {}

    @cached_property
    def _table(self) -> StageTable:
        edges = range(len(self.load.edges))
        choices = [
            Assignment(cut, edge, codec, codec, count)
            for cut in self.cuts[:-1]
            for count in self.load.micro_batches
            for codec in self.load.codecs
            for edge in edges
        ]
        return StageTable(self.load, [*choices, Assignment(self.cuts[-1], micro_batches=1)])

    @cached_property
    def best(self) -> Indices:
        """For each device and cut the best of the table's choices, ``(K, C)``, edges in turn."""
        alone, count = self._table.alone(), len(self.load.edges)
        by_cut = np.array([choice.cut for choice in self._table.choices])
        edge = np.array([choice.edge for choice in self._table.choices])
        found = np.zeros((len(self.load.devices), len(self.cuts)), dtype=np.int64)
        for k in range(len(found)):
            for i, cut in enumerate(self.cuts):
                mine = np.flatnonzero(
                    (by_cut == cut) & ((edge == k % count) | (cut == self.cuts[-1]))
                )
                found[k, i] = mine[alone[k, self._table.course[mine]].argmin()]
        return found

    @cached_property
    def baseline_s(self) -> Array:
        """Seconds of an iteration of each device alone, ``(K,)``."""
        return self.iteration_s(np.full(len(self.load.devices), len(self.cuts) - 1))

    def assignments(self, picked: Sequence[int]) -> tuple[Assignment, ...]:
        """Return what each device does at its cut, by index."""
        return tuple(self._table.choices[self.best[k, i]] for k, i in enumerate(picked))

    def iteration_s(self, picked: Sequence[int] | Indices) -> Array:
        """Return the seconds of an iteration of each device, ``(K,)``.

        Args:
            picked: Index of the cut of each device.
        """
        key = np.asarray(picked, dtype=np.int64)
        known = self._known.get(key.tobytes())
        if known is None:
            choices = self.best[np.arange(len(key)), key]
            known = self._known[key.tobytes()] = self._table.times(choices[None])[0][0]
        return known

    def iterations_s(self, picked: Indices) -> Array:
        """Return the seconds of an iteration of each device in P plans, ``(P, K)``.

        Args:
            picked: Index of the cut of each device, ``(P, K)``.
        """
        plans, back = np.unique(picked, axis=0, return_inverse=True)
        choices = self.best[np.arange(picked.shape[1]), plans]
        return self._table.times(choices)[0][back.ravel()]

    def times(self, iteration_s: Array) -> Times:
        """Return what is known of the devices when their iterations take so long."""
        links = [device.network for device in self.load.devices]
        slower = np.array([min(link.up_bits_s, link.down_bits_s) / 1e6 for link in links])
        return Times(iteration_s, slower, self.crossing_s)

    def assignment(self, device: int, cut: int) -> Assignment:
        """Return what a device does at a cut, by index; like ones repeat if there are more."""
        like = device % len(self.load.devices)
        made: Assignment = self._table.choices[self.best[like, cut]]
        edge = 0 if cut == len(self.cuts) - 1 else device % len(self.load.edges)
        return dataclasses.replace(made, edge=edge)

    @cached_property
    def crossing_bits(self) -> float:
        """Bits of a mini-batch at the first cut."""
        first = self.load.crossings[self.cuts[0] - 1]
        return 8.0 * frame_bytes(first, self.load.batch_size, "fp32")

    @cached_property
    def crossing_s(self) -> Array:
        """Seconds in which a mini-batch would cross the first cut both ways, ``(K,)``."""
        bits = self.crossing_bits
        links = [device.network for device in self.load.devices]
        return np.array([bits / link.up_bits_s + bits / link.down_bits_s for link in links])

    def with_rates(self, mbit_s: Sequence[float]) -> Scenario:
        """Return the same fleet at another moment."""
        devices = tuple(
            dataclasses.replace(d, network=Network(r * 1e6, r * 1e6, d.network.latency_s))
            for d, r in zip(self.load.devices, mbit_s, strict=True)
        )
        return Scenario(dataclasses.replace(self.load, devices=devices), self.shares, self.cuts)

    def moved(self, random: np.random.Generator, ranges: Ranges) -> Scenario:
        """Return the same fleet at another moment, whose rates are drawn."""
        return self.with_rates([_ratio(random, ranges.mbit_s) for _ in self.load.devices])


def drawn_costs(
    costs: MachineCosts,
    random: np.random.Generator,
    speed: tuple[float, float],
    unit: tuple[float, float],
) -> MachineCosts:
    """Return a machine like another: faster or slower, and each of its units by itself."""
    slower = costs.slower(_ratio(random, speed))
    low, high = np.log(unit)
    factors = np.exp(random.uniform(low, high, len(costs)))

    def times(table: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple((np.array(row) * factors).tolist()) for row in table)

    return dataclasses.replace(
        slower, forward_s=times(slower.forward_s), backward_s=times(slower.backward_s)
    )


def draw(base: Scenario, random: np.random.Generator, ranges: Ranges | None = None) -> Scenario:
    """Return a made-up scenario around another.

    Args:
        base: Gives the model, what may be chosen, and machines to vary.
        random: Where it is drawn from.
        ranges: From what.
    """
    ranges = ranges or Ranges()
    load = base.load
    count = int(random.integers(ranges.devices[0], ranges.devices[1] + 1))
    devices = []
    for k in range(count):
        like = load.devices[int(random.integers(len(load.devices)))]
        rate = _ratio(random, ranges.mbit_s) * 1e6
        network = Network(rate, rate, _ratio(random, LATENCY_S))
        costs = drawn_costs(like.costs, random, ranges.speed, ranges.unit)
        devices.append(Device(f"device {k}", costs, network, load.batch_size))
    slower = drawn_costs(load.edges[0], random, ranges.edge, ranges.unit)
    edges = tuple(slower for _ in load.edges)
    made = dataclasses.replace(load, devices=tuple(devices), edges=edges)
    return Scenario(made, base.shares, base.cuts)


def _ratio(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    low, high = np.log(bounds)
    return float(np.exp(random.uniform(low, high)))


def drawn_fleet(
    base: Scenario, random: np.random.Generator, moments: int, ranges: Ranges
) -> list[Scenario]:
    """Return a made-up fleet in some states of its links."""
    first = draw(base, random, ranges)
    return [first, *(first.moved(random, ranges) for _ in range(moments - 1))]
