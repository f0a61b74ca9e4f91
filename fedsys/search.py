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
        found = [improved(table, _best(table, starts), short, budget=_BUDGET)]
        how = "worthwhile choices, improved one by one"
    whole = np.where(loads == 0, alone, np.inf)
    if np.isfinite(whole.min(axis=1)).all():
        found.append(table.choice_at[whole.argmin(axis=1), 0])
    return _best(table, found), how


def _best(table: Table, plans: Sequence[Indices]) -> Indices:
    """Return the best plan; of equal ones the first."""
    return min(plans, key=table.score)


def _by_groups(table: Table, groups: Sequence[Indices]) -> Indices:
    """Return the plan that is best for a small fleet, one device for each group."""
    small = table.part([group[0] for group in groups], share=min(table.workers))
    alone, loads = small.alone(), small.loads()
    start = _best(small, _limited_starts(small, alone, loads))
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
    best = alone.min(axis=1)
    local = np.where(loads == 0, alone, np.inf).min(axis=1)
    highest = np.where(np.isfinite(local), local, alone.max(axis=1)).max()
    limits = np.geomspace(max(best.max(), 1e-12), max(highest, best.max(), 1e-12), _LIMITS - 1)
    rows, here = [alone.argmin(axis=1)], np.arange(len(alone))
    for limit in limits:
        within = alone <= np.maximum(limit, best)[:, None] * (1 + 1e-9)
        rows.append((np.where(within, loads, np.inf) + 1e-9 * alone).argmin(axis=1))
    found: dict[bytes, tuple[float, Indices]] = {}
    for row in rows:
        if row.tobytes() not in found:
            picked, busiest = spread(table, row, loads)
            estimate = np.maximum(alone[here, row], busiest * (loads[here, row] > 0))
            found[row.tobytes()] = float(score(estimate)), picked
    promising = sorted(found.values(), key=lambda entry: entry[0])[:2]
    return [picked for _, picked in promising]


def spread(table: Table, courses: Indices, loads: Array) -> tuple[Indices, float]:
    """Distribute devices over edges, the largest load first, to the edge that is done earliest.

    Returns:
        The choices, and the seconds of the busiest edge.
    """
    own = loads[np.arange(len(courses)), courses]
    if len(table.load.edges) == 1:
        return table.choice_at[courses, 0], float(own.sum() / table.workers[0])
    rates, seconds = [1.0 / workers for workers in table.workers], own.tolist()
    options = table.choice_at[courses].tolist()
    picked, busy = np.empty_like(courses), [0.0] * len(rates)
    for k in np.argsort(-own, kind="stable").tolist():
        ends = [
            busy[e] + seconds[k] * rates[e] if choice >= 0 else math.inf
            for e, choice in enumerate(options[k])
        ]
        edge = ends.index(min(ends))
        busy[edge] = ends[edge]
        picked[k] = options[k][edge]
    return picked, max(busy)


def _worthwhile(table: Table, alone: Array, loads: Array) -> list[Indices]:
    """Return for each device the choices that are best at something.

    A course that another one betters both alone and in what it takes of the edge is left out, but
    for the few that are fastest alone, and those that take nothing of an edge.
    """
    kept: dict[bytes, Indices] = {}
    result = []
    for own, load in zip(alone, loads, strict=True):
        key = own.tobytes() + load.tobytes()
        if key not in kept:
            order = np.lexsort((load, own))
            least = np.minimum.accumulate(load[order])
            front = order[np.r_[True, least[1:] < least[:-1]]]
            near, local = order[:_FEW], np.flatnonzero(load == 0)
            courses = np.unique(np.concatenate([front[:_FEW], near, local]))
            kept[key] = table.with_edges(courses)
        result.append(kept[key])
    return result


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
    best = table.score(picked)
    affordable = _affordable(table, picked, short, budget)
    everyone = affordable >= devices
    if affordable < 1:
        return picked
    for _ in range(4 * devices if everyone else 2):
        before = best
        order = np.argsort(-table.times_of(picked)[1], kind="stable")
        for k in order[: int(min(affordable, devices))]:
            tried = np.repeat(picked[None], len(short[k]), axis=0)
            tried[:, k] = short[k]
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
