"""Cuts that change under a constant load, in the four ways: what clients see, and memory.

Three host processes, and clients in this one that ask at moments of their own, whether or not the
answer before has come. Every answer is compared, to the bit, with that of the whole model.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor

from fedsys.commands.bench.partition_hosts import (
    BenchModel,
    HostProcesses,
    cut_at,
    host_processes,
    model_of,
)
from fedsys.commands.bench.sampling import sampled
from fedsys.errors import FedsysError
from fedsys.partition.problem import Partition
from fedsys.pruning.measuring import quantile
from fedsys.serving.chain import ChainEngine
from fedsys.serving.switch.switcher import Cost

WAYS = ("warm", "beside", "process", "pause")
_SHARES = (0.1, 0.6, 0.15, 0.15)  # of the time, as in WAYS
_LEAST, _SAID = 2, 100  # moves: at least, and from one word to the next
_QUIET_S, _BETWEEN_S = 3.0, 0.02
_CLIENTS = 16
_SAMPLE_S = 0.1


@dataclass(eq=False)
class _Heard:
    """What clients heard: moments of answers, their seconds, and how many were none or wrong."""

    ended_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    lost: int = 0
    wrong: int = 0

    def gap_ms(self) -> float:
        """Return the longest time without an answer."""
        moments = sorted(self.ended_s)
        return 1e3 * max((b - a for a, b in pairwise(moments)), default=0.0)


def moves_rows(
    options: Mapping[str, Any], most_s: float = math.inf, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each way.

    Args:
        options: Of the benchmark.
        most_s: Seconds for the moves of all ways, about: there are fewer, if they take longer.
        say: Is told how far it is.
    """
    model = model_of(str(options["model"]), int(options["side"]))
    for way, share in zip(WAYS, _SHARES, strict=True):
        count = int(options["moves" if way in ("warm", "beside") else "slow_moves"])
        with host_processes(("device", "edge", "cloud")) as hosts:
            plan = _Moves(way, count, share * most_s, float(options["requests_per_s"]))
            yield {"way": way, **_measured(model, hosts, plan, say)}


def in_order(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the ways stand in the order of NEUKONFIG (Majeed et al., IC2E 2021).

    Of those that answer on meanwhile: a pipeline that stands ready is there first, then one in the
    same process, then one in a new process. Pausing keeps requests waiting longest.

    Args:
        rows: The figures of all ways.
    """
    known = {str(row["way"]): row for row in rows}
    there = [known[w]["prepare_ms"] + known[w]["blocked_ms"] for w in ("warm", "beside", "process")]
    longest = max(known, key=lambda way: float(known[way]["blocked_ms"]))
    return there == sorted(there) and longest == "pause"


def places(model: BenchModel) -> list[Partition]:
    """Return two partitions that differ in what every host computes."""
    cuts, last = model.layers.cuts, len(model.layers)
    third, half, late = (cuts[len(cuts) * share // 4] for share in (1, 2, 3))
    return [cut_at(third, half), cut_at(half, max(late, half)) if late < last else cut_at(0, half)]


@dataclass(frozen=True)
class _Moves:
    """How cuts change: in which way, how often, for how many seconds at most, and under what load.

    The load is in requests per second.
    """

    way: str
    count: int
    most_s: float
    rate: float


def _measured(
    model: BenchModel, hosts: HostProcesses, plan: _Moves, say: Callable[[str], None]
) -> dict[str, Any]:
    first, other = places(model)
    image = model.image()
    with torch.inference_mode():
        expected = model.whole(image)
    engine = ChainEngine(hosts.chain(model), model.card, first, plan.way)
    try:
        engine.answer(image.numpy())
        base, quiet, busy = hosts.memory_bytes(), _Heard(), _Heard()
        if plan.way == "warm":
            engine.prepare([first, other])
        with _asking(engine, image, expected, plan.rate, quiet):
            time.sleep(_QUIET_S)
        memory = sampled(hosts.memory_bytes, _SAMPLE_S)
        with _asking(engine, image, expected, plan.rate, busy), memory as seen:
            costs = _moved(engine, [other, first], plan, say)
    finally:
        engine.close()
    return _figures(model, base, seen, quiet, busy, costs)


def _moved(
    engine: ChainEngine, turns: Sequence[Partition], plan: _Moves, say: Callable[[str], None]
) -> list[Cost]:
    partitions, costs, began = cycle(turns), list[Cost](), time.monotonic()
    while len(costs) < plan.count:
        costs.append(engine.move(next(partitions)))
        time.sleep(_BETWEEN_S)  # or a thousand warm ones are over before a request comes
        if len(costs) % _SAID == 0:
            say(f"{plan.way}: {len(costs)} of {plan.count} moves")
        if len(costs) >= _LEAST and time.monotonic() - began > plan.most_s:
            break
    return costs


def _figures(
    model: BenchModel, base: int, most: Sequence[int], quiet: _Heard, busy: _Heard,
    costs: Sequence[Cost],
) -> dict[str, Any]:  # fmt: skip
    blocked = [cost.blocked_ms for cost in costs]
    weights = sum(t.nbytes for t in model.whole.state_dict().values())
    before, during = (quantile(one.took_s, 0.99) for one in (quiet, busy))
    return {
        "moves": len(costs),
        "prepare_ms": quantile([cost.prepare_ms for cost in costs], 0.5),
        "blocked_ms": quantile(blocked, 0.5),
        "blocked_ms_max": max(blocked),
        "p99_quiet_ms": 1e3 * before,
        "p99_ms": 1e3 * during,
        "gap_quiet_ms": quiet.gap_ms(),
        "gap_ms": busy.gap_ms(),
        "answers": len(busy.ended_s),
        "lost": quiet.lost + busy.lost,
        "wrong": quiet.wrong + busy.wrong,
        "extra_memory_to_model": (max(most, default=base) - base) / weights,
    }


@contextmanager
def _asking(
    engine: ChainEngine, image: Tensor, expected: Tensor, rate: float, heard: _Heard
) -> Iterator[None]:
    """Ask at a constant rate until the block ends; returns when all answers are there."""
    stop, lock = threading.Event(), threading.Lock()

    def ask() -> None:
        began = time.monotonic()
        try:
            scores = torch.from_numpy(engine.answer(image.numpy()).scores)
        except FedsysError:
            with lock:
                heard.lost += 1
            return
        now = time.monotonic()
        with lock:
            heard.ended_s.append(now)
            heard.took_s.append(now - began)
            heard.wrong += not torch.equal(scores, expected)

    def send(pool: ThreadPoolExecutor) -> None:
        asked: list[Future[None]] = []
        begin = time.monotonic()
        while not stop.wait(max(0.0, begin + len(asked) / rate - time.monotonic())):
            asked.append(pool.submit(ask))

    with ThreadPoolExecutor(_CLIENTS) as pool:
        sender = threading.Thread(target=send, args=(pool,))
        sender.start()
        try:
            yield
        finally:
            stop.set()
            sender.join()
