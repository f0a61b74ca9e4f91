"""Traces of load and pressure, and what a portfolio makes of them in real time.

A trace is a list of segments, drawn from a seed. Now and then there is a memory budget that some
variants exceed; now and then as many busy processes beside as there are processors. There are two
kinds (`TRACES`), which differ in the load:

* ``balanced``: each variant of the front, which are those more accurate than every faster one, is
  the right one for about as many *requests*: it gets as many segments as the others, all segments
  have as many requests, and the rate is drawn between what the next better variant can do, in
  batches, and a part of what this one can do. So slow segments are long and fast ones short.
* ``drawn``: segments of equal duration, and rates from a fifth of what the slowest variant can do
  to a part of what the fastest can, each factor as likely as any other. Fast segments then hold
  nearly all requests, so this is close to a load for small variants alone.

Policy, options and traces were made while looking at seeds 0 to 6; others are held out.

Each contender plays the whole trace: the portfolio that switches, and every variant alone. In the
next turn they play in the reverse order, so that a machine whose speed drifts is as fast for one as
for the other; what is told is the sum of the turns. A request counts by the accuracy of what
answered it if it was answered within the objective, and nothing otherwise. It counts nothing either
while what answers it and the weights of the other variants in memory exceed the budget: the system
would have ended it. The *oracle* is the best single variant of each segment, as measured: what a
switcher would get that knows the trace and switches at no cost. A variant alone may begin a segment
with the queue of the one before, so the oracle is too low where fast segments follow each other;
and one that uses two variants within a segment may exceed it.
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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from fedsys.config.serving import ServingConfig
from fedsys.errors import RequestError
from fedsys.pruning.measuring import quantile
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.batching import Batcher, BatchLimits, Served
from fedsys.serving.portfolio import PortfolioEngine
from fedsys.serving.switch.policy import Profile

_BUSY = 0.25  # share of segments with busy processes beside
_TIGHT = 0.35  # share of segments with a memory budget
_TOP = 0.5  # of what the fastest variant can do: the highest rate of a drawn trace
_LOW = 0.2  # of what a variant can do: the lowest rate
_SHARE = 0.7  # of what a variant can do: the highest rate at which it is the right one


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
    kind: str, variants: Sequence[Profile], segments: int, seconds: float, seed: int
) -> tuple[Segment, ...]:
    """Draw a trace that suits a portfolio; the same one from the same seed.

    Args:
        kind: One of `TRACES`.
        variants: Give rates and budgets.
        segments: How many; for ``balanced`` each variant of the front gets an equal number of
            them, at least one.
        seconds: Of each, in the mean.
        seed: Of all draws.
    """
    draw = random.Random(seed)
    sizes = sorted(v.peak_bytes for v in variants)
    rates = TRACES[kind](variants, segments, draw)
    # of equal requests or of equal seconds: both take as long in all
    each = [1 / rate if kind == "balanced" else 1.0 for rate in rates]
    scale = segments * seconds / sum(each)
    result = []
    for rate, share in zip(rates, each, strict=True):
        tight, busy, size = draw.random() < _TIGHT, draw.random() < _BUSY, draw.choice(sizes)
        budget = int(size * 1.5) if tight else None
        result.append(Segment(share * scale, rate, budget, busy))
    return tuple(result)


def front(variants: Sequence[Profile]) -> list[Profile]:
    """Return the variants that are more accurate than every faster one, the fastest first."""
    result: list[Profile] = []
    for variant in sorted(variants, key=lambda v: v.latency[0].p50_ms):
        if not result or variant.accuracy > result[-1].accuracy:
            result.append(variant)
    return result


def _balanced(variants: Sequence[Profile], segments: int, draw: random.Random) -> list[float]:
    able = [max(1e3 * row.batch / row.p50_ms for row in v.latency) for v in front(variants)]
    rates = []
    for own, better in zip(able, (*able[1:], 0.0), strict=True):
        high = _SHARE * own
        low = min(high, max(better, _LOW * own))
        for _ in range(max(1, segments // len(able))):
            rates.append(low * (high / low) ** draw.random())
    draw.shuffle(rates)
    return rates


def _drawn(variants: Sequence[Profile], segments: int, draw: random.Random) -> list[float]:
    times = [v.latency[0].p50_ms for v in variants]
    low, high = _LOW * 1e3 / max(times), _TOP * 1e3 / min(times)
    return [low * (max(high, low) / low) ** draw.random() for _ in range(segments)]


TRACES: Mapping[str, Callable[[Sequence[Profile], int, random.Random], list[float]]] = {
    "balanced": _balanced,
    "drawn": _drawn,
}
"""Kinds of traces: the rates of their segments."""


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
class Ledger:
    """What became of the requests of one contender in one segment.

    Attributes:
        issued: How many were sent.
        answered: How many were answered.
        in_time: How many within the objective and the budget.
        over_budget: How many by something that exceeds the budget.
        value: Sum of the accuracies of what answered in time.
        by: How many each variant answered.
        late: How many were late by waiting (``queued``) and by computing (``computed``).
        queued_ms: How long each waited, in milliseconds.
        computed_ms: How long each was computed, in milliseconds.
    """

    issued: int = 0
    answered: int = 0
    in_time: int = 0
    over_budget: int = 0
    value: float = 0.0
    by: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    queued_ms: list[float] = field(default_factory=list)
    computed_ms: list[float] = field(default_factory=list)

    def __add__(self, other: Ledger) -> Ledger:
        """Return what became of the requests of both."""
        names = [part.name for part in dataclasses.fields(self)]
        return Ledger(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class Played:
    """How one contender did.

    Attributes:
        contender: Name of the variant, or ``switching``.
        accuracy: Of a variant that answers alone; NaN for the one that switches.
        ledgers: Of each segment.
        switches: How often it changed the variant.
        relieved: How many requests a standby answered.
    """

    contender: str
    accuracy: float
    ledgers: Sequence[Ledger]
    switches: int
    relieved: int

    def __add__(self, other: Played) -> Played:
        """Return both turns of one contender as one."""
        return Played(
            self.contender,
            self.accuracy,
            [a + b for a, b in zip(self.ledgers, other.ledgers, strict=True)],
            self.switches + other.switches,
            self.relieved + other.relieved,
        )

    @property
    def values(self) -> list[float]:
        """Of each segment: the sum of the accuracies of what answered in time."""
        return [ledger.value for ledger in self.ledgers]

    @property
    def log(self) -> list[dict[str, Any]]:
        """Of each segment: who answered how many, and why requests were late."""
        return [_row(ledger) for ledger in self.ledgers]

    @property
    def figures(self) -> dict[str, Any]:
        """Of the whole trace."""
        issued = sum(row.issued for row in self.ledgers)
        answered = sum(row.answered for row in self.ledgers)
        return {
            "accuracy": self.accuracy,
            "requests": issued,
            "answered": answered,
            "failed": issued - answered,
            "over_budget": sum(row.over_budget for row in self.ledgers),
            "attainment": sum(row.in_time for row in self.ledgers) / max(1, issued),
            "attainment_x_accuracy": sum(self.values) / max(1, issued),
            "switches": self.switches,
            "relieved": self.relieved,
        }


def play(
    portfolio: Portfolio,
    options: ServingConfig,
    trace: Sequence[Segment],
    seed: int,
    *,
    variant: str | None = None,
) -> Played:
    """Play a trace in real time and return how one contender did.

    Args:
        portfolio: Its variants.
        options: Objective and limits.
        trace: What happens.
        seed: Of the arrivals.
        variant: The only one that answers; None for the portfolio that switches.
    """
    options = dataclasses.replace(options, variant=variant)
    engine = PortfolioEngine(portfolio, options)
    batcher = Batcher(
        engine, BatchLimits(options.max_batch, options.max_delay_ms, options.max_queue)
    )
    image = torch.zeros(1, *portfolio.about.input_shape)
    books = _Books(portfolio, engine, trace, options.objective.p95_ms)
    if variant is None:
        engine.control.start(options.interval_s)
    _send(batcher, engine, trace, arrivals(trace, seed), image, books.note, books.ledgers)
    batcher.close(options.drain_s)
    status = engine.status()
    engine.close()
    return Played(
        variant or "switching",
        books.accuracy[variant] if variant else math.nan,
        books.ledgers,
        status["switches"],
        status["relieved"],
    )


class _Books:
    """Notes what becomes of the requests of one contender: a ledger for each segment."""

    def __init__(
        self,
        portfolio: Portfolio,
        engine: PortfolioEngine,
        trace: Sequence[Segment],
        objective_ms: float,
    ) -> None:
        self._portfolio, self._engine = portfolio, engine
        self._trace, self._objective_ms = trace, objective_ms
        self._lock = threading.Lock()
        self.ledgers = [Ledger() for _ in trace]
        self.accuracy = {
            v.name: v.accuracy if v.test_accuracy is None else v.test_accuracy
            for v in portfolio.variants
        }

    def note(self, began: float, number: int, future: Future[Served]) -> None:
        """Enter an answer to what was sent at a moment in a segment; what has failed is none."""
        took_ms = (time.perf_counter() - began) * 1e3
        if future.exception() is not None:
            return
        served, ledger = future.result(), self.ledgers[number]
        budget = self._trace[number].memory_bytes
        needed = _needed(self._portfolio, served.by, self._engine.in_memory)
        with self._lock:
            ledger.answered += 1
            ledger.by[served.by] += 1
            ledger.queued_ms.append(served.queue_ms)
            ledger.computed_ms.append(served.compute_ms)
            if budget is not None and needed > budget:
                ledger.over_budget += 1
            elif took_ms <= self._objective_ms:
                ledger.in_time += 1
                ledger.value += self.accuracy[served.by]
            else:
                waited = served.queue_ms > served.compute_ms
                ledger.late["queued" if waited else "computed"] += 1


def _needed(portfolio: Portfolio, by: str, in_memory: Sequence[str]) -> int:
    """Return the bytes that the answering variant takes, and the weights of the others."""
    own = portfolio.variant(by)
    others = [portfolio.variant(name).bytes for name in in_memory if name != by]
    return max(own.peak_bytes, own.bytes) + sum(others)


def _row(ledger: Ledger) -> dict[str, Any]:
    share = max(1, ledger.issued)
    return {
        "requests": ledger.issued,
        "value": ledger.value / share,
        "late_queued": ledger.late["queued"] / share,
        "late_computed": ledger.late["computed"] / share,
        "refused": (ledger.issued - ledger.answered) / share,
        "over_budget": ledger.over_budget / share,
        "queued_p95_ms": quantile(ledger.queued_ms, 0.95) if ledger.queued_ms else math.nan,
        "computed_p95_ms": quantile(ledger.computed_ms, 0.95) if ledger.computed_ms else math.nan,
        "by": ", ".join(f"{name} {count}" for name, count in ledger.by.most_common()),
    }


def _send(
    batcher: Batcher,
    engine: PortfolioEngine,
    trace: Sequence[Segment],
    moments: Sequence[tuple[float, int]],
    image: Tensor,
    look: Callable[[float, int, Future[Served]], None],
    ledgers: Sequence[Ledger],
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
            ledgers[number].issued += 1
            try:
                future = batcher.submit(image.numpy())
            except RequestError:
                continue
            future.add_done_callback(functools.partial(look, start + moment, number))


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
