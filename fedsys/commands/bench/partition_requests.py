"""Requests of chains: as predicted, to the bit, per second, and what the data plane adds to one.

The device is a host in this process, as in ``fedsys serve``; edge and cloud are processes. What
messages cost is measured beforehand by a model that computes next to nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn

from fedsys.commands.bench.partition_hosts import (
    BenchModel,
    HostProcesses,
    Laid,
    cut_at,
    host_processes,
    lay,
    model_of,
)
from fedsys.models import layered
from fedsys.partition.evaluation import evaluate
from fedsys.partition.host import HostServer
from fedsys.partition.pipeline import Passed
from fedsys.partition.planner import plan_partition, solve
from fedsys.partition.problem import RAW, Host, Partition, Problem
from fedsys.partition.profiling import inference_costs
from fedsys.partition.remote_host import RemoteHost
from fedsys.partition.stage_rack import Builder
from fedsys.planning.costs import Messaging
from fedsys.pruning.measuring import quantile
from fedsys.serving.chain_parts import StageBuilder
from fedsys.transport.network import Network
from fedsys.transport.security import new_token

NAMES = ("device", "edge", "cloud")
FURTHER = Network(100e6, 100e6, 5e-3)
"""From the edge to the cloud."""

_SMALL, _LARGE = 25, 400  # channels of 32 x 32 that cross: 102 kB and 1.6 MB
_IN_FLIGHT = 6
_LEAST = 3  # requests of which a median is taken


@contextmanager
def device_and(hosts: HostProcesses, builder: Builder | None = None) -> Iterator[HostProcesses]:
    """Yield hosts with one in this process before them; it is ended with the block."""
    token = new_token()
    server = HostServer(
        "device", f"memory://bench-{token[:8]}", builder or StageBuilder(), control_token=token
    )
    with ExitStack() as stack:
        stack.callback(server.stop)
        near = RemoteHost("hosts.list[0]", "device", server.address, token=token)
        stack.callback(near.close)
        yield HostProcesses([near, *hosts.remotes], hosts.pids, hosts.token)


def taken(laid: Laid, image: torch.Tensor, repeats: int, most_s: float = math.inf) -> list[float]:
    """Return the seconds of some requests, one at a time; two before them are not counted.

    Args:
        laid: The pipeline.
        image: What is asked.
        repeats: How many.
        most_s: Seconds after which fewer will do, but three.
    """
    seconds: list[float] = []
    began = time.monotonic()
    for _ in range(repeats + 2):
        laid.module(image)
        seconds.append(laid.took_s)
        if len(seconds) >= 2 + _LEAST and time.monotonic() - began > most_s:
            break
    return seconds[2:]


# --------------------------------------------------------------------------------------------------
# What the data plane adds


def thin_model(channels: int) -> BenchModel:
    """Return a model of two parts that computes little, with ``channels`` x 32 x 32 between."""
    net = nn.Sequential(
        nn.Conv2d(3, channels, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels, 10),
    )  # fmt: skip
    return BenchModel("thin", (3, 32, 32), layered(net.eval(), (3, 32, 32)))


def added_s(hosts: HostProcesses, channels: int, repeats: int) -> tuple[float, float]:
    """Return what a request takes beside computing.

    Returns:
        What it adds that a tensor goes to a second host, and what is there without: the way from
        the client into the device's host and back, in seconds.
    """
    model = thin_model(channels)
    chain = hosts.chain(model)
    last, first = len(model.layers), min(model.layers.cuts)
    beside: dict[int, list[float]] = {first: [], last: []}
    laid = {cut: lay(chain, cut_at(cut, last)) for cut in beside}
    for turn in range(repeats + 2):
        for cut, one in laid.items():
            one.module(model.image())
            computed = sum(float(part["compute_s"]) for part in one.told().values())
            if turn >= 2:
                beside[cut].append(one.took_s - computed)
    for one in laid.values():
        one.module.close()
    alone = median(beside[last])
    return median(beside[first]) - alone, alone


def overhead_figures(hosts: HostProcesses, repeats: int) -> tuple[dict[str, Any], Messaging]:
    """Return what the data plane adds, and what the planner is to know of messages."""
    (small, alone), (large, _) = (added_s(hosts, c, repeats) for c in (_SMALL, _LARGE))
    count = 4096 * (_LARGE - _SMALL)
    byte_s = max(0.0, large - small) / count
    message_s = max(0.0, small - byte_s * 4096 * _SMALL) / 4
    figures = {"data_plane_us": 1e6 * small, "data_plane_ns_byte": 1e9 * byte_s,
               "entry_us": 1e6 * alone}  # fmt: skip
    return figures, Messaging(message_s, {RAW: byte_s / 2})


# --------------------------------------------------------------------------------------------------
# As predicted, and to the bit


def latency_rows(
    hosts: HostProcesses, name: str, options: Mapping[str, Any], messaging: Messaging,
    most_s: float = math.inf, entry_s: float = 0.0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield for each network and some partitions what was predicted and what was measured.

    Args:
        hosts: The chain.
        name: Of the model.
        options: Of the benchmark.
        messaging: What messages cost.
        most_s: Seconds for all requests of the model, about.
        entry_s: What a request takes into the device's host and back.
    """
    model, repeats = model_of(name, int(options["side"])), int(options["repeats"])
    costs = inference_costs(model.layers, model.shape, repeats=repeats, messaging=messaging)
    near_costs = dataclasses.replace(costs, operation_s=entry_s)
    known = (Host(NAMES[0], near_costs), *(Host(one, costs) for one in NAMES[1:]))
    with torch.inference_mode():
        expected = model.whole(model.image())
    for mbit_s, latency_ms in options["networks"]:
        near = Network(1e6 * mbit_s, 1e6 * mbit_s, latency_ms / 1e3)
        problem = Problem.of(model.layers, model.shape, known, (near, FURTHER))
        chain = hosts.chain(model, (None, near, FURTHER))
        partitions = tried(problem)
        each_s = most_s / len(options["networks"]) / len(partitions)
        for partition in partitions:
            laid = lay(chain, partition)
            with torch.inference_mode():
                seconds = taken(laid, model.image(), repeats, each_s)
            measured = median(seconds)
            assert laid.passed is not None
            predicted, output = evaluate(problem, partition).latency_s, laid.passed.output
            laid.module.close()
            yield {
                "model": name, "mbit_s": mbit_s, "cuts": "/".join(map(str, partition.cuts)),
                "predicted_ms": 1e3 * predicted, "measured_ms": 1e3 * measured,
                "error": abs(predicted - measured) / measured,
                "same_bits": torch.equal(output, expected),
                "off": float((output - expected).abs().max()),
                "requests": len(seconds),
            }  # fmt: skip


def tried(problem: Problem) -> list[Partition]:
    """Return the best partition, that of most throughput, and the whole model on edge and cloud."""
    plan = plan_partition(problem, alternatives=1)
    busy = solve(problem, "throughput")
    found = [plan.best.partition, *(c.partition for c in plan.alternatives), busy]
    found += [choice.partition for choice in plan.whole[1:]]
    return list({one.cuts: one for one in found if one is not None}.values())


def errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures over all rows."""
    off = [float(row["error"]) for row in rows]
    return {
        "prediction_error_median": quantile(off, 0.5),
        "prediction_error_p90": quantile(off, 0.9),
        "same_bits": all(row["same_bits"] for row in rows),
        "off_max": max(float(row["off"]) for row in rows),
    }


# --------------------------------------------------------------------------------------------------
# Per second


def throughput_figures(name: str, side: int, seconds: float) -> dict[str, Any]:
    """Return requests per second of two hosts with a thread each, and of one with two threads."""
    model = model_of(name, side)
    with (
        host_processes(("first", "second"), 1) as two,
        host_processes(("whole",), 2) as one,
    ):
        costs = inference_costs(model.layers, model.shape, repeats=5)
        alike = tuple(Host(host, costs) for host in ("first", "second"))
        free = Network(1e10, 1e10, 0.0)
        partition = solve(Problem.of(model.layers, model.shape, alike, (free,)), "throughput")
        assert partition is not None
        laid = {"two": lay(two.chain(model), partition), "one": lay(one.chain(model), cut_at())}
        rates: dict[str, list[float]] = {"two": [], "one": []}
        for turn in range(3):
            for which in ("two", "one") if turn % 2 else ("one", "two"):
                rates[which].append(_per_second(laid[which], model, seconds))
        for each in laid.values():
            each.module.close()
    pair, alone = median(rates["two"]), median(rates["one"])
    return {"two_hosts_per_s": pair, "one_process_per_s": alone,
            "throughput_ratio": median(a / b for a, b in zip(*rates.values(), strict=True)),
            "throughput_cut": partition.cuts[0]}  # fmt: skip


def _per_second(laid: Laid, model: BenchModel, seconds: float) -> float:
    """Return the rate at which answers come while several requests are under way."""
    pipeline, image = laid.module.pipeline, model.image()
    waiting: deque[Future[Passed]] = deque(pipeline.submit(image) for _ in range(_IN_FLIGHT))
    waiting.popleft().result(60)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        waiting.append(pipeline.submit(image))
        waiting.popleft().result(60)
        count += 1
    rate = count / (time.monotonic() - began)
    for future in waiting:
        future.result(60)
    return rate
