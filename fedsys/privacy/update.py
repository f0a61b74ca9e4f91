"""One private step: clipped sums of the gradients of examples, with noise, divided by the batch.

Noise is drawn for each parameter by its name, so a model that is split anywhere draws the same. The
sum is divided by the *expected* size of a mini-batch: the true one would tell who was in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.privacy.gradients import ExampleGradients
from fedsys.privacy.layers import learns
from fedsys.privacy.noise import NoiseSource


class PrivateUpdate:
    """Gradients of DP-SGD for modules of one machine. As a context manager, it leaves them alone.

    Args:
        modules: What is trained here; with global names.
        clip_norm: Bound on the norm of an example's gradient over the whole model.
        noise: Deviation of the noise over `clip_norm`.
        expected: Examples in a mini-batch on average.
        source: Draws the noise.
        masks: Of weights that are pruned: they get neither gradient nor noise.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        clip_norm: float,
        noise: float,
        expected: float,
        source: NoiseSource,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.examples = ExampleGradients(modules, clip_norm)
        self._deviation, self._expected, self._source = noise * clip_norm, expected, source
        self._gone = {name: ~mask for name, mask in (masks or {}).items()}

    def __enter__(self) -> PrivateUpdate:
        return self

    def __exit__(self, *_: object) -> None:
        self.examples.close()

    def begin(self) -> None:
        """Begin a mini-batch."""
        self.examples.begin()

    def recording(self, piece: int, examples: int) -> AbstractContextManager[None]:
        """Take in the forward of a piece in a block, as `ExampleGradients.recording`."""
        return self.examples.recording(piece, examples)

    def squares(self) -> Tensor:
        """Return the squared norms of this machine's part, as `ExampleGradients.squares`."""
        return self.examples.squares()

    @torch.no_grad()
    def finish(self, step: int, squares: Tensor) -> None:
        """Put the gradient of the step into ``.grad`` of the parameters.

        Args:
            step: Index of the mini-batch in the round.
            squares: Squared norms over all parts of the model, by example.
        """
        self.examples.finish(squares)
        for name, parameter in self.examples.named.items():
            if not learns(parameter):
                continue
            drawn = self._source.normal("privacy", step, name, parameter.shape)
            noise = drawn.to(parameter.device, parameter.dtype) * self._deviation
            assert parameter.grad is not None
            parameter.grad.add_(noise).div_(self._expected)
            if name in self._gone:
                parameter.grad.masked_fill_(self._gone[name].to(parameter.device), 0.0)


def summed_backward(outputs: Tensor, labels: Tensor) -> Tensor:
    """Compute the backward of the sum of losses, whose rows are those of single examples.

    Args:
        outputs: ``(rows, classes)``.
        labels: ``(rows,)``.

    Returns:
        The sum of cross-entropies, without gradient.
    """
    loss = F.cross_entropy(outputs, labels, reduction="sum")
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
    return loss.detach()
