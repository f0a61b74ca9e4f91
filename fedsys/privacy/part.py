"""A part of a model in training: as it is, or with a promise to each example.

`ClippedPart` and `PrivatePart` are what a device and an edge server do alike in a step of split
training, on either side of the exchange of norms: a number for each parameter if gradients are
clipped (``client.clip_norm``), a number for each example if they are private, and else nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsys.config import Config
from fedsys.errors import FrameError
from fedsys.privacy.noise import NoiseSource
from fedsys.privacy.update import PrivateUpdate, summed_backward
from fedsys.training.masks import Masks
from fedsys.training.part import Part
from fedsys.training.tasks import CLASSIFICATION, Task, task_of

Told = tuple[dict[str, Any], dict[str, Tensor]]
"""Header values and tensors of a frame."""


class Stepping(Protocol):
    """What a step of split training asks of either side."""

    part: Part

    @property
    def exchanges(self) -> bool:
        """Whether a step needs norms of the other side."""

    def begin(self) -> None:
        """Begin a mini-batch."""

    def recording(self, piece: int, examples: int) -> AbstractContextManager[None]:
        """Surround the forward of a piece."""

    def back(self, outputs: Tensor, labels: Tensor, batch: int) -> Tensor:
        """Compute the backward of a piece of `batch` examples; return its share of their loss."""

    def told(self) -> Told:
        """Return the norms of this side, after the last backward; once in a step."""

    def take(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take in what the other side told; raises FrameError if it does not fit."""

    def step(self, index: int) -> None:
        """Do the optimizer step `index` of the round."""


class ClippedPart:
    """Gradients as they are, clipped by their joint norm if ``client.clip_norm`` says so."""

    def __init__(self, part: Part, task: Task = CLASSIFICATION) -> None:
        self.part, self._task = part, task
        self._norms: dict[str, float] = {}

    @property
    def exchanges(self) -> bool:
        """Whether gradients are clipped."""
        return self.part.clips

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self.part.zero_grad()

    def recording(self, piece: int, examples: int) -> AbstractContextManager[None]:
        """Leave it to autograd."""
        return nullcontext()

    def back(self, outputs: Tensor, labels: Tensor, batch: int) -> Tensor:
        """Compute the backward of a share of the mean loss, and return that."""
        loss = self._task.loss(outputs, labels, len(labels) / batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        return loss.detach()

    def told(self) -> Told:
        """Return squared norms by parameter."""
        self._norms = own = self.part.norms()
        return {"norms": own}, {}

    def take(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take in squared norms by parameter.

        Raises:
            FrameError: The other side told something else.
        """
        theirs = meta.get("norms")
        if not isinstance(theirs, dict) or not all(isinstance(v, float) for v in theirs.values()):
            raise FrameError("norms: must map names of parameters to squared norms")
        self._norms = {**theirs, **self._norms}

    def step(self, index: int) -> None:
        """Clip by the joint norm and step."""
        self.part.step(self._norms)


class PrivatePart:
    """Gradients of examples, clipped by their norm over all parts, with noise.

    Args:
        part: The modules with their optimizer.
        config: The run.
        noise: Deviation of the noise over the largest norm.
        expected: Examples in a mini-batch on average.
        source: Draws the noise.
        masks: What is pruned, packed, by global name.
    """

    def __init__(
        self,
        part: Part,
        config: Config,
        *,
        noise: float,
        expected: float,
        source: NoiseSource,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.part = part
        self._squares = torch.zeros(0, dtype=torch.int64)
        self._update = PrivateUpdate(
            part.modules,
            clip_norm=config.privacy.clip_norm,
            noise=noise,
            expected=expected,
            source=source,
            masks=Masks.unpacked(masks or {}, part.named),
        )

    @property
    def exchanges(self) -> bool:
        """It always needs norms of the other side."""
        return True

    def begin(self) -> None:
        """Begin a mini-batch."""
        self.part.zero_grad()
        self._update.begin()

    def recording(self, piece: int, examples: int) -> AbstractContextManager[None]:
        """Keep what layers are given, and autograd from their parameters."""
        return self._update.recording(piece, examples)

    def back(self, outputs: Tensor, labels: Tensor, batch: int) -> Tensor:
        """Compute the backward of the sum of losses; return its share of the mean loss."""
        return summed_backward(outputs, labels) / batch

    def told(self) -> Told:
        """Return squared norms by example of the mini-batch."""
        self._squares = self._update.squares()
        return {"batch": len(self._squares)}, {"squares": self._squares}

    def take(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take in squared norms by example.

        Raises:
            FrameError: The other side told something else than norms of the same examples.
        """
        theirs = tensors.get("squares")
        if theirs is None or theirs.dtype != torch.int64 or theirs.shape != self._squares.shape:
            raise FrameError(f"squares: must be {len(self._squares)} whole numbers")
        if len(theirs) and int(theirs.min()) < 0:
            raise FrameError("squares: must be at least 0")
        self._squares = self._squares + theirs.cpu().clamp(max=2**62)

    def step(self, index: int) -> None:
        """Clip, add noise, and step."""
        self._update.finish(index, self._squares)
        self.part.norms()  # with proximal term and penalty, which depend on no example
        self.part.step({})


def stepping(
    part: Part,
    config: Config,
    *,
    noise: float,
    expected: float,
    source: NoiseSource,
    masks: Mapping[str, Tensor] | None = None,
) -> Stepping:
    """Return what does the steps of a part; the arguments are those of `PrivatePart`."""
    if not config.privacy.per_example:
        return ClippedPart(part, task_of(config))
    return PrivatePart(part, config, noise=noise, expected=expected, source=source, masks=masks)
