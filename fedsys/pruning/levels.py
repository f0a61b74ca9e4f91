"""Masked models of one parent: pruned to several sparsities, and trained under the mask if asked.

What training there is happens before the conversion, so that each dense model equals a masked one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys import data
from fedsys.config import Config
from fedsys.data import Dataset, Images
from fedsys.errors import ConfigError
from fedsys.models.modes import observed
from fedsys.pruning.portfolio import Variant
from fedsys.pruning.sparsify import one_shot
from fedsys.pruning.structure import structure
from fedsys.randomness import Address
from fedsys.training import optimizers
from fedsys.training import plain as training
from fedsys.training.masks import Masks, held, last_layer

EVAL_BATCH = 250
"""Images that are scored at a time."""

FINE_TUNE = 5
"""Epochs of training under the mask where nothing else is said."""

Done = Callable[[training.Score, float], None]
"""Is told the score of an epoch and the seconds that it took."""


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """A masked model.

    Attributes:
        name: Name of the variant that is made of it.
        model: Its weights; where `masks` prune, they count as zero.
        masks: What is pruned.
        made: How, in words.
        trained: Whether it was trained under the mask, and BatchNorm's statistics with it.
        source: The run that trained it, if that began from a variant and not from the parent.
        origin: That variant, if its portfolio is still there.
    """

    name: str
    model: nn.Module
    masks: Masks
    made: str
    trained: bool = False
    source: str = ""
    origin: Variant | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a level is made, when its turn comes: so that one that fails leaves the others.

    Attributes:
        name: Name of the variant.
        make: Makes the masked model.
        trained: Whether that was trained under its mask.
    """

    name: str
    make: Callable[[], Level]
    trained: bool = False


def recipes(
    model: nn.Module, config: Config, dataset: Dataset, pruned: Masks | None = None
) -> list[Recipe]:
    """Prune `model` to every sparsity of ``pruning.sparsity``, each from the model as it is.

    Args:
        model: The model.
        config: ``pruning`` says what goes.
        dataset: Its data.
        pruned: What is pruned already, and stays so; it counts, and a sparsity that is not above
            it makes no level (a ConfigError when it is made).

    Raises:
        ConfigError: ``pruning.leave`` fits no layer, or there is nothing to prune by.
    """
    pruning = config.pruning
    if not pruning.active:
        raise ConfigError.of("pruning", "none", "must say what goes", "try pruning=group_norm")
    if pruning.rewinds:
        raise ConfigError.of(
            "pruning.rounds_per_level", pruning.rounds_per_level, "must be 0: levels are trained",
            "make them by fedsys train pruning=iterative num_clients=1, then fedsys prune run=RUN",
        )  # fmt: skip
    leave = last_layer(model) if pruning.leave is None else pruning.leave
    start, before = Masks.dense(model, leave), pruned or Masks({})
    if before:
        start = Masks({name: before.get(name, mask) for name, mask in start.items()})
        model = copy.deepcopy(model)
        before.apply(model)
    gone = start.figures().sparsity

    def level(name: str, sparsity: float) -> Level:
        made = f"{100 * sparsity:g} % of the weights pruned by {pruning.method}"
        if before:
            made += f", {100 * gone:.4g} % of them in training"
            if sparsity <= gone:
                rule = f"must be above {gone:.4g}, the share that is pruned already"
                raise ConfigError.of("pruning.sparsity", sparsity, rule)
        masks = _mask(model, start, sparsity, config, dataset)
        return Level(name, model, Masks({**before, **masks}), made)

    def recipe(sparsity: float) -> Recipe:
        name = f"{pruning.method}-{100 * sparsity:g}"
        return Recipe(name, lambda: level(name, sparsity))

    return [recipe(sparsity) for sparsity in pruning.sparsities]


def _mask(
    model: nn.Module, dense: Masks, sparsity: float, config: Config, dataset: Dataset
) -> Masks:
    pruning = config.pruning
    more: dict[str, Any] = {}
    if pruning.method in ("snip", "grasp"):
        count = -(-pruning.examples // config.client.batch_size)
        more["batches"] = list(islice(_batches(config, dataset), count))
    more |= structure(pruning, model, dataset.input_shape)
    return one_shot(
        pruning.method,
        model,
        sparsity,
        masks=dense,
        scope=pruning.scope,
        keep_channels=pruning.keep_channels,
        address=Address(config.seed),
        input_shape=dataset.input_shape,
        mix=pruning.mix,
        iterations=pruning.iterations,
        **more,
    )


def epochs_of(config: Config, *, trained: bool) -> int:
    """Return for how many epochs a level is trained under its mask.

    By default the model of a run is, unless that was done already: half of the weights taken away
    in one step leaves two thirds of the answers right, and a few epochs bring nearly all back.

    Args:
        config: ``variants``.
        trained: Whether it was trained under its mask already.
    """
    if config.variants.fine_tune is not None:
        return config.variants.fine_tune
    return 0 if trained or config.variants.run is None else FINE_TUNE


def refined(
    level: Level, config: Config, dataset: Dataset, epoch_done: Done = lambda score, seconds: None
) -> Level:
    """Take BatchNorm's statistics anew and train under the mask, as far as ``prune`` asks for it.

    Both happen before the conversion, so that the dense model equals a masked one. Statistics of
    a level that was trained under its mask are left alone: they are those of its training.

    Args:
        level: The masked model.
        config: ``variants`` and ``client``.
        dataset: Trained on its training part.
        epoch_done: Is told the score and the seconds of each epoch of training.
    """
    options, epochs = config.variants, epochs_of(config, trained=level.trained)
    normalised = any(_tracks(module) for module in level.model.modules())
    recalibrates = options.recalibrate > 0 and normalised and not level.trained
    if not recalibrates and not epochs:
        return level
    model, made = copy.deepcopy(level.model), level.made
    level.masks.apply(model)
    if epochs:
        _fine_tune(model, level.masks, config, dataset, epochs, epoch_done)
        made += f", {epochs} epoch{'' if epochs == 1 else 's'} of training under the mask"
    if recalibrates:
        _recalibrate(model, options.recalibrate, dataset)
        made += ", BatchNorm re-calibrated"
    return dataclasses.replace(level, model=model, made=made)


def _tracks(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _batches(config: Config, dataset: Dataset, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    everything = np.arange(len(dataset.train), dtype=np.int64)
    size = config.client.batch_size
    address = Address(config.seed, round=epoch + 1)
    return data.train_batches(dataset.train, everything, dataset, size, address, 0, 0)


def _fine_tune(
    model: nn.Module, masks: Masks, config: Config, dataset: Dataset, epochs: int, done: Done
) -> None:
    """Train with a learning rate that falls to 0 along half a cosine, epoch by epoch."""
    client = config.client
    optimizer = optimizers.make_optimizer(model.parameters(), client, client.lr)
    with held(masks, model, optimizer):
        for epoch in range(epochs):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = client.lr * (1.0 + math.cos(math.pi * epoch / epochs)) / 2.0
            address = Address(config.seed, round=epoch + 1)
            score = training.train(model, optimizer, _batches(config, dataset, epoch), address)
            done(score, time.perf_counter() - start)


def _recalibrate(model: nn.Module, examples: int, dataset: Dataset) -> None:
    """Replace BatchNorm's running statistics by the mean over `examples` images."""
    x, _ = next(iter(data.eval_batches(spread(dataset.train, 2), dataset, EVAL_BATCH)))
    kept = observed(model, x).training  # what the model keeps in evaluation is not its own to move
    model.eval()
    norms = [
        module
        for name, module in model.named_modules()
        if _tracks(module) and kept.get(name, {}).get("training", True)
    ]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for x, _ in data.eval_batches(spread(dataset.train, examples), dataset, EVAL_BATCH):
            if len(x) > 1:
                model(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()


def spread(images: Images, count: int) -> Images:
    """Return images at equal distances in a part, of which folders hold one class after another."""
    count = min(count, len(images))
    return images.take(np.arange(count, dtype=np.int64) * len(images) // max(count, 1))
