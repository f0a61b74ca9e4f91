"""What each cut is expected to take each device, and how an agent sees that: the candidates.

`outlook` puts what is known of devices into the closed form of planners for one device alone, and
takes for each cut the course that is fastest. `candidates` says of each cut what an agent weighs,
in ratios, so that neither the model nor the speed of machines, nor the number of cuts or devices
matters. One network scores all candidates of all devices (`fedsys.planning.learning.cut_agent`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices
from fedsys.planning.learning.knowing import Knowledge, Rows
from fedsys.planning.learning.staging import Forecast, Setup
from fedsys.planning.workload import Array

FEATURES: Final = (
    "alone over target", "round over target", "device", "link", "edge", "others", "own best",
    "round at lowest rate", "share", "unmeasured", "slow", "stays", "alone", "swing",
)  # fmt: skip
"""What is said of a candidate; see `candidates`."""

LEAST: Final = 0.01
"""Added to ratios before the logarithm is taken: what is smaller does not matter."""

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Outlook:
    """What is expected of R devices at C cuts, each by the course that is fastest there.

    Attributes:
        alone_s: Seconds of an iteration with an edge to itself, ``(R, C)``.
        round_s: Seconds of a round, as slow as iterations lately were.
        lowest_s: Likewise, at the lowest rate that the link had lately.
        device_s: Seconds in which the device computes in a round.
        link_s: Seconds in which the busier way of the link transfers.
        edge_s: Seconds in which the edge computes for the device.
        exchange_s: Seconds in which it receives and returns its part of the model.
        course: The course.
    """

    alone_s: Array
    round_s: Array
    lowest_s: Array
    device_s: Array
    link_s: Array
    edge_s: Array
    exchange_s: Array
    course: Indices


def outlook(setup: Setup, known: Knowledge, made: Forecast | None = None) -> Outlook:
    """Return what is expected of all devices at all cuts.

    Args:
        setup: The devices and their cuts.
        known: What is known of them.
        made: What follows from that, if it was made already.
    """
    made = made or Forecast.of(setup, known)
    s, every = made.stages, made.alone_s
    count, cuts, courses = every.shape
    course = every.argmin(axis=2)
    flat = course.ravel() + np.arange(count * cuts) * courses

    def there(values: Array) -> Array:
        picked: Array = values.ravel()[flat].reshape(count, cuts)
        return picked

    rows = setup.rows
    alone, pieces = there(every), there(s.pieces)
    bit_s = (known.up_bit_s + known.down_bit_s)[:, None]
    latency = np.where(setup.held_bits > 0, 2 * rows.latency_s[:, None], 0.0)
    exchange = setup.held_bits * bit_s + latency
    steps = rows.steps[:, None]
    link = pieces * np.maximum(there(s.up), there(s.down)) * steps
    round_s = alone * np.exp(known.slow) * steps + exchange
    lower = 10.0 ** known.swing[:, None] - 1.0
    return Outlook(
        alone,
        round_s,
        round_s + (link + exchange) * lower,
        pieces * (there(s.forward) + there(s.backward)) * steps,
        link,
        np.where(setup.away, pieces * there(s.edge) * steps, 0.0),
        exchange,
        course,
    )


@dataclass(frozen=True)
class Target:
    """What the slowest device of a fleet may hope for, and who is at the edges.

    Attributes:
        wished: Index of the cut with the least expected time of each device, ``(R,)``.
        seconds: Of a round of the slowest device of its fleet there, ``(R,)``.
        others_s: Seconds of an edge that the others take at their wishes, for each session that it
            computes at a time, ``(R,)``.
    """

    wished: Indices
    seconds: Array
    others_s: Array


def target(rows: Rows, seen: Outlook, legal: NDArray[np.bool_]) -> Target:
    """Return what a fleet may hope for.

    Args:
        rows: The devices.
        seen: What is expected.
        legal: Which cuts may be chosen, ``(R, C)``.
    """
    here = np.arange(len(rows.fleet))
    hoped = np.where(legal, seen.round_s, np.inf)
    wished = hoped.argmin(axis=1)
    slowest = np.maximum.reduceat(hoped[here, wished], rows.starts)[rows.fleet]
    # Who is ready before the slowest without an edge does not need one
    home = legal[:, -1] & (seen.round_s[:, -1] <= slowest)
    own = np.where(home, 0.0, seen.edge_s[here, wished])
    busy = np.bincount(rows.edge, own)[rows.edge]
    return Target(wished, slowest, (busy - own) / rows.workers)


def candidates(
    setup: Setup, known: Knowledge, seen: Outlook, hoped: Target, legal: NDArray[np.bool_]
) -> Features:
    """Return what an agent sees: of each cut `FEATURES`, and whether it is legal.

    Its shape is ``(R, C, F + 1)``. Ratios are logarithms to base 10. The *target* is the time of a
    round that the slowest device of the fleet may hope for.

    ======================= =====================================================================
    alone over target       expected time of a round with the whole model, over the target
    round over target       and with the cut
    device, link, edge      time in which each is busy in a round, over the target
    others                  time of the edge for the others, over the target; 0 where none is needed
    own best                the least time that the device may hope for, over the target
    round at lowest rate    expected time of a round at the lowest rate of late, over the target
    share                   share of the work on the device
    unmeasured              share of its time that no cut that was tried tells
    slow                    how many times as long as expected iterations took there
    stays                   whether it is the cut of the last round
    alone                   whether it is the whole model
    swing                   highest seconds of a bit of late over the last ones
    ======================= =====================================================================
    """
    goal = np.maximum(hoped.seconds, 1e-12)[:, None]
    own = seen.round_s[np.arange(len(legal)), hoped.wished][:, None]
    made = np.zeros((*legal.shape, len(FEATURES) + 1), dtype=np.float32)
    ratios = np.empty((8, *legal.shape))
    for i, seconds in enumerate(
        (seen.round_s[:, -1:], seen.round_s, seen.device_s, seen.link_s, seen.edge_s,
         hoped.others_s[:, None], own, seen.lowest_s)
    ):  # fmt: skip
        np.divide(seconds, goal, out=ratios[i])
    ratios[5, :, -1] = 0.0
    ratios += LEAST
    np.log10(ratios, out=ratios)
    made[..., :8] = np.minimum(np.maximum(ratios, -2.0), 2.0).transpose(1, 2, 0)
    made[..., 8] = setup.share
    made[..., 9] = known.unmeasured(setup.share)
    made[..., 10] = known.slow
    made[..., 11] = known.cut[:, None] == np.arange(legal.shape[1])
    made[:, -1, 12] = 1.0
    made[..., 13] = known.swing[:, None]
    made[..., 14] = legal
    return made
