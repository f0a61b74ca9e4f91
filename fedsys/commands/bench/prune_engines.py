"""Shrunk models on the engines that answer: PyTorch and ONNX Runtime, one image and batches.

* `rounding_rows`: what rounding numbers of channels up saves, none, all alike, and where it pays
  (`fedsys.pruning.rounding`).
* `served_rows`: Torch-Pruning beside ours at the same number of parameters, with
  ``pruning.cost`` of ``bench.served_cost`` and with channels rounded for the engine. Extra channels
  count: what is rounded up is pruned more before. BatchNorm is folded in all; ``as given`` is what
  Torch-Pruning returns.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import fx, nn

from fedsys.commands.bench.prune_rivals import (
    RIVAL,
    SHAPE,
    converted,
    folded,
    masks_by,
    of_size,
    plain_score,
    torch_pruning,
    weighed,
)
from fedsys.config import Config, VariantsConfig
from fedsys.pruning.dense.removal import evaluation_graph, masked_copy
from fedsys.pruning.dense.shrink import count_parameters, shrink
from fedsys.pruning.export import onnx_bytes
from fedsys.pruning.measuring import in_turns, macs, speedup, with_threads
from fedsys.pruning.precision import OnnxModule
from fedsys.pruning.rounding import ONNX, TORCH, decided
from fedsys.randomness import Address
from fedsys.training.masks import last_layer

_FEWEST = 10
"""Timed runs of batches, at least."""

Row = dict[str, Any]


def rounding_rows(
    model: nn.Module, name: str, config: Config, options: Mapping[str, Any]
) -> list[Row]:
    """Return a row for each engine: which groups of channels are rounded up, and milliseconds.

    Args:
        model: With weights as after training; left as it was.
        name: Its name in the rows.
        config: ``pruning`` and ``variants``.
        options: ``rival_sparsity`` and ``served_batches``.

    Raises:
        ModelError: The extra ``export`` is not installed, or a conversion fails.
    """
    plan = shrink(model, SHAPE, masks=masks_by(model, plain_score(config, options))).plan
    variants = _for_batches(config, options)
    rows = []
    for engine in (TORCH, ONNX):
        began = time.perf_counter()
        found = decided(plan, variants, SHAPE, engines=(engine,))
        took = time.perf_counter() - began
        measured = found.measured_ms or {}
        rows.append(
            {
                "model": name,
                "engine": engine,
                "groups": len(found.groups),
                "rounded": len(found.rounded),
                **{f"{kind}_ms": ms for kind, ms in measured.items()},
                "predicted_ms": found.predicted_ms if measured else None,
                "faster_than_exact": measured["exact"] / measured["chosen"] if measured else 1.0,
                "tries": found.tries,
                "seconds": took,
            }
        )
    return rows


def served_rows(
    model: nn.Module, name: str, config: Config, options: Mapping[str, Any]
) -> list[Row]:
    """Return a row for each engine, batch size and model; all are timed in turns in one process.

    Args:
        model: With weights as after training; left as it was.
        name: Its name in the rows.
        config: ``pruning`` and ``variants``.
        options: ``rival_sparsity``, ``rival_runs``, ``served_batches`` and ``served_cost`` (cost
            and weight).

    Raises:
        ConfigError: The cost or its weight is out of range.
        ModelError: A package is missing, or nothing is as small as wanted.
    """
    plain = plain_score(config, options)
    cost, weight = options["served_cost"]
    chosen = weighed(plain, cost, weight)
    first = shrink(model, SHAPE, masks=masks_by(model, plain))
    params = first.report.parameters
    given = torch_pruning(model, SHAPE, params, last_layer(model))
    models: dict[str, nn.Module] = {RIVAL: folded(given), "fedsys": folded(first.model)}
    sizes = {RIVAL: count_parameters(given), "fedsys": params}
    _, exact = of_size(model, chosen, params)
    variants = _for_batches(config, options)
    for engine in (TORCH, ONNX):
        round_to = decided(exact, variants, SHAPE, engines=(engine,)).round_to
        masks, _ = of_size(model, chosen, params, round_to or 1)
        candidate = converted(model, masks, config, round_to or 1)
        by = f"fedsys, {cost}^{weight:g}, for {engine}"
        models[by], sizes[by] = candidate.module, candidate.variant.params
    every = {(TORCH, by): each for by, each in models.items()}
    every |= {(ONNX, by): OnnxModule(onnx_bytes(each, SHAPE)) for by, each in models.items()}
    every[TORCH, f"{RIVAL}, as given"] = given
    costs = {by: macs(_traced(each), SHAPE) for by, each in models.items()}
    rows = []
    for batch in options["served_batches"]:
        for (engine, by), figures in _timed(every, int(batch), int(options["rival_runs"])).items():
            known = by if by in sizes else RIVAL
            row = {"model": name, "engine": engine, "batch": int(batch), "by": by}
            rows.append({**row, "params": sizes[known], "macs": costs[known], **figures})
    return rows


def _timed(
    models: Mapping[tuple[str, str], nn.Module], batch: int, runs: int
) -> dict[tuple[str, str], Row]:
    """Time models by engine and name in turns, by the clock on the wall and by the processor's."""
    images = torch.randn(batch, *SHAPE, generator=Address(0).torch("served"))
    named = {f"{engine}/{by}": each for (engine, by), each in models.items()}
    found: dict[tuple[str, str], Row] = {key: {} for key in models}
    for kind, clock in (("", time.perf_counter), ("cpu_", time.thread_time)):
        with with_threads(1):
            took = in_turns(named, images, max(_FEWEST, runs // batch), clock=clock)
        for engine, by in models:
            own, rival = took[f"{engine}/{by}"], took[f"{engine}/{RIVAL}"]
            figures = found[engine, by]
            figures[f"{kind}ms"] = 1000.0 * median(own)
            figures[f"{kind}faster_than_torch_pruning"] = speedup(rival, own)
    return found


def _for_batches(config: Config, options: Mapping[str, Any]) -> VariantsConfig:
    """Return how variants are made, measured with one thread and the batch sizes of the bench."""
    sizes = tuple(int(batch) for batch in options["served_batches"])
    return dataclasses.replace(config.variants, batch_sizes=sizes, threads=(1,))


def _traced(model: nn.Module) -> fx.GraphModule:
    return evaluation_graph(masked_copy(model, None)).float()
