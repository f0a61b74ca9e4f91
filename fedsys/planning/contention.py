"""The time of an iteration in closed form: of one device alone, and of several that share edges.

All devices begin an iteration together and work by the schedule
`fedsys.training.schedule.pipelined`, with micro-batches of one size. An iteration is a flow shop
with the device as its first and its last machine (pieces i = 1 … N; stages forward f, up u, edge s,
down d, backward b; latency l; F, U, S, D, C: the moments of their ends)::

    F_i = max(F_{i-1}, C_{i-depth}) + f             C_i = max(D_i + l, C_{i-1}, F before) + b
    U_i = max(F_i, U_{i-1}) + u                     S_i = max(U_i + l, S_{i-1}) + s
    D_i = max(S_i, D_{i-1}) + d

where "F before" is the forward that the schedule puts before this backward: the last one. These
are the recurrences of PiPar (Zhang et al., "PiPar: Pipeline Parallelism for Collaborative Machine
Learning", JPDC 2024, section IV) with what its code leaves out: a device computes one thing at a
time, and a message arrives a latency after its last bit. With all pieces in flight the moments of
the stages before the edge are linear in the piece, U_i = f + u + (i - 1) max(f, u), and so are,
for a device alone, those after it, so that the last backward ends at::

    C_N = max(N f + N b,  D_1 + l + N b,  D_N + l + b)
    D_i = f + u + l + s + d + (i - 1) max(f, u, s, d)

Devices with fewer pieces in flight than they have take the way of `fedsys.planning.bounded`.

Edges serve in order of arrival. `fedsys.planning.timeline.play` gives the same times, piece by
piece.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.bounded import bounded_s
from fedsys.planning.workload import Array, StageTimes

Indices = NDArray[np.int64]

_MANY = 4  # plans from which on arrays are faster than a loop


def alone_s(s: StageTimes, depth: int | None = None) -> Array:
    """Return the seconds of an iteration of a device that has its edge to itself.

    Args:
        s: The stages, of any shape.
        depth: Pieces in flight at most; None: all.

    Returns:
        Seconds, of that shape.
    """
    n, arrival = s.pieces, s.forward + s.up + s.latency
    slowest = np.maximum(s.forward, s.up)
    first = arrival + s.edge + s.down
    last = first + (n - 1) * np.maximum(np.maximum(slowest, s.edge), s.down)
    done = np.maximum(first + n * s.backward, last + s.backward) + s.latency
    served = arrival + s.edge + (n - 1) * np.maximum(slowest, s.edge)
    seconds = _whole(s, np.where(s.offloaded, done, 0.0), served + s.edge_update)
    late = _bounded(s, depth)
    if depth is not None and late.any():
        each = _part(s, late, axis=1)
        edge = np.zeros(each.pieces.shape, dtype=np.int64)
        seconds[late] = _whole(each, *bounded_s(each, edge, [1], depth))[:, 0]
    return seconds


def _bounded(s: StageTimes, depth: int | None) -> NDArray[np.bool_]:
    """Return where a device has more pieces than may be in flight."""
    late: NDArray[np.bool_] = s.offloaded & (s.pieces > (np.inf if depth is None else depth))
    return late


def _part(s: StageTimes, where: NDArray[np.bool_], axis: int | None = None) -> StageTimes:
    """Return some entries, with one axis more if it is given."""
    found = {f.name: getattr(s, f.name)[where] for f in dataclasses.fields(StageTimes)}
    return StageTimes(
        **{n: x if axis is None else np.expand_dims(x, axis) for n, x in found.items()}
    )


def _whole(s: StageTimes, done: Array, edge_end: Array) -> Array:
    """Add what the device does besides; `done` and `edge_end` are 0 without an edge."""
    computing = s.pieces * (s.forward + s.backward)
    device = np.maximum(np.maximum(done, computing), computing + s.load) + s.device_update
    return np.where(s.offloaded, np.maximum(device, edge_end), device)


def together_s(
    s: StageTimes, edge: Indices, workers: Sequence[int], depth: int | None = None
) -> Array:
    """Return the seconds of an iteration of devices that share edges, for many plans at once.

    Args:
        s: The stages, ``(C, K)``: C plans for K devices.
        edge: Index of the edge of each device, ``(C, K)``.
        workers: Sessions that each edge computes at the same time.
        depth: Pieces in flight at most; None: all.

    Returns:
        Seconds, ``(C, K)``.
    """
    late: NDArray[np.bool_] = np.any(_bounded(s, depth), axis=-1)
    if depth is not None and late.any():
        seconds, some = np.empty(edge.shape), _part(s, late)
        seconds[late] = _whole(some, *bounded_s(some, edge[late], workers, depth))
        if not late.all():
            seconds[~late] = together_s(_part(s, ~late), edge[~late], workers)
        return seconds
    row = _Row.of(s)
    if not len(row.device):
        return alone_s(s)
    freed = _served(row, s, edge, workers)
    return _whole(s, *_ends(row, s, freed))


@dataclasses.dataclass(frozen=True)
class _Row:
    """The pieces of all K devices in a row of R places, for C plans.

    Few devices have many pieces: a table of devices and pieces would be mostly empty.

    Attributes:
        lengths: Places of each device, ``(K,)``: as many as it has pieces in some plan.
        starts: Where they begin, ``(K,)``.
        device: The device of each place, ``(R,)``.
        piece: The piece, ``(R,)``.
        pieces: How many the device has, ``(C, R)``.
        real: Whether it has this one, ``(C, R)``.
        arrival: When it is at the edge, ``(C, R)``.
        stepping: What the edge's optimizer takes after it, ``(C, R)``.
        held: What the edge takes for it, its step included, ``(C, R)``.
    """

    lengths: Indices
    starts: Indices
    device: Indices
    piece: Indices
    pieces: Array
    real: NDArray[np.bool_]
    arrival: Array
    stepping: Array
    held: Array

    @classmethod
    def of(cls, s: StageTimes) -> _Row:
        lengths = np.where(s.offloaded, s.pieces, 0).max(axis=0).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        device = np.repeat(np.arange(len(lengths)), lengths)
        piece = np.arange(len(device)) - starts[device]
        pieces = s.pieces[:, device]
        real = (piece < pieces) & s.offloaded[:, device]
        gap = np.maximum(s.forward, s.up)[:, device]
        arrival = (s.forward + s.up + s.latency)[:, device] + piece * gap
        stepping = np.where(piece == pieces - 1, s.edge_update[:, device], 0.0)
        held = np.where(real, s.edge[:, device] + stepping, 0.0)
        return cls(lengths, starts, device, piece, pieces, real, arrival, stepping, held)


def _served(row: _Row, s: StageTimes, edge: Indices, workers: Sequence[int]) -> Array:
    """Return when edges have finished each piece and their step, ``(C, R)``; -inf for none."""
    freed = np.full(row.arrival.shape, -np.inf)
    for index, several in enumerate(workers):
        served = s.offloaded & (edge == index)
        here = served.any(axis=0)  # a device that is elsewhere in all plans is left out
        if not here.any():
            continue
        places, own = np.flatnonzero(here[row.device]), row.lengths[here]
        mine = row.real[:, places] & served[:, row.device[places]]
        at = np.where(mine, row.arrival[:, places], np.inf)
        work = np.where(mine, row.held[:, places], 0.0)
        begins = np.cumsum(own) - own
        if several >= len(own):
            end = np.empty_like(at)
            for alike in _alike(begins, own):
                end[:, alike] = _queue(at[:, alike], work[:, alike])
        elif several == 1:
            end = _one_worker(at, work)
        else:
            counts = np.where(served[:, here], s.pieces[:, here], 0).astype(np.int64)
            end = _some_workers(at, work, begins, counts, several)
        freed[:, places] = np.where(mine, end, freed[:, places])
    return freed


def _ends(row: _Row, s: StageTimes, freed: Array) -> tuple[Array, Array]:
    """Return when the last backward of each device ends, and its edge's work, ``(C, K)``.

    Args:
        row: The pieces.
        s: The stages, ``(C, K)``.
        freed: When edges have finished each piece, ``(C, R)``.
    """
    down = s.down[:, row.device]
    returned = freed - row.stepping - row.piece * down
    for places in _alike(row.starts, row.lengths):
        returned[:, places] = np.maximum.accumulate(returned[:, places], axis=-1)
    left = (row.pieces - row.piece) * s.backward[:, row.device]
    returned = np.where(row.real, returned + (row.piece + 1) * down + left, -np.inf)
    away = row.lengths > 0
    done, edge_end = np.zeros(s.pieces.shape), np.full(s.pieces.shape, -np.inf)
    starts = row.starts[away]
    done[:, away] = np.maximum.reduceat(returned, starts, axis=-1) + s.latency[:, away]
    edge_end[:, away] = np.maximum.reduceat(freed, starts, axis=-1)
    return np.where(s.offloaded, done, 0.0), edge_end


def _alike(starts: Indices, lengths: Indices) -> Iterator[Indices]:
    """Yield the places of the pieces of devices with the same number of them, ``(devices, N)``."""
    for count in np.unique(lengths[lengths > 0]):
        yield starts[lengths == count][:, None] + np.arange(count)


def _queue(at: Array, held: Array) -> Array:
    """Return when each leaves a queue with one server; the last axis is in order of arrival."""
    work = np.cumsum(held, axis=-1)
    end: Array = work + np.maximum.accumulate(at - (work - held), axis=-1)
    return end


def _one_worker(at: Array, held: Array) -> Array:
    order = np.argsort(at, axis=-1, kind="stable")  # ties: the device with the lower index
    ends = np.empty_like(at)
    in_order = _queue(
        np.take_along_axis(at, order, axis=-1), np.take_along_axis(held, order, axis=-1)
    )
    np.put_along_axis(ends, order, in_order, axis=-1)
    return ends


def _some_workers(at: Array, held: Array, starts: Indices, counts: Indices, workers: int) -> Array:
    """Serve what came first among that whose session is not in work.

    Args:
        at: When pieces arrive, ``(P, R)``: of P plans, the pieces of all devices in a row.
        held: How long they take.
        starts: Where the pieces of each device begin in the row, ``(K,)``.
        counts: How many there are of each device, ``(P, K)``.
        workers: How many are served at the same time.

    Returns:
        When they are done, ``(P, R)``; -inf where there is no piece.
    """
    if len(at) < _MANY:
        plans = zip(at, held, counts, strict=True)
        return np.stack([_one_plan(a, h, starts, c, workers) for a, h, c in plans])
    return _many_plans(at, held, starts, counts, workers)


def _one_plan(at: Array, held: Array, starts: Indices, counts: Indices, workers: int) -> Array:
    ends = np.full(at.shape, -np.inf)
    times, lengths, stops = at.tolist(), held.tolist(), (starts + counts).tolist()
    free = [0.0] * workers
    begins = enumerate(starts.tolist())
    coming = [(times[first], times[first], k, first) for k, first in begins if first < stops[k]]
    heapq.heapify(coming)  # when it may begin, when it came, device, place
    waiting: list[tuple[float, int, int]] = []
    now = 0.0
    while coming or waiting:
        now = max(now, free[0]) if waiting else max(now, free[0], coming[0][0])
        while coming and coming[0][0] <= now:
            heapq.heappush(waiting, heapq.heappop(coming)[1:])
        _, k, place = heapq.heappop(waiting)
        end = now + lengths[place]
        heapq.heapreplace(free, end)
        ends[place] = end
        place += 1
        if place < stops[k]:
            came = times[place]
            heapq.heappush(coming, (max(came, end), came, k, place))
    return ends


def _many_plans(at: Array, held: Array, starts: Indices, counts: Indices, workers: int) -> Array:
    """Serve the pieces of many plans at once, one piece of each after the other."""
    plans, size = at.shape
    here = np.arange(plans)
    # one place more: for what a device would send after its last piece, which never comes
    coming = np.concatenate([at, np.full((plans, 1), np.inf)], axis=-1)
    lengths = np.concatenate([held, np.zeros((plans, 1))], axis=-1)
    ends = np.full(coming.shape, -np.inf)
    stops = starts + counts
    places = np.where(counts > 0, starts, size)
    came = np.take_along_axis(coming, places, axis=-1)
    ready, worker = came.copy(), np.zeros((plans, workers))
    for _ in range(int(counts.sum(axis=-1).max(initial=0))):
        free = worker.argmin(axis=-1)
        now = np.maximum(worker[here, free], ready.min(axis=-1))
        who = np.where(ready <= now[:, None], came, np.inf).argmin(axis=-1)
        place = places[here, who]
        end = now + lengths[here, place]
        ends[here, place] = worker[here, free] = end
        place = np.where(place + 1 < stops[here, who], place + 1, size)
        places[here, who] = place
        came[here, who] = coming[here, place]
        ready[here, who] = np.maximum(came[here, who], end)
    return ends[:, :size]
