"""A session: one device's part of the model on an edge server, and the turns of their dialogue.

A session holds units ``[first, last)`` of a layered model with their optimizer. The device sends
frames; each is one operation at a position (step, micro-batch), and has one reply::

    activation  {step, piece, batch}   x, labels   ─▶  gradient {step, piece}  x, loss, hits
    norms       {step, norms}                      ─▶  norms    {step, norms}   only when clipping
    evaluate    {index}                x           ─▶  outputs  {index}        x

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

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsys import config as configuration
from fedsys.errors import FrameError, LinkClosed, SessionError
from fedsys.models.layered import LayeredModel
from fedsys.offload.emulation import Workers, session_pace
from fedsys.offload.snapshot import SessionSpec, Snapshot, State, natural
from fedsys.randomness import Address, drawing, rows
from fedsys.training import plain as training
from fedsys.training.federation import layered_model, penalty_of
from fedsys.training.part import Part, filled_stages, safe_input
from fedsys.training.schedule import pieces
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.security import new_token
from fedsys.transport.wire import Frame

T = TypeVar("T")

__all__ = ["Session", "SessionSpec", "Snapshot", "State", "layered_model", "natural"]


def _dtype_of(model: LayeredModel) -> torch.dtype:
    """Return the type in which a model computes: that of its first floating-point parameter."""
    floats = (p.dtype for p in model.graph.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


class Session:
    """The edge's part in training, behind the dialogue described above.

    Args:
        spec: What the server app said.
        start: Where to begin: the state at a step.
        device: Where to compute.
        replicate: Called with a snapshot after every ``replicate_every`` steps.
        workers: What the sessions of an edge server share; None: this one is alone.

    Attributes:
        steps: Steps done in this round, those before `start` included.
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
        self.spec, self.steps = spec, start.step
        self.incarnation = new_token()
        self._config = configuration.parse(spec.config)
        self._device, self._replicate = device, replicate
        model = layered_model(self._config, spec.input_shape, spec.num_classes)
        if not 0 <= spec.first <= spec.last <= len(model):
            raise FrameError(f"open: units {spec.first} to {spec.last} of {len(model)}")
        self._enters = model.units[spec.first - 1].out_shape if spec.first else spec.input_shape
        cuts = [spec.first, spec.last]
        layout = self._config.client.memory_format
        (self._stage,) = filled_stages(model, cuts, [1], start.state, device, layout)
        self._private = spec.last < len(model)
        workers = workers or Workers("")
        self._pace = session_pace(self._config, model, spec, workers)
        self._processors, self._threads = workers.processors, self._config.client.threads
        self._dtype = _dtype_of(model)
        self._part = Part(
            [self._stage],
            self._config,
            spec.round,
            proximal_mu=spec.proximal_mu,
            optimizer_state=start.optimizer,
            anchor=start.anchor or None,
            masks=start.masks,
            penalty=penalty_of(self._config, model, spec.round),
        )
        self._pruned = start.masks
        self._nbytes = self._part.nbytes()
        self._address = Address(self._config.seed, spec.client, spec.round)
        self._masks: dict[str, Tensor] = {}
        self._batch = 0
        self._forward = self._backward = 0  # pieces of the present step that are done
        self._open: dict[int, tuple[Tensor, Tensor]] = {}  # label-private: input and output
        self._early: dict[tuple[str, int], Frame] = {}
        self._replies: dict[tuple[str, int, int], Frame] = {}
        self._frozen = False
        self._lock = threading.RLock()

    def handle(self, frame: Frame) -> Iterator[Frame]:
        """Do the operation of a frame and yield the replies that are due, in order.

        The iterator must be exhausted, whatever becomes of the replies.

        Raises:
            SessionError: The operation is not for the position at which the session is.
            FrameError: The frame lacks something, or a tensor has another shape or type.
            LinkClosed: The session was frozen.
        """
        with self._lock:
            if self._frozen:
                raise LinkClosed(f"session {self.spec.id} is no longer here")
            if frame.kind == "evaluate":
                yield self._evaluate(frame)
                return
            if frame.kind not in ("activation", "gradient", "norms"):
                raise SessionError(f"{frame.kind}: not an operation of a session")
            step = natural(frame, "step")
            piece = natural(frame, "piece") if frame.kind != "norms" else 0
            known = self._replies.get((frame.kind, step, piece))
            if known is not None:
                yield known
                return
            if step != self.steps:
                raise SessionError(
                    f"{frame.kind} for step {step} of session {self.spec.id}, where step "
                    f"{self.steps} is due"
                )
            yield from self._in_turn(frame, piece)

    def snapshot(self) -> Snapshot:
        """Return the state between two steps.

        Raises:
            SessionError: A step is begun and not finished.
        """
        with self._lock:
            if self._forward or self._early:
                raise SessionError(f"session {self.spec.id} is in the middle of step {self.steps}")
            state = {n: t.cpu().clone() for n, t in self._part.state().items()}
            optimizer, anchor = self._part.optimizer_state(), self._part.anchor()
            return Snapshot(self.steps, state, optimizer, anchor, self._pruned)

    def freeze(self) -> Snapshot:
        """Return the state between two steps, and do nothing more from here on.

        Raises:
            SessionError: A step is begun and not finished.
        """
        with self._lock:
            snapshot = self.snapshot()
            self._frozen = True
            return snapshot

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
        return self._nbytes

    # --- one step ---------------------------------------------------------------------------------

    def _in_turn(self, frame: Frame, piece: int) -> Iterator[Frame]:
        if frame.kind == "norms":
            yield self._finish_with(frame)
            return
        if piece >= (self._pieces() if self._forward else self.spec.micro_batches):
            raise SessionError(f"piece {piece} of {self.spec.micro_batches}")
        if frame.kind == "gradient" and piece not in self._open:
            raise SessionError(f"gradient of piece {piece}, whose activation was not sent")
        self._early[frame.kind, piece] = frame
        while True:
            due = {"activation": self._forward, "gradient": self._backward}
            ready = [(kind, p) for kind, p in due.items() if (kind, p) in self._early]
            if not ready:
                return
            kind, index = ready[0]
            now = self._early.pop((kind, index))
            reply = self._activate(now, index) if kind == "activation" else self._return(now, index)
            # Kept before it is sent: the link may be lost with it.
            self._replies[kind, self.steps, index] = reply
            yield reply
            if self._backward == self._pieces() and self._backward and not self._part.clips:
                self._apply(self._part.norms())

    def _pieces(self) -> int:
        return min(self._batch, self.spec.micro_batches)

    def _activate(self, frame: Frame, piece: int) -> Frame:
        batch = natural(frame, "batch")
        if batch < 1 or (piece and batch != self._batch):
            raise FrameError(f"batch={batch}: must be at least 1, and the same for all pieces")
        x, (start, stop) = self._input(frame, piece, batch)
        self._begin_operation(frame, stop - start, forward=True)
        labels = None if self._private else self._labels(frame, stop - start)
        if piece == 0:  # what is refused above has changed nothing
            self._begin(batch)
        needs_gradient = bool(frame.meta.get("needs_gradient", True))
        x.requires_grad_(needs_gradient)
        meta: dict[str, Any] = {"step": self.steps, "piece": piece}
        if labels is None:
            out = self._compute(lambda: self._ahead(x, start, stop))
            self._open[piece] = (x, out)
            meta["at_us"] = self._pace.end()
            return self._encoded("activation", out, meta)
        more = self._compute(lambda: self._there_and_back(x, labels, start, stop))
        meta["at_us"] = self._pace.end()
        return self._encoded("gradient", x.grad if needs_gradient else None, meta, more)

    def _ahead(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return the outputs for rows ``[start, stop)`` of the mini-batch."""
        step = drawing(self._address, self.steps, self._batch, self._masks)
        with torch.enable_grad(), step, rows(start, stop):
            out = training.forward(self._stage, safe_input(self._stage, x))
        self._forward += 1
        self._pace.turn()
        return out

    def _there_and_back(self, x: Tensor, labels: Tensor, start: int, stop: int) -> State:
        """Compute forward and backward; return loss and hits."""
        out = self._ahead(x, start, stop)
        loss = training.loss_of(out, labels, (stop - start) / self._batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        self._backward += 1
        return {"loss": loss.detach(), "hits": (out.detach().argmax(1) == labels).sum()}

    def _compute(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, done by a processor that all sessions share."""

        def done() -> T:
            training.set_threads(self._threads)
            self._pace.served()
            return work()

        return self._processors.do(done, self._threads)

    def _return(self, frame: Frame, piece: int) -> Frame:
        """Take the gradient of what was sent for a piece; reply with that of its input."""
        x, out = self._open[piece]
        self._begin_operation(frame, len(x), forward=False)
        gradient = self._decoded(frame, out)
        del self._open[piece]
        if out.requires_grad:
            self._compute(lambda: out.backward(gradient))  # type: ignore[no-untyped-call]
        self._backward += 1
        meta = {"step": self.steps, "piece": piece, "at_us": self._pace.end()}
        return self._encoded("gradient", x.grad, meta)

    def _begin_operation(self, frame: Frame, rows_: int, *, forward: bool) -> None:
        both = not self._private
        self._pace.begin(frame.arrived_s, frame.encoded_bytes, rows_, both=both, forward=forward)

    def _begin(self, batch: int) -> None:
        self._batch = batch
        self._masks = {}
        self._part.zero_grad()
        self._replies = {k: v for k, v in self._replies.items() if k[1] == self.steps - 1}

    def _finish_with(self, frame: Frame) -> Frame:
        """Clip by the joint norm of both sides and step; reply with the norms of this side."""
        theirs = frame.meta.get("norms")
        floats = isinstance(theirs, dict) and all(isinstance(v, float) for v in theirs.values())
        if not floats or not isinstance(theirs, dict):
            raise FrameError("norms: must map names of parameters to squared norms")
        if not self._part.clips or self._backward < max(1, self._pieces()):
            raise SessionError(f"norms of step {self.steps}, whose pieces are not all done")
        step = self.steps
        mine = self._part.norms()
        self._apply({**theirs, **mine})
        reply = Frame("norms", {"step": step, "norms": mine})
        self._replies["norms", step, 0] = reply
        return reply

    def _apply(self, norms: Mapping[str, float]) -> None:
        self._compute(lambda: self._part.step(norms))
        self._pace.update()
        self._nbytes = self._part.nbytes()  # optimizers take memory in their first step
        self._forward = self._backward = 0
        self._early.clear()
        self.steps += 1
        every = self.spec.replicate_every
        if every and self.steps % every == 0:
            self._replicate(self.spec, self.snapshot())

    def _evaluate(self, frame: Frame) -> Frame:
        """Forward only; neither draws nor statistics change."""
        tensor = decode_activation(frame.tensors, frame.meta).to(self._device)
        self._check_shape(tensor, None)
        out = self._compute(lambda: self._scored(tensor))
        meta = {"index": natural(frame, "index")}
        return Frame("outputs", {**meta, "codec": "fp32"}, {"x": out.clone()})

    def _scored(self, x: Tensor) -> Tensor:
        self._stage.eval()
        try:
            with torch.inference_mode():
                return self._stage(x)  # type: ignore[no-any-return]  # modules return anything
        finally:
            self._stage.train()

    # --- tensors ----------------------------------------------------------------------------------

    def _input(self, frame: Frame, piece: int, batch: int) -> tuple[Tensor, tuple[int, int]]:
        bounds = list(pieces(batch, self.spec.micro_batches))
        if piece >= len(bounds):
            raise SessionError(f"piece {piece} of a mini-batch with {batch} examples")
        start, stop = bounds[piece]
        tensor = decode_activation(frame.tensors, frame.meta).to(self._device)
        self._check_shape(tensor, stop - start)
        return tensor, (start, stop)

    def _check_shape(self, tensor: Tensor, examples: int | None) -> None:
        """Check what comes in; `examples` is None for any number of at least one."""
        count = tensor.shape[0] if tensor.dim() else 0
        fits = count == examples if examples else count > 0
        if tuple(tensor.shape[1:]) != tuple(self._enters) or not fits:
            expected = (examples or "n", *self._enters)
            raise FrameError(f"activation of shape {tuple(tensor.shape)} instead of {expected}")
        if tensor.dtype != self._dtype:
            raise FrameError(f"activation of type {tensor.dtype} instead of {self._dtype}")

    def _labels(self, frame: Frame, examples: int) -> Tensor:
        labels = frame.tensors.get("labels")
        if labels is None or labels.dtype != torch.int64 or tuple(labels.shape) != (examples,):
            raise FrameError(f"labels: must be {examples} integers")
        if int(labels.min()) < 0 or int(labels.max()) >= self.spec.num_classes:
            raise FrameError(f"labels: must be in 0 to {self.spec.num_classes - 1}")
        return labels.to(self._device)

    def _decoded(self, frame: Frame, out: Tensor) -> Tensor:
        tensor = decode_activation(frame.tensors, frame.meta).to(self._device)
        if tensor.shape != out.shape or tensor.dtype != out.dtype:
            got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, out))
            raise FrameError(f"gradient of {got} instead of {expected}")
        return tensor

    def _encoded(
        self,
        kind: str,
        tensor: Tensor | None,
        meta: Mapping[str, Any],
        more: Mapping[str, Tensor] | None = None,
    ) -> Frame:
        if tensor is None:
            return Frame(kind, meta, dict(more or {}))
        tensors, codec = encode_activation(tensor, self.spec.codec_down)
        return Frame(kind, {**meta, **codec}, {**tensors, **(more or {})})
