"""Whose turn it is in the dialogue of a session: its position, and the replies that are kept.

Nothing here computes with tensors: what stands between two frames and the next position is the
same for a session that trains, that is replicated, and that has moved.
"""

from __future__ import annotations

from collections.abc import Collection

from fedsys.errors import SessionError
from fedsys.transport.wire import Frame

Awaited = tuple[str, int, int]
"""An operation whose answer a device waits for: kind, step, piece."""


class Turns:
    """The position of one session in its round. For one thread at a time.

    Frames may come in any order within a step; `due` gives them in the order of the pieces.

    Args:
        session: Name of the session, for messages.
        micro_batches: Pieces of a mini-batch, as far as it has as many examples.
        steps: Steps that are done.

    Attributes:
        steps: Steps that are done.
        batch: Examples of the mini-batch in work, or of the last one.
        forward: Pieces of the step in work whose activation was taken.
        backward: Pieces of the step in work that are done.
    """

    def __init__(self, session: str, micro_batches: int, steps: int) -> None:
        self.steps, self.batch = steps, 0
        self.forward = self.backward = 0
        self._session, self._micro_batches = session, micro_batches
        self._early: dict[tuple[str, int], Frame] = {}
        self._replies: dict[tuple[str, int, int], Frame] = {}

    @property
    def pieces(self) -> int:
        """Pieces of the mini-batch in work."""
        return min(self.batch, self._micro_batches)

    @property
    def complete(self) -> bool:
        """Whether all pieces of the step in work are done."""
        return 0 < self.backward == self.pieces

    def check_between(self) -> None:
        """Check that no step is in work.

        Raises:
            SessionError: One is begun and not finished.
        """
        if self.forward or self._early:
            raise SessionError(f"session {self._session} is in the middle of step {self.steps}")

    def answered(self, kind: str, step: int, piece: int) -> Frame | None:
        """Return the reply to an operation that was done before; None if it is to be done now.

        Raises:
            SessionError: It is for another step.
        """
        known = self._replies.get((kind, step, piece))
        if known is None and step != self.steps:
            raise SessionError(
                f"{kind} for step {step} of session {self._session}, where step {self.steps} is due"
            )
        return known

    def check_piece(self, piece: int) -> None:
        """Check that the step in work has a piece.

        Raises:
            SessionError: It has not.
        """
        if piece >= (self.pieces if self.forward else self._micro_batches):
            raise SessionError(f"piece {piece} of {self._micro_batches}")

    def put(self, frame: Frame, piece: int) -> None:
        """Take the frame of a piece of the step in work."""
        self._early[frame.kind, piece] = frame

    def due(self) -> tuple[Frame, int] | None:
        """Return the frame that is to be worked at next, with its piece; None: one must come."""
        for key in (("activation", self.forward), ("gradient", self.backward)):
            if key in self._early:
                return self._early.pop(key), key[1]
        return None

    def begin(self, batch: int) -> None:
        """Begin the mini-batch of a step; only replies of the step before are kept."""
        self.batch = batch
        self._replies = {k: v for k, v in self._replies.items() if k[1] == self.steps - 1}

    def keep(self, kind: str, step: int, piece: int, reply: Frame) -> None:
        """Keep the reply to an operation, in case that it comes again."""
        self._replies[kind, step, piece] = reply

    def replies_before(self) -> tuple[Frame, ...]:
        """Return the replies of the step before the one in work, each with what it answers.

        That to a change of the cut is among them: it comes before the first piece of a step, and
        what it did is in the state.
        """
        return tuple(
            Frame(reply.kind, {**reply.meta, "for": kind}, reply.tensors)
            for (kind, step, _), reply in self._replies.items()
            if step == self.steps - 1 or kind == "recut"
        )

    def replies_to(self, awaited: Collection[Awaited]) -> list[Frame]:
        """Return the replies to some operations, as far as there are any, in a fixed order."""
        return [self._replies[key] for key in sorted(set(awaited)) if key in self._replies]

    def end(self) -> None:
        """End the step in work."""
        self.forward = self.backward = 0
        self._early.clear()
        self.steps += 1
