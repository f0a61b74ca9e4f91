"""A link that changes: cuts that follow it, beside the best cuts that stay, and an oracle.

The device, in this process, is some times slower than the edge: what it computes is done for real,
then it waits for the moment at which the slower machine would be done. The link takes the rates of
a trace in turn. Each contender plays the same trace alone, asking again as soon as an answer is
there, at most ten times a second. The oracle has in each piece of the trace the best of those that
stay, as measured.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor, nn

from fedsys.commands.bench.partition_hosts import (
    BenchModel,
    HostProcesses,
    host_processes,
    lay,
    model_of,
)
from fedsys.commands.bench.partition_requests import device_and
from fedsys.partition.conditions import ChainConditions, Observer, under
from fedsys.partition.controller import MoveRules
from fedsys.partition.planner import solve
from fedsys.partition.problem import Host, Partition, Problem
from fedsys.partition.profiling import inference_costs
from fedsys.planning.costs import Messaging
from fedsys.pruning.measuring import quantile
from fedsys.serving.chain import ChainEngine
from fedsys.serving.chain_control import ChainControl
from fedsys.serving.chain_parts import StageBuilder
from fedsys.transport.network import Network

_PAUSE_S = 0.1  # from one request to the next, at least
_DWELL_S = 1.0
_INTERVAL_S = 0.25
_LATENCY_S = 2e-3
_LEAD_S = 1.0


@final
class SlowBuilder:
    """Makes modules that take some times as long as they compute.

    Args:
        slower: How many times.
    """

    def __init__(self, slower: float) -> None:
        self._slower, self._inner = slower, StageBuilder()

    def build(self, body: bytes, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the module that a body describes, slowed down."""
        return _Slow(self._inner.build(body, tensors), self._slower)

    def free(self, module: nn.Module) -> None:
        """Take a module apart."""
        assert isinstance(module, _Slow)
        self._inner.free(module.inner)


class _Slow(nn.Module):
    def __init__(self, inner: nn.Module, slower: float) -> None:
        super().__init__()
        self.inner, self._slower = inner, slower

    def forward(self, x: Tensor) -> Tensor:
        began = time.monotonic()
        out: Tensor = self.inner(x)
        time.sleep((self._slower - 1) * (time.monotonic() - began))
        return out


@dataclass(frozen=True)
class LinkTrace:
    """What happens to the link.

    Attributes:
        bits_s: Rates in turn.
        piece_s: For which each stays.
        lead_s: For which the first rate is there before, while pipelines are built.
    """

    bits_s: tuple[float, ...]
    piece_s: float
    lead_s: float = 0.0

    @property
    def network(self) -> Network:
        """The link; its latency stays."""
        starts = [0.0, *(self.lead_s + i * self.piece_s for i in range(1, len(self.bits_s)))]
        rows = tuple((at, rate, rate) for at, rate in zip(starts, self.bits_s, strict=True))
        return Network(self.bits_s[0], self.bits_s[0], _LATENCY_S, trace=rows)


@dataclass(eq=False)
class PlayedChain:
    """What one contender did.

    Attributes:
        name: Of it.
        took_s: Seconds of the requests that began in each piece.
        moves: Changes of cuts, each with its moment.
        points: Of each request: when it began, its seconds, and the cuts.
    """

    name: str
    took_s: list[list[float]]
    moves: list[Mapping[str, Any]] = field(default_factory=list)
    points: list[tuple[float, float, str]] = field(default_factory=list)

    @property
    def all_s(self) -> list[float]:
        """Seconds of all requests."""
        return [seconds for piece in self.took_s for seconds in piece]


def trace_figures(
    options: Mapping[str, Any], messaging: Messaging, most_s: float = math.inf,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Return what all make of the trace, and each request of the one that moves.

    Args:
        options: Of the benchmark.
        messaging: What messages cost.
        most_s: Seconds for all contenders, about: each rate stays for less, if that is too long.
        say: Is told how far it is.
    """
    model, slower = model_of(str(options["model"]), int(options["side"])), options["device_slower"]
    rates = tuple(1e6 * float(rate) for rate in options["trace_mbit_s"])
    trace = LinkTrace(rates, float(options["trace_s"]))
    costs = inference_costs(model.layers, model.shape, repeats=5, messaging=messaging)
    known = (Host("device", costs.slower(float(slower))), Host("edge", costs))
    problem = Problem.of(model.layers, model.shape, known, (trace.network.at(0.0),))
    played = []
    with (
        host_processes(("edge",)) as processes,
        device_and(processes, SlowBuilder(float(slower))) as hosts,
    ):
        standing = _standing(problem, trace)
        fits_s = most_s / (1 + len(standing)) / len(rates)
        trace = dataclasses.replace(trace, piece_s=min(trace.piece_s, fits_s))
        trace = dataclasses.replace(trace, lead_s=_built(model, hosts, standing.values()))
        for name, partition in {"moves": None, **standing}.items():
            say(f"trace: {name}")
            played.append(_play(model, hosts, problem, trace, name, partition))
    return figures(played, trace)


def _built(model: BenchModel, hosts: HostProcesses, partitions: Iterable[Partition]) -> float:
    """Send hosts all units once, or who plays first would wait for them; return a time to build."""
    chain, longest = hosts.chain(model), 0.0
    for partition in partitions:
        lay(chain, partition).module.close()
        began = time.monotonic()
        lay(chain, partition).module.close()
        longest = max(longest, time.monotonic() - began)
    return _LEAD_S + 2 * longest


def _standing(problem: Problem, trace: LinkTrace) -> dict[str, Partition]:
    """Return the best partition of each rate of the trace, by its cuts."""
    found = {}
    for rate in trace.bits_s:
        best = solve(under(problem, ChainConditions((1.0, 1.0), (0.0, 0.0), (rate,))))
        if best is not None:
            found[f"stays at {best.cuts[0]}"] = best
    return found


def _play(
    model: BenchModel, hosts: HostProcesses, problem: Problem, trace: LinkTrace, name: str,
    partition: Partition | None,
) -> PlayedChain:  # fmt: skip
    built, observer, image = time.monotonic(), Observer(problem), model.image()
    chain = hosts.chain(model, (None, trace.network), built)
    first = partition or solve(problem)
    assert first is not None
    engine = ChainEngine(chain, model.card, first, "beside", observer.seen)
    control = ChainControl(engine, problem, MoveRules(dwell_s=_DWELL_S), observer)
    played = PlayedChain(name, [[] for _ in trace.bits_s])
    origin = built + trace.lead_s
    time.sleep(max(0.0, origin - time.monotonic()))
    try:
        if partition is None:
            control.start(_INTERVAL_S)
        while (began := time.monotonic() - origin) < trace.piece_s * len(trace.bits_s):
            with torch.inference_mode():
                answer = engine.answer(image.numpy())
            took = time.monotonic() - origin - began
            played.took_s[int(began / trace.piece_s)].append(took)
            played.points.append((began, took, str(answer.facts["cuts"])))
            time.sleep(max(0.0, _PAUSE_S - took))
    finally:
        control.close()
        played.moves = [
            {"at_s": one["time_s"] - time.time() + time.monotonic() - origin, **one}
            for one in control.records
        ]
        engine.switcher.close()
    return played


def figures(played: Sequence[PlayedChain], trace: LinkTrace) -> dict[str, Any]:
    """Return the table of contenders, and the goals; the first one moves."""
    moving, *standing = played
    best = [
        min((one.took_s[i] for one in standing if one.took_s[i]), key=fmean, default=[float("nan")])
        for i in range(len(trace.bits_s))
    ]
    oracle = PlayedChain("oracle", [list(piece) for piece in best])
    rows: list[dict[str, Any]] = [
        {"contender": one.name, "mean_ms": 1e3 * _mean(one), "requests": len(one.all_s),
         "p95_ms": 1e3 * quantile(one.all_s, 0.95), "moves": len(one.moves)}
        for one in (*played, oracle)
    ]  # fmt: skip
    static = min(rows[1:-1], key=lambda row: float(row["mean_ms"]))
    possible = static["mean_ms"] - rows[-1]["mean_ms"]
    changes = len(trace.bits_s) - 1
    return {
        "contenders": rows,
        "best_static": static["contender"],
        "mean_to_static": rows[0]["mean_ms"] / static["mean_ms"],
        "p95_to_static": rows[0]["p95_ms"] / static["p95_ms"],
        "share_of_oracle_gain": (static["mean_ms"] - rows[0]["mean_ms"]) / possible
        if possible > 0
        else float("nan"),
        "piece_s": trace.piece_s,
        "moves_per_change": len(moving.moves) / changes,
        "undone": sum(one["verdict"] == "back" for one in moving.moves),
        "points": [
            {"at_s": at, "ms": 1e3 * took, "cuts": cuts, "mbit_s": _rate(trace, at)}
            for at, took, cuts in moving.points
        ],
    }


def _rate(trace: LinkTrace, at_s: float) -> float:
    return trace.bits_s[min(int(at_s / trace.piece_s), len(trace.bits_s) - 1)] / 1e6


def _mean(one: PlayedChain) -> float:
    """Return the mean seconds, each piece weighed alike: slow ones have fewer requests."""
    return fmean(fmean(piece) for piece in one.took_s if piece)
