"""One mini-batch of a device that trains together with an edge: its operations in their order.

What is sent is on its way while the next operation computes, and the mini-batch after this one is
loaded by another thread from the moment at which the first answer is awaited: earlier it would
compete with the forwards, and in this thread it would delay a backward whose answer is there. More
cannot be done ahead: the first forward of the next mini-batch needs the parameters after this one's
optimizer step, which needs the last gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clients.roaming import Roaming
from fedsys.config import ScheduleConfig
from fedsys.offload.emulation import Pace
from fedsys.offload.remote import Remote
from fedsys.planning.assignment import Assignment
from fedsys.privacy.part import Stepping
from fedsys.randomness import Address, drawing, rows
from fedsys.runs.tracing import Recorder
from fedsys.training import plain as training
from fedsys.training.part import keep_gradient, safe_input
from fedsys.training.plain import Score
from fedsys.training.precision import autocast, for_loss
from fedsys.training.schedule import micro_batch_bounds, operations
from fedsys.training.tasks import CLASSIFICATION, Task
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.nonzeros import SKIP, Nonzeros, restored
from fedsys.transport.several import Inputs, beside
from fedsys.transport.wire import Frame


@dataclass
class Tally:
    """What was seen so far in the round."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    hits: float = 0  # of whole numbers one of them
    examples: int = 0

    def copy(self) -> Tally:
        """Return the same sums, to go on from or to come back to."""
        return Tally(self.loss.clone(), self.hits, self.examples)

    def score(self, steps: int) -> Score:
        """Return the score over all examples of a number of steps; NaN for no examples."""
        if not self.examples:
            return Score(math.nan, math.nan, 0, steps)
        return Score(
            float(self.loss) / self.examples, self.hits / self.examples, self.examples, steps
        )


class LoadedBatch(NamedTuple):
    """A mini-batch, and when it was loaded.

    Attributes:
        x: Inputs ``(batch, …)``, of one tensor or several.
        y: Labels ``(batch,)``.
        span: Begin and end, in seconds of the monotonic clock.
    """

    x: Inputs
    y: Tensor
    span: tuple[float, float]


class Batches:
    """The mini-batches of a round, loaded one ahead by a thread that ends with the context.

    Args:
        source: Inputs and labels; only that thread asks for them.
        device: Where they are needed.
    """

    def __init__(self, source: Iterator[tuple[Inputs, Tensor]], device: torch.device) -> None:
        self._source, self._device = source, device
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loads")
        self._next: Future[LoadedBatch | None] | None = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.shutdown(cancel_futures=True)

    def load(self) -> Future[LoadedBatch | None] | None:
        """Begin to load the next mini-batch; return None if that was begun already."""
        if self._next is not None:
            return None
        self._next = self._loader.submit(self._load)
        return self._next

    def take(self) -> LoadedBatch | None:
        """Return the next mini-batch once it is loaded; None after the last one.

        Raises:
            Exception: What the source raised.
        """
        self.load()
        assert self._next is not None
        taken, self._next = self._next, None
        return taken.result()

    def _load(self) -> LoadedBatch | None:
        began = time.monotonic()
        if (found := next(self._source, None)) is None:
            return None
        x, y = found[0].to(self._device), found[1].to(self._device)
        return LoadedBatch(x, y, (began, time.monotonic()))


@dataclass(frozen=True)
class Split:
    """How a device shares a model with its edge.

    Attributes:
        assignment: Cut, pieces of a mini-batch, and codecs.
        tail: Units ``[tail, L)`` are on the device too.
        units: Number of units, L.
        schedule: Order of the pieces.
        given: Which of several inputs go to the edge as they are, beside what crosses the cut.
        kept: Which of them units ``[tail, L)`` need.
        skips_zeros: Whether gradients come without what the activation has zeros for, where no
            unit of the device needs it.
    """

    assignment: Assignment
    tail: int
    units: int
    schedule: ScheduleConfig
    given: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    skips_zeros: bool = False

    @property
    def private(self) -> bool:
        """Whether the last units, and with them the labels, are on the device."""
        return self.tail < self.units


class Steps:
    """Works through mini-batches together with an edge. For one thread.

    Args:
        split: Who does what.
        address: Seed, client and round.
        remote: The session.
        pace: When operations end.
        recorder: Takes note of them.
        device: Where the device computes.
        roaming: Moves of the device in this round; None: there are none.
        task: Tells the metric.
        precision: In which forwards compute, as ``client.precision``.
    """

    def __init__(
        self,
        split: Split,
        address: Address,
        remote: Remote,
        pace: Pace,
        recorder: Recorder,
        device: torch.device,
        roaming: Roaming | None = None,
        task: Task = CLASSIFICATION,
        precision: str = "fp32",
    ) -> None:
        self._task, self._precision = task, precision
        self._device, self._roaming = device, roaming
        self._split, self._address, self._remote = split, address, remote
        self._cut = split.assignment.cut
        self._pace, self._recorder = pace, recorder
        self._step = 0
        self._sent: dict[int, Tensor] = {}
        self._needed: dict[int, Nonzeros] = {}  # where what was sent needs a gradient
        self._posted: dict[tuple[str, int], tuple[float, int]] = {}  # when, and how many bytes
        self._returned: dict[int, tuple[Tensor, Tensor]] = {}  # label-private: loss and hits

    def shared_as(self, split: Split) -> None:
        """Go on with another cut."""
        self._split, self._cut = split, split.assignment.cut

    def take(self, step: int, batches: Batches) -> LoadedBatch | None:
        """Return the mini-batch of a step, loaded ahead or now; None after the last one."""
        self._load(batches)
        loaded = batches.take()
        if loaded is not None and self._pace.costs is None:
            self._recorder.note("load", step, -1, loaded.span, "loader")
        return loaded

    def do(
        self, step: int, part: Stepping, x: Inputs, y: Tensor, tally: Tally, batches: Batches
    ) -> None:
        """Do one mini-batch: forwards, backwards, optimizer step.

        Args:
            step: Its index in the round.
            part: The device's units.
            x: Inputs ``(batch, …)``.
            y: Labels ``(batch,)``.
            tally: Receives loss and hits.
            batches: Gives the mini-batch that is loaded ahead.

        Raises:
            Moved: The session goes on elsewhere.
            EdgesLost: No edge has it.
        """
        self._step = step
        self._sent.clear()
        self._needed.clear()
        self._posted.clear()
        self._returned.clear()
        part.begin()
        size, (front, back) = len(y), part.part.modules
        bounds = list(micro_batch_bounds(size, self._split.assignment.pieces))
        inputs: list[tuple[Inputs, Tensor]]
        inputs = [(x, y)] if len(bounds) == 1 else [(x[a:b], y[a:b]) for a, b in bounds]
        schedule, private = self._split.schedule, self._split.private
        plan = operations(schedule.kind, len(bounds), schedule.depth, tail=private)
        with drawing(self._address, step, size):
            for operation, piece in plan:
                with rows(*bounds[piece]):
                    recording = part.recording(piece, len(inputs[piece][1]))
                    if operation == "forward":
                        with recording:
                            self._forward(piece, size, front, *inputs[piece])
                        continue
                    self._load(batches)  # while the first answer is awaited
                    if operation == "tail":
                        with recording:
                            self._tail(piece, part, back, inputs[piece], size)
                    else:
                        loss, hits = self._backward(piece, len(inputs[piece][1]))
                        tally.loss += loss * size
                        tally.hits += hits
        self._update(part)
        tally.examples += size

    def _load(self, batches: Batches) -> None:
        """Begin to load the next mini-batch, unless that was done."""
        begun = batches.load()
        if begun is not None and self._pace.costs is not None:
            loaded = begun.result()
            self._pace.owe(0.0 if loaded is None else len(loaded.y) * self._pace.costs.load_s)

    # --- operations -------------------------------------------------------------------------------

    def _forward(self, piece: int, size: int, front: nn.Module, x: Inputs, labels: Tensor) -> None:
        if self._roaming is not None:
            self._roaming.at(self._step, piece)
        self._pace.begin()
        z = training.forward(front, x, self._precision)
        skips = self._split.skips_zeros and z.requires_grad
        tensors, codec = encode_activation(z, self._split.assignment.codec_up, mark=skips)
        if skips:
            self._needed[piece], codec[SKIP] = Nonzeros(tensors["x"]), True
        tensors = {**tensors, **beside(x, self._split.given)}
        if not self._split.private:
            tensors = {**tensors, "labels": labels}
        meta = {**codec, "batch": size, "needs_gradient": z.requires_grad}
        nbytes = self._remote.prepare("activation", self._step, piece, meta, tensors)
        self._end("forward", piece, 0, len(labels), 0, self._cut, up=nbytes)
        self._sent[piece] = z
        self._post("activation", piece, nbytes)

    def _tail(
        self, piece: int, part: Stepping, back: nn.Module, given: tuple[Inputs, Tensor], size: int
    ) -> None:
        """Compute the last units, the loss, and the gradient that goes back to the edge."""
        x, labels = given
        answer = self._await("activation", piece)
        z = self._decoded(answer)
        kept = keep_gradient(z)
        with autocast(self._precision, z):
            outputs = back(safe_input(back, z), *beside(x, self._split.kept).values())
        outputs = for_loss(outputs, self._precision)
        loss = part.back(outputs, labels, size)
        gradient = kept[0] if kept else torch.zeros_like(z)
        tensors, codec = encode_activation(gradient, self._split.assignment.codec_up)
        nbytes = self._remote.prepare("gradient", self._step, piece, codec, tensors)
        self._returned[piece] = loss, self._task.total(outputs.detach(), labels)
        down, split = answer.encoded_bytes, self._split
        self._end("tail", piece, 2, len(labels), split.tail, split.units, up=nbytes, down=down)
        self._post("gradient", piece, nbytes)

    def _backward(self, piece: int, size: int) -> tuple[Tensor, float]:
        """Compute with the gradient of an activation; return loss and hits of the piece."""
        needed = self._needed.pop(piece, None)
        if needed is not None:
            needed.find()  # while the answer is on its way
        answer = self._await("gradient" if self._split.private else "activation", piece)
        z = self._sent.pop(piece)
        if z.requires_grad:
            gradient = self._decoded(answer, needed)
            self._remote.traffic.gradients += z.numel()
            self._remote.traffic.needed += answer.tensors["x"].numel()
            z.backward(gradient)  # type: ignore[no-untyped-call]  # no type in torch
        self._end("backward", piece, 1, size, 0, self._cut, down=answer.encoded_bytes)
        if self._split.private:
            loss, hits = self._returned.pop(piece)
            return loss.cpu(), hits.item()
        return answer.tensors["loss"], answer.tensors["hits"].item()

    def _update(self, part: Stepping) -> None:
        self._pace.begin()
        told = part.told()
        if part.exchanges:
            self._remote.send("norms", self._step, 0, *told)
            answer = self._remote.receive("norms", self._step, 0)
            part.take(answer.meta, answer.tensors)
        part.step(self._step)
        costs = self._pace.costs
        seconds = 0.0
        if costs is not None:
            seconds = sum(costs.update_s[: self._cut]) + sum(costs.update_s[self._split.tail :])
        self._recorder.note("update", self._step, -1, self._pace.end(seconds))
        self._recorder.note("load", self._step, -1, self._pace.settle())
        self._recorder.finished(self._pace.real(), self._pace.late_s)

    # --- what surrounds them ----------------------------------------------------------------------

    def _post(self, kind: str, piece: int, nbytes: int) -> None:
        now = self._pace.now()
        self._posted[kind, piece] = now, nbytes
        self._remote.post(kind, self._step, piece)
        self._recorder.note("send", self._step, piece, (now, self._pace.now()))

    def _await(self, kind: str, piece: int) -> Frame:
        """Return the answer to an operation, with which the next one begins."""
        idle = self._pace.now()
        answer = self._remote.receive(kind, self._step, piece)
        loaded = self._pace.begin(answer.arrived_s)
        self._recorder.note("load", self._step, -1, loaded)
        self._recorder.note("wait", self._step, piece, (max(idle, loaded[1]), answer.arrived_s))
        arrived = answer.arrived_s, answer.encoded_bytes
        sent, told = self._posted.pop((kind, piece), (0.0, 0)), answer.meta.get("at_us")
        self._recorder.answer(self._step, piece, sent, arrived, told)
        return answer

    def _end(
        self, name: str, piece: int, which: int, rows_: int, first: int, last: int,
        *, up: int = 0, down: int = 0,
    ) -> None:  # fmt: skip
        """End an operation: `which` is 0 for a forward, 1 for a backward, 2 for both.

        `up` and `down` are the bytes of its messages, 0 for none.
        """
        costs, seconds = self._pace.costs, 0.0
        if costs is not None:
            both = costs.seconds(rows_, first, last)
            seconds = sum(both) if which == 2 else both[which]
            if name == "forward":
                seconds += costs.release_seconds(rows_, last)
            ways = zip((up, down), self._split.assignment.codecs, strict=True)
            seconds += sum(costs.messaging.seconds(n, codec) for n, codec in ways if n)
        self._recorder.note(name, self._step, piece, self._pace.end(seconds))

    def _decoded(self, answer: Frame, needed: Nonzeros | None = None) -> Tensor:
        tensors = restored(answer.tensors, answer.meta, needed)
        return decode_activation(tensors, answer.meta).to(self._device)
