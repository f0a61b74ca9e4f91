"""BatchNorm whose running statistics are those of mini-batches, however these are cut into pieces.

BatchNorm normalises by the statistics of what it sees. With micro-batches it sees pieces, so its
outputs, its gradients and its running statistics are no longer those of the mini-batch, and the
statistics move ``m`` times per step, with values of fewer examples.

`DeferredBatchNorm` repairs the running statistics and nothing else: it normalises by the piece in
work, as BatchNorm does, and moves the statistics once, after the last piece, to mean and variance
of all examples of the mini-batch (torchgpipe: Kim et al., 2020, section 2.3.4; there the variance
is the biased one, here the unbiased one, as in torch). Only layers without statistics of batches,
such as GroupNorm, make micro-batches and mini-batches equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.randomness import Piece, piece_of


@dataclass(frozen=True)
class BatchMoments:
    """What was seen of a mini-batch: values per channel, their mean and squared deviations.

    Attributes:
        count: Values per channel.
        mean: ``(channels,)`` in float64.
        deviations: Sum of the squared deviations from the mean, ``(channels,)`` in float64.
    """

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, x: Tensor) -> BatchMoments:
        """Return the statistics of ``(rows, channels, …)``."""
        if x.dtype in (torch.bfloat16, torch.float16):  # torch would round them to it
            x = x.float()
        others = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, others, correction=0)
        count = x.numel() // x.shape[1]
        return cls(count, mean.double(), variance.double() * count)

    def __add__(self, other: BatchMoments) -> BatchMoments:
        """Return the statistics of both together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.square() * (self.count * other.count / count)
        return BatchMoments(count, mean, self.deviations + other.deviations + between)


class DeferredBatchNorm(_BatchNorm):
    """BatchNorm for ``(rows, channels, …)`` that takes running statistics once per mini-batch.

    A whole mini-batch in one piece goes the way of torch's own, with the same bits.
    """

    def __init__(self, num_features: int, eps: float, momentum: float | None, affine: bool) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self._seen: dict[int, BatchMoments] = {}  # of the pieces so far, by the call of this module

    @classmethod
    def like(cls, other: _BatchNorm) -> DeferredBatchNorm:
        """Return one with the settings, parameters and buffers of `other`."""
        made = cls(other.num_features, other.eps, other.momentum, other.affine)
        made.weight, made.bias = other.weight, other.bias
        for name, buffer in other.named_buffers():
            made.register_buffer(name, buffer)
        return made.train(other.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return `input`, of shape ``(rows, channels, …)``, normalised per channel."""
        piece = piece_of(self) if self.training else None
        if piece is None or piece.stop - piece.start == piece.of:
            return super().forward(input)
        out = F.batch_norm(
            input, None, None, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps
        )
        with torch.no_grad():
            self.gather(BatchMoments.of(input.detach()), piece)
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (got {input.dim()})")

    def gather(self, seen: BatchMoments, piece: Piece) -> None:
        """Note a piece; after the last one of the mini-batch move the running statistics."""
        before = self._seen.pop(piece.call, None)
        if piece.start and before is not None:  # else the step is begun, perhaps once more
            seen = before + seen
        if piece.stop < piece.of:
            self._seen[piece.call] = seen
            return
        assert self.num_batches_tracked is not None  # `like` is given what has statistics
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = seen.deviations / (seen.count - 1)
        for running, value in ((self.running_mean, seen.mean), (self.running_var, unbiased)):
            assert running is not None
            running.lerp_(value.to(running.dtype), share)
