"""The time of an iteration in closed form: of one device alone, and of several that share edges.

All devices begin an iteration together and work by the schedule `fedsys.schedule.pipelined`, with
micro-batches of one size (letters as in `fedsys.recurrences`; N pieces, latency l). Then the
moments of the stages before the edge are linear in the piece, U_i = f + u + (i - 1) max(f, u), and
so are, for a device alone, those after it, so that the last backward ends at

    C_N = max(N f + N b,  D_1 + l + N b,  D_N + l + b)
    D_i = f + u + l + s + d + (i - 1) max(f, u, s, d)

Edges serve in order of arrival. `fedsys.timeline.play` gives the same times, piece by piece.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsys.workload import Array, Stages

Indices = NDArray[np.int64]

_MANY = 4  # plans from which on arrays are faster than a loop


def alone_s(s: Stages) -> Array:
    """Return the seconds of an iteration of a device that has its edge to itself.

    Args:
        s: The stages, of any shape.

    Returns:
        Seconds, of that shape.
    """
    n, arrival = s.pieces, s.forward + s.up + s.latency
    slowest = np.maximum(s.forward, s.up)
    first = arrival + s.edge + s.down
    last = first + (n - 1) * np.maximum(np.maximum(slowest, s.edge), s.down)
    done = np.maximum(first + n * s.backward, last + s.backward) + s.latency
    served = arrival + s.edge + (n - 1) * np.maximum(slowest, s.edge)
    return _whole(s, np.where(s.offloaded, done, 0.0), served + s.edge_update)


def _whole(s: Stages, done: Array, edge_end: Array) -> Array:
    """Add what the device does besides; `done` and `edge_end` are 0 without an edge."""
    computing = s.pieces * (s.forward + s.backward)
    device = np.maximum(np.maximum(done, computing), computing + s.load) + s.device_update
    return np.where(s.offloaded, np.maximum(device, edge_end), device)


def together_s(s: Stages, edge: Indices, workers: Sequence[int]) -> Array:
    """Return the seconds of an iteration of devices that share edges, for many plans at once.

    Args:
        s: The stages, ``(C, K)``: C plans for K devices.
        edge: Index of the edge of each device, ``(C, K)``.
        workers: Sessions that each edge computes at the same time.

    Returns:
        Seconds, ``(C, K)``.
    """
    count = int(s.pieces[s.offloaded].max(initial=0))
    if count == 0:
        return alone_s(s)
    i = np.arange(count)
    real = (i < s.pieces[..., None]) & s.offloaded[..., None]
    gap = np.maximum(s.forward, s.up)[..., None]
    arrival = (s.forward + s.up + s.latency)[..., None] + i * gap
    last = i == s.pieces[..., None] - 1
    held = s.edge[..., None] + np.where(last, s.edge_update[..., None], 0.0)
    held = np.where(real, held, 0.0)
    freed = np.full(arrival.shape, -np.inf)  # when the edge has finished a piece, its step included
    for index, several in enumerate(workers):
        mine = real & (edge == index)[..., None]
        if not mine.any():
            continue
        at = np.where(mine, arrival, np.inf)
        if several >= edge.shape[-1]:
            end = _queue(at, np.where(mine, held, 0.0))
        elif several == 1:
            end = _one_worker(at, np.where(mine, held, 0.0))
        else:
            end = _some_workers(at, held, several)
        freed = np.where(mine, end, freed)
    answered = freed - np.where(last, s.edge_update[..., None], 0.0)
    down = s.down[..., None]
    returned = (i + 1) * down + np.maximum.accumulate(answered - i * down, axis=-1)
    left = (s.pieces[..., None] - i) * s.backward[..., None]
    done = np.where(real, returned + left, -np.inf).max(axis=-1) + s.latency
    return _whole(s, np.where(s.offloaded, done, 0.0), freed.max(axis=-1))


def _queue(at: Array, held: Array) -> Array:
    """Return when each leaves a queue with one server; the last axis is in order of arrival."""
    work = np.cumsum(held, axis=-1)
    end: Array = work + np.maximum.accumulate(at - (work - held), axis=-1)
    return end


def _one_worker(at: Array, held: Array) -> Array:
    flat = at.reshape(len(at), -1)
    order = np.argsort(flat, axis=-1, kind="stable")  # ties: the device with the lower index
    sorted_held = np.take_along_axis(held.reshape(flat.shape), order, axis=-1)
    ends = np.empty_like(flat)
    np.put_along_axis(
        ends, order, _queue(np.take_along_axis(flat, order, axis=-1), sorted_held), axis=-1
    )
    return ends.reshape(at.shape)


def _some_workers(at: Array, held: Array, workers: int) -> Array:
    """Serve what came first among that whose session is not in work."""
    if len(at) < _MANY:
        return np.stack([_one_plan(a, h, workers) for a, h in zip(at, held, strict=True)])
    return _many_plans(at, held, workers)


def _one_plan(at: Array, held: Array, workers: int) -> Array:
    """Serve the pieces ``(K, N)`` of one plan."""
    ends = np.full(at.shape, -np.inf)
    counts = np.isfinite(at).sum(axis=-1).tolist()
    times, lengths = at.tolist(), held.tolist()
    free = [0.0] * workers
    coming = [(row[0], row[0], k, 0) for k, row in enumerate(times) if counts[k]]
    heapq.heapify(coming)  # when it may begin, when it came, device, piece
    waiting: list[tuple[float, int, int]] = []
    now = 0.0
    while coming or waiting:
        now = max(now, free[0]) if waiting else max(now, free[0], coming[0][0])
        while coming and coming[0][0] <= now:
            heapq.heappush(waiting, heapq.heappop(coming)[1:])
        _, k, piece = heapq.heappop(waiting)
        end = now + lengths[k][piece]
        heapq.heapreplace(free, end)
        ends[k, piece] = end
        piece += 1
        if piece < counts[k]:
            came = times[k][piece]
            heapq.heappush(coming, (max(came, end), came, k, piece))
    return ends


def _many_plans(at: Array, held: Array, workers: int) -> Array:
    """Serve the pieces ``(P, K, N)`` of many plans at once, one piece of each after the other."""
    plans, devices, count = at.shape
    here = np.arange(plans)
    # one place more for each device: what it would ask for after its last piece, which never comes
    coming = np.concatenate([at, np.full((plans, devices, 1), np.inf)], axis=-1)
    lengths = np.concatenate([held, np.zeros((plans, devices, 1))], axis=-1)
    ends = np.full(coming.shape, -np.inf)
    following = np.zeros((plans, devices), dtype=np.int64)
    came, ready, worker = at[..., 0].copy(), at[..., 0].copy(), np.zeros((plans, workers))
    for _ in range(int(np.isfinite(at).sum(axis=(1, 2)).max(initial=0))):
        free = worker.argmin(axis=-1)
        now = np.maximum(worker[here, free], ready.min(axis=-1))
        who = np.where(ready <= now[:, None], came, np.inf).argmin(axis=-1)
        piece = following[here, who]
        end = now + lengths[here, who, piece]
        ends[here, who, piece] = worker[here, free] = end
        piece = np.minimum(piece + 1, count)
        following[here, who] = piece
        came[here, who] = coming[here, who, piece]
        ready[here, who] = np.maximum(came[here, who], end)
    # a plan that is through before the others has gone on with pieces that there are not
    return np.where(np.isfinite(at), ends[..., :count], -np.inf)
