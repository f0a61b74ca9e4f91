"""What this machine takes to answer: seconds of each unit in evaluation, measured.

``fedsys profile`` measures training. In evaluation a model is faster and its units share their time
otherwise, so what is planned for requests is measured by requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import torch

from fedsys.models.layers import LayeredModel, section
from fedsys.planning.costs import MachineCosts, Messaging

_WARM_UP = 2


def inference_costs(
    layers: LayeredModel,
    input_shape: Sequence[int],
    *,
    rows: int = 1,
    repeats: int = 10,
    messaging: Messaging | None = None,
    name: str = "measured",
) -> MachineCosts:
    """Return what this machine takes for a model, for the planner; backward passes cost nothing.

    Units between two legal cuts are timed as one and share its time by their multiply-accumulates.

    Args:
        layers: The model, with values; its parts are computed in evaluation.
        input_shape: Of an example, without the batch.
        rows: Examples of a request.
        repeats: Of which the median counts.
        messaging: What messages cost; measured by whoever has links.
        name: Of the machine.
    """
    bounds = [0, *layers.cuts, len(layers)]
    parts = [section(layers, first, last).eval() for first, last in pairwise(bounds)]
    x = torch.randn(rows, *input_shape, generator=torch.Generator().manual_seed(0))
    taken: list[list[float]] = [[] for _ in parts]
    with torch.inference_mode():
        for repeat in range(_WARM_UP + repeats):
            y = x
            for part, samples in zip(parts, taken, strict=True):
                began = time.perf_counter()
                y = part(y)
                if repeat >= _WARM_UP:
                    samples.append(time.perf_counter() - began)
    seconds = shared_by_work(layers, [median(samples) for samples in taken])
    nothing = (0.0,) * len(seconds)
    forward = (tuple(seconds),)
    return MachineCosts(
        name, (rows,), forward, (nothing,), nothing, messaging=messaging or Messaging()
    )


def shared_by_work(layers: LayeredModel, parts: Sequence[float]) -> list[float]:
    """Return the seconds of each unit; units between two legal cuts share theirs by their work."""
    found: list[float] = []
    bounds = [0, *layers.cuts, len(layers)]
    for (first, last), seconds in zip(pairwise(bounds), parts, strict=True):
        work = [unit.macs for unit in layers.units[first:last]]
        whole = sum(work)
        found += [seconds * (w / whole if whole else 1 / len(work)) for w in work]
    return found
