"""From what is known of devices and what they measured to what is known: `informed`."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.learning.knowing import Knowledge, Measurements
from fedsys.planning.learning.staging import Forecast, Setup
from fedsys.planning.workload import Array

FADING: Final = 0.8
"""What is left after a round of the logarithm by which an iteration took longer than expected."""

SWING: Final = 0.98
"""What is left after a round of the logarithm of the highest to the last seconds of a bit."""

MOST: Final = 100.0
"""Times as long as expected up to which an iteration is told apart."""

DRIFT: Final = 0.2
"""Relative change of what a cut takes from which on the machine has changed."""

LEAST_S: Final = 1e-9
"""Seconds above which something is believed to have been measured."""


def informed(known: Knowledge, setup: Setup, seen: Measurements) -> tuple[Knowledge, Forecast]:
    """Return what is known after a round, and what is expected by that.

    Args:
        known: Before it.
        setup: The devices and their cuts.
        seen: What was measured.
    """
    if not (known.cut >= 0).any():
        return known, Forecast.of(setup, known)
    here, cut = np.arange(len(known.cut)), np.maximum(known.cut, 0)
    measured = (known.cut >= 0) & (seen.iteration_s > LEAST_S)
    away = measured & setup.away[here, cut]
    own = setup.at(cut, known.course)
    after = dataclasses.replace(
        known,
        work_s=_worked(known, own, seen, measured),
        edge_s=_edges(known, own, seen, away),
        load_s=_loaded(known, seen, measured & ~away),
        unseen=np.where(seen.up_bit_s > 0, 0.0, known.unseen + 1),
    )
    after = _linked(after, seen)
    made = Forecast.of(setup, after)
    expected = made.alone_s[here, cut, known.course]
    return dataclasses.replace(after, slow=_slowed(known, expected, seen, away)), made


def _worked(known: Knowledge, own: Setup, seen: Measurements, measured: NDArray[np.bool_]) -> Array:
    here, cut = np.arange(len(known.cut)), np.maximum(known.cut, 0)
    beside = own.pieces * (own.sending_s + own.receiving_s)
    work = np.maximum(seen.compute_s - beside, 0.05 * seen.compute_s)
    mine = measured & (work > LEAST_S)
    work_s = known.work_s.copy()
    before = work_s[here, cut]
    # A machine that has become faster or slower is so at all cuts
    moved = mine & (before > LEAST_S) & (np.abs(work - before) > DRIFT * before)
    if moved.any():
        work_s[moved] *= (work[moved] / before[moved])[:, None]
    work_s[here[mine], cut[mine]] = work[mine]
    return work_s


def _slowed(
    known: Knowledge, expected_s: Array, seen: Measurements, offloaded: NDArray[np.bool_]
) -> Array:
    here, cut = np.arange(len(known.cut)), np.maximum(known.cut, 0)
    slow = known.slow * FADING
    now = np.log(np.clip(seen.iteration_s / np.maximum(expected_s, LEAST_S), 1.0 / MOST, MOST))
    slow[here[offloaded], cut[offloaded]] = now[offloaded]
    return slow


def _loaded(known: Knowledge, seen: Measurements, alone: NDArray[np.bool_]) -> Array:
    """Return what loading takes: what an iteration of a device alone takes beside computing."""
    rest = np.maximum(seen.iteration_s - seen.compute_s, 0.0)
    return np.where(alone & (seen.compute_s > LEAST_S), rest, known.load_s)


def _edges(known: Knowledge, own: Setup, seen: Measurements, offloaded: NDArray[np.bool_]) -> Array:
    """Return what edges take for the whole model: the mean of what their devices saw."""
    rest = own.rest * own.pieces
    mine = offloaded & (seen.edge_s > 0) & (rest > 0.01)
    if not mine.any():
        return known.edge_s
    beside = own.pieces * own.serving_s
    whole = np.maximum(seen.edge_s - beside, 0.05 * seen.edge_s) / np.maximum(rest, 0.01)
    edge = own.rows.edge
    count = np.bincount(edge[mine], minlength=int(edge.max()) + 1)
    total = np.bincount(edge[mine], whole[mine], minlength=len(count))
    mean = (total / np.maximum(count, 1))[edge]
    return np.where(mean > 0, mean, known.edge_s)


def _linked(known: Knowledge, seen: Measurements) -> Knowledge:
    up = np.where(seen.up_bit_s > 0, seen.up_bit_s, known.up_bit_s)
    down = np.where(seen.down_bit_s > 0, seen.down_bit_s, known.down_bit_s)
    before, now = known.up_bit_s + known.down_bit_s, up + down
    both = (before > 0) & (now > 0)
    grown = np.log10(np.where(both, before, 1.0)) - np.log10(np.where(both, now, 1.0))
    swing = np.clip(SWING * known.swing + grown, 0.0, 3.0)
    return dataclasses.replace(known, up_bit_s=up, down_bit_s=down, swing=swing)
