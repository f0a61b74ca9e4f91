"""The models that the leakage audit attacks: who is in which, and how they are trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys import data
from fedsys.config import Config
from fedsys.data import Dataset, Images
from fedsys.errors import ConfigError
from fedsys.randomness import Address
from fedsys.training import federation, optimizers
from fedsys.training import plain as training


@dataclass(frozen=True)
class Setting:
    """A mechanism, and what it claims.

    Attributes:
        mechanism: ``none``, ``record``, ``client``, ``cut`` or ``label``.
        epsilon: What is claimed; None: nothing.
    """

    mechanism: str
    epsilon: float | None = None

    @property
    def label(self) -> str:
        """Name for people."""
        return self.mechanism if self.epsilon is None else f"{self.mechanism}, ε = {self.epsilon:g}"


@dataclass(frozen=True)
class Pool:
    """The images of an audit.

    Attributes:
        images: What models are trained on: first the examples, then the canaries.
        members: Which of them each model is trained on, ``(models, examples + canaries)``.
        canaries: How many there are, at the end.
        known: Images of the attacker, uint8.
    """

    images: Images
    members: NDArray[np.bool_]
    canaries: int
    known: Tensor

    @property
    def examples(self) -> int:
        """How many images are no canaries."""
        return len(self.images) - self.canaries

    def of_model(self, index: int) -> Images:
        """Return what a model is trained on."""
        return self.images.take(np.flatnonzero(self.members[index]).astype(np.int64))

    def of_clients(self, size: int) -> Pool:
        """Return the same images, of which as many as a client has are in or out together.

        Raises:
            ConfigError: Examples or canaries do not go into clients.
        """
        if self.examples % size or self.canaries % size:
            raise ConfigError.of(
                "bench.client_size", size,
                f"must divide the {self.examples} examples and the {self.canaries} canaries",
            )  # fmt: skip
        return replace(self, members=np.repeat(self.members[:, ::size], size, axis=1))

    def victims(self, count: int) -> Images:
        """Return images that the first model was trained on."""
        inside = np.flatnonzero(self.members[0][: self.examples])[:count]
        return self.images.take(inside.astype(np.int64))


def make_pool(dataset: Dataset, options: Mapping[str, Any], seed: int) -> Pool:
    """Deal the training part of a data set among models, canaries and attacker.

    Raises:
        ConfigError: There are too few images.
    """
    examples, canaries, known = (int(options[k]) for k in ("examples", "canaries", "known"))
    models, needed = int(options["models"]), examples + canaries + known
    if needed > len(dataset.train):
        raise ConfigError.of(
            "bench.examples", examples,
            f"must leave room in the {len(dataset.train)} training images for {canaries} canaries "
            f"and {known} images of the attacker", "lower one of them",
        )  # fmt: skip
    if models < 2:
        raise ConfigError.of("bench.models", models, "must be at least 2")
    rng = Address(seed).numpy("audit")
    order = rng.permutation(len(dataset.train)).astype(np.int64)
    images = dataset.train.take(order[: examples + canaries])
    labels = images.labels.clone()
    wrong = rng.integers(1, dataset.num_classes, canaries)
    labels[examples:] = (labels[examples:] + torch.from_numpy(wrong)) % dataset.num_classes
    members = rng.random((models, examples + canaries)) < 0.5
    attackers = dataset.train.take(order[examples + canaries : needed])
    return Pool(Images(images.pixels, labels), members, canaries, attackers.pixels)


Fit = Callable[[Images, int], nn.Module]
"""Trains a model on images; the number tells the models of one mechanism apart."""


def fit_plain(config: Config, dataset: Dataset, epochs: int) -> Fit:
    """Return what trains a model without any mechanism."""

    def fit(images: Images, index: int) -> nn.Module:
        model = federation.build_model(config, dataset)
        train_on(model, model, config, dataset, images, index, epochs)
        return model.eval()

    return fit


def train_on(
    trained: nn.Module,
    model: nn.Module,
    config: Config,
    dataset: Dataset,
    images: Images,
    index: int,
    epochs: int,
) -> None:
    """Train on images without a promise.

    Args:
        trained: What is called: `model`, or more around its parts.
        model: Whose parameters learn.
        config: Tells how.
        dataset: Of the images.
        images: All of them are seen in each epoch.
        index: Tells models of one mechanism apart.
        epochs: The learning rate falls to nothing over them.
    """
    client, address = config.client, Address(config.seed, index, 1)
    optimizer = optimizers.make_optimizer(model.parameters(), client, client.lr)
    steps = math.ceil(len(images) / client.batch_size)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = client.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        batches = _batches(images, dataset, client.batch_size, address, epoch, epoch * steps)
        training.train(trained, optimizer, batches, address, first_step=epoch * steps,
                       clip_norm=client.clip_norm)  # fmt: skip


def _batches(
    images: Images, dataset: Dataset, size: int, address: Address, epoch: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    everything = np.arange(len(images), dtype=np.int64)
    return data.train_batches(images, everything, dataset, size, address, epoch, first)


@torch.no_grad()
def losses_of(model: nn.Module, images: Images, dataset: Dataset) -> NDArray[np.float64]:
    """Return the cross-entropy of each image, not augmented, in evaluation mode."""
    found = [
        F.cross_entropy(model(x), y, reduction="none").double()
        for x, y in data.eval_batches(images, dataset)
    ]
    return np.asarray(torch.cat(found).numpy())


def accuracy_of(model: nn.Module, images: Images, dataset: Dataset) -> float:
    """Return the share of images that a model gets right."""
    return training.evaluate(model, data.eval_batches(images, dataset)).accuracy


def say(text: str) -> None:
    """Tell a person what is in work."""
    print(text, file=sys.stderr, flush=True)
