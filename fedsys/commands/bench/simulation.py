"""The in-process grid against Flower's engine and a bare loop, for models of several sizes.

===================  ============================================================================
``local_ms``         `send_and_receive` with clients that return the record that they received
``flower_ms``        the same by Flower's simulation engine, as ``runtime=simulation`` runs it
``calls_ms``         the part of ``local_ms`` that is Flower's: the app is called in a bare loop
``full_local_ms``    a whole round: the strategy makes messages, each client loads the record
                     into a model and returns a fresh one, the strategy aggregates
``full_flower_ms``   the same round by Flower's engine
``floor_ms``         decode, load, encode and average for as many clients in a bare loop, by the
                     same functions on records, without grid, threads, messages and strategy
``memory_ms``        the same loop over plain bytes: what moving the numbers alone takes
``first_round_s``    the first whole round of Flower's engine, in seconds: its clients' processes
                     start and import torch; ``engine_start_s`` is what Ray takes before it
===================  ============================================================================

Everything else is warm, our whole rounds and the bare loops are taken in turns, and medians count.
Both sides have the same clients, client app, strategy and number of workers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import nn

from fedsys.commands.bench import Chart
from fedsys.config import Config, locate
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runtime.local import LocalGrid
from fedsys.training import plain as training
from fedsys.transport import records
from fedsys.transport.messages import (
    ARRAYS,
    CONFIG,
    IDENTITY,
    METRICS,
    NUM_EXAMPLES,
    PARTITION_ID,
    Identity,
    Settings,
    number,
    written,
)

WARM_UP = 3
"""Turns that are not counted."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every size.

    Args:
        config: ``num_clients`` and ``runtime.workers`` (None counts as 1).
        options: ``bytes`` of each model, ``arrays`` in it, ``turns``, ``full_turns``,
            ``flower_turns`` (0 leaves Flower's engine out), and dotted paths of the ``strategy``
            and the ``roster``, which fedsys knows by name only.

    Returns:
        ``cases``: for each size ``bytes``, ``arrays`` and the milliseconds named above.
    """
    from fedsys.runtime import quiet_flower

    quiet_flower()
    training.set_threads(config.client.threads)
    cases = [_case(config, options, int(size)) for size in options["bytes"]]
    return {"cases": cases, "num_clients": config.num_clients, "workers": _workers(config)}


def _workers(config: Config) -> int:
    return config.runtime.workers or 1


def _case(config: Config, options: Mapping[str, Any], size: int) -> dict[str, Any]:
    arrays = int(options["arrays"])
    model = make_model(size, arrays)
    echo, calls = _echo_times(config, model, int(options["turns"]))
    full, floor, memory = _full_times(config, options, model)
    flower = _engine_times(config, options, model) if int(options["flower_turns"]) else {}
    figures = {
        "bytes": size,
        "arrays": arrays,
        "local_ms": 1e3 * echo,
        "flower_ms": flower.get("flower_ms"),
        "full_local_ms": 1e3 * full,
        "full_flower_ms": flower.get("full_flower_ms"),
        "floor_ms": 1e3 * floor,
        "first_round_s": flower.get("first_round_s"),
        "engine_start_s": flower.get("engine_start_s"),
        "calls_ms": 1e3 * calls,
        "memory_ms": 1e3 * memory,
    }
    return {name: value for name, value in figures.items() if value is not None}


def make_model(size: int, arrays: int) -> nn.Module:
    """Return a module of `arrays` float32 parameters that have `size` bytes together.

    Raises:
        ConfigError: `size` is not a multiple of four bytes for each array.
    """
    if arrays < 1 or size < 4 * arrays or size % (4 * arrays):
        rule = f"must be a multiple of 4 x bench.arrays={arrays}"
        raise ConfigError.of("bench.bytes", size, rule)
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for i in range(arrays):
        values = torch.randn(size // 4 // arrays, generator=generator)
        model.register_parameter(f"layer{i:02}", nn.Parameter(values))
    return model


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --------------------------------------------------------------------------------------------------
# The clients: of this process, and of the processes of Flower's engine, which know them by name

app = ClientApp()


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    """Return what was received."""
    return Message(message.content, reply_to=message)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Tell the partition id."""
    identity = Identity(int(number(context.node_config, PARTITION_ID)))
    return Message(RecordDict({IDENTITY: ConfigRecord(written(identity))}), reply_to=message)


@app.train()
def load(message: Message, context: Context) -> Message:
    """Load what was received into a model, and send back what that has then."""
    received = message.content.array_records[ARRAYS]
    model = _model_for(tuple(array.shape for array in received.values()))
    records.load_into(model, received)
    metrics = MetricRecord({NUM_EXAMPLES: 100 + int(number(context.node_config, PARTITION_ID))})
    content = RecordDict({ARRAYS: records.to_record(model.state_dict()), METRICS: metrics})
    return Message(content, reply_to=message)


@lru_cache(maxsize=1)
def _model_for(shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
    """Return this process's model for arrays of these shapes, all equal."""
    return make_model(4 * shapes[0][0] * len(shapes), len(shapes))


# --------------------------------------------------------------------------------------------------
# The grid alone


def _echo_times(config: Config, model: nn.Module, turns: int) -> tuple[float, float]:
    """Return the seconds of `send_and_receive`, and of calling the client app for each message."""
    arrays = records.to_record(model.state_dict())
    times: list[float] = []
    calls: list[float] = []
    with LocalGrid(app, config.num_clients, workers=_workers(config)) as grid:
        context = Context(1, next(iter(grid.get_node_ids())), {}, RecordDict(), {})
        for turn in range(WARM_UP + turns):
            messages = _echoes(grid, arrays, turn + 1)
            took = _seconds(partial(grid.send_and_receive, messages))
            bare = _seconds(partial(_call_each, messages, context))
            if turn >= WARM_UP:
                times.append(took)
                calls.append(bare)
    return median(times), median(calls)


def _echoes(grid: Grid, arrays: ArrayRecord, round_: int) -> list[Message]:
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(written(Settings(round_)))})
    return [Message(content, node, "query.echo") for node in grid.get_node_ids()]


def _call_each(messages: Sequence[Message], context: Context) -> list[Message]:
    return [app(message, context) for message in messages]


# --------------------------------------------------------------------------------------------------
# Whole rounds, and the bare loop


def _full_times(config: Config, options: Mapping[str, Any], model: nn.Module) -> list[float]:
    """Return the seconds of a whole round and of the two bare loops."""
    strategy = make_strategy(config, options, model)
    arrays = records.to_record(model.state_dict())
    took: list[list[float]] = [[], [], []]
    with (
        LocalGrid(app, config.num_clients, workers=_workers(config)) as grid,
        # A thread like those of the clients: glibc takes the memory of a process's first thread
        # anew from the system in every round, which would make the bare loops slower than ours.
        ThreadPoolExecutor(1) as bare,
    ):
        for turn in range(WARM_UP + int(options["full_turns"])):
            works: list[Callable[[], object]] = [
                partial(_round, strategy, grid, arrays, turn + 1),
                lambda: bare.submit(_bare_round, model, arrays, config.num_clients).result(),
                lambda: bare.submit(_bare_bytes, model, arrays, config.num_clients).result(),
            ]
            for times, work in zip(took, works, strict=True):
                seconds = _seconds(work)
                if turn >= WARM_UP:
                    times.append(seconds)
    return [median(times) for times in took]


def make_strategy(config: Config, options: Mapping[str, Any], model: nn.Module) -> Strategy:
    """Return the strategy that the options name."""
    roster = locate(str(options["roster"]), "bench.roster")()
    strategy: Strategy = locate(str(options["strategy"]), "bench.strategy")(config, model, roster)
    return strategy


def _round(strategy: Strategy, grid: Grid, arrays: ArrayRecord, round_: int) -> ArrayRecord:
    messages = strategy.configure_train(round_, arrays, ConfigRecord(), grid)
    aggregate, _ = strategy.aggregate_train(round_, grid.send_and_receive(messages))
    if aggregate is None:
        raise ConfigError("bench.strategy: made no aggregate of valid replies")
    return aggregate


def _bare_round(model: nn.Module, arrays: ArrayRecord, clients: int) -> ArrayRecord:
    replies: list[ArrayRecord] = []
    for _ in range(clients):
        records.load_into(model, arrays)
        replies.append(records.to_record(model.state_dict()))
    return records.record_of(_mean([records.arrays_of(reply) for reply in replies]))


def _bare_bytes(model: nn.Module, arrays: ArrayRecord, clients: int) -> list[bytes]:
    sent = {name: records.view(array).tobytes() for name, array in arrays.items()}
    own = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    replies: list[dict[str, bytes]] = []
    for _ in range(clients):
        for name, data in sent.items():
            own[name][:] = np.frombuffer(data, np.float32)
        replies.append({name: array.tobytes() for name, array in own.items()})
    decoded = [{n: np.frombuffer(data, np.float32) for n, data in r.items()} for r in replies]
    return [array.tobytes() for array in _mean(decoded).values()]


def _engine_times(config: Config, options: Mapping[str, Any], model: nn.Module) -> dict[str, float]:
    """Return what Flower's engine takes to start, for its first round and for those after it."""
    from fedsys.runtime.simulation import SimulationEngine

    workers = dataclasses.replace(config.runtime, workers=_workers(config))
    apps = dataclasses.replace(config.apps, client=f"{__name__}:app")
    strategy = make_strategy(config, options, model)
    arrays = records.to_record(model.state_dict())
    times: list[float] = []
    rounds: list[float] = []
    began = time.perf_counter()
    with SimulationEngine(dataclasses.replace(config, runtime=workers, apps=apps), {}) as grid:
        started = time.perf_counter() - began
        first = _seconds(partial(_round, strategy, grid, arrays, 1))
        for turn in range(1 + int(options["flower_turns"])):
            messages = _echoes(grid, arrays, turn + 1)
            echo = _seconds(partial(_all_answer, grid, messages))
            whole = _seconds(partial(_round, strategy, grid, arrays, turn + 2))
            if turn >= 1:
                times.append(echo)
                rounds.append(whole)
    return {
        "flower_ms": 1e3 * median(times),
        "full_flower_ms": 1e3 * median(rounds),
        "first_round_s": first,
        "engine_start_s": started,
    }


def _all_answer(grid: Grid, messages: Sequence[Message]) -> None:
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise RuntimeFailure(f"a client of Flower's engine failed: {reply.error.reason}")


def _mean(states: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return the mean that the clients' weights give, one product and one sum for each array."""
    total = sum(100 + i for i in range(len(states)))
    mean: dict[str, NDArray[Any]] = {}
    for i, state in enumerate(states):
        for name, array in state.items():
            share = array * np.float32((100 + i) / total)
            if name in mean:
                mean[name] += share
            else:
                mean[name] = share
    return mean


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the times of each size."""
    cases = figures["cases"]
    names = ["local_ms", "flower_ms", "full_local_ms", "full_flower_ms", "floor_ms"]
    names = [name for name in names if name in cases[0]]
    return Chart(
        f"{figures['num_clients']} clients, {figures['workers']} worker(s)",
        "bytes of the model",
        "milliseconds per round",
        [f"{case['bytes']:,}" for case in cases],
        {name.removesuffix("_ms"): [case[name] for case in cases] for name in names},
        log=True,
    )
