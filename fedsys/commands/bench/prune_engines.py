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
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from fedsys.commands.bench.prune_rivals import folded, masks_by, of_size, torch_pruning
from fedsys.config import Config
from fedsys.config.pruning import check
from fedsys.pruning.candidates import Candidate, convert
from fedsys.pruning.dense.removal import evaluation_graph, masked_copy
from fedsys.pruning.dense.shrink import count_parameters, shrink
from fedsys.pruning.export import export_onnx
from fedsys.pruning.levels import Level
from fedsys.pruning.measuring import in_turns, macs, speedup, with_threads
from fedsys.pruning.precision import OnnxModule
from fedsys.pruning.rounding import ONNX, TORCH, decided
from fedsys.randomness import Address
from fedsys.training.masks import Masks, last_layer

_SHAPE = (3, 32, 32)
_RIVAL = "Torch-Pruning"
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
    pruning = dataclasses.replace(config.pruning, sparsity=float(options["rival_sparsity"]))
    plan = shrink(model, _SHAPE, masks=masks_by(model, pruning)).plan
    variants = _for_batches(config, options)
    rows = []
    for engine in (TORCH, ONNX):
        began = time.perf_counter()
        found = decided(plan, variants, _SHAPE, engines=(engine,))
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
    plain = dataclasses.replace(config.pruning, sparsity=float(options["rival_sparsity"]))
    cost, weight = options["served_cost"]
    chosen = dataclasses.replace(plain, cost=str(cost), cost_weight=float(weight))
    check(chosen)
    first = shrink(model, _SHAPE, masks=masks_by(model, plain))
    params = first.report.parameters
    given = torch_pruning(model, _SHAPE, params, last_layer(model))
    models: dict[str, nn.Module] = {_RIVAL: folded(given), "fedsys": folded(first.model)}
    sizes = {_RIVAL: count_parameters(given), "fedsys": params}
    _, exact = of_size(model, chosen, params)
    variants = _for_batches(config, options)
    for engine in (TORCH, ONNX):
        round_to = decided(exact, variants, _SHAPE, engines=(engine,)).round_to
        masks, _ = of_size(model, chosen, params, round_to or 1)
        candidate = _converted(model, masks, config, round_to)
        by = f"fedsys, {cost}^{weight:g}, for {engine}"
        models[by], sizes[by] = candidate.module, candidate.variant.params
    onnx = {by: _in_onnx(each) for by, each in models.items()}
    every = {(TORCH, by): each for by, each in models.items()}
    every |= {(ONNX, by): each for by, each in onnx.items()}
    every[TORCH, f"{_RIVAL}, as given"] = given
    costs = {by: macs(_traced(each), _SHAPE) for by, each in models.items()}
    rows = []
    for batch in options["served_batches"]:
        for (engine, by), figures in _timed(every, int(batch), int(options["rival_runs"])).items():
            known = by if by in sizes else _RIVAL
            row = {"model": name, "engine": engine, "batch": int(batch), "by": by}
            rows.append({**row, "params": sizes[known], "macs": costs[known], **figures})
    return rows


def _timed(
    models: Mapping[tuple[str, str], nn.Module], batch: int, runs: int
) -> dict[tuple[str, str], Row]:
    """Time models by engine and name in turns, by the clock on the wall and by the processor's."""
    images = torch.randn(batch, *_SHAPE, generator=Address(0).torch("served"))
    named = {f"{engine}/{by}": each for (engine, by), each in models.items()}
    found: dict[tuple[str, str], Row] = {key: {} for key in models}
    for kind, clock in (("", time.perf_counter), ("cpu_", time.thread_time)):
        with with_threads(1):
            took = in_turns(named, images, max(_FEWEST, runs // batch), clock=clock)
        for engine, by in models:
            own, rival = took[f"{engine}/{by}"], took[f"{engine}/{_RIVAL}"]
            figures = found[engine, by]
            figures[f"{kind}ms"] = 1000.0 * median(own)
            figures[f"{kind}faster_than_torch_pruning"] = speedup(rival, own)
    return found


def _for_batches(config: Config, options: Mapping[str, Any]) -> Any:
    """Return how variants are made, measured with one thread and the batch sizes of the bench."""
    sizes = tuple(int(batch) for batch in options["served_batches"])
    return dataclasses.replace(config.variants, batch_sizes=sizes, threads=(1,))


def _converted(
    model: nn.Module, masks: Masks, config: Config, round_to: Mapping[str, int]
) -> Candidate:
    """Return the verified dense model."""
    level = Level("ours", model, masks, config.pruning.method)
    candidate, _ = convert(level, config.variants, _SHAPE, lambda plan: None, None, round_to or 1)
    return candidate


def _traced(model: nn.Module) -> Any:
    return evaluation_graph(masked_copy(model, None)).float()


def _in_onnx(model: nn.Module) -> nn.Module:
    with TemporaryDirectory(prefix="fedsys-bench-prune-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, _SHAPE, path)
        return OnnxModule(path.read_bytes())
