"""The time of devices that keep a bounded number of pieces in flight, for many plans at once.

What a device sends then depends on what came back, so there is no closed form for several devices
on one edge. The recurrences of `fedsys.planning.contention` are gone through instead, one piece of
each plan after the other, in the order in which its edge serves them: the answer to piece i
decides when piece i + depth arrives, which is never before the edge has begun with piece i.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.workload import Array, StageTimes

Indices = NDArray[np.int64]


def bounded_s(
    s: StageTimes, edge: Indices, workers: Sequence[int], depth: int
) -> tuple[Array, Array]:
    """Return when devices that share edges have done their last backward, and their sessions.

    Args:
        s: The stages, ``(P, K)``: P plans for K devices.
        edge: Index of the edge of each device, ``(P, K)``.
        workers: Sessions that each edge computes at the same time.
        depth: Pieces in flight at most, at least 1.

    Returns:
        Two times ``(P, K)``, the second one with the optimizer step of the edge; 0 and -inf where
        there is no edge.
    """
    done, served = np.zeros(edge.shape), np.full(edge.shape, -np.inf)
    for index, several in enumerate(workers):
        mine = s.offloaded & (edge == index)
        if mine.any():
            counts = np.where(mine, s.pieces, 0).astype(np.int64)
            own, end = _one_edge(s, counts, several, min(depth, int(counts.max())))
            done, served = np.where(mine, own, done), np.where(mine, end, served)
    return done, served


def _one_edge(s: StageTimes, counts: Indices, workers: int, depth: int) -> tuple[Array, Array]:
    own, up, down = (np.zeros(counts.shape) for _ in range(3))  # until when each is taken
    coming = np.full((*counts.shape, depth), np.inf)  # arrivals of the pieces in flight
    for piece in range(depth):
        real = piece < counts
        own = np.where(real, own + s.forward, own)
        up = np.where(real, np.maximum(own, up) + s.up, up)
        coming[..., piece] = np.where(real, up + s.latency, np.inf)
    came, pieces = coming[..., 0].copy(), np.zeros(counts.shape, dtype=np.int64)
    ready, worker = came.copy(), np.zeros((len(counts), workers))
    served = np.full(counts.shape, -np.inf)
    for _ in range(int(counts.sum(axis=-1).max(initial=0))):
        rows = np.flatnonzero(np.isfinite(ready.min(axis=-1)))
        free = worker[rows].argmin(axis=-1)
        now = np.maximum(worker[rows, free], ready[rows].min(axis=-1))
        first = np.where(ready[rows] <= now[:, None], came[rows], np.inf).argmin(axis=-1)
        at = rows, first  # ties: the device with the lower index
        piece, count = pieces[at], counts[at]
        end = now + s.edge[at]
        freed = end + np.where(piece == count - 1, s.edge_update[at], 0.0)
        worker[rows, free] = served[at] = freed
        down[at] = np.maximum(end, down[at]) + s.down[at]
        own[at] = np.maximum(own[at], down[at] + s.latency[at]) + s.backward[at]
        more = piece + depth < count
        own[at] += np.where(more, s.forward[at], 0.0)
        up[at] = np.where(more, np.maximum(own[at], up[at]) + s.up[at], up[at])
        coming[rows, first, piece % depth] = np.where(more, up[at] + s.latency[at], np.inf)
        pieces[at] += 1
        came[at] = coming[rows, first, (piece + 1) % depth]
        came[at] = np.where(piece + 1 < count, came[at], np.inf)
        ready[at] = np.maximum(came[at], freed)
    return own, served
