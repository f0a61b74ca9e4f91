"""Which variant computes the next batch, of those in memory: a pure function, asked at each batch.

`fedsys.serving.switch.policy` says which variant the load of the last seconds calls for. But loads
jump, and a switch takes the time of loading: what comes meanwhile would wait for a variant that is
too slow. So small variants stay in memory (`standbys`), and each batch is computed by the most
accurate variant there with which neither the batch nor what waits behind it will be late
(`relieve`). A queue that lasts a moment costs accuracy for that moment only, and no switch.

The look ahead is that of a server that turns to its fastest variant after this batch: a slow
variant is used as long as the fast one can still make good what waits meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsys.serving.switch.policy import (
    TAIL,
    Objective,
    Profile,
    Signals,
    latency_at,
    merit,
    slowdown,
    transfer_ms,
)

_MOST_HELP = 0.5  # of the requests of a variant that others may take over


@dataclass(frozen=True)
class Backlog:
    """A batch that is about to be computed, and what waits behind it.

    Attributes:
        rows: Examples in the batch.
        waited_ms: How long its oldest request has waited, in milliseconds.
        behind: Examples that wait behind it.
    """

    rows: int
    waited_ms: float = 0.0
    behind: int = 0


def relieve(
    current: Profile,
    spare: Sequence[Profile],
    backlog: Backlog,
    signals: Signals,
    objective: Objective,
) -> tuple[Profile, bool]:
    """Return who should compute a batch, and whether it is expected to be in time.

    Args:
        current: The variant that answers; it is taken where no other is in memory.
        spare: Others in memory.
        backlog: The batch, and what waits.
        signals: As last seen: arrivals and slowness.
        objective: Its latency less its margin is what counts, as predictions are off.

    Returns:
        The most accurate variant in memory with which the batch and what is behind it are
        expected in time, or else the fastest one; of those that keep to the memory.
    """
    ranked = sorted((current, *spare), key=merit, reverse=True)
    fitting = [v for v in ranked if _fits(v, objective)] or [current]
    slow = slowdown(signals)
    allowed = objective.p95_ms / (1 + objective.margin) - transfer_ms(signals, objective)
    fastest = min(fitting, key=lambda v: latency_at(v, objective.max_batch).p50_ms)
    rest = latency_at(fastest, objective.max_batch).p95_ms * slow
    for variant in fitting:
        own = latency_at(variant, backlog.rows).p95_ms * slow
        coming = backlog.behind + signals.arrival_rate * own / 1e3
        last = own + math.ceil(coming / objective.max_batch) * rest  # it has come just now
        first = backlog.waited_ms + own + (rest if backlog.behind else 0.0)
        if max(first, last) <= allowed:
            return variant, True
    return fastest, False


def _fits(variant: Profile, objective: Objective) -> bool:
    return objective.memory_bytes is None or variant.peak_bytes <= objective.memory_bytes


def standbys(
    variants: Sequence[Profile], chosen: Profile, room: float, share: float
) -> tuple[str, ...]:
    """Return the names of the variants that should stay in memory beside the one that answers.

    Args:
        variants: The portfolio.
        chosen: What answers.
        room: Bytes that all may take together.
        share: Of the weights of the largest variant: what all others in memory may take.

    Returns:
        From the smallest up, as many as keep to both bounds.
    """
    left = min(share * max(v.bytes for v in variants), room - chosen.peak_bytes)
    names = []
    for variant in sorted(variants, key=lambda v: (v.bytes, v.name)):
        if variant.name == chosen.name:
            continue
        left -= variant.bytes
        if left < 0:
            break
        names.append(variant.name)
    return tuple(names)


def tails_of(variants: Sequence[Profile], helper: Profile | None) -> dict[str, float]:
    """Return for each variant the share of its requests that may take longer than the objective.

    Without help it is `TAIL`. What a helper takes over is in time, but less accurate; so it may be
    as much as leaves both together as accurate as the next variant alone: with accuracies a of the
    variant, n of the next less accurate one and h of the helper, (a - n) / (a - h), at most half.

    Args:
        variants: The portfolio.
        helper: What takes over; None for nobody.
    """
    result = {v.name: TAIL for v in variants}
    if helper is None or math.isnan(helper.accuracy):
        return result
    for variant in variants:
        below = [v.accuracy for v in variants if v.accuracy < variant.accuracy]
        if below and variant.accuracy > helper.accuracy:
            gain = variant.accuracy - max(*below, helper.accuracy)
            share = gain / (variant.accuracy - helper.accuracy)
            result[variant.name] = min(_MOST_HELP, max(TAIL, share))
    return result
