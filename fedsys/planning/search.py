"""The search of `policy=auto` for a good plan, in a time that hundreds of devices allow.

Starts give all devices one limit of time; then the choice of one device after the other is changed
for a better plan. A large fleet has too many devices for that, so it is made smaller: one device
stands for a group of its kind, or of about its speed where there are many kinds, and an edge
computes for a group as long as for all that are in it. A few large groups are planned first, then
more small ones from there. What is best for the small fleet is given to the large one, and taken if
it is better there than all on the devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedsys.planning.contention import Indices
from fedsys.planning.stage_table import StageTable, score
from fedsys.planning.workload import Array

_EFFORT = 80_000  # pieces that are timed for a fleet
_LOOK = 10_000  # pieces that could be timed in what each look takes beside them
_WINDOWED = 12  # times as long takes a piece where few are in flight
_SEVERAL = 20  # and where an edge computes several sessions at a time, but not all
_LIMITS = 16  # starts
_LEVELS = (8, 25)  # groups of devices, about: few large ones, then more small ones
_FEW = 10  # choices of a device: the fastest ones, and as many down to that of the least load
_POWER = 16  # of the mean of the devices' times, by which plans are compared at first
_LEAST = 1e-3  # what a change has to bring there


def promising(table: StageTable) -> tuple[Indices, str]:
    """Return a good plan, never worse than with all on the devices, and how it was searched.

    Args:
        table: All choices.
    """
    if len(table.kind) <= _LEVELS[0]:
        found = [_from_each_start(table)]
        how = "worthwhile choices from each start, then all choices, improved one by one"
    else:
        levels = _levels(table)
        found = [_by_groups(table, levels)]
        how = f"worthwhile choices, improved for {len(levels[-1])} groups of like devices"
    whole = np.where(table.loads() == 0, table.alone(), np.inf)
    if np.isfinite(whole.min(axis=1)).all():
        found.append(table.choice_at[whole.argmin(axis=1), 0])
    return table.best_of(found), how


def _from_each_start(table: StageTable) -> Indices:
    """Return the best plan of a small fleet, for which there is time for more than one start."""
    alone, loads = table.alone(), table.loads()
    short, starts = _worthwhile(table, alone, loads), _limited_starts(table, alone, loads)
    starts.append(fastest_alone(table))
    found = [improved(table, start, short, effort=_EFFORT) for start in starts]
    everything = [np.arange(len(table.choices))] * len(alone)
    return improved(table, table.best_of(found), everything, effort=2 * _EFFORT)


def _by_groups(table: StageTable, levels: Sequence[Sequence[Indices]]) -> Indices:
    """Return the plan that is best for small fleets, one device for each group."""
    picked: Indices | None = None
    for groups in levels:
        small = table.part(groups)
        alone, loads = small.alone(), small.loads()
        starts = _limited_starts(small, alone, loads)
        if picked is not None:
            starts.append(picked[[group[0] for group in groups]])
        short = _worthwhile(small, alone, loads)
        chosen = improved(small, small.best_of(starts), short, effort=_EFFORT)
        picked = np.empty(len(table.kind), dtype=chosen.dtype)
        for group, choice in zip(groups, chosen, strict=True):
            picked[group] = choice
    assert picked is not None  # there is a level
    return picked


def _levels(table: StageTable) -> list[list[Indices]]:
    """Return like devices in groups: few large ones, and more small ones.

    A group has as many devices as an edge computes at a time, or more, all of one kind. Where there
    are too many kinds for that, their neighbours in speed make a group.
    """
    devices = len(table.kind)
    levels: list[list[Indices]] = []
    for count in _LEVELS:
        size = max(min(table.workers), math.ceil(devices / count))
        found = _groups(table, table.kind, size)
        if size * len(found) > 1.2 * devices:
            found = _groups(table, np.zeros_like(table.kind), size)
        if not levels or len(found) > len(levels[-1]):
            levels.append(found)
    return levels


def _groups(table: StageTable, kind: Indices, size: int) -> list[Indices]:
    """Return groups of about that size within each kind; the slowest of a group is its first."""
    seconds = table.alone().mean(axis=1)
    found: list[Indices] = []
    for one in np.unique(kind):
        members = np.flatnonzero(kind == one)
        members = members[np.argsort(-seconds[members], kind="stable")]
        found += np.array_split(members, max(1, round(len(members) / size)))
    return found


def _limited_starts(table: StageTable, alone: Array, loads: Array) -> list[Indices]:
    """Return the two most promising plans in which all devices have one limit of time, in order.

    Each device takes least of the edges within the limit, which lies between the least possible
    time of a round and that of choices made alone. A plan takes as long as its slowest device
    alone, or as its busiest edge.
    """
    _, some, like = np.unique(table.like, return_index=True, return_inverse=True)
    own, work = alone[some], loads[some]
    best = own.min(axis=1)
    local = np.where(work == 0, own, np.inf).min(axis=1)
    highest = np.where(np.isfinite(local), local, own.max(axis=1)).max()
    limits = np.geomspace(max(best.max(), 1e-12), max(highest, best.max(), 1e-12), _LIMITS - 1)
    least = work + 1e-9 * own
    rows = [own.argmin(axis=1)]
    for limit in limits:
        within = own <= np.maximum(limit, best)[:, None] * (1 + 1e-9)
        rows.append(np.where(within, least, np.inf).argmin(axis=1))
    courses = np.array(list({row.tobytes(): row for row in rows}.values()))[:, like]
    picked, busiest = spread(table, courses, loads)
    here = np.arange(len(alone))
    takes = np.maximum(alone[here, courses], busiest[:, None] * (loads[here, courses] > 0))
    return list(picked[np.argsort(score(takes), kind="stable")[:2]])


def spread(table: StageTable, courses: Indices, loads: Array) -> tuple[Indices, Array]:
    """Distribute devices over edges, the largest load first, to the edge that is done earliest.

    Args:
        table: All choices.
        courses: Of each device, ``(P, K)``: P plans.
        loads: Seconds of an edge, ``(K, O)``.

    Returns:
        The choices, ``(P, K)``, and the seconds of the busiest edge of each plan.
    """
    own = loads[np.arange(courses.shape[1]), courses]
    if len(table.load.edges) == 1:
        return table.choice_at[courses, 0], own.sum(axis=-1) / table.workers[0]
    order = np.argsort(-own, axis=-1, kind="stable")
    options = np.take_along_axis(table.choice_at[courses], order[:, :, None], axis=1)
    rates = 1.0 / np.array(table.workers)
    seconds = np.take_along_axis(own, order, axis=-1)[:, :, None] * rates
    seconds[options < 0] = np.inf
    plans, edge = np.arange(len(courses)), np.empty_like(order)
    busy = np.zeros((len(courses), len(rates)))
    for turn in range(order.shape[1]):
        ends = busy + seconds[:, turn]
        edge[:, turn] = ends.argmin(axis=-1)
        busy[plans, edge[:, turn]] = ends[plans, edge[:, turn]]
    picked = np.empty_like(courses)
    chosen = np.take_along_axis(options, edge[:, :, None], axis=-1)[:, :, 0]
    np.put_along_axis(picked, order, chosen, axis=-1)
    return picked, busy.max(axis=-1)


def fastest_alone(table: StageTable) -> Indices:
    """Return the plan in which each device has the course that is fastest alone, ``(K,)``."""
    picked, _ = spread(table, table.alone().argmin(axis=1)[None], table.loads())
    own: Indices = picked[0]
    return own


def _worthwhile(table: StageTable, alone: Array, loads: Array) -> list[Indices]:
    """Return for each device the choices that are best at something.

    A course that another one betters both alone and in what it takes of the edge is left out, but
    for the few that are fastest alone, and those that take nothing of an edge. Of many that are
    left, a few stand for all, from the fastest to that of the least load.
    """
    kept: dict[int, Indices] = {}
    for k, like in enumerate(table.like.tolist()):
        if like not in kept:
            own, load = alone[k], loads[k]
            order = np.lexsort((load, own))
            least = np.minimum.accumulate(load[order])
            front = order[np.r_[True, least[1:] < least[:-1]]]
            some = front[np.unique(np.linspace(0, len(front) - 1, _FEW).astype(int))]
            near, local = order[:_FEW], np.flatnonzero(load == 0)
            courses = np.unique(np.concatenate([some, near, local]))
            kept[like] = table.with_edges(courses)
    return [kept[like] for like in table.like.tolist()]


def improved(
    table: StageTable, picked: Indices, short: Sequence[Indices], *, effort: float = math.inf
) -> Indices:
    """Change the choice of one device after the other for a better plan, until none is better.

    Where several devices are equally slow, no single change makes the slowest faster. So plans are
    compared by a mean with a high power of the devices' times at first, in which each of the
    slowest counts, and by their score at the end. What is returned is no worse than `picked`.

    Args:
        table: All choices.
        picked: The plan to begin with.
        short: The choices that are tried of each device.
        effort: Pieces that may be timed in all.
    """
    alone, cost, start = table.alone(), _cost_of_piece(table), picked
    for measure, least in ((_slow_ones, _LEAST), (score, 1e-12)):
        better = True
        while better:
            better = False
            times = table.times_of(picked)[1]
            best, slowest = float(measure(times)), float(times.max())
            for k in np.argsort(-times, kind="stable"):
                # In company nothing is faster than alone
                worth = short[k][alone[k, table.course[short[k]]] < slowest]
                worth = worth[worth != picked[k]]
                if not len(worth):
                    continue
                tried = np.repeat(picked[None], len(worth), axis=0)
                tried[:, k] = worth
                effort -= cost * table.pieces(tried) + _LOOK
                if effort < 0:
                    return table.best_of([picked, start])
                scores = table.scores(tried, measure)
                i = int(scores.argmin())
                if scores[i] < best * (1 - least):
                    picked, best, better = tried[i], float(scores[i]), True
    return table.best_of([picked, start])


def _slow_ones(round_s: Array) -> Array:
    """Return a mean of the times of devices, ``(C, K)``, to which the slowest ones give most."""
    most = round_s.max(axis=-1)
    shares = round_s / np.maximum(most, 1e-300)[..., None]
    mean: Array = most * (shares**_POWER).mean(axis=-1) ** (1 / _POWER)
    return mean


def _cost_of_piece(table: StageTable) -> int:
    """Return how many times as long a piece takes as one of a closed form."""
    limit = table.load.in_flight
    if limit is not None and max(table.load.micro_batches) > limit:
        return _WINDOWED
    return _SEVERAL if any(1 < workers < len(table.kind) for workers in table.workers) else 1
