"""The arithmetic of a session: the edge's units in training, piece by piece.

Every computation waits for a processor that all sessions of the edge server share, and for the
moment at which the machine that is stood for would be done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedsys import config as configuration
from fedsys.errors import FrameError
from fedsys.offload.emulation import Workers, session_pace
from fedsys.offload.session_tensors import Expected
from fedsys.offload.snapshot import SessionSpec, Snapshot, State
from fedsys.privacy.noise import source_of
from fedsys.privacy.part import Told, stepping
from fedsys.randomness import Address, drawing, rows
from fedsys.training import plain as training
from fedsys.training.federation import base_state, layered_model, penalty_of
from fedsys.training.part import Part, filled_stages, names_between, safe_input
from fedsys.training.precision import autocast, for_loss
from fedsys.training.tasks import task_of
from fedsys.transport.wire import Frame

T = TypeVar("T")


class EdgePart:
    """Units ``[first, last)`` of a model with their optimizer. For one thread at a time.

    Args:
        spec: Which units, and how they are trained.
        start: Their state.
        device: Where to compute.
        workers: What the sessions of an edge server share.

    Attributes:
        expected: What is taken from the device.
        private: Whether the last units are not among them, so that the device has the labels.
        exchanges: Whether a step needs the norms of the device's units.
        nbytes: Bytes of weights and optimizer state.

    Raises:
        FrameError: The model has no such units.
        ModelError: The state is not theirs.
    """

    def __init__(
        self, spec: SessionSpec, start: Snapshot, device: torch.device, workers: Workers
    ) -> None:
        config = configuration.parse(spec.config)
        model = layered_model(config, spec.input_shape, spec.num_classes)
        if not 0 <= spec.first <= spec.last <= len(model):
            raise FrameError(f"open: units {spec.first} to {spec.last} of {len(model)}")
        cuts, client = [spec.first, spec.last], config.client
        self.expected = Expected.of(model, spec, device, config.task, client.precision)
        base = base_state(config, spec.input_shape, spec.num_classes)
        (self._stage,) = filled_stages(
            model, cuts, [1], start.state, device, client.memory_format, base,
            kernels=client.kernels,
        )  # fmt: skip
        self.private = spec.last < len(model)
        self._pace = session_pace(config, model, spec, workers)
        self._task, self._precision = task_of(config), client.precision
        self._processors, self._threads = workers.processors, client.threads
        self._part = Part(
            [self._stage],
            config,
            spec.round,
            proximal_mu=spec.proximal_mu,
            optimizer_state=start.optimizer,
            anchor=start.anchor or None,
            masks=start.masks,
            penalty=penalty_of(config, model, spec.round),
        )
        self._pruned, self._spec, self._model = start.masks, spec, model
        self._address = Address(config.seed, spec.client, spec.round)
        self._steps = stepping(
            self._part, config, noise=spec.noise, expected=spec.expected, masks=start.masks,
            source=source_of(self._address, config.privacy.secure),
        )  # fmt: skip
        self.exchanges, self.nbytes = self._steps.exchanges, self._part.nbytes()
        self._step = self._batch = 0
        self._draws: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # buffers when the mini-batch in work began

    def snapshot(self, step: int, *, begun: bool = False) -> Snapshot:
        """Return the state as it is after a number of steps; copied.

        Args:
            step: The number.
            begun: Whether the next one is in work; what it changed is left out.
        """
        state = {n: t.cpu().clone() for n, t in self._part.state().items()}
        if begun:
            state |= {n: t.cpu().clone() for n, t in self._before.items() if n in state}
        optimizer, anchor = self._part.optimizer_state(), self._part.anchor()
        return Snapshot(step, state, optimizer, anchor, self._pruned, self._spec.first)

    def units_between(self, cut: int) -> set[str]:
        """Return the names of parameters and buffers between another cut and that of this part.

        Raises:
            FrameError: The model has no such cut, or no unit would be left here.
        """
        if not 0 <= cut < self._spec.last:
            raise FrameError(f"recut: unit {cut}, where the last one here is {self._spec.last - 1}")
        return names_between(self._model, sorted((cut, self._spec.first)))[1]

    def arrived(self, frame: Frame, examples: int, *, forward: bool) -> None:
        """Take note of when the frame of an operation came, and what it takes."""
        self._pace.begin(
            frame.arrived_s, frame.encoded_bytes, examples, both=not self.private, forward=forward
        )

    def ended(self) -> list[int]:
        """Wait for the end of an operation; return its moments, as `SessionPace.end`."""
        return self._pace.end()

    def begin(self, step: int, batch: int) -> None:
        """Begin a mini-batch of `batch` examples."""
        self._step, self._batch, self._draws = step, batch, {}
        self._before = {n: b.clone() for n, b in self._stage.named_buffers()}
        self._steps.begin()

    def compute(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, done by a processor that all sessions share."""

        def done() -> T:
            training.set_threads(self._threads)
            self._pace.served()
            return work()

        return self._processors.do(done, self._threads)

    def ahead(self, inputs: Sequence[Tensor], start: int, stop: int) -> Tensor:
        """Return the outputs for rows ``[start, stop)`` of the mini-batch.

        Args:
            inputs: Activations, and the inputs of the model that are needed beside them.
            start: The first row.
            stop: The end.
        """
        x, *more = inputs
        drawn = drawing(self._address, self._step, self._batch, self._draws)
        recorded = self._steps.recording(start, stop - start)
        with torch.enable_grad(), drawn, rows(start, stop), recorded:
            given = safe_input(self._stage, x), *more
            with autocast(self._precision, x):
                out = training.explained(self._stage, lambda: self._stage(*given))
            if not self.private:
                out = for_loss(out, self._precision)
        self._pace.turn()
        made: Tensor = out
        return made

    def back(self, out: Tensor, labels: Tensor) -> State:
        """Compute the backward of a piece from its labels; return loss and hits."""
        loss = self._steps.back(out, labels, self._batch)
        return {"loss": loss, "hits": self._task.total(out.detach(), labels)}

    def told(self) -> Told:
        """Return the norms of these units' gradients; once per step."""
        return self.compute(self._steps.told)

    def take(self, frame: Frame) -> None:
        """Take in the norms of the device's units.

        Raises:
            FrameError: They do not fit.
        """
        self._steps.take(frame.meta, frame.tensors)

    def step(self) -> None:
        """Clip by the joint norm of all units, if norms were exchanged, and step."""
        self.compute(lambda: self._steps.step(self._step))
        self._pace.update()
        self.nbytes = self._part.nbytes()  # optimizers take memory in their first step

    def scored(self, *inputs: Tensor) -> Tensor:
        """Return the outputs for these, forward only; neither draws nor statistics change."""
        self._stage.eval()
        try:
            with torch.inference_mode():
                return self._stage(*inputs)  # type: ignore[no-any-return]  # modules return anything
        finally:
            self._stage.train()
