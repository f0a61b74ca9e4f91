"""Requests that wait together are computed together.

A batch is closed when it is full, or when its first request has waited
`BatchLimits.max_delay_ms`. A request is never divided, so one variant answers all of it. Each gets
an answer or an error: it is computed, refused at once because the queue is full, given up because
its time is over, or failed with the reason.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fedsys.errors import FedsysError, RequestError
from fedsys.serving.engine import Answer, Engine, Fact, Pressure


@dataclass(frozen=True)
class BatchLimits:
    """How much waits, and how long.

    Attributes:
        max_batch: Images in a batch; a request with more makes a batch by itself.
        max_delay_ms: How long the first request of a batch waits for others, in milliseconds.
        max_queue: Images that may wait.
    """

    max_batch: int = 8
    max_delay_ms: float = 1.0
    max_queue: int = 1024


@dataclass(frozen=True, eq=False)
class Served:
    """The answer to one request.

    Attributes:
        scores: float32 ``(rows, classes)``.
        by: What answered.
        queue_ms: From its submission to the start of its batch, in milliseconds.
        compute_ms: Duration of its batch.
        batch: Images in its batch.
        facts: What the engine said besides.
    """

    scores: Tensor
    by: str
    queue_ms: float
    compute_ms: float
    batch: int
    facts: Mapping[str, Fact]


@dataclass(frozen=True, eq=False)
class _Waiting:
    images: Tensor
    since: float
    future: Future[Served]

    @property
    def rows(self) -> int:
        return self.images.shape[0]


@final
class Batcher:
    """Takes requests from any thread and has them computed, batch by batch, in one of its own.

    Args:
        engine: Computes.
        limits: How much waits, and how long.
    """

    def __init__(self, engine: Engine, limits: BatchLimits) -> None:
        self._engine, self._limits = engine, limits
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._rows

    def submit(self, images: Tensor) -> Future[Served]:
        """Put a request into the queue.

        Args:
            images: Normalised float32 ``(rows, C, H, W)``.

        Raises:
            RequestError: The queue is full, or the endpoint is about to end.
        """
        waiting = _Waiting(images, time.perf_counter(), Future())
        with self._change:
            if self._closing:
                raise RequestError(503, "the endpoint is about to end; ask another one")
            if self._rows and self._rows + waiting.rows > self._limits.max_queue:
                raise RequestError(503, f"{self._rows} images wait already; ask again later")
            self._queue.append(waiting)
            self._rows += waiting.rows
            self._engine.watch.arrived(waiting.rows)
            self._change.notify()
        return waiting.future

    def close(self, drain_s: float) -> int:
        """Take no more requests, answer those that wait, and end.

        Args:
            drain_s: Longest time for that, in seconds.

        Returns:
            How many requests had to be failed because the time was over.
        """
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(drain_s)
        with self._change:
            left = [self._take() for _ in range(len(self._queue))]
        failed = 0
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(RequestError(503, "the endpoint ended before"))
                failed += 1
        return failed

    def _take(self) -> _Waiting:
        waiting = self._queue.popleft()
        self._rows -= waiting.rows
        self._engine.watch.left(waiting.rows)
        return waiting

    def _work(self) -> None:
        while batch := self._next():
            wanted = [w for w in batch if w.future.set_running_or_notify_cancel()]
            if wanted:
                self._compute(wanted)

    def _next(self) -> list[_Waiting]:
        """Wait for a batch; an empty one means the end."""
        limit = self._limits.max_batch
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return []
            until = self._queue[0].since + self._limits.max_delay_ms / 1e3
            while self._rows < limit and not self._closing:
                left = until - time.perf_counter()
                if left <= 0 or not self._change.wait(left):
                    break
            batch = [self._take()]
            rows = batch[0].rows
            while self._queue and rows + self._queue[0].rows <= limit:
                rows += self._queue[0].rows
                batch.append(self._take())
            return batch

    def _compute(self, batch: list[_Waiting]) -> None:
        start = time.perf_counter()
        try:
            images = batch[0].images if len(batch) == 1 else torch.cat([w.images for w in batch])
            pressure = Pressure((start - batch[0].since) * 1e3, self._rows)
            answer = self._engine.answer(images, pressure)
        except Exception as error:  # whatever the engine says: the requests are told, others go on
            known = isinstance(error, FedsysError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            for waiting in batch:
                failure = error if isinstance(error, RequestError) else RequestError(500, text)
                waiting.future.set_exception(failure)
            return
        self._give(batch, answer, start, (time.perf_counter() - start) * 1e3)

    def _give(self, batch: list[_Waiting], answer: Answer, start: float, took_ms: float) -> None:
        rows = sum(w.rows for w in batch)
        first = 0
        for waiting in batch:
            scores = answer.scores[first : first + waiting.rows]
            first += waiting.rows
            queued = (start - waiting.since) * 1e3
            served = Served(scores, answer.by, queued, took_ms, rows, answer.facts)
            self._engine.watch.answered((time.perf_counter() - waiting.since) * 1e3)
            waiting.future.set_result(served)
