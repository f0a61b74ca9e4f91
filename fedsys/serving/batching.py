"""Requests that wait together are computed together.

A batch grows while another one is computed, and longer only if `BatchLimits.max_delay_ms` says so.
Where a batch takes less time than handing it to another thread and back, who took the requests in
computes it himself (`Batcher.work_off`); else threads do. A request of more images than a batch may
have is computed in pieces of that size, and a batch of others, if any wait, between each two:
nobody waits for more than a piece. One variant answers all of a request; where it changes
meanwhile, the request begins anew. Each gets an answer or an error: it is computed, refused at once
because the queue is full, given up because its time is over, or failed with the reason.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from fedsys.errors import FedsysError, RequestError
from fedsys.serving.engine import Answer, Array, Engine, Fact, Pressure

ANEW = 2
"""How many times a request in pieces begins anew until it is computed in one."""


@dataclass(frozen=True)
class BatchLimits:
    """How much waits, and how long.

    Attributes:
        max_batch: Images in a batch; a request with more is computed in as many as it needs.
        max_delay_ms: How long the first request of a batch waits for others though nothing is
            computed, in milliseconds.
        max_queue: Images that may wait.
    """

    max_batch: int = 8
    max_delay_ms: float = 0.0
    max_queue: int = 1024


@dataclass(frozen=True, eq=False)
class Served:
    """The answer to one request.

    Attributes:
        scores: float32 ``(rows, classes)``.
        by: What answered.
        queue_ms: From its submission to the start of its batch, in milliseconds.
        compute_ms: Duration of its batch, or batches.
        batch: Images in its batch, or batches.
        facts: What the engine said besides.
    """

    scores: Array
    by: str
    queue_ms: float
    compute_ms: float
    batch: int
    facts: Mapping[str, Fact]


@dataclass(frozen=True, eq=False)
class _Waiting:
    images: Array
    since: float
    future: Future[Served]

    @property
    def rows(self) -> int:
        return int(self.images.shape[0])


@dataclass(eq=False)
class _Divided:
    """A request that is computed in pieces.

    Attributes:
        request: Of which images wait that are not computed.
        began: When its first piece was, by `time.perf_counter`; 0.0 before.
        answers: Of the pieces so far, all by the same.
        took_ms: Duration of its pieces.
        again: How many times it had to begin anew.
    """

    request: _Waiting
    began: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    took_ms: float = 0.0
    again: int = 0

    @property
    def done(self) -> int:
        """Images that are computed."""
        return sum(answer.scores.shape[0] for answer in self.answers)

    @property
    def by(self) -> str:
        """Who computed them; empty if there are none."""
        return self.answers[0].by if self.answers else ""

    def is_wanted(self) -> bool:
        """Return whether anybody waits for it; asked once, before its first piece."""
        return self.request.future.set_running_or_notify_cancel()

    def piece(self, most: int) -> Array:
        """Return the images that are next: `most`, or all if that is the only way to its end."""
        if self.again > ANEW:
            return self.request.images
        return self.request.images[self.done : self.done + most]

    def take(self, answer: Answer) -> None:
        """Take the answer to a piece; if another one gave it, all before are to be done again."""
        if self.by not in ("", answer.by):
            self.answers.clear()
            self.again += 1
        else:
            self.answers.append(answer)

    def whole(self) -> Answer:
        """Return the answer to all of it."""
        return replace(
            self.answers[-1], scores=np.concatenate([one.scores for one in self.answers])
        )


@final
class Batcher:
    """Takes requests from any thread and has them computed, batch by batch, in threads of its own.

    Args:
        engine: Computes.
        limits: How much waits, and how long.
    """

    def __init__(self, engine: Engine, limits: BatchLimits) -> None:
        self._engine, self._limits = engine, limits
        self._queue: deque[_Waiting] = deque()
        self._divided: deque[_Divided] = deque()  # the first is in work
        self._rows = self._computing = 0
        self._change = threading.Condition()
        self._closing = False
        self._threads = [  # the first one computes pieces, too
            threading.Thread(target=self._work, args=(lane == 0,), name="inference", daemon=True)
            for lane in range(engine.lanes)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._rows

    def submit(self, images: Array, *, wake: bool = True) -> Future[Served]:
        """Put a request into the queue.

        Args:
            images: Normalised float32 ``(rows, C, H, W)``.
            wake: Whether threads are told; if not, `work_off` is to follow.

        Raises:
            RequestError: The queue is full, or the endpoint is about to end.
        """
        waiting = _Waiting(images, time.perf_counter(), Future())
        with self._change:
            if self._closing:
                raise RequestError(503, "the endpoint is about to end; ask another one")
            if self._rows and self._rows + waiting.rows > self._limits.max_queue:
                raise RequestError(503, f"{self._rows} images wait already; ask again later")
            if waiting.rows > self._limits.max_batch:
                self._divided.append(_Divided(waiting))
            else:
                self._queue.append(waiting)
            self._rows += waiting.rows
            self._engine.watch.arrived(waiting.rows)
            if wake:
                self._change.notify_all()
        return waiting.future

    def at_once(self, images: Array) -> Served | None:
        """Compute a request in this thread, if it is quick and nothing else waits or is computed.

        Args:
            images: As for `submit`.

        Returns:
            The answer; None if that is not so, and the request is to be submitted.

        Raises:
            RequestError: It failed.
        """
        rows = int(images.shape[0])
        with self._change:
            waits = self._computing or self._queue or self._divided or self._closing
            if waits or self._limits.max_delay_ms or rows > self._limits.max_batch:
                return None
            if not self._engine.is_quick(rows):
                return None
            self._computing += 1
        watch, start = self._engine.watch, time.perf_counter()
        watch.arrived(rows)
        watch.left(rows)
        try:
            answer = self._engine.answer(images)
        except Exception as error:
            raise _failure(error) from error
        finally:
            self._ended()
        took_ms = (time.perf_counter() - start) * 1e3
        watch.answered(took_ms)
        return Served(answer.scores, answer.by, 0.0, took_ms, rows, answer.facts)

    def work_off(self) -> bool:
        """Compute a batch of what waits in this thread, if it is quick and nothing is computed.

        Else threads are told of it.

        Returns:
            Whether it was computed here and more waits.
        """
        with self._change:
            if not (self._queue or self._divided):
                return False
            rows = min(self._rows, self._limits.max_batch)
            alone = not (self._computing or self._divided or self._limits.max_delay_ms)
            if not (alone and self._queue and self._engine.is_quick(rows)):
                self._change.notify_all()
                return False
            batch = self._batch()
        self._computed(batch)
        return bool(self._queue)

    def close(self, drain_s: float) -> int:
        """Take no more requests, answer those that wait, and end.

        Args:
            drain_s: Longest time for that, in seconds.

        Returns:
            How many requests had to be failed because the time was over.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        until = time.monotonic() + drain_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._change:
            left = [self._take() for _ in range(len(self._queue))]
            divided = [one for one in list(self._divided) if self._drop(one)]
        wanted = [w for w in left if w.future.set_running_or_notify_cancel()]
        wanted += [one.request for one in divided if one.began or one.is_wanted()]
        _fail(wanted, RequestError(503, "the endpoint ended before"))
        return len(wanted)

    def _take(self) -> _Waiting:
        waiting = self._queue.popleft()
        self._leave(waiting.rows)
        return waiting

    def _drop(self, divided: _Divided) -> bool:
        """Have a request no more; return whether it was still there."""
        if divided not in self._divided:
            return False
        self._divided.remove(divided)
        self._leave(divided.request.rows)
        return True

    def _leave(self, rows: int) -> None:
        self._rows -= rows
        self._engine.watch.left(rows)

    def _work(self, pieces: bool) -> None:
        while True:
            batch = self._next(pieces)
            if batch:
                self._computed(batch)
            if pieces and self._divided:
                self._compute_piece(self._divided[0])
            elif not batch:
                return

    def _computed(self, batch: list[_Waiting]) -> None:
        """Compute a batch that was taken by `_batch`, but for those that nobody waits for."""
        wanted = [w for w in batch if w.future.set_running_or_notify_cancel()]
        try:
            if wanted:
                self._compute(wanted)
        finally:
            self._ended()

    def _ended(self) -> None:
        with self._change:
            self._computing -= 1
            if self._queue or self._divided:
                self._change.notify_all()

    def _next(self, pieces: bool) -> list[_Waiting]:
        """Wait for a batch; an empty one means the end, or that there are only pieces."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._may_begin(pieces))
                if not self._queue:
                    return []
                self._wait_for_more(self._queue[0].since + self._limits.max_delay_ms / 1e3)
                if self._queue:  # another lane may have taken what was there
                    return self._batch()

    def _may_begin(self, pieces: bool) -> bool:
        if not (self._queue or (pieces and self._divided)):
            return self._closing
        return self._computing < self._engine.lanes

    def _wait_for_more(self, until: float) -> None:
        while self._rows < self._limits.max_batch and not self._closing:
            left = until - time.perf_counter()
            if left <= 0 or not self._change.wait(left):
                return

    def _batch(self) -> list[_Waiting]:
        """Take a batch; `_computed` is to follow."""
        self._computing += 1
        batch = [self._take()]
        rows = batch[0].rows
        while self._queue and rows + self._queue[0].rows <= self._limits.max_batch:
            rows += self._queue[0].rows
            batch.append(self._take())
        return batch

    def _compute(self, batch: list[_Waiting]) -> None:
        start = time.perf_counter()
        try:
            images = (
                batch[0].images if len(batch) == 1 else np.concatenate([w.images for w in batch])
            )
            pressure = Pressure((start - batch[0].since) * 1e3, self._rows)
            answer = self._engine.answer(images, pressure)
        except Exception as error:  # whatever the engine says: the requests are told, others go on
            _fail(batch, error)
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

    def _compute_piece(self, divided: _Divided) -> None:
        request, start = divided.request, time.perf_counter()
        with self._change:
            if divided not in self._divided:
                return
            if not divided.began and not divided.is_wanted():
                self._drop(divided)
                return
            divided.began = divided.began or start
        images = divided.piece(self._limits.max_batch)
        problem: Exception | None = None
        try:
            pressure = Pressure((start - request.since) * 1e3, self._rows - images.shape[0])
            divided.take(self._engine.answer(images, pressure, divided.by))
        except Exception as error:
            problem = error
        divided.took_ms += (time.perf_counter() - start) * 1e3
        with self._change:
            ended = (problem or divided.done == request.rows) and self._drop(divided)
        if ended and problem:
            _fail([request], problem)
        elif ended:
            self._give([request], divided.whole(), divided.began, divided.took_ms)


def _fail(requests: list[_Waiting], error: Exception) -> None:
    for waiting in requests:
        waiting.future.set_exception(_failure(error))


def _failure(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    known = isinstance(error, FedsysError)
    return RequestError(500, str(error) if known else f"{type(error).__name__}: {error}")
