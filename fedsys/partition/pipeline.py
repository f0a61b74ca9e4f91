"""The entry's end of a pipeline: requests go in by id, answers come back in any order.

Many requests may be under way; each host computes one at a time, so the stages work at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any, final

from torch import Tensor

from fedsys.errors import LinkError, RuntimeFailure, first_line
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame


@dataclass(frozen=True, eq=False)
class Passed:
    """A request that came back.

    Attributes:
        output: What the last host made.
        parts: For each host in order what it did: ``host``, ``queue_s``, ``compute_s``; and for
            each but the last ``link_s``, there and back without the dwelling there, and ``bytes``.
        link_s: The same of the link from the entry to the first host.
        bytes: That were sent to the first host.
    """

    output: Tensor
    parts: Sequence[Mapping[str, Any]]
    link_s: float
    bytes: int


@dataclass(frozen=True, eq=False, slots=True)
class _Waiting:
    future: Future[Passed]
    sent_s: float
    nbytes: int


@final
class Pipeline:
    """Sends requests through a chain of hosts.

    Args:
        name: For people.
        link: To the first host.
        timeout_s: Longest time for an answer.
    """

    def __init__(self, name: str, link: Link, timeout_s: float) -> None:
        self.name, self._link, self._timeout_s = name, link, timeout_s
        self._ids = count()
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._lost = ""
        threading.Thread(target=self._read, name=f"answers of {name}", daemon=True).start()

    @property
    def in_flight(self) -> int:
        """Requests that have not come back."""
        return len(self._waiting)

    def submit(self, images: Tensor) -> Future[Passed]:
        """Send a request; many may be under way.

        Args:
            images: Inputs of the model, ``(batch, …)``.

        Raises:
            RuntimeFailure: The first host is lost.
        """
        number, future = next(self._ids), Future[Passed]()
        tensors, meta = encode_activation(images, "fp32")
        with self._lock:
            if self._lost:
                raise RuntimeFailure(self._lost)
            self._waiting[number] = _Waiting(future, monotonic(), images.nbytes)
        try:
            self._link.send(Frame("x", {**meta, "id": number}, tensors))
        except LinkError as error:
            self._end(number, RuntimeFailure(f"the first host is lost: {first_line(error)}"))
        return future

    def run(self, images: Tensor) -> Passed:
        """Send a request and wait for its answer.

        Raises:
            RuntimeFailure: A host failed or is lost, or no answer came in time.
        """
        future = self.submit(images)
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            raise RuntimeFailure(f"{self.name}: no answer in {self._timeout_s:g} s") from error

    def close(self) -> None:
        """End the link; what is under way fails."""
        self._link.close()

    def _read(self) -> None:
        try:
            while True:
                self._answered(self._link.recv())
        except LinkError as error:
            reason = f"the first host is lost: {first_line(error)}"
        with self._lock:
            self._lost = reason
        for number in list(self._waiting):
            self._end(number, RuntimeFailure(reason))

    def _answered(self, frame: Frame) -> None:
        number = frame.meta.get("id")
        if frame.kind == "failed":
            host, reason = frame.meta.get("host"), frame.meta.get("reason")
            self._end(number, RuntimeFailure(f"{host}: {reason}"))
            return
        if frame.kind != "y":
            return
        with self._lock:
            waiting = self._waiting.pop(number, None) if type(number) is int else None
        if waiting is None:
            return
        link_s = monotonic() - waiting.sent_s - float(frame.meta["held_s"])
        output = decode_activation(frame.tensors, frame.meta)
        waiting.future.set_result(Passed(output, frame.meta["parts"], link_s, waiting.nbytes))

    def _end(self, number: object, error: RuntimeFailure) -> None:
        with self._lock:
            waiting = self._waiting.pop(number, None) if type(number) is int else None
        if waiting is not None:
            waiting.future.set_exception(error)
