"""A portfolio behind the endpoint: one variant answers, and changes as conditions do."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast, final

import numpy as np
import psutil

from fedsys.config.serving import ServingConfig
from fedsys.errors import ModelError
from fedsys.pruning.portfolio import Portfolio, Variant
from fedsys.serving.computing import is_by_onnx, made_run, usual_threads
from fedsys.serving.engine import CALM, Answer, Array, Card, Pressure
from fedsys.serving.switch.control import Control, Record
from fedsys.serving.switch.pointer import Run
from fedsys.serving.switch.policy import (
    Objective,
    Signals,
    Standing,
    decide,
    latency_at,
    profile_of,
)
from fedsys.serving.switch.relief import Backlog
from fedsys.serving.switch.signals import Meter
from fedsys.serving.switch.switcher import Loaded, Resident, Switcher

QUICK_MS = 4.0
"""Batches that take less are computed by whoever took their requests in.

Handing over to another thread and back takes 0.1 to 0.3 ms; a health check waits for a batch.
"""

_NEWEST = 0.2  # weight of a batch in how long batches take


@final
class PortfolioEngine:
    """Computes answers by the variant that the policy has chosen.

    Args:
        portfolio: Loaded and checked.
        options: Objective, batches and threads.
        tell: Called with each switch.

    Attributes:
        card: What a client must know.
        watch: The meter of the policy's signals.
        control: Decides and switches.

    Raises:
        ConfigError: ``serving.variant`` is none of the portfolio, or ``serving.engine`` needs files
            that it has not.
        ModelError: The first variant cannot be read.
    """

    def __init__(
        self,
        portfolio: Portfolio,
        options: ServingConfig,
        tell: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.card = card_of(portfolio)
        shape = self.card.input_shape
        chosen = _chosen(portfolio, options)
        threads = options.threads or usual_threads()
        self._by_onnx = {v.name: is_by_onnx(v, options.engine, threads) for v in chosen}
        profiles = [profile_of(v, threads, onnx=self._by_onnx[v.name]) for v in chosen]
        self._accuracy = {v.name: v.accuracy for v in chosen}
        self.watch = Meter(profiles)
        goal = objective_of(options, shape)
        seen = Signals(time.monotonic(), free_memory=self.watch.signals().free_memory)
        first = decide(Standing(), seen, profiles, goal)[1]
        sizes = sorted({1, options.max_batch})
        standby = options.standby
        warm = tuple(np.zeros((size, *shape), np.float32) for size in sizes)

        def load(name: str) -> Run:
            return made_run(portfolio, name, onnx=self._by_onnx[name], threads=threads)

        self._switcher: Switcher
        if options.resident:
            runs = {v.name: load(v.name) for v in chosen}
            self._switcher, standby = Resident(runs, first.after), math.inf
        else:
            self._switcher = Loaded(load, first.after, warm, lambda run: run.close())
        self.control = Control(self._switcher, profiles, goal, self.watch.signals, tell, standby)
        self.control.last = first
        self._answers: Counter[str] = Counter()
        self._relieved = 0
        likely = next(profile for profile in profiles if profile.name == first.after)
        self._batch_ms = latency_at(likely, options.max_batch).p50_ms
        self._process = psutil.Process()

    @property
    def ready(self) -> bool:
        """Whether a variant is in memory that answers; else requests wait for one."""
        return self._switcher.ready

    @property
    def lanes(self) -> int:
        """One batch at a time, with all threads."""
        return 1

    def is_quick(self, rows: int) -> bool:
        """Return whether a variant is there, and batches take less than `QUICK_MS` lately."""
        return self._batch_ms < QUICK_MS and self._switcher.ready

    def answer(self, images: Array, pressure: Pressure = CALM, by: str = "") -> Answer:
        """Return the scores, all by one variant: that of the policy, or one that relieves it.

        With `by` it is that variant, unless it is in memory no more.
        """
        with self._switcher.lease(by or self._picked(images.shape[0], pressure)) as active:
            start = time.perf_counter()
            scores: Array = active.run(images)
            took = (time.perf_counter() - start) * 1e3
        self._batch_ms += _NEWEST * (took - self._batch_ms)
        self.watch.passed(active.name, images.shape[0], took)
        self._answers[active.name] += images.shape[0]
        if active.name != self._switcher.current:
            self._relieved += images.shape[0]
        last = self.control.last
        facts = {
            "accuracy": self._accuracy[active.name],
            "meets_objective": last is not None and last.meets,
        }
        return Answer(scores, active.name, facts)

    def _picked(self, rows: int, pressure: Pressure) -> str | None:
        name, in_time = self.control.pick(Backlog(rows, pressure.waited_ms, pressure.behind))
        if not in_time:
            self.watch.overdue()
            self.control.hurry()
        return name

    @property
    def in_memory(self) -> list[str]:
        """Names of the variants in memory, the one that answers first."""
        answering = [self._switcher.current] if self._switcher.ready else []
        return [*answering, *self._switcher.spare]

    def status(self) -> Mapping[str, Any]:
        """Return what answers, why, what was seen, and the switches so far."""
        last = self.control.last
        records = list(self.control.records)
        return {
            "variant": self._switcher.current,
            "ready": self.ready,
            "meets_objective": last is not None and last.meets,
            "reason": last.reason if last else "",
            "signals": vars(last.signals) if last else {},
            "predicted_p95_ms": {n: p.p95_ms for n, p in last.predicted.items()} if last else {},
            "in_memory": self.in_memory,
            "by_onnx": [name for name, by_onnx in self._by_onnx.items() if by_onnx],
            "answers": dict(self._answers),
            "relieved": self._relieved,
            "switches": sum(r.cost is not None for r in records),
            "failed_switches": sum(r.cost is None for r in records),
            "resident_bytes": self._process.memory_info().rss,
            "records": [record.as_row() for record in records[-100:]],
        }

    def close(self) -> None:
        """End: decide no more, and free the variant."""
        self.control.close()
        self._switcher.close()


def _chosen(portfolio: Portfolio, options: ServingConfig) -> tuple[Variant, ...]:
    if options.variant is None:
        return portfolio.variants
    return (portfolio.variant(options.variant),)


def needs_torch(portfolio: Portfolio, options: ServingConfig) -> bool:
    """Return whether PyTorch computes a variant that may answer.

    Raises:
        ConfigError: ``serving.variant`` is none of the portfolio, or ``serving.engine`` needs files
            that it has not.
    """
    threads = options.threads or usual_threads()
    chosen = _chosen(portfolio, options)
    return not all([is_by_onnx(variant, options.engine, threads) for variant in chosen])


def card_of(portfolio: Portfolio) -> Card:
    """Return what a client must know of the variants.

    Raises:
        ModelError: They do not take images, or are normalised in a way that cannot be.
    """
    about = portfolio.about
    shape, each = about.input_shape, (about.mean, about.std)
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise ModelError(f"{portfolio.folder}: takes inputs of {shape}, which are no images")
    if any(len(values) != shape[0] for values in each) or min(about.std) <= 0:
        raise ModelError(f"{portfolio.folder}: mean {about.mean} and std {about.std} do not fit")
    size = cast(tuple[int, int, int], tuple(shape))
    return Card(about.classes, size, about.mean, about.std, "pytorch")


def objective_of(options: ServingConfig, shape: tuple[int, int, int]) -> Objective:
    """Return the objective of the policy; images are counted as bytes of raw pixels."""
    goal, (channels, height, width) = options.objective, shape
    return Objective(
        p95_ms=goal.p95_ms,
        memory_bytes=goal.memory_bytes,
        margin=goal.margin,
        dwell_s=goal.dwell_s,
        down_dwell_s=goal.down_dwell_s,
        max_batch=options.max_batch,
        input_bytes=channels * height * width,
    )
