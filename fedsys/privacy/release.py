"""What leaves a device at the cut: activations that are clipped example by example, and noise.

Each example's activation is scaled to a norm of at most C, whatever the example is, and noise is
added to every number of it. So whoever receives it cannot tell well which of any two inputs it came
from: that is local differential privacy (Duchi, Jordan and Wainwright, FOCS 2013), and its
neighbours are any two inputs, whose clipped activations lie at most 2 C apart. Gaussian noise has
the Euclidean norm, Laplace noise that of absolute values (Dwork et al., TCC 2006).

Backward, the gradient passes the clipping as through any other operation: what is scaled down loses
the direction along itself, and noise is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsys.privacy.noise import Addressed, NoiseSource
from fedsys.randomness import Address, drawn_for_rows

NOISE = ("gaussian", "laplace")

PURPOSE = "cut-noise"


@dataclass(frozen=True)
class Noise:
    """How much of which noise is added to activations that are clipped to which norm.

    Attributes:
        clip_norm: Largest norm C of an example's activation; infinite: they are as they are.
        multiplier: Deviation (Laplace: scale) of the noise over `clip_norm`; 0: none.
        kind: One of `NOISE`.
    """

    clip_norm: float
    multiplier: float
    kind: str = "gaussian"

    @property
    def order(self) -> int:
        """Of the norm: 2, or 1 for sums of absolute values."""
        return 2 if self.kind == "gaussian" else 1

    @property
    def scale(self) -> float:
        """Deviation of Gaussian noise, or scale of Laplace's."""
        return 0.0 if self.multiplier == 0.0 else self.multiplier * self.clip_norm

    def draw(self, source: NoiseSource, purpose: str, step: int, shape: Sequence[int]) -> Tensor:
        """Return noise of a shape, in float32 on the CPU."""
        size = torch.Size(shape)
        if self.kind == "gaussian":
            normal: Tensor = source.normal(purpose, step, "", size)
            return normal * self.scale
        # Two exponential variables differ by a Laplace variable
        u = source.uniform(purpose, step, 2 * math.prod(size)).reshape(2, *size)
        first, second = torch.from_numpy(-np.log1p(-u))
        drawn: Tensor = ((first - second) * self.scale).float()
        return drawn


def clipped(z: Tensor, noise: Noise) -> Tensor:
    """Return activations ``(rows, …)`` whose norms are at most ``noise.clip_norm``, row by row.

    Rows below that are returned to the bit; those whose norm is not finite, which no factor bounds,
    as zeros.
    """
    if math.isinf(noise.clip_norm):
        return z
    norms = torch.linalg.vector_norm(z.flatten(1), ord=noise.order, dim=1)
    bounded = norms.isfinite()
    if not bool(bounded.all()):
        z = torch.where(bounded.view(-1, *[1] * (z.dim() - 1)), z, 0.0)
        norms = torch.linalg.vector_norm(z.flatten(1), ord=noise.order, dim=1)
    factors = noise.clip_norm / norms.clamp(min=noise.clip_norm)
    held: Tensor = z * factors.view(-1, *[1] * (z.dim() - 1))
    return held


class Release(nn.Module):
    """Clips the rows of a mini-batch and adds noise to them; in evaluation they are as they are.

    Noise is drawn for the whole mini-batch, by example, from (seed, client, round, step); pieces of
    it have their rows of that, and a step that is done again releases the same bits.

    Args:
        noise: How much.
        source: Where it comes from; None: from the address of the step.
    """

    def __init__(self, noise: Noise, source: NoiseSource | None = None) -> None:
        super().__init__()
        self.noise, self._source = noise, source

    def extra_repr(self) -> str:
        """Return what is done, for `repr` of the model."""
        return f"{self.noise.kind}, clip_norm={self.noise.clip_norm:g}, scale={self.noise.scale:g}"

    def forward(self, z: Tensor) -> Tensor:
        """Return what may leave the device of activations ``(rows, …)``."""
        if not self.training:
            return z
        held = clipped(z, self.noise)
        if self.noise.scale == 0.0:
            return held

        def draw(address: Address, step: int, batch: int) -> Tensor:
            source = self._source or Addressed(address)
            return self.noise.draw(source, PURPOSE, step, (batch, *z.shape[1:]))

        return held + drawn_for_rows(PURPOSE, draw).to(device=z.device, dtype=z.dtype)


def release_from(front: nn.Module, release: Release) -> None:
    """Have a module return, in training, what `release` makes of its outputs.

    Its parameters keep their names.
    """

    def released(module: nn.Module, _: object, z: Tensor) -> Tensor:
        held: Tensor = release(z) if module.training else z
        return held

    front.register_forward_hook(released)
