"""One host's part of a pipeline: it computes what arrives, and passes on what it made.

::

    upstream ──x──▶ [queue of the link] ──▶ compute ──x──▶ downstream
             ◀──y──────────────────────────────────── reader ◀──y──

The thread of the link from upstream computes, so a request costs no change of threads; another one
reads answers from downstream. What was sent on is held until its answer has passed: when the next
host is lost, its requests are here, with their ids.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from fedsys.errors import FedsysError, FrameError, LinkError, first_line
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class SentOn:
    """A request that was sent on and has not been answered.

    Attributes:
        upstream: Where its answer goes.
        frame: What was sent on.
        arrived_s: When it came, by `time.monotonic`.
        sent_s: When it was sent on.
        part: What this host did for it.
    """

    upstream: Link
    frame: Frame
    arrived_s: float
    sent_s: float
    part: Mapping[str, Any]


@final
class HostedStage:
    """Computes one part of a pipeline until it is closed.

    Args:
        host: Name of this host, for answers.
        run: Computes the units; the identity for none.
        codec: How what goes on is written.
        onward: Link to the next host; None for the last one.
        onward_name: Name of the next host, for answers.
    """

    def __init__(
        self, host: str, run: Run, codec: str, onward: Link | None, onward_name: str = ""
    ) -> None:
        self._host, self._run, self._codec = host, run, codec
        self._onward, self._onward_name = onward, onward_name
        self._held: dict[int, SentOn] = {}
        self._lock = threading.Lock()
        self.computed, self.busy_s = 0, 0.0
        if onward is not None:
            threading.Thread(target=self._read, name="answers", daemon=True).start()

    @property
    def held(self) -> Mapping[int, SentOn]:
        """Requests that were sent on and have not been answered, by id."""
        with self._lock:
            return dict(self._held)

    def serve(self, link: Link) -> None:
        """Compute what comes over a link until it ends.

        Raises:
            LinkError: It ended.
        """
        while True:
            frame = link.recv()
            if frame.kind == "x":
                self._work(link, frame)
            elif frame.kind == "ping":
                link.send(Frame("pong", {"id": frame.meta.get("id")}))
            else:
                raise FrameError(f"{frame.kind}: a link of data carries x and ping")

    def _work(self, link: Link, frame: Frame) -> None:
        began, number = time.monotonic(), frame.meta.get("id")
        if type(number) is not int:
            raise FrameError("x: has no id")
        try:
            with torch.inference_mode():
                out = self._run(decode_activation(frame.tensors, frame.meta))
            if not isinstance(out, Tensor):
                raise FrameError(f"{self._host} made no tensor of what it was sent")
            tensors, meta = encode_activation(out, self._codec if self._onward else "fp32")
        except Exception as error:  # of this request alone: the others go on
            known = isinstance(error, FedsysError)
            reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
            link.send(_failed(number, self._host, reason))
            return
        now = time.monotonic()
        self.computed, self.busy_s = self.computed + 1, self.busy_s + now - began
        part = {"host": self._host, "queue_s": began - frame.arrived_s, "compute_s": now - began}
        if self._onward is None:
            answer = {"id": number, "held_s": now - frame.arrived_s, "parts": [part], **meta}
            link.send(Frame("y", answer, tensors))
            return
        onward = Frame("x", {**meta, "id": number}, tensors)
        with self._lock:
            self._held[number] = SentOn(link, onward, frame.arrived_s, now, part)
        try:
            self._onward.send(onward)
        except LinkError as error:
            self._fail(number, first_line(error))

    def _read(self) -> None:
        assert self._onward is not None
        try:
            while True:
                self._answered(self._onward.recv())
        except LinkError as error:
            reason = first_line(error)
        for number in self.held:
            self._fail(number, reason)

    def _answered(self, frame: Frame) -> None:
        number = frame.meta.get("id")
        with self._lock:
            held = self._held.pop(number, None) if type(number) is int else None
        if held is None:  # answered already
            return
        if frame.kind != "y":
            with suppress(LinkError):
                held.upstream.send(frame)
            return
        now = time.monotonic()
        link_s = now - held.sent_s - float(frame.meta["held_s"])
        sent = sum(tensor.nbytes for tensor in held.frame.tensors.values())
        part = {**held.part, "link_s": link_s, "bytes": sent, "arrived_s": frame.arrived_s}
        parts = [part, *_listed(frame.meta.get("parts"))]
        meta = {**frame.meta, "held_s": now - held.arrived_s, "parts": parts}
        with suppress(LinkError):
            held.upstream.send(Frame("y", meta, frame.tensors))

    def _fail(self, number: int, reason: str) -> None:
        with self._lock:
            held = self._held.pop(number, None)
        if held is not None:
            with suppress(LinkError):
                held.upstream.send(_failed(number, self._onward_name, f"lost: {reason}"))

    def close(self) -> None:
        """End the link to the next host; requests that wait for it fail."""
        if self._onward is not None:
            self._onward.close()


def _failed(number: int, host: str, reason: str) -> Frame:
    return Frame("failed", {"id": number, "host": host, "reason": reason[:500]})


def _listed(parts: object) -> Sequence[Any]:
    return parts if isinstance(parts, list) else ()
