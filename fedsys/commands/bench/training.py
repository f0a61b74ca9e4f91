"""A client's local training against the barest PyTorch loop, in turns in one process.

Ours does what every client does: it chooses a mini-batch of uint8 images, augments and normalises
it, addresses the draws of the model, and trains by `fedsys.training.plain.train`. The other side
is the loop of a tutorial over tensors that were augmented and normalised beforehand. Both have the
same model, initial weights, optimizer, number of threads and images; only ``client.memory_format``
and ``client.precision`` are ours alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys import data
from fedsys.commands.bench import Chart
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.randomness import Address
from fedsys.training import federation, optimizers
from fedsys.training import plain as training
from fedsys.training.federation import Federation

WARM_UP = 2
"""Turns of each that are not counted."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure both in turns; who begins changes from turn to turn.

    Args:
        config: Data, model and client; the first client's examples are trained on.
        options: ``batches`` steps in a turn, ``turns`` of each.

    Returns:
        ``fedsys_per_s`` and ``plain_per_s`` in examples per second (medians), the median of the
        turns' ratios as ``ratio``, its quartiles, and the median of the ratios of processor time
        as ``cpu_ratio``, which says more on a busy machine.

    Raises:
        ConfigError: The first client has fewer examples than one mini-batch.
    """
    training.set_threads(config.client.threads)
    fed = federation.federation(config)
    held, size = len(fed.parts[0]), config.client.batch_size
    if held < size:
        raise ConfigError.of("client.batch_size", size, f"must be at most the {held} examples")
    model = federation.build_model(config, fed.dataset)
    ours = _Ours(config, fed, copy.deepcopy(model), int(options["batches"]))
    plain = _Plain(config, fed, training.lay_out(model, "contiguous"), int(options["batches"]))
    took: dict[str, list[float]] = {"fedsys": [], "plain": []}
    processor: dict[str, list[float]] = {"fedsys": [], "plain": []}
    for turn in range(WARM_UP + int(options["turns"])):
        pair = [("fedsys", ours.turn), ("plain", plain.turn)]
        for name, work in pair if turn % 2 else reversed(pair):
            began, cpu = time.perf_counter(), time.process_time()
            work()
            if turn >= WARM_UP:
                took[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - cpu)
    ratios = sorted(p / f for f, p in zip(took["fedsys"], took["plain"], strict=True))
    examples = int(options["batches"]) * size
    return {
        "fedsys_per_s": examples / median(took["fedsys"]),
        "plain_per_s": examples / median(took["plain"]),
        "ratio": median(ratios),
        "ratio_quartile_1": ratios[len(ratios) // 4],
        "ratio_quartile_3": ratios[len(ratios) * 3 // 4],
        "cpu_ratio": median(
            p / f for f, p in zip(processor["fedsys"], processor["plain"], strict=True)
        ),
        "turns": len(ratios),
        "batch_size": size,
        "threads": torch.get_num_threads(),
    }


def _whole_batches(config: Config, fed: Federation) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mini-batches of full size without end, epoch by epoch, as a client makes them."""
    address, step, epoch = Address(config.seed, 0, 1), 0, 0
    size = config.client.batch_size
    while True:
        batches = data.train_batches(
            fed.dataset.train, fed.parts[0], fed.dataset, size, address, epoch, step
        )
        for x, y in batches:
            if len(y) == size:
                yield x, y
            step += 1
        epoch += 1


class _Ours:
    def __init__(self, config: Config, fed: Federation, model: nn.Module, count: int) -> None:
        self._model, self._count = model, count
        self._optimizer = optimizers.make_optimizer(model.parameters(), config.client, 0.01)
        self._batches = _whole_batches(config, fed)
        self._address, self._precision = Address(config.seed, 0, 1), config.client.precision

    def turn(self) -> None:
        batches, precision = islice(self._batches, self._count), self._precision
        training.train(self._model, self._optimizer, batches, self._address, precision=precision)


class _Plain:
    def __init__(self, config: Config, fed: Federation, model: nn.Module, count: int) -> None:
        self._model = model.train()
        self._optimizer = optimizers.make_optimizer(model.parameters(), config.client, 0.01)
        self._batches = list(islice(_whole_batches(config, fed), count))

    def turn(self) -> None:
        for x, y in self._batches:
            self._optimizer.zero_grad()
            loss = F.cross_entropy(self._model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            self._optimizer.step()


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return examples per second of both."""
    return Chart(
        f"Local training: {figures['ratio']:.3f} of a bare loop",
        f"batches of {figures['batch_size']}, {figures['threads']} thread(s)",
        "examples per second",
        ["median of all turns"],
        {"fedsys": [figures["fedsys_per_s"]], "bare loop": [figures["plain_per_s"]]},
    )
