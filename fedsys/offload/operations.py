"""What a session does with one frame: the piece of a step, or the scoring of a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedsys.errors import FrameError, SessionError
from fedsys.offload.edge_part import EdgePart
from fedsys.offload.session_tensors import encoded, needed_of
from fedsys.offload.snapshot import SessionSpec, State, natural
from fedsys.offload.turns import Turns
from fedsys.training.part import keep_gradient
from fedsys.training.schedule import micro_batch_bounds
from fedsys.transport.nonzeros import Nonzeros
from fedsys.transport.wire import Frame


class Operations:
    """Carries out what is due. For one thread at a time.

    Args:
        spec: Of the session.
        part: Computes.
        turns: The position, which moves with each forward and backward that is done.
    """

    def __init__(self, spec: SessionSpec, part: EdgePart, turns: Turns) -> None:
        self._spec, self._part, self._turns = spec, part, turns
        # Label-private: output, where the gradient of the input will be, and what of it is needed
        self._open: dict[int, tuple[Tensor, list[Tensor], Nonzeros | None]] = {}

    def awaits_gradient(self, piece: int) -> bool:
        """Return whether the output of a piece was sent to the device, which has the labels."""
        return piece in self._open

    def activate(self, frame: Frame, piece: int) -> Frame:
        """Take the activation of a piece; reply with its output, or with its gradient."""
        part, turns, codec = self._part, self._turns, self._spec.codec_down
        batch = natural(frame, "batch")
        if batch < 1 or (piece and batch != turns.batch):
            raise FrameError(f"batch={batch}: must be at least 1, and the same for all pieces")
        start, stop = self._bounds(piece, batch)
        x = part.expected.activation(frame, stop - start)
        inputs = x, *part.expected.beside(frame, stop - start)
        part.arrived(frame, stop - start, forward=True)
        labels = None if part.private else part.expected.labels(frame, stop - start)
        if piece == 0:  # what is refused above has changed nothing
            turns.begin(batch)
            part.begin(turns.steps, batch)
        gradient = keep_gradient(x) if frame.meta.get("needs_gradient", True) else []
        needed = needed_of(frame)
        meta: dict[str, Any] = {"step": turns.steps, "piece": piece}
        if labels is None:
            out = part.compute(lambda: self._ahead(inputs, start, stop))
            self._open[piece] = out, gradient, needed
            return encoded("activation", out, {**meta, "at_us": part.ended()}, codec)
        more = part.compute(lambda: self._there_and_back(inputs, labels, start, stop))
        meta["at_us"] = part.ended()
        return encoded("gradient", _of(gradient), meta, codec, more, needed)

    def _bounds(self, piece: int, batch: int) -> tuple[int, int]:
        bounds = list(micro_batch_bounds(batch, self._spec.micro_batches))
        if piece >= len(bounds):
            raise SessionError(f"piece {piece} of a mini-batch with {batch} examples")
        return bounds[piece]

    def _ahead(self, inputs: Sequence[Tensor], start: int, stop: int) -> Tensor:
        out = self._part.ahead(inputs, start, stop)
        self._turns.forward += 1
        return out

    def _there_and_back(
        self, inputs: Sequence[Tensor], labels: Tensor, start: int, stop: int
    ) -> State:
        found = self._part.back(self._ahead(inputs, start, stop), labels)
        self._turns.backward += 1
        return found

    def take_back(self, frame: Frame, piece: int) -> Frame:
        """Take the gradient of what was sent for a piece; reply with that of its input."""
        out, gradient, needed = self._open[piece]
        self._part.arrived(frame, len(out), forward=False)
        came = self._part.expected.gradient(frame, out)
        del self._open[piece]
        if out.requires_grad:
            self._part.compute(lambda: out.backward(came))  # type: ignore[no-untyped-call]
        self._turns.backward += 1
        meta = {"step": self._turns.steps, "piece": piece, "at_us": self._part.ended()}
        return encoded("gradient", _of(gradient), meta, self._spec.codec_down, nonzeros=needed)

    def evaluate(self, frame: Frame) -> Frame:
        """Score a mini-batch, forward only; neither draws nor statistics change."""
        tensor = self._part.expected.activation(frame, None)
        inputs = tensor, *self._part.expected.beside(frame, len(tensor))
        out = self._part.compute(lambda: self._part.scored(*inputs))
        meta = {"index": natural(frame, "index")}
        return Frame("outputs", {**meta, "codec": "fp32"}, {"x": out.clone()})


def _of(gradient: list[Tensor]) -> Tensor | None:
    """Return the gradient that backward has left; None if it left none."""
    return gradient[0] if gradient else None
