"""Operations that a device sent and that were not answered yet, and answers that nobody took yet.

What is not answered is kept as it was encoded, to be sent again over another link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fedsys.offload.snapshot import natural
from fedsys.transport.wire import Frame, encode_parts

Operation = tuple[str, int, int]
"""Kind, step, piece."""

_REPLY = {
    ("activation", False): "gradient",
    ("activation", True): "activation",
    ("gradient", True): "gradient",
    ("norms", False): "norms",
    ("norms", True): "norms",
    ("evaluate", False): "outputs",
    ("done", False): "done",
    ("recut", False): "recut",
}


class Outstanding:
    """The operations of one session. For one thread.

    Args:
        private: Whether the edge's outputs come back (label-private cut).
        clock: Seconds.

    Attributes:
        step: That of the operation which was prepared last.
    """

    def __init__(self, private: bool, clock: Callable[[], float]) -> None:
        self.step = 0
        self._private, self._clock = private, clock
        self._sent: dict[Operation, tuple[float, list[Any]]] = {}
        self._answers: dict[Operation, Frame] = {}
        self._furthest: dict[str, tuple[int, int]] = {}  # position answered, by kind of answer

    def prepare(
        self,
        kind: str,
        step: int,
        piece: int,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> int:
        """Encode an operation; return its bytes. Its tensors must not change until the answer."""
        name, self.step = "index" if kind == "evaluate" else "piece", step
        frame = Frame(kind, {"step": step, name: piece, **meta}, tensors)
        parts: list[Any] = encode_parts(frame)
        self._sent[kind, step, piece] = (self._clock(), parts)
        return sum(len(part) for part in parts)

    def posted(self, kind: str, step: int, piece: int) -> list[Any]:
        """Return what is to be sent of an operation that was prepared; it counts as sent now."""
        _, parts = self._sent[kind, step, piece]
        self._sent[kind, step, piece] = (self._clock(), parts)
        return parts

    def unanswered(self) -> list[list[Any]]:
        """Return what is to be sent again, in the order in which it was sent."""
        return [parts for _, parts in self._sent.values()]

    def awaited(self) -> list[Operation]:
        """Return the operations of training whose answers are waited for."""
        return [operation for operation in self._sent if operation[0] != "evaluate"]

    def is_answered(self, kind: str, step: int, piece: int) -> bool:
        """Return whether the answer to an operation is there."""
        return (self._answer(kind), step, piece) in self._answers

    def answered(self, kind: str, step: int, piece: int) -> tuple[Frame, float]:
        """Return the answer to an operation, once, and the seconds since that was sent."""
        now = self._clock()
        sent, _ = self._sent.pop((kind, step, piece), (now, []))
        return self._answers.pop((self._answer(kind), step, piece)), now - sent

    def take(self, frame: Frame) -> bool:
        """Take an answer in; return whether it is one for which nothing came so far before."""
        if frame.kind == "outputs":
            step, index = 0, natural(frame, "index")
        else:
            step = natural(frame, "step")
            index = natural(frame, "piece") if "piece" in frame.meta else 0
        further = (step, index) > self._furthest.get(frame.kind, (-1, -1))
        if further:
            self._furthest[frame.kind] = step, index
        asked = {"gradient": "gradient" if self._private else "activation", "outputs": "evaluate"}
        if (asked.get(frame.kind, frame.kind), step, index) in self._sent:
            self._answers[frame.kind, step, index] = frame  # others came twice: forget them
        return further

    def forget(self) -> None:
        """Forget what was sent and not answered."""
        self._sent.clear()
        self._answers.clear()

    def _answer(self, kind: str) -> str:
        """Return the kind of the answer to an operation."""
        return _REPLY[kind, self._private and kind in ("activation", "gradient", "norms")]
