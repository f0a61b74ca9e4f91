"""A trace of load and pressure, and what a portfolio makes of it in real time.

A trace is a list of segments, drawn from a seed: requests per second between a fifth of what the
slowest variant can do and a part of what the fastest can; now and then a memory budget that some
variants exceed; now and then as many busy processes beside as there are processors. The policy and
its options were fixed on other seeds than the one that is reported.

Each contender plays the whole trace: the portfolio that switches, and every variant alone. A
request counts by the accuracy of what answered it if it was answered within the objective, and
nothing otherwise. While the budget is below what the running variant takes, requests count nothing:
the system would have ended it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from fedsys.errors import RequestError
from fedsys.pruning.portfolio import Portfolio
from fedsys.pruning.switch_policy import Profile
from fedsys.serving.batching import Batcher, Limits, Served
from fedsys.serving.options import ServingConfig
from fedsys.serving.portfolio import PortfolioEngine

_BUSY = 0.25  # share of segments with busy processes beside
_TIGHT = 0.35  # share of segments with a memory budget
_TOP = 0.5  # of what the fastest variant can do: the highest rate


@dataclass(frozen=True)
class Segment:
    """A time in which conditions stay as they are.

    Attributes:
        seconds: How long.
        rate: Requests per second.
        memory_bytes: Budget of the variant that answers; None for none.
        busy: Whether others keep all processors busy.
    """

    seconds: float
    rate: float
    memory_bytes: int | None
    busy: bool


def make_trace(
    variants: Sequence[Profile], segments: int, seconds: float, seed: int
) -> tuple[Segment, ...]:
    """Draw a trace that suits a portfolio; the same one from the same seed.

    Args:
        variants: Give rates and budgets.
        segments: How many.
        seconds: Of each.
        seed: Of all draws.
    """
    draw = random.Random(seed)
    times = [v.latency[0].p50_ms for v in variants]
    low, high = 0.2 * 1e3 / max(times), _TOP * 1e3 / min(times)
    sizes = sorted(v.peak_bytes for v in variants)
    result = []
    for _ in range(segments):
        rate = low * (max(high, low) / low) ** draw.random()
        tight, busy, size = draw.random() < _TIGHT, draw.random() < _BUSY, draw.choice(sizes)
        result.append(Segment(seconds, rate, int(size * 1.5) if tight else None, busy))
    return tuple(result)


def arrivals(trace: Sequence[Segment], seed: int) -> list[tuple[float, int]]:
    """Return the moments of all requests in seconds, with the numbers of their segments."""
    draw = random.Random(seed)
    result, start = [], 0.0
    for number, segment in enumerate(trace):
        moment = start + draw.expovariate(segment.rate)
        while moment < start + segment.seconds:
            result.append((moment, number))
            moment += draw.expovariate(segment.rate)
        start += segment.seconds
    return result


@dataclass(slots=True)
class _Ledger:
    """What became of the requests of one contender."""

    issued: int = 0
    answered: int = 0
    failed: int = 0
    in_time: int = 0
    over_budget: int = 0
    value: float = 0.0


def play(
    portfolio: Portfolio,
    options: ServingConfig,
    trace: Sequence[Segment],
    seed: int,
    *,
    variant: str | None = None,
) -> dict[str, Any]:
    """Play a trace in real time and return how one contender did.

    Args:
        portfolio: Its variants.
        options: Objective and limits.
        trace: What happens.
        seed: Of the arrivals.
        variant: The only one that answers; None for the portfolio that switches.
    """
    options = dataclasses.replace(options, variant=variant)
    accuracy = {v.name: v.accuracy if v.test_accuracy is None else v.test_accuracy
                for v in portfolio.variants}  # fmt: skip
    peak = {v.name: max(v.peak_bytes, v.bytes) for v in portfolio.variants}
    engine = PortfolioEngine(portfolio, options)
    batcher = Batcher(engine, Limits(options.max_batch, options.max_delay_ms, options.max_queue))
    image = torch.zeros(1, *portfolio.about.input_shape)
    ledger, lock = _Ledger(), threading.Lock()
    if variant is None:
        engine.control.start(options.interval_s)

    def look(began: float, segment: Segment, future: Future[Served]) -> None:
        took_ms = (time.perf_counter() - began) * 1e3
        with lock:
            if future.exception() is not None:
                ledger.failed += 1
                return
            by = future.result().by
            ledger.answered += 1
            if segment.memory_bytes is not None and peak[by] > segment.memory_bytes:
                ledger.over_budget += 1
            elif took_ms <= options.objective.p95_ms:
                ledger.in_time += 1
                ledger.value += accuracy[by]

    _send(batcher, engine, trace, arrivals(trace, seed), image, look, ledger)
    batcher.close(options.drain_s)
    switches = sum(record.cost is not None for record in engine.control.records)
    engine.close()
    return {
        "contender": variant or "switching",
        "accuracy": accuracy[variant] if variant else math.nan,
        "requests": ledger.issued,
        "answered": ledger.answered,
        "failed": ledger.issued - ledger.answered,
        "over_budget": ledger.over_budget,
        "attainment": ledger.in_time / max(1, ledger.issued),
        "attainment_x_accuracy": ledger.value / max(1, ledger.issued),
        "switches": switches,
    }


def _send(
    batcher: Batcher,
    engine: PortfolioEngine,
    trace: Sequence[Segment],
    moments: Sequence[tuple[float, int]],
    image: Tensor,
    look: Callable[[float, Segment, Future[Served]], None],
    ledger: _Ledger,
) -> None:
    goal, start, present = engine.control.objective, time.perf_counter(), -1
    with _Neighbours() as neighbours:
        for moment, number in moments:
            while present < number:
                present += 1
                segment = trace[present]
                engine.control.aim(dataclasses.replace(goal, memory_bytes=segment.memory_bytes))
                neighbours.press(segment.busy)
            time.sleep(max(0.0, start + moment - time.perf_counter()))
            began, segment = start + moment, trace[number]
            ledger.issued += 1
            try:
                future = batcher.submit(image)
            except RequestError:
                continue
            future.add_done_callback(functools.partial(look, began, segment))


_BURN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for number in range(100_000):
        number * number
"""


@final
class _Neighbours:
    """A process for each processor that computes while it is let, until the block ends."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._busy = True

    def __enter__(self) -> _Neighbours:
        for _ in range(os.cpu_count() or 1):
            self._processes.append(subprocess.Popen([sys.executable, "-S", "-c", _BURN]))
        self.press(False)
        return self

    def press(self, busy: bool) -> None:
        """Let them compute, or stop them."""
        if busy != self._busy:
            self._busy = busy
            for process in self._processes:
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)

    def __exit__(self, *failure: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
