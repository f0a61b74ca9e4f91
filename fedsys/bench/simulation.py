"""The in-process grid against a bare loop that does the same work, for models of several sizes.

===================  ============================================================================
``local_ms``         `send_and_receive` with clients that return the record that they received
``calls_ms``         the part of it that is Flower's: the client app is called in a bare loop
``full_local_ms``    a whole round: the strategy makes messages, each client loads the record
                     into a model and returns a fresh one, the strategy aggregates
``floor_ms``         decode, load, encode and average for as many clients in a bare loop, by the
                     same functions on records, without grid, threads, messages and strategy
``memory_ms``        the same loop over plain bytes: what moving the numbers alone takes
===================  ============================================================================

Everything is warm, the whole rounds and the bare loop are taken in turns, and medians count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import nn

from fedsys import records, training
from fedsys.bench import Chart
from fedsys.config import Config, locate
from fedsys.errors import ConfigError
from fedsys.runtime.local import LocalGrid

WARM_UP = 3
"""Turns that are not counted."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every size.

    Args:
        config: ``num_clients`` and ``runtime.workers`` (None counts as 1).
        options: ``bytes`` of each model, ``arrays`` in it, ``turns``, ``full_turns``, and dotted
            paths of the ``strategy`` and the ``roster``, which fedsys knows by name only.

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
    return {
        "bytes": size,
        "arrays": arrays,
        "local_ms": 1e3 * echo,
        "calls_ms": 1e3 * calls,
        "full_local_ms": 1e3 * full,
        "floor_ms": 1e3 * floor,
        "memory_ms": 1e3 * memory,
    }


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
# The grid alone


def _echo_times(config: Config, model: nn.Module, turns: int) -> tuple[float, float]:
    """Return the seconds of `send_and_receive`, and of calling the client app for each message."""
    app = ClientApp()

    @app.train()
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    arrays = records.to_record(model.state_dict())
    times: list[float] = []
    calls: list[float] = []
    with LocalGrid(app, config.num_clients, workers=_workers(config)) as grid:
        nodes = list(grid.get_node_ids())
        context = Context(1, nodes[0], {}, RecordDict(), {})
        for turn in range(WARM_UP + turns):
            settings = ConfigRecord({"server-round": turn + 1})
            content = RecordDict({"arrays": arrays, "config": settings})
            messages = [Message(content, node, "train") for node in nodes]
            took = _seconds(partial(grid.send_and_receive, messages))
            bare = _seconds(partial(_call_each, app, messages, context))
            if turn >= WARM_UP:
                times.append(took)
                calls.append(bare)
    return median(times), median(calls)


def _call_each(app: ClientApp, messages: Sequence[Message], context: Context) -> list[Message]:
    return [app(message, context) for message in messages]


# --------------------------------------------------------------------------------------------------
# Whole rounds, and the bare loop


def _full_times(config: Config, options: Mapping[str, Any], model: nn.Module) -> list[float]:
    """Return the seconds of a whole round and of the two bare loops."""
    app = _loading_app(model)
    roster = locate(str(options["roster"]), "bench.roster")()
    strategy: Strategy = locate(str(options["strategy"]), "bench.strategy")(config, model, roster)
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


def _loading_app(model: nn.Module) -> ClientApp:
    """Return an app whose clients load what they receive and send back what they have then."""
    app = ClientApp()

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        identity = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"identity": identity}), reply_to=message)

    @app.train()
    def load(message: Message, context: Context) -> Message:
        records.load_into(model, message.content.array_records["arrays"])
        metrics = MetricRecord({"num-examples": 100 + int(context.node_config["partition-id"])})
        content = RecordDict({"arrays": records.to_record(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def _round(strategy: Strategy, grid: LocalGrid, arrays: ArrayRecord, number: int) -> ArrayRecord:
    messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
    aggregate, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
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
    """Return the five times of each size."""
    cases = figures["cases"]
    names = ("local_ms", "calls_ms", "full_local_ms", "floor_ms", "memory_ms")
    return Chart(
        f"{figures['num_clients']} clients in one process, {figures['workers']} worker(s)",
        "bytes of the model",
        "milliseconds per round",
        [f"{case['bytes']:,}" for case in cases],
        {name.removesuffix("_ms"): [case[name] for case in cases] for name in names},
        log=True,
    )
