"""What is known of devices by what was measured of them, as arrays: R devices, C cuts, Q courses.

A *course* is a number of micro-batches and a codec; `CutTable` says what each cut moves and holds.
Nothing here is read off a profile but what a device is believed to take before it was measured:

* the seconds that a device computes at a cut are those that it measured there; between two cuts
  that were tried they grow with the multiply-accumulates, and so they do beyond them;
* what it takes alone beyond that is loading, which an edge's work may hide;
* rates are those of the last message; edges take what they were measured to take;
* an iteration that took longer than it should have (others were at the edge) is believed to do so
  again, and less so with every round.

One row of the arrays is one device. Training has those of many fleets, a run those of its own, so
that both know by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices
from fedsys.planning.costs import FRAME_BYTES, tensor_bytes
from fedsys.planning.workload import Array, Workload


@dataclass(frozen=True)
class CutTable:
    """What the cuts of a model move and hold, the whole model last.

    Leading axes are those of rows: ``(C,)`` for the model of a run, ``(R, C)`` for many models.

    Attributes:
        share: Share of the multiply-accumulates on the device, ``(…, C)``.
        up_bits: Bits of a mini-batch that a device sends by each course, ``(…, C, Q)``; 0 at the
            whole model.
        down_bits: Bits that it receives.
        held_bits: Bits of the device's part of the model, ``(…, C)``; 0 if it is not exchanged.
        pieces: Micro-batches of each course, ``(Q,)``.
        depth: Pieces in flight at most; None: all.
    """

    share: Array
    up_bits: Array
    down_bits: Array
    held_bits: Array
    pieces: Array
    depth: int | None = None


Course = tuple[int, str]
"""Micro-batches, codec."""


def courses_of(load: Workload) -> tuple[Course, ...]:
    """Return the courses that may be chosen."""
    return tuple((count, codec) for count in load.micro_batches for codec in load.codecs)


def table_of(load: Workload, shares: Sequence[float], cuts: Sequence[int]) -> CutTable:
    """Return the table of a model.

    Args:
        load: What is trained, and what may be chosen.
        shares: Share of the work on the device at each cut that may be chosen.
        cuts: These cuts, the whole model last.
    """
    courses = courses_of(load)
    size, held = load.batch_size, 8.0 * np.cumsum([0.0, *load.state_bytes])
    up, down = np.zeros((2, len(cuts), len(courses)))
    for i, cut in enumerate(cuts[:-1]):
        for q, (count, codec) in enumerate(courses):
            sent = tensor_bytes(load.crossings[cut - 1], size, codec) + FRAME_BYTES * count
            up[i, q], down[i, q] = 8.0 * (sent + load.crossings[cut - 1].more * size), 8.0 * sent
    return CutTable(
        np.array(shares),
        up,
        down,
        held[list(cuts)] * float(load.exchange),
        np.array([float(count) for count, _ in courses]),
        load.in_flight,
    )


@dataclass(frozen=True)
class Rows:
    """What is configured of R devices, those of a fleet in a row.

    Attributes:
        starts: Index of the first device of each fleet, ``(N,)``.
        fleet: The fleet of each device, ``(R,)``.
        edge: Number of the edge of each device, over all fleets.
        workers: Sessions that it computes at a time, ``(R,)``.
        latency_s: One way.
        steps: Iterations in a round.
        piece_s: Seconds of a forward, or a backward, of a piece beside its work.
        message_s: CPU seconds of a message beside its bits; the whole model sends none.
        bit_s: CPU seconds of a bit that is sent or received by each course, ``(R, Q)``.
        edge_piece_s: As `piece_s` and `message_s` together, of the edge.
        edge_bit_s: As `bit_s`, of the edge.
    """

    starts: Indices
    fleet: Indices
    edge: Indices
    workers: Array
    latency_s: Array
    steps: Array
    piece_s: Array
    message_s: Array
    bit_s: Array
    edge_piece_s: Array
    edge_bit_s: Array


@dataclass(frozen=True)
class Measurements:
    """What R devices measured in a round; 0 where nothing was.

    Attributes:
        iteration_s: Seconds from one mini-batch to the next, ``(R,)``.
        compute_s: Seconds in which the device computed.
        edge_s: Seconds in which its edge did.
        up_bit_s: Seconds of a bit to the edge.
        down_bit_s: Seconds of a bit from it.
    """

    iteration_s: Array
    compute_s: Array
    edge_s: Array
    up_bit_s: Array
    down_bit_s: Array


@dataclass(frozen=True)
class Knowledge:
    """What is known of R devices.

    Attributes:
        guess_s: Seconds that a device computes for the whole model, as it is believed before it has
            measured anything, ``(R,)``; 0 if nothing is.
        work_s: Seconds that it computes at each cut beside pieces and messages, as measured,
            ``(R, C)``; 0 where it was never.
        slow: Logarithm of how many times as long as expected an iteration took, ``(R, C)``.
        up_bit_s: Seconds of a bit to the edge, ``(R,)``.
        down_bit_s: Seconds of a bit from it.
        swing: Logarithm of the highest to the last seconds of a bit.
        edge_s: Seconds that its edge takes for the whole model.
        cut: Index of the cut of the last round; -1 before the first.
        course: Index of the course.
        unseen: Rounds since its link was measured.
        load_s: Seconds in which it loads a mini-batch beside computing, ``(R,)``.
    """

    guess_s: Array
    work_s: Array
    slow: Array
    up_bit_s: Array
    down_bit_s: Array
    swing: Array
    edge_s: Array
    cut: Indices
    course: Indices
    unseen: Array
    load_s: Array

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Of whom it is known, or believed, what they compute, ``(R,)``."""
        ready: NDArray[np.bool_] = (self.guess_s > 0) | (self.work_s > 0).any(axis=1)
        return ready

    def works_s(self, share: Array) -> Array:
        """Return the seconds of work on the device at each cut, ``(R, C)``.

        Args:
            share: Share of the multiply-accumulates, ``(R, C)``.
        """
        tried, at = self.work_s > 0, np.arange(share.shape[1])
        rows, last = np.arange(len(share))[:, None], len(at) - 1
        before = np.maximum.accumulate(np.where(tried, at, -1), axis=1)
        after = np.minimum.accumulate(np.where(tried, at, last + 1)[:, ::-1], axis=1)[:, ::-1]
        some = before >= 0
        low = np.where(some, self.work_s[rows, before], 0.0)
        low_share = np.where(some, share[rows, before], 0.0)
        upper = np.minimum(after, last)
        apart = np.maximum(share[rows, upper] - low_share, 1e-12)
        between = np.maximum(self.work_s[rows, upper] - low, 0.0) / apart
        beyond = np.where(some, low / np.maximum(low_share, 1e-12), self.guess_s[:, None])
        works: Array = low + np.where(after <= last, between, beyond) * (share - low_share)
        return works

    def unmeasured(self, share: Array) -> Array:
        """Return the share of each cut's work that is not told by a cut that was tried, ``(R, C)``.

        It is 0 at cuts that were tried, and 1 where nothing was.
        """
        tried = np.where(self.work_s > 0, share, 0.0)
        told = np.maximum.accumulate(tried, axis=1)
        first = np.where(tried > 0, tried, 2.0).min(axis=1, keepdims=True)
        known = np.where(told > 0, told / share, np.where(first <= 1.0, share / first, 0.0))
        rest: Array = 1.0 - np.minimum(known, 1.0)
        return rest
