"""The search of `policy=auto` for a good plan, in a time that hundreds of devices allow.

Starts give all devices one limit of time; then the choice of one device after the other is changed
for a better plan. A large fleet has too many devices for that where an edge computes several
sessions at a time. It is made smaller: of every W devices of a kind one stands for all, on edges
that compute a W-th of the sessions at a time. Queues of both are alike, and that of one worker is
found without going from piece to piece. What is best for the small fleet is given to the large one,
and taken if it is better there than the best start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedsys.contention import Indices
from fedsys.tables import Table, score
from fedsys.workload import Array

_BUDGET = 150_000  # pieces that are timed in one look
_EFFORT = 300_000  # pieces that are timed in all of a small fleet
_LOOK = 10_000  # pieces that could be timed in what each look takes beside them
_SLOWER = 20  # times, for several sessions at a time on an edge but not all, or few in flight
_LIMITS = 16  # starts
_FEW = 10  # choices of a device that are looked at


def promising(table: Table) -> tuple[Indices, str]:
    """Return a good plan, never worse than with all on the devices, and how it was searched.

    Args:
        table: All choices.
    """
    alone, loads = table.alone(), table.loads()
    starts, short = _limited_starts(table, alone, loads), _worthwhile(table, alone, loads)
    groups = _groups(table)
    if groups and _affordable(table, starts[0], short, _BUDGET) < len(alone):
        found = [starts[0], _by_groups(table, groups)]
        how = f"worthwhile choices, improved for {len(groups)} groups of devices of one kind"
    else:
        found = [improved(table, table.best_of(starts), short, budget=_BUDGET)]
        how = "worthwhile choices, improved one by one"
    whole = np.where(loads == 0, alone, np.inf)
    if np.isfinite(whole.min(axis=1)).all():
        found.append(table.choice_at[whole.argmin(axis=1), 0])
    return table.best_of(found), how


def _by_groups(table: Table, groups: Sequence[Indices]) -> Indices:
    """Return the plan that is best for a small fleet, one device for each group."""
    small = table.part([group[0] for group in groups], share=min(table.workers))
    alone, loads = small.alone(), small.loads()
    start = small.best_of(_limited_starts(small, alone, loads))
    short = _worthwhile(small, alone, loads)
    effort = _EFFORT / len(small.workers) / (4 if _windowed(small) else 1)
    chosen = improved(small, start, short, effort=effort)
    picked = np.empty(len(table.kind), dtype=chosen.dtype)
    for group, choice in zip(groups, chosen, strict=True):
        picked[group] = choice
    return picked


def _groups(table: Table) -> list[Indices]:
    """Return devices of one kind in groups, one group for as many as an edge computes at a time.

    Empty if edges compute one session at a time, or if there are too many kinds for such groups.
    """
    size = min(table.workers)
    found: list[Indices] = []
    for kind in np.unique(table.kind):
        members = np.flatnonzero(table.kind == kind)
        members = members[np.argsort(table.steps[members], kind="stable")]
        found += np.array_split(members, max(1, round(len(members) / size)))
    return found if size > 1 and size * len(found) <= 1.2 * len(table.kind) else []


def _limited_starts(table: Table, alone: Array, loads: Array) -> list[Indices]:
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


def spread(table: Table, courses: Indices, loads: Array) -> tuple[Indices, Array]:
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


def _worthwhile(table: Table, alone: Array, loads: Array) -> list[Indices]:
    """Return for each device the choices that are best at something.

    A course that another one betters both alone and in what it takes of the edge is left out, but
    for the few that are fastest alone, and those that take nothing of an edge.
    """
    kept: dict[int, Indices] = {}
    for k, like in enumerate(table.like.tolist()):
        if like not in kept:
            own, load = alone[k], loads[k]
            order = np.lexsort((load, own))
            least = np.minimum.accumulate(load[order])
            front = order[np.r_[True, least[1:] < least[:-1]]]
            near, local = order[:_FEW], np.flatnonzero(load == 0)
            courses = np.unique(np.concatenate([front[:_FEW], near, local]))
            kept[like] = table.with_edges(courses)
    return [kept[like] for like in table.like.tolist()]


def improved(
    table: Table,
    picked: Indices,
    short: Sequence[Indices],
    *,
    budget: float = math.inf,
    effort: float = math.inf,
) -> Indices:
    """Change the choice of one device after the other for a better plan, until none is better.

    Args:
        table: All choices.
        picked: The plan to begin with.
        short: The choices that are tried of each device.
        budget: Pieces that may be timed in one pass; if all devices are too many for it, the
            slowest ones are looked at, or none.
        effort: Pieces that may be timed in all.
    """
    devices = len(picked)
    best, alone = table.score(picked), table.alone()
    affordable = _affordable(table, picked, short, budget)
    everyone = affordable >= devices
    if affordable < 1:
        return picked
    for _ in range(4 * devices if everyone else 2):
        before = best
        order = np.argsort(-table.times_of(picked)[1], kind="stable")
        for k in order[: int(min(affordable, devices))]:
            # In company nothing is faster than alone, and a plan is as slow as its slowest device
            worth = short[k][alone[k, table.course[short[k]]] < best]
            worth = worth[worth != picked[k]]
            if not len(worth):
                continue
            tried = np.repeat(picked[None], len(worth), axis=0)
            tried[:, k] = worth
            effort -= table.pieces(tried) + _LOOK
            if effort < 0:
                return picked
            scores = table.scores(tried)
            i = int(scores.argmin())
            if scores[i] < best * (1 - 1e-12):
                picked, best = tried[i], float(scores[i])
        if best >= before * (1 - 1e-12):
            break
    return picked


def _windowed(table: Table) -> bool:
    """Return whether a device may have more pieces than are in flight, which is slow to time."""
    limit = table.load.in_flight
    return limit is not None and max(table.load.micro_batches) > limit


def _affordable(table: Table, picked: Indices, short: Sequence[Indices], budget: float) -> float:
    """Return for how many devices all choices can be tried."""
    devices = len(picked)
    pieces = float(table.stages(picked[None]).pieces.max())
    if _windowed(table) or any(1 < workers < devices for workers in table.workers):
        budget /= _SLOWER
    return budget / (devices * max(pieces, 1.0) * max(len(s) for s in short))
