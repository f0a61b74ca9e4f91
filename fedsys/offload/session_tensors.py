"""The tensors of a session's frames: checked before anything is done with them, and encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsys.config.task import TaskConfig
from fedsys.errors import FrameError
from fedsys.models.layers import LayeredModel
from fedsys.offload.snapshot import SessionSpec
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.nonzeros import LEFT_OUT, SKIP, Nonzeros
from fedsys.transport.several import Shape, beside_of, is_several
from fedsys.transport.wire import Frame


@dataclass(frozen=True)
class Expected:
    """What a session takes from its device.

    Attributes:
        shape: Of one example where it enters the edge's units.
        dtypes: That activations may have.
        classes: Number of classes.
        device: Where tensors are to be.
        task: What is learned, by which targets are checked.
        inputs: Shape of several inputs of an example, as `fedsys.transport.several.Shape`.
        given: Which of them come with the activations.
    """

    shape: Sequence[int]
    dtypes: tuple[torch.dtype, ...]
    classes: int
    device: torch.device
    task: TaskConfig = field(default_factory=TaskConfig)
    inputs: Shape = ()
    given: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, model: LayeredModel, spec: SessionSpec, device: torch.device, task: TaskConfig,
        precision: str = "fp32",
    ) -> Expected:  # fmt: skip
        """Return what a session with the units of `spec` takes.

        In another precision than that of the model, devices say what type their units leave.
        """
        several = is_several(spec.input_shape)
        if several and not spec.first:
            raise FrameError("open: first=0: several inputs are no activation")
        enters = model.units[spec.first - 1].out_shape if spec.first else spec.input_shape
        lowered = (torch.bfloat16,) if precision == "bf16" and spec.first else ()
        dtypes = _dtype_of(model), *lowered
        return cls(
            enters, dtypes, spec.num_classes, device, task,
            spec.input_shape if several else (), model.inputs(spec.first, spec.last),
        )  # fmt: skip

    def beside(self, frame: Frame, examples: int) -> tuple[Tensor, ...]:
        """Return the inputs that come with the activations of a frame.

        Raises:
            FrameError: One is missing, or has another shape or type.
        """
        found = beside_of(frame.tensors, self.inputs, self.given, examples)
        return tuple(tensor.to(self.device) for tensor in found)

    def activation(self, frame: Frame, examples: int | None) -> Tensor:
        """Return the activations ``(examples, …)`` of a frame.

        Args:
            frame: The frame.
            examples: How many are due; None for any number of at least one.

        Raises:
            FrameError: They have another shape or type.
        """
        tensor = decode_activation(frame.tensors, frame.meta).to(self.device)
        count = tensor.shape[0] if tensor.dim() else 0
        fits = count == examples if examples else count > 0
        if tuple(tensor.shape[1:]) != tuple(self.shape) or not fits:
            expected = (examples or "n", *self.shape)
            raise FrameError(f"activation of shape {tuple(tensor.shape)} instead of {expected}")
        if tensor.dtype not in self.dtypes:
            expected_types = " or ".join(map(str, self.dtypes))
            raise FrameError(f"activation of type {tensor.dtype} instead of {expected_types}")
        return tensor

    def labels(self, frame: Frame, examples: int) -> Tensor:
        """Return the labels ``(examples,)`` of a frame, or what else is to be learned of it.

        Raises:
            FrameError: They are missing, or others.
        """
        labels = frame.tensors.get("labels")
        if not self.task.usual:
            return self._targets(labels, examples)
        if labels is None or labels.dtype != torch.int64 or tuple(labels.shape) != (examples,):
            raise FrameError(f"labels: must be {examples} integers")
        if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise FrameError(f"labels: must be in 0 to {self.classes - 1}")
        return labels.to(self.device)

    def _targets(self, targets: Tensor | None, examples: int) -> Tensor:
        """Return targets ``(examples, …)``: classes of a kind that has them, else numbers."""
        if targets is None or not targets.dim() or targets.shape[0] != examples:
            raise FrameError(f"labels: must be targets of {examples} examples")
        own = isinstance(self.task.loss, Mapping)
        if targets.dtype == torch.int64 and (own or self.task.classes):
            least, most = (int(bound) for bound in torch.aminmax(targets))
            if not own and (least < 0 or most >= self.classes):
                raise FrameError(f"labels: must be in 0 to {self.classes - 1}")
            return targets.to(self.device)
        if targets.dtype != torch.float32 or (self.task.classes and not own):
            raise FrameError(f"labels: must not be of {targets.dtype} for task={self.task.kind}")
        return targets.to(self.device)

    def gradient(self, frame: Frame, out: Tensor) -> Tensor:
        """Return the gradient of `out` that a frame carries.

        Raises:
            FrameError: It has another shape or type.
        """
        tensor = decode_activation(frame.tensors, frame.meta).to(self.device)
        if tensor.shape != out.shape or tensor.dtype != out.dtype:
            got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, out))
            raise FrameError(f"gradient of {got} instead of {expected}")
        return tensor


def encoded(
    kind: str,
    tensor: Tensor | None,
    meta: Mapping[str, Any],
    codec: str,
    more: Mapping[str, Tensor] | None = None,
    nonzeros: Nonzeros | None = None,
) -> Frame:
    """Return a frame with a tensor written by a codec, and with others as they are.

    With `nonzeros` it is the gradient of an activation, and needed where that is not zero.
    """
    if tensor is None:
        return Frame(kind, meta, dict(more or {}))
    tensors, about = encode_activation(tensor, codec)
    found = None if nonzeros is None else nonzeros.of(tensors["x"])
    if found is not None:
        tensors["x"], about[LEFT_OUT] = found
    return Frame(kind, {**meta, **about}, {**tensors, **(more or {})})


def needed_of(frame: Frame) -> Nonzeros | None:
    """Return where the activation of a frame needs a gradient; None: everywhere."""
    return Nonzeros(frame.tensors["x"]) if frame.meta.get(SKIP) is True else None


def _dtype_of(model: LayeredModel) -> torch.dtype:
    """Return the type in which a model computes: that of its first floating-point parameter."""
    floats = (p.dtype for p in model.graph.parameters() if p.is_floating_point())
    return next(floats, torch.float32)
