"""How the models of the leakage audit are trained under each mechanism of differential privacy.

What is audited is the machinery of runs: `fedsys.privacy.training` for examples, which split
training equals to the bit, and `Release` at the cut. For clients it is the arithmetic of
``strategies.PrivateClients`` in one process: clipped updates of whole models, a mean over all of
them with equal weights, and noise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedsys import data
from fedsys.commands.bench.leakage_models import Fit, fit_plain, train_on
from fedsys.config import Config
from fedsys.data import Dataset, Images
from fedsys.models.layers import layered, resolve_cut, split
from fedsys.privacy import training as private
from fedsys.privacy.accountant import cached_noise
from fedsys.privacy.budget import epoch_steps, sampling_rate
from fedsys.privacy.labels import randomised
from fedsys.privacy.noise import Addressed, poisson_sample
from fedsys.privacy.release import Noise, Release
from fedsys.privacy.update import PrivateUpdate
from fedsys.randomness import Address
from fedsys.training import federation, optimizers
from fedsys.training import plain as training

Claimed = tuple[float, float]
"""ε and δ."""


def fit_cut(config: Config, dataset: Dataset, epochs: int, cut: Any, noise: Noise) -> Fit:
    """Return what trains a model with clipping and noise at a cut."""

    def fit(images: Images, index: int) -> nn.Module:
        model = federation.build_model(config, dataset)
        chain = layered(model, dataset.input_shape)
        front, back = split(chain, resolve_cut(chain, cut))
        released = nn.Sequential(front, Release(noise), back)
        train_on(released, model, config, dataset, images, index, epochs)
        return model.eval()

    return fit


def fit_label(config: Config, dataset: Dataset, epochs: int, epsilon: float) -> Fit:
    """Return what trains a model on labels that randomised response told."""
    fit = fit_plain(config, dataset, epochs)

    def told(images: Images, index: int) -> nn.Module:
        address = Address(config.seed, index)
        labels = randomised(images.labels, epsilon, dataset.num_classes, address)
        return fit(Images(images.pixels, labels), index)

    return told


def fit_record(
    config: Config, dataset: Dataset, epochs: int, claimed: Claimed, clip_norm: float
) -> Fit:
    """Return what trains a model by DP-SGD, with the noise that the claim asks for."""

    def fit(images: Images, index: int) -> nn.Module:
        model = federation.build_model(config, dataset)
        count, size = len(images), config.client.batch_size
        rate, steps = sampling_rate(count, size), epochs * epoch_steps(count, size)
        address = Address(config.seed, index, 1)
        source = Addressed(address)
        drawn = (poisson_sample(source, step, count, rate) for step in range(steps))
        update = PrivateUpdate(
            [model], clip_norm=clip_norm, noise=cached_noise(*claimed, rate, steps, "pld"),
            expected=rate * count, source=source,
        )  # fmt: skip
        optimizer = optimizers.make_optimizer(model.parameters(), config.client, config.client.lr)
        with update:
            batches = data.drawn_batches(images, drawn, dataset, address)
            private.train(model, optimizer, batches, address, update)
        return model.eval()

    return fit


@dataclass(frozen=True)
class AuditClients:
    """The clients of an audit, and how their updates become a model.

    Attributes:
        count: Of all clients, also those that are not in.
        size: Images of each, which stand together.
        rounds: In each, every client that is in trains on its images once.
        clip_norm: Largest norm of an update.
    """

    count: int
    size: int
    rounds: int
    clip_norm: float


def fit_client(config: Config, dataset: Dataset, claimed: Claimed, clients: AuditClients) -> Fit:
    """Return what trains a model on clipped updates of clients, whose mean has noise.

    AuditClients that are not in count with an update of nothing, as in the claim.
    """

    def fit(images: Images, index: int) -> nn.Module:
        model = federation.build_model(config, dataset)
        noise = cached_noise(*claimed, 1.0, clients.rounds, "pld") * clients.clip_norm
        groups = np.arange(len(images), dtype=np.int64).reshape(-1, clients.size)
        for round_ in range(1, clients.rounds + 1):
            address = Address(config.seed, index, round_)
            start = parameters_to_vector(model.parameters()).detach()
            total = noise * Addressed(address).normal("client-noise", 0, "", start.shape)
            for group in groups:
                own = copy.deepcopy(model)
                optimizer = optimizers.make_optimizer(
                    own.parameters(), config.client, config.client.lr
                )
                batches = data.drawn_batches(images, [group], dataset, address)
                training.train(own, optimizer, batches, address)
                update = parameters_to_vector(own.parameters()).detach() - start
                total += update * (clients.clip_norm / update.norm().clamp(min=clients.clip_norm))
            vector_to_parameters(start + total / clients.count, model.parameters())
        return model.eval()

    return fit
