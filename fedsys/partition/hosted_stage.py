"""One host's part of a pipeline: it computes what arrives, and passes on what it made.

::

    upstream ──x──▶ [queue of the link] ──▶ compute ──x──▶ downstream
             ◀──y──────────────────────────────────── reader ◀──y──

The thread of the link from upstream computes, so a request costs no change of threads; another one
reads answers from downstream. What was sent on is held until its answer has passed: when the next
host is lost, its requests are here, with their ids. Either they fail then, or (`holds`) they stay
until `divert` gives them, and all that come, to a stage of another pipeline on this host, which
goes on from the boundary where they are. A stage that is dropped says so of what it has: these may
be requests of other pipelines, which then are asked anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from fedsys.errors import FedsysError, FrameError, LinkError, first_line
from fedsys.transport.codecs import decode_activations, encode_activations
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

Run = Callable[..., Any]
Tensors = tuple[Tensor, ...]
"""What crosses a cut: one tensor, or several."""


@dataclass(frozen=True)
class StagePiece:
    """Some of what a stage computes.

    Attributes:
        first: The boundary of the model from which it goes on: the index of a unit.
        run: Computes it, of one tensor or several; returns one, or a tuple of several.
    """

    first: int
    run: Run


@dataclass(frozen=True)
class Onward:
    """Where a stage sends what it made.

    Attributes:
        link: To the next host; None from the last one.
        name: Of the next host, for answers.
        codec: How what goes on is written.
        holds: Whether requests stay here when the next host is lost, instead of failing.
    """

    link: Link | None = None
    name: str = ""
    codec: str = "fp32"
    holds: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Underway:
    """A request that is here, or was sent on and has not been answered.

    Attributes:
        number: Its id.
        upstream: Where its answer goes.
        arrived_s: When it came, by `time.monotonic`.
        part: What this host did for it.
        frame: What was sent on; None as long as it is here.
        sent_s: When it was sent on.
    """

    number: int
    upstream: Link
    arrived_s: float
    part: Mapping[str, Any]
    frame: Frame | None = None
    sent_s: float = 0.0


class _Dropped(FrameError):
    """The stage is dropped, and computes no more."""


@final
class HostedStage:
    """Computes one part of a pipeline until it is closed.

    Args:
        host: Name of this host, for answers.
        pieces: What it computes, one after the other; none of them for no units.
        end: The boundary of the model behind the last of them.
        onward: Where it sends what it made.
        by: What the last host says of who answered.
    """

    def __init__(
        self,
        host: str,
        pieces: Sequence[StagePiece],
        end: int,
        onward: Onward = Onward(),
        by: str = "",
    ) -> None:
        self._host, self._pieces, self._end = host, tuple(pieces), end
        self._onward, self._by = onward, by
        self._held: dict[int, Underway] = {}
        self._lock = threading.Lock()
        self._computing, self._idle = 0, threading.Condition(self._lock)
        self._instead: tuple[HostedStage, int] | None = None
        self._upstreams: tuple[Link, ...] = ()
        self._closed = False
        self.computed, self.busy_s = 0, 0.0
        if onward.link is not None:
            threading.Thread(
                target=self._read, args=(onward.link,), name="answers", daemon=True
            ).start()

    @property
    def held(self) -> Mapping[int, Underway]:
        """Requests that were sent on and have not been answered, by id."""
        with self._lock:
            return dict(self._held)

    @property
    def boundaries(self) -> frozenset[int]:
        """Where a request may go on in this stage."""
        return frozenset({*(piece.first for piece in self._pieces), self._end})

    def serve(self, link: Link) -> None:
        """Compute what comes over a link until it ends.

        Raises:
            LinkError: It ended.
        """
        with self._lock:
            self._upstreams += (link,)
        try:
            while True:
                frame = link.recv()
                if frame.kind == "x":
                    self._work(link, frame)
                elif frame.kind == "ping":
                    link.send(Frame("pong", {"id": frame.meta.get("id")}))
                else:
                    raise FrameError(f"{frame.kind}: a link of data carries x and ping")
        finally:
            with self._lock:
                self._upstreams = tuple(one for one in self._upstreams if one is not link)

    def _work(self, link: Link, frame: Frame) -> None:
        began, number = time.monotonic(), frame.meta.get("id")
        if type(number) is not int:
            raise FrameError("x: has no id")
        part = {"host": self._host, "queue_s": began - frame.arrived_s, "compute_s": 0.0}
        one = Underway(number, link, frame.arrived_s, part)
        self._go_on(one, lambda: decode_activations(frame.tensors, frame.meta), None)

    def resume(self, one: Underway, values: Callable[[], Tensors], first: int) -> None:
        """Go on with a request of another pipeline of this host, from a boundary of the model.

        Args:
            one: The request.
            values: What it is at that boundary.
            first: The boundary: one of `boundaries`.
        """
        self._go_on(one, values, first)

    def _go_on(self, one: Underway, values: Callable[[], Tensors], first: int | None) -> None:
        """Compute the pieces from a boundary on (None: all), and pass on what they make."""
        began = time.monotonic()
        try:
            with self._occupied(), torch.inference_mode():
                out = values()
                for piece in self._pieces:
                    if first is None or piece.first >= first:
                        out = tensors_of(piece.run(*out), self._host)
            if self._onward.link is None and self._instead is None and len(out) > 1:
                raise FrameError(f"{self._host} ends the model, and made {len(out)} tensors")
            codec = self._onward.codec if self._onward.link else "fp32"
            tensors, meta = encode_activations(out, codec)
        except Exception as error:  # of this request alone: the others go on
            known = isinstance(error, FedsysError)
            reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
            with suppress(LinkError):
                dropped = isinstance(error, _Dropped)
                one.upstream.send(_failed(one.number, self._host, reason, dropped))
            return
        now = time.monotonic()
        self.computed, self.busy_s = self.computed + 1, self.busy_s + now - began
        part = {**one.part, "compute_s": one.part["compute_s"] + now - began}
        frame = Frame("x", {**meta, "id": one.number}, tensors)
        self._pass_on(replace(one, part=part, frame=frame, sent_s=now), out)

    @contextmanager
    def _occupied(self) -> Iterator[None]:
        """Keep the modules while something is computed; raise once they may be taken apart."""
        with self._lock:
            if self._closed:
                raise _Dropped("the pipeline was dropped")
            self._computing += 1
        try:
            yield
        finally:
            with self._idle:
                self._computing -= 1
                self._idle.notify_all()

    def _pass_on(self, one: Underway, out: Tensors) -> None:
        onward = self._onward.link
        with self._lock:
            instead = self._instead
            if instead is None and onward is not None:
                self._held[one.number] = one
        assert one.frame is not None
        if instead is not None:
            stage, first = instead
            stage.resume(one, lambda: out, first)
        elif onward is None:
            meta = {**one.frame.meta, "held_s": one.sent_s - one.arrived_s, "parts": [one.part]}
            with suppress(LinkError):
                one.upstream.send(Frame("y", {**meta, "by": self._by}, one.frame.tensors))
        else:
            try:
                onward.send(one.frame)
            except LinkError as error:
                if self._closed or not self._onward.holds:
                    self._fail(one.number, first_line(error))

    def divert(self, stage: HostedStage, first: int) -> int:
        """Let another stage of this host go on with what is held here, and with all that comes.

        Args:
            stage: Of another pipeline.
            first: The boundary at which requests are when they leave this stage.

        Returns:
            How many were held.

        Raises:
            FrameError: The other stage does not begin, end or pause there.
        """
        if first not in stage.boundaries:
            raise FrameError(f"{self._host} cannot go on at {first}: {sorted(stage.boundaries)}")
        with self._lock:
            self._instead = stage, first
            held, self._held = list(self._held.values()), {}
        for one in held:
            stage.resume(one, lambda one=one: _values_of(one), first)  # type: ignore[misc]
        return len(held)

    def _read(self, onward: Link) -> None:
        try:
            while True:
                self._answered(onward.recv())
        except LinkError as error:
            reason = first_line(error)
        if self._onward.holds and not self._closed:
            self._tell(Frame("lost", {"host": self._onward.name, "reason": reason[:500]}))
            return
        for number in self.held:
            self._fail(number, reason)

    def _tell(self, frame: Frame) -> None:
        for link in self._upstreams:
            with suppress(LinkError):
                link.send(frame)

    def _answered(self, frame: Frame) -> None:
        if frame.kind == "lost":  # further on in the chain
            self._tell(frame)
            return
        number = frame.meta.get("id")
        with self._lock:
            held = self._held.pop(number, None) if type(number) is int else None
        if held is None or held.frame is None:  # answered already
            return
        if frame.kind != "y":
            with suppress(LinkError):
                held.upstream.send(frame)
            return
        with suppress(LinkError):
            held.upstream.send(_passed_back(held, held.frame, frame))

    def _fail(self, number: int, reason: str) -> None:
        with self._lock:
            held = self._held.pop(number, None)
        if held is not None:
            with suppress(LinkError):
                lost = f"lost: {reason}"
                held.upstream.send(_failed(number, self._onward.name, lost, self._closed))

    def close(self, longest_s: float = 30.0) -> bool:
        """End the link to the next host; requests that wait for it fail, as dropped.

        Args:
            longest_s: How long it waits for what is computed now, in seconds.

        Returns:
            Whether nothing is computed any more, so that the modules may be taken apart.
        """
        with self._idle:
            self._closed = True
            over = self._idle.wait_for(lambda: not self._computing, longest_s)
        if self._onward.link is not None:
            self._onward.link.close()
        for number in self.held:  # who reads has ended if the next host was lost before
            self._fail(number, "the pipeline was dropped")
        return over


def tensors_of(out: object, host: str) -> Tensors:
    """Return what units made as a tuple.

    Raises:
        FrameError: It is neither a tensor nor a tuple of them.
    """
    values = out if isinstance(out, tuple) else (out,)
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise FrameError(f"{host} made no tensor of what it was sent")
    return values


def _values_of(one: Underway) -> Tensors:
    assert one.frame is not None
    return decode_activations(one.frame.tensors, one.frame.meta)


def _passed_back(held: Underway, sent: Frame, answer: Frame) -> Frame:
    """Return an answer with what this host did, and how long its tensors were on the link."""
    now = time.monotonic()
    link_s = now - held.sent_s - float(answer.meta["held_s"])
    count = sum(tensor.nbytes for tensor in sent.tensors.values())
    part = {**held.part, "link_s": link_s, "bytes": count, "arrived_s": answer.arrived_s}
    parts = [part, *_listed(answer.meta.get("parts"))]
    meta = {**answer.meta, "held_s": now - held.arrived_s, "parts": parts}
    return Frame("y", meta, answer.tensors)


def _failed(number: int, host: str, reason: str, dropped: bool) -> Frame:
    meta = {"id": number, "host": host, "reason": reason[:500], "dropped": dropped}
    return Frame("failed", meta)


def _listed(parts: object) -> Sequence[Any]:
    return parts if isinstance(parts, list) else ()
