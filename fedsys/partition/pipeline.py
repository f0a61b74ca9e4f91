"""The entry's end of a pipeline: requests go in by id, answers come back in any order.

Many requests may be under way; each host computes one at a time, so the stages work at once. Each
is kept until its answer is there. When a host is lost they fail, or, where somebody is told of it,
wait for `Pipeline.divert`: then another pipeline computes them, and those that come. Whichever
answers first, a request has one answer: its future is in the hands of who takes it from the table.
Requests of a pipeline that is taken down fail with `PipelineLeft`: no host failed, so who asked
asks another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any, final

from torch import Tensor

from fedsys.errors import LinkError, PipelineLeft, RuntimeFailure, first_line
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

_IDS = count()  # of all pipelines: a request may pass into another one with its id

Lost = Callable[[str, str], None]
"""Is told that a host cannot be reached any more by the one before it: its name, and why."""


@dataclass(frozen=True, eq=False)
class Passed:
    """A request that came back.

    Attributes:
        output: What the last host made.
        parts: For each host in order what it did: ``host``, ``queue_s``, ``compute_s``; and for
            each but the last ``link_s``, there and back without the dwelling there, and ``bytes``.
        link_s: The same of the link from the entry to the first host.
        bytes: That were sent to the first host.
        by: Name of the pipeline that answered.
        again: How many times it was sent into another pipeline by the entry.
    """

    output: Tensor
    parts: Sequence[Mapping[str, Any]]
    link_s: float
    bytes: int
    by: str = ""
    again: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class _Waiting:
    future: Future[Passed]
    images: Tensor
    sent_s: float
    again: int


@final
class Pipeline:
    """Sends requests through a chain of hosts.

    Args:
        name: For people.
        link: To the first host.
        timeout_s: Longest time for an answer.
        first: Name of the first host.
        lost: Is told of a host that is lost; requests wait then. None: they fail.
    """

    def __init__(
        self, name: str, link: Link, timeout_s: float, first: str = "", lost: Lost | None = None
    ) -> None:
        self.name, self._link, self._timeout_s = name, link, timeout_s
        self._first, self._lost = first, lost
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._ended, self._why = "", RuntimeFailure
        self._open, self._closed = True, False
        self._instead: Pipeline | None = None
        threading.Thread(target=self._read, name=f"answers of {name}", daemon=True).start()

    @property
    def in_flight(self) -> int:
        """Requests that have not come back."""
        return len(self._waiting)

    @property
    def diverted(self) -> bool:
        """Whether another pipeline computes what comes; no more when that one is taken down."""
        return self._instead is not None and not self._instead.closed

    @property
    def ended(self) -> bool:
        """Whether it fails what comes."""
        return bool(self._ended)

    @property
    def closed(self) -> bool:
        """Whether it was taken down."""
        return self._closed

    def submit(self, images: Tensor) -> Future[Passed]:
        """Send a request; many may be under way.

        Args:
            images: Inputs of the model, ``(batch, …)``.

        Raises:
            PipelineLeft: It was taken down.
            RuntimeFailure: The first host is lost.
        """
        future = Future[Passed]()
        self._send(future, images, 0)
        return future

    def _send(self, future: Future[Passed], images: Tensor, again: int) -> None:
        number = next(_IDS)
        with self._lock:
            if self._closed:
                raise self._left()
            instead = self._instead if self.diverted else None
            if instead is None:
                if self._ended:
                    raise self._why(self._ended)
                self._waiting[number] = _Waiting(future, images, monotonic(), again)
        if instead is not None:
            instead._send(future, images, again)
            return
        tensors, meta = encode_activation(images, "fp32")
        try:
            if self._open:
                self._link.send(Frame("x", {**meta, "id": number}, tensors))
        except LinkError as error:
            if self._closed:
                self._end(number, self._left())
            elif self._lost is None:
                reason = f"the first host is lost: {first_line(error)}"
                self._end(number, RuntimeFailure(reason))

    def run(self, images: Tensor) -> Passed:
        """Send a request and wait for its answer.

        Raises:
            PipelineLeft: It was taken down before it answered.
            RuntimeFailure: A host failed or is lost, or no answer came in time.
        """
        future = self.submit(images)
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            future.cancel()  # an answer that comes later is nobody's, nor is it computed again
            raise RuntimeFailure(f"{self.name}: no answer in {self._timeout_s:g} s") from error

    def divert(self, instead: Pipeline) -> int:
        """Have another pipeline compute what is under way, and what comes; return how much that is.

        What this one still answers counts if it comes first.
        """
        with self._lock:
            self._instead, self._ended = instead, ""
            waiting, self._waiting = self._waiting, {}
        wanted = [one for one in waiting.values() if not one.future.cancelled()]
        for one in wanted:
            try:
                instead._send(one.future, one.images, one.again + 1)
            except RuntimeFailure as error:
                with suppress(InvalidStateError):
                    one.future.set_exception(error)
        return len(wanted)

    def pass_on(self, instead: Pipeline) -> None:
        """Have another pipeline compute what comes; what is under way is answered by this one."""
        with self._lock:
            self._instead, self._ended = instead, ""

    def fail(self, reason: str, kind: type[RuntimeFailure] = RuntimeFailure) -> None:
        """Fail what is under way, and what comes, until `divert`.

        Args:
            reason: Why.
            kind: Of the error: `PipelineLeft` where another pipeline is to be asked.
        """
        with self._lock:
            self._ended, self._why = reason, kind
        for number in list(self._waiting):
            self._end(number, kind(reason))

    def close(self) -> None:
        """End the link; what is under way fails, and what comes, as `PipelineLeft`."""
        with self._lock:
            self._closed = True
        for number in list(self._waiting):  # who reads may have ended before, with a lost host
            self._end(number, self._left())
        self._link.close()  # after that: it may wait for a host that stands still

    def _left(self) -> PipelineLeft:
        return PipelineLeft(f"{self.name} was taken down before it answered")

    def _read(self) -> None:
        try:
            while True:
                self._answered(self._link.recv())
        except LinkError as error:
            reason = first_line(error)
        self._open = False
        if self._closed:
            return
        if self._lost is not None:
            self._lost(self._first, reason)
            return
        self.fail(f"the first host is lost: {reason}")

    def _answered(self, frame: Frame) -> None:
        number = frame.meta.get("id")
        if frame.kind == "failed":
            host, reason = frame.meta.get("host"), frame.meta.get("reason")
            kind = PipelineLeft if frame.meta.get("dropped") is True else RuntimeFailure
            self._end(number, kind(f"{host}: {reason}"))
            return
        if frame.kind == "lost" and self._lost is not None:
            self._lost(str(frame.meta.get("host")), str(frame.meta.get("reason")))
            return
        if frame.kind != "y":
            return
        waiting = self._take(number)
        if waiting is None:
            return
        link_s = monotonic() - waiting.sent_s - float(frame.meta["held_s"])
        output = decode_activation(frame.tensors, frame.meta)
        passed = Passed(
            output, frame.meta["parts"], link_s, waiting.images.nbytes,
            str(frame.meta.get("by", "")), waiting.again,
        )  # fmt: skip
        with suppress(InvalidStateError):  # nobody waits any more
            waiting.future.set_result(passed)

    def _take(self, number: object) -> _Waiting | None:
        with self._lock:
            return self._waiting.pop(number, None) if type(number) is int else None

    def _end(self, number: object, error: RuntimeFailure) -> None:
        waiting = self._take(number)
        if waiting is not None:
            with suppress(InvalidStateError):
                waiting.future.set_exception(error)
