"""Portfolios: how exact, how fast and how small, with Torch-Pruning beside ours.

* ``exactness``: models of every family with random masks; the dense model against the masked one,
  in float64 and float32, and their answers on test images.
* ``conversions``: masks of the smallest magnitudes, all of the last layer left; seconds with
  verification, and how many parameters are left, beside the reference rule
  (`fedsys.commands.bench.prune_reference`).
* ``rivals``: our scores without and with costs, and Torch-Pruning's magnitude importance, all at
  the same number of parameters; seconds, MACs and latency in turns
  (`fedsys.commands.bench.prune_rivals`).
* ``rounding``: numbers of channels rounded up, none, all, and where it pays, on both engines;
  ``served``: Torch-Pruning and ours at the same number of parameters, on both engines, one image
  and batches (`fedsys.commands.bench.prune_engines`).
* ``effort``: six variants of one trained parent, from mask to written portfolio, against six times
  its measured training.
* ``trained``: models that trained under masks against their dense variants: parameters, latency in
  turns, answers on all test images.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsys import config as configuration
from fedsys import data
from fedsys.commands.bench import Chart
from fedsys.commands.bench.prune_engines import rounding_rows, served_rows
from fedsys.commands.bench.prune_models import as_trained, built
from fedsys.commands.bench.prune_reference import reference_rule_parameters
from fedsys.commands.bench.prune_rivals import rivals
from fedsys.commands.prune import fill, of_run, run_config
from fedsys.config import Config
from fedsys.data import Dataset
from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.candidates import convert
from fedsys.pruning.dense.removal import masked_copy
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.levels import Level, Recipe, recipes, refined, spread
from fedsys.pruning.making import Made, make
from fedsys.pruning.measuring import in_turns, speedup, with_threads
from fedsys.pruning.scores import random
from fedsys.pruning.sparsify import one_shot, prune
from fedsys.randomness import Address
from fedsys.runs.folder import RunFolder
from fedsys.training import federation, optimizers
from fedsys.training import plain as training
from fedsys.training.masks import Masks, last_layer

RUNS = 30
"""Timed runs of each model in a comparison."""

Row = dict[str, Any]


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure and return the tables that this module names.

    Args:
        config: Data, seed, client; model and pruning of the trained part.
        options: See ``conf/bench/prune.yaml``.

    Raises:
        ConfigError: A folder holds no run, or a value does not fit.
        ModelError: A package of the extra ``prune`` is missing, or a conversion fails.
    """
    training.set_threads(config.client.threads)
    dataset = federation.federation(config).dataset
    images = _images(dataset, int(options["images"]))
    exact = [
        _exactness(name, sparsity, images, config.seed, *alive)
        for name, sparsities, *alive in options["families"]
        for sparsity in sparsities
    ]
    conversions = [
        _conversion(name, sparsity, int(options["repeats"]), config.seed)
        for name, sparsity in options["conversions"]
    ]
    beside = _of_each(rivals, "rivals", config, options)
    rounding = _of_each(rounding_rows, "rounded", config, options)
    served = _of_each(served_rows, "served", config, options)
    tables = {
        "exactness": exact,
        "conversions": conversions,
        "rivals": beside,
        "rounding": rounding,
        "served": served,
        "threads": torch.get_num_threads(),
    }
    if not options["trains"]:
        return tables
    parent, config, dataset, seconds, source = _parent(config, options, dataset)
    effort = _effort(parent, config, dataset, seconds, source)
    trained = _trained(parent, config, dataset, options)
    return tables | {"effort": [effort], "trained": trained}


def _of_each(
    rows: Callable[[nn.Module, str, Config, Mapping[str, Any]], list[Row]],
    key: str,
    config: Config,
    options: Mapping[str, Any],
) -> list[Row]:
    """Return the rows of all models that an option names."""
    found = []
    for name in options[key]:
        _say(f"{key}: {name}")
        found += rows(as_trained(built(name, config.seed), config.seed), name, config, options)
    return found


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return how many times fewer parameters are left, ours and by the reference rule."""
    rows = figures["conversions"]
    return Chart(
        "Exact conversion of magnitude masks",
        "model",
        "times fewer parameters",
        [f"{row['model']}, {row['sparsity']:.1%}" for row in rows],
        {
            "fedsys": [row["times"] for row in rows],
            "reference rule": [row["reference_times"] for row in rows],
        },
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _images(dataset: Dataset, count: int) -> Tensor:
    return torch.cat([x for x, _ in data.eval_batches(spread(dataset.test, count), dataset, 250)])


# --------------------------------------------------------------------------------------------------
# Exactness and conversion


def _exactness(name: str, sparsity: float, images: Tensor, seed: int, alive: int = 0) -> Row:
    model = as_trained(built(name, seed), seed)
    row: Row = {"model": name, "sparsity": sparsity, "alive": alive}
    _say(f"exactness of {name} at {sparsity:.1%}")
    try:
        masks = random_masks(model, sparsity, Address(seed), alive)
        if alive:
            _strengthen(model, masks)
        small = shrink(model, (3, 32, 32), masks=masks)
    except ModelError as error:
        return row | {"refused": str(error)[:60]}
    masked = masked_copy(model, masks)
    expected, got = _answers(masked, images), _answers(small.model, images)
    return row | {
        "max_abs_diff_float64": small.report.max_abs_diff_float64,
        "max_abs_diff": float((expected - got).abs().max()),
        "max_abs_output": float(expected.abs().max()),
        "images": len(images),
        "other_answers": int((expected.argmax(1) != got.argmax(1)).sum()),
        "spread": float(expected.std(0).max()),
        "params": small.report.parameters,
        "parent_params": small.report.parameters_before,
    }


def random_masks(model: nn.Module, sparsity: float, address: Address, alive: int = 0) -> Masks:
    """Prune weights at random, all of the last layer left.

    Args:
        model: Its weights are not looked at.
        sparsity: Share of them that goes; exact.
        address: Of the draws.
        alive: So many channels of every layer keep all weights to as many of the next, so that
            images reach the outputs where hardly a weight is left; 0 leaves all to chance.

    Raises:
        ModelError: A layer would lose all its weights.
    """
    scores = random(model, address)
    for score in scores.values():
        score[:alive, :alive] = math.inf
    return prune(Masks.dense(model, last_layer(model)), scores, sparsity)


@torch.no_grad()
def _strengthen(model: nn.Module, masks: Masks) -> None:
    """Scale the weights left in each channel to a norm of √2, as if they had been drawn for it.

    Where few are left, outputs would hardly depend on the image, and agree whatever went.
    """
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        norms = (weight * mask).flatten(1).norm(dim=1).clamp(min=1e-9)
        weight.mul_((2.0**0.5 / norms).view(-1, *[1] * (weight.dim() - 1)))


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.split(images, 250)])


def _conversion(name: str, sparsity: float, repeats: int, seed: int) -> Row:
    model = built(name, seed).eval()
    leave = last_layer(model)
    masks = one_shot("magnitude", model, sparsity, leave=leave)
    _say(f"{repeats} conversions of {name} at {sparsity:.1%}")
    reports = [shrink(model, (3, 32, 32), masks=masks).report for _ in range(repeats)]
    before, after = reports[0].parameters_before, reports[0].parameters
    reference = reference_rule_parameters(model, (3, 32, 32), masks=masks)
    return {
        "model": name,
        "sparsity": sparsity,
        "seconds": median(report.seconds for report in reports),
        "parent_params": before,
        "params": after,
        "times": before / after,
        "reference_params": reference,
        "reference_times": before / reference,
        "max_abs_diff_float64": reports[0].max_abs_diff_float64,
    }


# --------------------------------------------------------------------------------------------------
# Trained models


def _parent(
    config: Config, options: Mapping[str, Any], dataset: Dataset
) -> tuple[nn.Module, Config, Dataset, float, str]:
    """Return a trained model, its configuration and data, the seconds it took, and where from."""
    if options["run"] is None:
        model, seconds = _train(config, dataset, int(options["epochs"]))
        return model, config, dataset, seconds, f"{options['epochs']} epochs here"
    path = Path(str(options["run"])).absolute()
    config, dataset, model = _of_folder(path, config)
    seconds = float(RunFolder.open(path).info["result"]["seconds"])
    return fill(model, path / "model.safetensors"), config, dataset, seconds, path.name


def _of_folder(path: Path, config: Config) -> tuple[Config, Dataset, nn.Module]:
    """Return the configuration of a run with our pruning and measuring, its data and its model."""
    own = configuration.parse(configuration.to_text({**run_config(path), "resume": None}))
    own = dataclasses.replace(
        own, variants=config.variants, pruning=config.pruning, client=config.client
    )
    dataset = federation.federation(own).dataset
    return own, dataset, federation.build_model(own, dataset, initial=False)


def _train(config: Config, dataset: Dataset, epochs: int) -> tuple[nn.Module, float]:
    if epochs < 1:
        raise ConfigError.of("bench.epochs", epochs, "must be at least 1")
    model = federation.build_model(config, dataset)
    lr = config.client.lr
    optimizer = optimizers.make_optimizer(model.parameters(), config.client, lr)
    everything = np.arange(len(dataset.train), dtype=np.int64)
    began = time.perf_counter()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + np.cos(np.pi * epoch / epochs)) / 2
        address = Address(config.seed, 0, epoch + 1)
        size = config.client.batch_size
        batches = data.train_batches(dataset.train, everything, dataset, size, address, 0, 0)
        seen = training.train(model, optimizer, batches, address)
        _say(f"epoch {epoch + 1} of {epochs}: train accuracy {seen.accuracy:.1%}")
    return model, time.perf_counter() - began


def _effort(
    parent: nn.Module, config: Config, dataset: Dataset, seconds: float, source: str
) -> Row:
    made, took = _made(parent, recipes(parent, config, dataset), config, dataset)
    count = len(made.measured) - 1
    return {
        "parent": source,
        "training_seconds": seconds,
        "variants": count,
        "seconds": took,
        "times_faster": count * seconds / took,
        **{f"{part}_seconds": value for part, value in made.seconds.items()},
        "on_the_front": len(made.portfolio.variants) - 1,
        "slower_than_parent_on_the_front": _slower(made),
    }


def _slower(made: Made) -> int:
    parent = made.portfolio.parent
    return sum(
        own.p50_ms > its.p50_ms
        for variant in made.portfolio.variants
        for own, its in zip(variant.latencies, parent.latencies, strict=True)
    )


def _made(
    parent: nn.Module, masked: Sequence[Recipe], config: Config, dataset: Dataset
) -> tuple[Made, float]:
    """Make a portfolio in a folder that is thrown away; the seconds do not count the test part."""
    with TemporaryDirectory(prefix="fedsys-bench-prune-") as folder:
        began = time.perf_counter()
        made = make(parent, masked, config, dataset, Path(folder))
        took = time.perf_counter() - began
    return made, took - made.seconds.get("test", 0.0)


def _trained(
    parent: nn.Module, config: Config, dataset: Dataset, options: Mapping[str, Any]
) -> list[Row]:
    """Compare models that trained under masks with their dense variants."""
    if not options["pruned"]:
        variants = dataclasses.replace(config.variants, fine_tune=int(options["fine_tune"]))
        tuned = dataclasses.replace(config, variants=variants)
        found = []
        for recipe in recipes(parent, config, dataset):
            level = refined(recipe.make(), tuned, dataset)
            found.append(_against_masked(level, parent, config, dataset))
        return found
    rows = []
    for folder in options["pruned"]:
        path = Path(str(folder)).absolute()
        own, images, model = _of_folder(path, config)
        trained, masked = of_run(path, model, own, images)
        rows += [
            {"run": path.name, **_against_masked(recipe.make(), trained, own, images)}
            for recipe in masked
        ]
    return rows


def _against_masked(level: Level, parent: nn.Module, config: Config, dataset: Dataset) -> Row:
    _say(f"{level.name} beside its masked model")
    candidate, small = convert(level, config.variants, dataset.input_shape, lambda plan: None)
    masked = masked_copy(level.model, level.masks)
    images = torch.randn(1, *dataset.input_shape, generator=Address(0).torch("masked"))
    with with_threads(1):
        took = in_turns({"masked": masked, "dense": candidate.module}, images, RUNS)
    everything = _images(dataset, len(dataset.test))
    expected, got = _answers(masked, everything), _answers(candidate.module, everything)
    labels = dataset.test.labels[: len(everything)]
    return {
        "variant": level.name,
        "sparsity": candidate.variant.sparsity,
        "val_accuracy": _accuracy(candidate.module, dataset),
        "parent_val_accuracy": _accuracy(parent, dataset),
        "test_accuracy": float((got.argmax(1) == labels).double().mean()),
        "masked_test_accuracy": float((expected.argmax(1) == labels).double().mean()),
        "other_answers": int((expected.argmax(1) != got.argmax(1)).sum()),
        "params": candidate.variant.params,
        "times_fewer": small.report.parameters_before / candidate.variant.params,
        "masked_ms": 1000 * median(took["masked"]),
        "ms": 1000 * median(took["dense"]),
        "times_faster": speedup(took["masked"], took["dense"]),
        "max_abs_diff": candidate.variant.max_abs_diff,
    }


def _accuracy(model: nn.Module, dataset: Dataset) -> float:
    return training.evaluate(model, data.eval_batches(dataset.validation, dataset, 250)).accuracy
