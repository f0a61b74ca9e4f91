"""A session: one device's part of the model on an edge server, and the turns of their dialogue.

A session holds units ``[first, last)`` of a layered model with their optimizer. The device sends
frames; each is one operation at a position (step, micro-batch), and has one reply::

    activation  {step, piece, batch}   x, labels   ─▶  gradient {step, piece}  x, loss, hits
    norms       {step, norms}                      ─▶  norms    {step, norms}   only when clipping
    norms       {step, batch}          squares     ─▶  norms    {step}  squares by example
    evaluate    {index}                x           ─▶  outputs  {index}        x
    recut       {step, first}          units       ─▶  recut    {step}         units

Between two steps a device may change the cut: it sends the units that go to the edge, or gets those
that come to it, with all that is kept beside their parameters.

If the last units are on the device too (label-private), the edge never sees labels or a loss, and
forward and backward are two operations::

    activation  {step, piece, batch}   x           ─▶  activation {step, piece} x
    gradient    {step, piece}          x           ─▶  gradient   {step, piece} x

Gradients of the micro-batches add up in the order of the pieces, whatever the order of the frames;
after the last one the session steps. Replies of the present step and of the one before are kept:
an operation that comes again, because a link was lost, is answered again and not done again. An
operation for any other position is refused.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator

import torch

from fedsys.errors import LinkClosed, SessionError
from fedsys.offload.edge_part import EdgePart
from fedsys.offload.edge_session import Follower
from fedsys.offload.emulation import Workers
from fedsys.offload.operations import Operations
from fedsys.offload.sealing import Sealed, digest_of
from fedsys.offload.snapshot import SessionPosition, SessionSpec, Snapshot, natural
from fedsys.offload.turns import Awaited, Turns
from fedsys.transport.security import new_token
from fedsys.transport.wire import Frame


class Session:
    """The edge's part in training, behind the dialogue described above.

    Args:
        spec: What the server app said.
        start: Where to begin: the state at a step.
        device: Where to compute.
        replicate: Called with a snapshot after every ``replicate_every`` steps.
        workers: What the sessions of an edge server share; None: this one is alone.

    Attributes:
        incarnation: Differs between a session and one that replaced it.
    """

    def __init__(
        self,
        spec: SessionSpec,
        start: Snapshot,
        device: torch.device,
        replicate: Callable[[SessionSpec, Snapshot], None] = lambda spec, snapshot: None,
        workers: Workers | None = None,
    ) -> None:
        self.spec, self.incarnation = spec, new_token()
        self._replicate = replicate
        self._where = device, workers or Workers("")
        self._part = EdgePart(spec, start, *self._where)
        self._turns = Turns(spec.id, spec.micro_batches, start.step)
        self._operations = Operations(spec, self._part, self._turns)
        self._done: list[Frame] = []  # operations of the step in work, to be done again elsewhere
        self._follower: Follower | None = None
        self._frozen = False
        self._lock = threading.RLock()

    @property
    def lost(self) -> bool:
        """Whether the process that has it is gone: it would be this one."""
        return False

    @property
    def steps(self) -> int:
        """Steps done in this round, those before the start included; without waiting."""
        return self._turns.steps

    def handle(self, frame: Frame) -> Iterator[Frame]:
        """Do the operation of a frame and yield the replies that are due, in order.

        The iterator must be exhausted, whatever becomes of the replies.

        Raises:
            SessionError: The operation is not for the position at which the session is.
            FrameError: The frame lacks something, or a tensor has another shape or type.
            LinkClosed: The session was frozen.
        """
        if self._follower is not None and frame.kind == "activation":
            step = natural(frame, "step")
            if step == self.steps:  # else it is repeated, or refused
                self._follower.let_catch_up(step)
        with self._lock:
            if self._frozen:
                raise LinkClosed(f"session {self.spec.id} is no longer here")
            if frame.kind == "evaluate":
                yield self._operations.evaluate(frame)
                return
            if frame.kind not in ("activation", "gradient", "norms", "recut"):
                raise SessionError(f"{frame.kind}: not an operation of a session")
            step = natural(frame, "step")
            piece = natural(frame, "piece") if frame.kind in ("activation", "gradient") else 0
            known = self._turns.answered(frame.kind, step, piece)
            if known is not None:
                yield known
            elif frame.kind == "recut":
                yield self._recut(frame)
            elif frame.kind == "norms":
                yield from self._finish_with(frame)
            else:
                yield from self._in_turn(frame, piece)

    def snapshot(self) -> Snapshot:
        """Return the state between two steps.

        Raises:
            SessionError: A step is begun and not finished.
        """
        with self._lock:
            self._turns.check_between()
            return self._part.snapshot(self.steps)

    def freeze(self) -> Snapshot:
        """Return the state between two steps, and do nothing more from here on.

        Raises:
            SessionError: A step is begun and not finished.
        """
        with self._lock:
            snapshot = self.snapshot()
            self._frozen = True
            return snapshot

    def hold_still(self) -> SessionPosition:
        """Return the state as it is, also within a step, and do nothing more until `go_on`."""
        with self._lock:
            self._frozen = True
            return self.as_it_stands()

    def as_it_stands(self) -> SessionPosition:
        """Return the state as it is, also within a step."""
        with self._lock:
            snapshot = self._part.snapshot(self.steps, begun=bool(self._done))
            replies = self._turns.replies_before()
            return SessionPosition(snapshot, self.incarnation, tuple(self._done), replies)

    def followed(self, follower: Follower | None) -> SessionPosition:
        """Return the state as it is; `follower` takes each operation after that, in order."""
        with self._lock:
            self._follower = follower
            return self.as_it_stands()

    def sealed(self, awaited: Collection[Awaited]) -> Sealed:
        """Do nothing more until `go_on`, and return what two that are the same have in common.

        Args:
            awaited: Operations whose answers the device waits for.
        """
        with self._lock:
            self._frozen, frozen_s = True, time.monotonic()
            snapshot = self._part.snapshot(self.steps, begun=bool(self._done))
            replies = self._turns.replies_to(awaited)
            about = [snapshot.to_meta(), len(self._done)]
            return Sealed(self.incarnation, digest_of(about, snapshot, replies), frozen_s)

    def go_on(self) -> None:
        """Do operations again after `hold_still` or `sealed`."""
        with self._lock:
            self._frozen = False

    def take_up(self, position: SessionPosition) -> None:
        """Come to where another session stood that began with the same snapshot.

        Raises:
            SessionError: It did operations that are not due here.
            FrameError: They do not fit.
        """
        with self._lock:
            for reply in position.replies:
                piece = natural(reply, "piece") if "piece" in reply.meta else 0
                self._turns.keep(str(reply.meta["for"]), natural(reply, "step"), piece, reply)
            for operation in position.operations:
                for _ in self.handle(operation):
                    pass
            self.incarnation = position.incarnation

    def at_work(self) -> bool:
        """Return whether an operation is in work, without waiting for it."""
        if not self._lock.acquire(blocking=False):
            return True
        self._lock.release()
        return False

    def position(self) -> int:
        """Return the steps done, once the operation in work is: a step follows its reply."""
        with self._lock:
            return self.steps

    def nbytes(self) -> int:
        """Return the bytes of weights and optimizer state, without waiting for an operation."""
        return self._part.nbytes

    def _in_turn(self, frame: Frame, piece: int) -> Iterator[Frame]:
        turns, operations = self._turns, self._operations
        turns.check_piece(piece)
        if frame.kind == "gradient" and not operations.awaits_gradient(piece):
            raise SessionError(f"gradient of piece {piece}, whose activation was not sent")
        turns.put(frame, piece)
        self._done.append(frame)
        self._tell(frame)
        while (due := turns.due()) is not None:
            now, index = due
            ahead = now.kind == "activation"
            reply = operations.activate(*due) if ahead else operations.take_back(*due)
            # Kept before it is sent: the link may be lost with it.
            turns.keep(now.kind, turns.steps, index, reply)
            yield reply
            if turns.complete and not self._part.exchanges:
                self._part.told()
                self._apply()

    def _tell(self, operation: Frame) -> None:
        if self._follower is not None:
            self._follower.take(operation)

    def _recut(self, frame: Frame) -> Frame:
        """Have the units from another one on, and return those that are the device's now."""
        first, now = natural(frame, "first"), self.snapshot()
        names = self._part.units_between(first)
        given = now.of(names)
        left = now.of(names, others=True).with_(Snapshot.from_frame(frame).of(names))
        spec = dataclasses.replace(self.spec, first=first)
        self._part = EdgePart(spec, left, *self._where)  # refused before anything has changed
        self._operations = Operations(spec, self._part, self._turns)
        self.spec = spec
        reply = Frame("recut", {"step": self.steps}, given.tensors())
        self._turns.keep("recut", self.steps, 0, reply)
        self._tell(frame)
        return reply

    def _finish_with(self, frame: Frame) -> Iterator[Frame]:
        """Reply with the norms of this side, clip by the joint norm of both sides and step."""
        part, turns, step = self._part, self._turns, self.steps
        empty = part.exchanges and frame.meta.get("batch") == 0 and not turns.forward
        if empty:  # a Poisson sample without examples is a step, too
            turns.begin(0)
            part.begin(step, 0)
        if not part.exchanges or turns.backward < max(1 - empty, turns.pieces):
            raise SessionError(f"norms of step {step}, whose pieces are not all done")
        meta, tensors = part.told()
        part.take(frame)
        self._tell(frame)
        reply = Frame("norms", {"step": step, **meta}, tensors)
        turns.keep("norms", step, 0, reply)
        yield reply
        self._apply()

    def _apply(self) -> None:
        self._part.step()
        self._turns.end()
        self._done.clear()
        every = self.spec.replicate_every
        if every and self.steps % every == 0:
            self._replicate(self.spec, self.snapshot())
