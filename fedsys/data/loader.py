"""Mini-batches of one client, and of an evaluation.

A whole batch is chosen, flipped, cropped and normalised at once on uint8, in this thread: for
100 images of 3x32x32 this takes half a millisecond, below one hundredth of a training step on a
CPU, so there is nothing for worker processes to hide.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from fedsys.data.dataset import Dataset, Images, Indices
from fedsys.errors import ConfigError
from fedsys.randomness import Address
from fedsys.transport.several import Inputs, Several

AUGMENTATIONS = ("none", "crop", "crop_flip")

EVALUATION_BATCH: Final = 500
"""Examples that are scored at a time."""


class Shifts(NamedTuple):
    """What is drawn for a batch of B images; arrays of shape ``(B,)``.

    Attributes:
        top: Row of the padded image at which the crop begins.
        left: Column of the padded image at which the crop begins.
        flip: Whether the image is mirrored left to right before it is padded.
    """

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.bool_]


def padding(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns added on each side before a crop: an eighth of the image.

    That is 4 for images of 32x32, as in the papers.
    """
    return height // 8, width // 8


def draw_shifts(
    augmentation: str, batch: int, height: int, width: int, address: Address, step: int
) -> Shifts:
    """Draw crops and flips of a batch from ``(address, "augment", step)``."""
    rows, columns = padding(height, width)
    generator = address.torch("augment", step)
    top = torch.randint(0, 2 * rows + 1, (batch,), generator=generator)
    left = torch.randint(0, 2 * columns + 1, (batch,), generator=generator)
    if augmentation == "crop_flip":
        flip = torch.rand(batch, generator=generator) < 0.5
    else:
        flip = torch.zeros(batch, dtype=torch.bool)
    return Shifts(top.numpy(), left.numpy(), flip.numpy())


def augment(pixels: Tensor, shifts: Shifts) -> Tensor:
    """Mirror, pad with black and crop each image of a uint8 batch ``(B, C, H, W)``."""
    batch, channels, height, width = pixels.shape
    rows, columns = padding(height, width)
    padded = np.zeros((batch, channels, height + 2 * rows, width + 2 * columns), dtype=np.uint8)
    padded[:, :, rows : rows + height, columns : columns + width] = pixels.numpy()
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    # The crop of a mirrored image is the mirror of a crop: mirror the smaller result.
    mirrored = np.flatnonzero(shifts.flip)
    left = np.where(shifts.flip, 2 * columns - shifts.left, shifts.left)
    cropped = windows[np.arange(batch), :, shifts.top, left]
    cropped[mirrored] = cropped[mirrored, :, :, ::-1]
    return torch.from_numpy(cropped)


class _Normaliser:
    """Turn uint8 pixels into ``(pixels / 255 - mean) / std`` by one product and one sum."""

    def __init__(self, dataset: Dataset) -> None:
        self.pictures = dataset.pictures
        self.scale, self.shift = _factors(tuple(dataset.mean), tuple(dataset.std))

    def __call__(self, pixels: Inputs) -> Inputs:
        if not self.pictures or isinstance(pixels, Several):
            return pixels
        return pixels.float().mul_(self.scale).add_(self.shift)


@functools.lru_cache(maxsize=16)
def _factors(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return factor and summand for each channel, ``(C, 1, 1)``; nobody changes them."""
    mean_ = torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
    std_ = torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
    return (1.0 / (255.0 * std_)).float(), (-mean_ / std_).float()


def train_batches(
    images: Images,
    indices: Indices,
    dataset: Dataset,
    batch_size: int,
    address: Address,
    epoch: int,
    first_step: int,
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield the shuffled and augmented mini-batches of one epoch.

    Args:
        images: The part that `indices` point into.
        indices: Examples of the client, shape ``(n,)``.
        dataset: Gives normalisation and augmentation.
        batch_size: Examples per mini-batch B; the last one has the remainder. A remainder of one
            example joins the mini-batch before it, because BatchNorm can take no variance of a
            single value; so the last mini-batch may have B + 1.
        address: Seed, client and round of the draws.
        epoch: Which of the client's epochs in this round; decides the order.
        first_step: Step of the first mini-batch in the round; with the position of a mini-batch
            it decides the augmentation.

    Yields:
        float32 of shape ``(B, C, H, W)``, normalised, and int64 of shape ``(B,)``; of other tasks
        inputs as they are, and targets.
    """
    normalised = _Normaliser(dataset)
    height, width = dataset.input_shape[1:] if dataset.pictures else (0, 0)
    mine = torch.as_tensor(indices, dtype=torch.int64)
    order = mine[torch.randperm(len(mine), generator=address.torch("shuffle", step=epoch))]
    spans = list(_spans(len(mine), batch_size))
    if batch_size > 1 and len(spans) > 1 and len(mine) % batch_size == 1:
        spans[-2:] = [(spans[-2][0], len(mine))]
    for position, (start, stop) in enumerate(spans):
        rows = order[start:stop]
        pixels = images.pixels.index_select(0, rows)
        if dataset.augmentation != "none" and isinstance(pixels, Tensor):
            step = first_step + position
            shifts = draw_shifts(dataset.augmentation, stop - start, height, width, address, step)
            pixels = augment(pixels, shifts)
        yield normalised(pixels), images.labels.index_select(0, rows)


def drawn_batches(
    images: Images, drawn: Iterable[Indices], dataset: Dataset, address: Address
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield mini-batches of given examples, augmented as those of `train_batches`.

    Args:
        images: The part that indices point into.
        drawn: The examples of each mini-batch, of the steps 0, 1, … of a round; any number.
        dataset: Gives normalisation and augmentation.
        address: Seed, client and round of the draws.
    """
    normalised = _Normaliser(dataset)
    height, width = dataset.input_shape[1:] if dataset.pictures else (0, 0)
    for step, indices in enumerate(drawn):
        rows = torch.as_tensor(indices, dtype=torch.int64)
        pixels = images.pixels.index_select(0, rows)
        if dataset.augmentation != "none" and len(rows) and isinstance(pixels, Tensor):
            shifts = draw_shifts(dataset.augmentation, len(rows), height, width, address, step)
            pixels = augment(pixels, shifts)
        yield normalised(pixels), images.labels.index_select(0, rows)


def eval_batches(
    images: Images, dataset: Dataset, batch_size: int = EVALUATION_BATCH
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield all images in order, normalised and not augmented.

    Yields:
        float32 of shape ``(B, C, H, W)`` and int64 of shape ``(B,)``; the last may be shorter.
    """
    normalised = _Normaliser(dataset)
    for start, stop in _spans(len(images), batch_size):
        yield normalised(images.pixels[start:stop]), images.labels[start:stop]


def _spans(count: int, batch_size: int) -> Iterator[tuple[int, int]]:
    if batch_size < 1:
        raise ConfigError.of("client.batch_size", batch_size, "must be at least 1")
    for start in range(0, count, batch_size):
        yield start, min(start + batch_size, count)
