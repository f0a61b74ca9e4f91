"""Plans: for each device the cut, the number of micro-batches, the codec and the edge server.

A plan is judged by the time of a round: of each device, its iterations and the exchange of its part
of the model, with contention for edges as in `fedsys.planning.contention`. Of two plans the one
with the faster slowest device is better; a thousandth of the mean is added so that no other device
waits without need. "All on the device" is always a candidate, unless offloading is forced.

========== =====================================================================================
exhaustive the optimum over all choices of all devices, if there are at most 10^6 combinations;
           above, each device in turn has the best of all its choices until none changes
auto       a few of the choices that can be worth it, from starts with one limit of time for all
pipar      the rule of PiPar for each device by itself: one number of micro-batches for each cut
splitfed   one micro-batch, each device at its own best cut: split learning in parallel
classic    everything on the devices
========== =====================================================================================

`pipar` is the rule of Zhang et al., "PiPar: Pipeline Parallelism for Collaborative Machine
Learning" (JPDC 2024): for each cut as many micro-batches as keep the device busy until the first
gradient is back, N = 1 + ceil((t_u + t_s + t_d) / min(t_f, t_b)), and the cut with the least time.
Unlike its published code it counts bytes of the real tensors and latency, and times a pipeline in
which a device computes one thing at a time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedsys.errors import ConfigError
from fedsys.planning import search
from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import Indices, alone_s
from fedsys.planning.stage_table import MEAN, StageTable
from fedsys.planning.workload import MOST_PIECES, Device, Menu, Workload
from fedsys.transport.network import Network

METHODS = ("auto", "exhaustive", "pipar", "splitfed", "classic")
MOST_COMBINATIONS = 10**6


@dataclass(frozen=True)
class Plan:
    """What each device shall do, and what the model says about it.

    Attributes:
        method: Who made it.
        choices: For each device.
        iteration_s: Predicted seconds of an iteration of each device, of a full mini-batch.
        rest_s: Likewise, of the last mini-batch of an epoch.
        round_s: Predicted seconds of its round.
        how: How far it was searched, in words.
        planned_s: Seconds that planning took.
    """

    method: str
    choices: tuple[Assignment, ...]
    iteration_s: tuple[float, ...]
    round_s: tuple[float, ...]
    how: str
    rest_s: tuple[float, ...] = ()
    planned_s: float = dataclasses.field(default=0.0, compare=False)

    @property
    def seconds(self) -> float:
        """Predicted seconds of the round: those of the slowest device."""
        return max(self.round_s)


def plan(load: Workload, method: str = "auto", *, offload: bool = False) -> Plan:
    """Return the plan of a method.

    Args:
        load: What is trained, on which machines, and what may be chosen.
        method: One of `METHODS`.
        offload: Whether every device has to offload: `classic` is not a candidate then.

    Raises:
        ConfigError: There is no such method, or offloading is forced and the model has no cut.
    """
    if method not in METHODS:
        raise ConfigError.of("policy.kind", method, f"must be one of {', '.join(METHODS)}")
    if (offload or method == "splitfed") and not load.cuts:
        raise ConfigError.of(
            "model", method, "must have a cut: between its units more than one tensor flows",
            "policy=none trains it on the devices",
        )  # fmt: skip
    began = time.perf_counter()
    table, picked, how = _METHODS[method](load, offload)
    made = _as_plan(table, picked, method, how)
    return dataclasses.replace(made, planned_s=time.perf_counter() - began)


def evaluate(
    load: Workload, choices: Sequence[Assignment], *, method: str = "", how: str = ""
) -> Plan:
    """Return a plan of given choices with what the model predicts for it."""
    table, picked = _listed(load, choices)
    return _as_plan(table, picked, method, how)


def _listed(load: Workload, choices: Sequence[Assignment]) -> tuple[StageTable, Indices]:
    index = {choice: i for i, choice in enumerate(dict.fromkeys(choices))}
    return StageTable(load, list(index)), np.array([index[choice] for choice in choices])


def _as_plan(table: StageTable, picked: Indices, method: str, how: str) -> Plan:
    iteration, round_ = table.times_of(picked)
    rest = iteration * table.rest[np.arange(len(picked)), table.course[picked]]
    choices = tuple(table.choices[i] for i in picked)
    times = (tuple(seconds.tolist()) for seconds in (iteration, round_, rest))
    iteration_s, round_s, rest_s = times
    return Plan(method, choices, iteration_s, round_s, how, rest_s)


def options(load: Workload, *, offload: bool = False) -> list[Assignment]:
    """Return all choices of a device; those of one kind stand together, edge by edge."""
    whole = [] if offload else [_whole(load)]
    return whole + [
        Assignment(cut, edge, codec, codec, count)
        for cut in load.cuts
        for count in load.micro_batches
        for codec in load.codecs
        for edge in range(len(load.edges))
    ]


def _whole(load: Workload) -> Assignment:
    return Assignment(load.units, micro_batches=1)


def best_static(load: Workload, *, offload: bool = False) -> Plan:
    """Return the best plan in which all devices do the same; edges are taken in turn.

    Args:
        load: What is trained.
        offload: Whether devices have to offload.
    """
    alike = dataclasses.replace(load, edges=load.edges[:1])
    edges = len(load.edges)
    plans = [
        [
            dataclasses.replace(choice, edge=0 if choice.cut == load.units else k % edges)
            for k in range(len(load.devices))
        ]
        for choice in options(alike, offload=offload)
    ]
    table, rows = _listed(load, [choice for choices in plans for choice in choices])
    picked = rows.reshape(len(plans), -1)
    best = picked[int(table.scores(picked).argmin())]
    return _as_plan(table, best, "static", "the same choice for all devices")


def next_best(
    load: Workload, made: Plan, *, offload: bool = False
) -> tuple[tuple[Assignment, float], ...]:
    """Return for each device the best of its other choices, and the seconds of its round with it.

    The other devices stay as they are in the plan. Choices that differ in the edge only are one.

    Args:
        load: What is trained.
        made: A plan of it.
        offload: Whether devices have to offload.
    """
    table = StageTable(load, list(dict.fromkeys([*options(load, offload=offload), *made.choices])))
    index = {choice: i for i, choice in enumerate(table.choices)}
    picked = np.array([index[choice] for choice in made.choices])
    known: dict[tuple[int, Network, int, Assignment], tuple[Assignment, float]] = {}
    found = []
    for k, (device, own) in enumerate(zip(load.devices, made.choices, strict=True)):
        key = (id(device.costs), device.network, device.examples, own)
        if key not in known:
            like = (own.cut, own.pieces, own.codecs)
            others = [i for i, c in enumerate(table.choices) if (c.cut, c.pieces, c.codecs) != like]
            rows = np.repeat(picked[None], len(others), axis=0)
            rows[:, k] = others
            seconds = np.array([table.times(row[None])[1][0, k] for row in rows])
            best = int(seconds.argmin()) if others else 0
            known[key] = (
                (table.choices[others[best]], float(seconds[best]))
                if others
                else (own, made.round_s[k])
            )
        found.append(known[key])
    return tuple(found)


# --------------------------------------------------------------------------------------------------
# The methods: a table of choices, which of them, and how they were found

_Found = tuple[StageTable, Indices, str]


def _classic(load: Workload, offload: bool) -> _Found:
    return *_listed(load, [_whole(load)] * len(load.devices)), "no choice"


def _auto(load: Workload, offload: bool) -> _Found:
    table = StageTable(load, options(load, offload=offload))
    return table, *search.promising(table)


def _exhaustive(load: Workload, offload: bool) -> _Found:
    table = StageTable(load, options(load, offload=offload))
    start, _ = search.promising(table)
    count, devices = len(table.choices), len(load.devices)
    combinations = count**devices
    if combinations > MOST_COMBINATIONS:
        everything = [np.arange(count)] * devices
        starts = (start, search.fastest_alone(table))
        picked = table.best_of([search.improved(table, s, everything) for s in starts])
        how = f"each device in turn over {count} choices until none changed: not proved the best"
    else:
        picked = _joint(table, start, combinations)
        how = f"all {combinations} combinations of choices: the optimum of the model"
    return table, picked, how


def _joint(table: StageTable, start: Indices, combinations: int) -> Indices:
    """Return the best of all combinations.

    What devices would take alone is a bound from below, so combinations are timed in the order of
    that bound until it is above the best time that was found.
    """
    alone, count = table.alone()[:, table.course], len(table.choices)
    devices = len(alone)
    slowest, mean = np.zeros(1), np.zeros(1)
    for own in alone:  # the last device's choice changes fastest
        slowest = np.maximum(slowest[:, None], own).ravel()
        mean = (mean[:, None] + own / devices).ravel()
    bound = slowest + MEAN * mean
    picked, best = start, table.score(start)
    order = np.flatnonzero(bound < best)
    order = order[np.argsort(bound[order], kind="stable")]
    size = 64
    while len(order) and bound[order[0]] < best:
        part, order = order[:size], order[size:]
        rows = np.stack(np.unravel_index(part, (count,) * devices), axis=1)
        scores = table.scores(rows)
        if scores.min() < best:
            picked, best = rows[int(scores.argmin())], float(scores.min())
        size = min(4 * size, 50_000)
    return picked


def _pipar(load: Workload, offload: bool) -> _Found:
    found = [
        _pipar_choice(load, device, k % len(load.edges), offload)
        for k, device in enumerate(load.devices)
    ]
    return *_listed(load, found), "the paper's rule, each device by itself"


def _pipar_choice(load: Workload, device: Device, edge: int, offload: bool) -> Assignment:
    codec = load.codecs[0]
    whole = Menu(load, [Assignment(cut, edge, codec, codec, 1) for cut in load.cuts])
    choices = [] if offload and load.cuts else [_whole(load)]
    if load.cuts:
        s = whole.stages(device)
        away = s.up + s.edge + s.down + 2 * s.latency
        shorter = np.maximum(np.minimum(s.forward, s.backward), 1e-12)
        most = min(load.batch_size // 2, MOST_PIECES, max(load.micro_batches))
        for cut, ratio in zip(load.cuts, away / shorter, strict=True):
            count = max(1, min(most, 1 + math.ceil(min(float(ratio), most))))
            count = load.batch_size // (load.batch_size // count)
            choices.append(Assignment(cut, edge, codec, codec, min(count, load.batch_size)))
    menu = Menu(load, choices)
    seconds = alone_s(menu.stages(device), load.in_flight)
    return choices[int(np.argmin(seconds))]


def _splitfed(load: Workload, offload: bool) -> _Found:
    found, codec = [], load.codecs[0]
    for k, device in enumerate(load.devices):
        edge = k % len(load.edges)
        menu = Menu(load, [Assignment(cut, edge, codec, codec, 1) for cut in load.cuts])
        found.append(menu.choices[int(np.argmin(alone_s(menu.stages(device))))])
    return *_listed(load, found), "one micro-batch, each device at its own best cut"


_METHODS: dict[str, Callable[[Workload, bool], _Found]] = {
    "auto": _auto,
    "exhaustive": _exhaustive,
    "pipar": _pipar,
    "splitfed": _splitfed,
    "classic": _classic,
}
