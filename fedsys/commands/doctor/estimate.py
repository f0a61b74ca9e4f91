"""Whether data and model of a run are there, and how long the run will take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from fedsys.commands.doctor.checks import Check
from fedsys.config import Config
from fedsys.errors import FedsysError
from fedsys.offload.processors import usable_cores
from fedsys.runs.progress import seconds_text

BENCHMARK_S = 1.0


def data_and_model(config: Config) -> Iterator[Check]:
    """Load the data, build the model, train it for a second, and say what to expect."""
    from fedsys.training import federation
    from fedsys.training import plain as training

    try:
        fed = federation.federation(config)
        parts = [len(part) for part in fed.parts]
        source, least, most = config.data.get("source"), min(parts), max(parts)
        told = f"{source}: {sum(parts):,} training examples, {least} to {most} for each client"
        yield Check("data", "ok", told)
        training.set_threads(config.client.threads)
        model = federation.build_model(config, fed.dataset)
        federation.check_model(model, fed.dataset, config)
    except FedsysError as error:
        otherwise = "choose other data or another model"
        yield Check.failed("data and model", error, otherwise)
        return
    parameters = sum(p.numel() for p in model.parameters())
    yield Check("model", "ok", f"{parameters:,} parameters")
    per_step = seconds_per_step(config)
    yield Check("to expect", "ok", expectation(config, parts, per_step))


def expectation(config: Config, parts: list[int], per_step: float) -> str:
    """Say how long the rounds of a run take in one process.

    Args:
        config: The run.
        parts: Examples of each client.
        per_step: Seconds of one optimizer step, with nothing beside it.
    """
    client = config.client
    steps = sum(math.ceil(n / client.batch_size) for n in parts) * client.epochs
    share = float(config.strategy.get("fraction_train", 1.0))
    workers = config.runtime.workers or max(1, usable_cores() // client.threads)
    parallel = max(1, min(workers, config.num_clients, usable_cores() // client.threads))
    per_round = steps * share * per_step / parallel
    return (
        f"about {seconds_text(config.rounds * per_round)} of training for {config.rounds} rounds "
        f"in one process ({seconds_text(per_step)} per step, {steps * share:.0f} steps per round, "
        f"{parallel} at a time), if the machine is free"
    )


def seconds_per_step(config: Config) -> float:
    """Return the seconds of one optimizer step of a client, measured for about a second."""
    from fedsys import data
    from fedsys.randomness import Address
    from fedsys.training import federation, optimizers
    from fedsys.training import plain as training

    fed = federation.federation(config)
    device = training.pick_device(config.client.device)
    model = federation.build_model(config, fed.dataset, initial=False).to(device)
    largest = max(range(len(fed.parts)), key=lambda k: len(fed.parts[k]))
    optimizer = optimizers.make_optimizer(model.parameters(), config.client, config.client.lr)
    steps, began, round_ = 0, 0.0, 0
    while round_ < 2 or time.perf_counter() - began < BENCHMARK_S:
        round_ += 1
        address = Address(config.seed, largest, round_)
        batches = list(
            data.train_batches(
                fed.dataset.train,
                fed.parts[largest],
                fed.dataset,
                config.client.batch_size,
                address,
                0,
                0,
            )
        )[: 1 if round_ == 1 else None]
        if round_ == 2:  # the first step warms up
            began = time.perf_counter()
        score = training.train(
            model,
            optimizer,
            batches,
            address,
            micro_batches=config.schedule.micro_batches,
            precision=config.client.precision,
        )
        steps += score.steps if round_ > 1 else 0
    return (time.perf_counter() - began) / max(steps, 1)
