"""The best partition of a problem, found in four ways that agree.

* `scan`: two hosts, every cut (Neurosurgeon; Kang et al., ASPLOS 2017);
* `dynamic`: any number of hosts. What a host costs depends on where it begins and ends, so the best
  way to arrive at a host with a unit is all that has to be kept: O(H² K² C²) for H hosts, K cuts
  and C codecs;
* `frontier`: all partitions that are best in one of two objectives for what they cost in the other;
  by it, objectives are minimised within a time limit;
* `exhaustive`: every partition, one by one; what the others are tested against.

A minimum cut, for more than one tensor at a cut, is in `fedsys.partition.minimum_cut`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.partition.evaluation import evaluate
from fedsys.partition.problem import RAW, Array, Partition, Problem, taking_part
from fedsys.partition.tables import Tables

_HAIR = 1e-12  # relative; sums in another order differ by less

Whole = NDArray[np.int64]
State = tuple[int, str | None]
"""A host, and the codec of what it receives; None for the first, which has the input."""


def scan(problem: Problem, objective: str = "latency") -> Partition | None:
    """Return the best cut between two hosts; None if no cut is allowed."""
    tables, best = Tables(problem), (math.inf, 0, RAW)
    add = _adding(objective)
    alone = tables.portion(0, None, None).of(objective)[0, -1]
    if alone < best[0]:
        best = (float(alone), len(tables.cuts) - 1, RAW)
    for codec in tables.codecs:
        device = tables.portion(0, None, codec).of(objective)[0]
        server = tables.portion(1, codec, None).of(objective)[:, -1]
        total = add(add(device, tables.transfer(0, 1, codec).of(objective)), server)[:-1]
        place = int(np.argmin(total))
        if total[place] < best[0]:
            best = (float(total[place]), place, codec)
    if math.isinf(best[0]):
        return None
    return Partition((tables.cuts[best[1]],), (best[2],))


def _adding(objective: str) -> Callable[[Array, Array], Array]:
    return np.maximum if objective == "throughput" else np.add


def _states(tables: Tables) -> list[State]:
    hosts = range(1, len(tables.problem.hosts))
    return [(0, None), *((host, codec) for host in hosts for codec in tables.codecs)]


def dynamic(problem: Problem, objective: str = "latency") -> Partition | None:
    """Return the best partition among any number of hosts; None if none is allowed.

    Of partitions with the same greatest busy time, ``throughput`` takes that of least latency.
    """
    tables = Tables(problem)
    found = _shortest(tables, objective)
    if found is None or objective != "throughput":
        return None if found is None else found[1]
    value, partition = found
    second = _shortest(tables, "latency", most_busy=value * (1 + _HAIR))
    return second[1] if second else partition


def _shortest(
    tables: Tables, objective: str, most_busy: float = math.inf
) -> tuple[float, Partition] | None:
    count, states, add = len(tables.cuts), _states(tables), _adding(objective)
    value = {state: np.full(count, np.inf) for state in states}
    before: dict[State, list[tuple[State, int] | None]] = {s: [None] * count for s in states}
    value[states[0]][0] = 0.0
    end: tuple[float, State, int] | None = None
    for state in states:
        host, came = state
        if np.isinf(value[state]).all():
            continue
        closing = tables.portion(host, came, None)
        total = add(value[state], _within(closing.of(objective), closing.busy, most_busy)[:, -1])
        if host:  # a host that computes nothing takes no part
            total[-1] = np.inf
        place = int(np.argmin(total))
        if total[place] < (end[0] if end else np.inf):
            end = (float(total[place]), state, place)
        for codec in tables.codecs:
            part = tables.portion(host, came, codec)
            matrix = _within(part.of(objective), part.busy, most_busy)
            if host:
                np.fill_diagonal(matrix, np.inf)
            arriving = add(value[state][:, None], matrix)
            origin = arriving.argmin(0)
            reached = arriving[origin, np.arange(count)]
            for other in range(host + 1, len(tables.problem.hosts)):
                transfer = tables.transfer(host, other, codec)
                cost = _within(transfer.of(objective), transfer.busy, most_busy)
                there, target = add(reached, cost), (other, codec)
                better = there < value[target]
                value[target] = np.where(better, there, value[target])
                for k in np.flatnonzero(better):
                    before[target][k] = (state, int(origin[k]))
    return None if end is None else (end[0], _traced(tables, before, end[1], end[2]))


def _within(cost: Array, busy: Array, most: float) -> Array:
    return cost.copy() if math.isinf(most) else np.where(busy <= most, cost, np.inf)


def _traced(
    tables: Tables,
    before: dict[State, list[tuple[State, int] | None]],
    state: State,
    place: int,
) -> Partition:
    """Follow the best way back; hosts between those that take part compute nothing."""
    begins: dict[int, tuple[int, str]] = {}
    at: tuple[State, int] | None = (state, place)
    while at is not None:
        (host, codec), k = at
        if host:
            begins[host] = (tables.cuts[k], codec or RAW)
        at = before[at[0]][k]
    return _filled(tables.problem, begins)


def _filled(problem: Problem, begins: dict[int, tuple[int, str]]) -> Partition:
    cuts, codecs = [], []
    following = len(problem), RAW
    for host in reversed(range(1, len(problem.hosts))):
        following = begins.get(host, (following[0], RAW))
        cuts.append(following[0])
        codecs.append(following[1])
    return Partition(tuple(reversed(cuts)), tuple(reversed(codecs)))


# --------------------------------------------------------------------------------------------------
# Two objectives


@dataclass(frozen=True, eq=False)
class _Arrivals:
    """Ways to arrive at a host: what they cost in two objectives, with which unit, and from where.

    Each array has one entry for each way: two costs, the index of the cut that the host begins
    with, the state before (its number) and the way there.
    """

    x: Array
    y: Array
    cut: Whole
    state: Whole
    way: Whole


def frontier(
    problem: Problem, first: str = "latency", second: str = "throughput"
) -> list[Partition]:
    """Return the partitions of which no other is as good in both objectives and better in one.

    Of those that cost the same in both, one. In ascending order of the first objective. What cannot
    keep up with `Problem.requests_per_s` is none of them.
    """
    tables = Tables(problem, steady=True)
    states = _states(tables)
    arrivals = _all_arrivals(tables, states, (first, second))
    ends = []
    for number, (state, found) in enumerate(zip(states, arrivals, strict=True)):
        part = tables.portion(*state, None)
        x, y = (
            _adding(objective)(values, part.of(objective)[found.cut, -1])
            for objective, values in ((first, found.x), (second, found.y))
        )
        ends.append((x, y, np.full(len(x), number), np.arange(len(x))))
    x, y, number_of, way_of = (np.concatenate([end[i] for end in ends]) for i in range(4))
    return [
        _followed(tables, states, arrivals, int(number_of[i]), int(way_of[i])) for i in _best(x, y)
    ]


def _best(x: Array, y: Array) -> list[int]:
    """Return the indices of what nothing else is better than, ascending in x."""
    order = np.lexsort((y, x))
    order = order[np.isfinite(x[order]) & np.isfinite(y[order])]
    if not len(order):
        return []
    lowest = np.minimum.accumulate(y[order])
    better = lowest[1:] < lowest[:-1] - np.abs(lowest[:-1]) * _HAIR
    return [int(i) for i in order[np.concatenate([[True], better])]]


def _all_arrivals(
    tables: Tables, states: Sequence[State], objectives: tuple[str, str]
) -> list[_Arrivals]:
    zero = np.zeros(1, dtype=np.int64)
    made = [_Arrivals(np.zeros(1), np.zeros(1), zero, zero - 1, zero)]
    for target in states[1:]:
        found = [
            arrived
            for cut in range(len(tables.cuts) - 1)
            if (arrived := _arriving(tables, states, made, target, cut, objectives)) is not None
        ]
        made.append(_joined(found))
    return made


def _joined(found: Sequence[_Arrivals]) -> _Arrivals:
    def each(name: str) -> Any:
        values = [getattr(one, name) for one in found]
        return np.concatenate(values) if values else np.zeros(0, dtype=np.int64)

    return _Arrivals(each("x"), each("y"), each("cut"), each("state"), each("way"))


def _arriving(
    tables: Tables,
    states: Sequence[State],
    made: Sequence[_Arrivals],
    target: State,
    cut: int,
    objectives: tuple[str, str],
) -> _Arrivals | None:
    host, codec = target
    assert codec is not None
    gathered: list[tuple[Array, Array, Whole, Whole]] = []
    for number, (source, before) in enumerate(zip(states, made, strict=False)):
        if source[0] >= host:
            continue
        ways = np.flatnonzero(before.cut <= cut if source[0] == 0 else before.cut < cut)
        part, sent = tables.portion(*source, codec), tables.transfer(source[0], host, codec)
        x, y = (
            add(add(values[ways], part.of(objective)[before.cut[ways], cut]),
                sent.of(objective)[cut])
            for objective, values in zip(objectives, (before.x, before.y), strict=True)
            for add in (_adding(objective),)
        )  # fmt: skip
        gathered.append((x, y, np.full(len(ways), number), ways))
    x, y, state, way = (np.concatenate([g[i] for g in gathered]) for i in range(4))
    best = _best(x, y)
    if not best:
        return None
    cuts = np.full(len(best), cut)
    return _Arrivals(x[best], y[best], cuts, state[best], way[best])


def _followed(
    tables: Tables, states: Sequence[State], made: Sequence[_Arrivals], number: int, way: int
) -> Partition:
    begins: dict[int, tuple[int, str]] = {}
    while number >= 0:
        (host, codec), found = states[number], made[number]
        if host:
            begins[host] = (tables.cuts[found.cut[way]], codec or RAW)
        number, way = int(found.state[way]), int(found.way[way])
    return _filled(tables.problem, begins)


# --------------------------------------------------------------------------------------------------
# Every partition


def every(problem: Problem) -> Iterator[Partition]:
    """Yield all partitions at legal cuts that obey the constraints but the time limit."""
    for cuts in combinations_with_replacement(problem.cuts, len(problem.hosts) - 1):
        part = set(taking_part(cuts, len(problem)))
        choices = [
            problem.codecs if host in part and cuts[host - 1] > 0 else (RAW,)
            for host in range(1, len(problem.hosts))
        ]
        for codecs in product(*choices):
            partition = Partition(cuts, codecs)
            if not broken(problem, partition):
                yield partition


def broken(problem: Problem, partition: Partition) -> bool:
    """Return whether a partition breaks a constraint other than the time limit."""
    rules = problem.constraints
    for portion in evaluate(problem, partition).portions:
        units = range(portion.first, portion.last)
        if any(rules.must.get(unit, portion.host) != portion.host for unit in units):
            return True
        if any((unit, portion.host) in rules.must_not for unit in units):
            return True
        if portion.memory_bytes > problem.hosts[portion.host].memory_bytes:
            return True
        if portion.sent_bytes > rules.upload_bytes.get(portion.host, math.inf):
            return True
    return False


def exhaustive(problem: Problem, objective: str = "latency") -> Partition | None:
    """Return the best of all partitions, tried one by one; None if none is allowed."""
    limit = problem.constraints.time_limit_s
    best: tuple[tuple[float, float], Partition] | None = None
    for partition in every(problem):
        cost = evaluate(problem, partition)
        key = (cost.value(objective), cost.latency_s)
        if cost.latency_s <= limit and math.isfinite(key[0]) and (best is None or key < best[0]):
            best = key, partition
    return best[1] if best else None
