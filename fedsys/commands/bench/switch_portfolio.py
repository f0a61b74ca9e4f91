"""A portfolio for the benchmark of switching, where none is given: trained here, then pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedsys import data
from fedsys.config import Config
from fedsys.pruning.levels import recipes
from fedsys.pruning.making import make
from fedsys.pruning.portfolio import Portfolio
from fedsys.randomness import Address
from fedsys.training import federation, optimizers
from fedsys.training import plain as training


def make_portfolio(
    config: Config, folder: Path, epochs: int, say: Callable[[str], None]
) -> Portfolio:
    """Train the model of `config` on all of the training part, and prune it as ``prune`` says.

    Args:
        config: Data, model, client, pruning and variants.
        folder: Of the portfolio.
        epochs: Of training.
        say: Takes what a person wants to read meanwhile.

    Raises:
        FedsysError: The model does not fit the data, or nothing can be pruned.
    """
    training.set_threads(config.client.threads)
    dataset = federation.federation(config).dataset
    model = federation.build_model(config, dataset)
    client, address = config.client, Address(config.seed, 0, 1)
    optimizer = optimizers.make_optimizer(model.parameters(), client, client.lr)
    everything, steps = np.arange(len(dataset.train), dtype=np.int64), 0
    for epoch in range(epochs):
        batches = data.train_batches(
            dataset.train, everything, dataset, client.batch_size, address, epoch, steps
        )
        score = training.train(model, optimizer, batches, address, first_step=steps)
        steps += score.steps
        say(f"epoch {epoch + 1} of {epochs}: train accuracy {score.accuracy:.1%}")
    made = make(
        model, recipes(model, config, dataset), config, dataset, folder,
        source=f"{epochs} epochs of training for the benchmark", say=say,
    )  # fmt: skip
    return made.portfolio
