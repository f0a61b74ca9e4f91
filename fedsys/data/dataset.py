"""A data set in memory, and the choices made once when it is read.

Parts of images keep their pixels as uint8: a quarter of the memory of float32, and what the disk
has. Other inputs have the type that models take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsys.transport.several import Inputs, Shape, shape_of

Indices = NDArray[np.int64]

STATISTICS_FROM = 10_000
"""Mean and standard deviation of a training part are taken from at most this many images."""


@dataclass(frozen=True, eq=False)
class Images:
    """One part of a data set.

    Attributes:
        pixels: The inputs. Images are uint8 of shape ``(N, C, H, W)``, contiguous; may be mapped
            from a file. Others are float32 or int64 of shape ``(N, …)``, or several such tensors.
        labels: What is to be learned: classes, int64 of shape ``(N,)``, each in ``[0, number of
            classes)``; or targets of another task, ``(N, …)``.
        strata: int64 of shape ``(N,)``: what parts are stratified and divided by; None: labels.
        owners: int64 of shape ``(N,)``: whose the examples are, where the data say so.
    """

    pixels: Inputs
    labels: Tensor
    strata: Tensor | None = None
    owners: Tensor | None = None

    @property
    def groups(self) -> Indices:
        """What parts are stratified and divided by, ``(N,)``."""
        return (self.labels if self.strata is None else self.strata).numpy()

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, indices: Indices) -> Images:
        """Return the images at `indices`, copied; all of them in order are not copied."""
        if len(indices) == len(self) and np.array_equal(indices, np.arange(len(self))):
            return self
        rows = torch.from_numpy(indices)
        more = (None if each is None else each[rows] for each in (self.strata, self.owners))
        return Images(self.pixels.index_select(0, rows), self.labels.index_select(0, rows), *more)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its three parts.

    Attributes:
        name: Name of the source, for instance ``"digits"``.
        train: What the clients share.
        validation: What rounds are judged on; without examples if none were set aside.
        test: Scored once, on the last model.
        classes: Names of the classes, by label.
        mean: Per channel, of ``pixels / 255``; empty: inputs are no images and stay as they are.
        std: Per channel, of ``pixels / 255``; above zero.
        augmentation: ``"none"``, ``"crop"`` or ``"crop_flip"``.
        outputs: What a model makes of an example, or of a place of it: classes, or numbers.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    outputs: int = 0

    @property
    def input_shape(self) -> Shape:
        """Shape of one example: ``(C, H, W)`` of an image, or the types and shapes of several."""
        return shape_of(self.train.pixels)

    @property
    def num_classes(self) -> int:
        """Number of classes, or of other outputs."""
        return self.outputs or len(self.classes)

    @property
    def target_bytes(self) -> int:
        """Size of what is to be learned of one example, as it is sent."""
        labels = self.train.labels
        return labels.element_size() * math.prod(labels.shape[1:])

    @property
    def counted(self) -> tuple[Indices, tuple[str, ...]]:
        """By what the examples of clients are counted, ``(N,)``, and how its values are called."""
        if self.classes:
            return self.train.groups, self.classes
        return np.zeros(len(self.train), dtype=np.int64), ("examples",)

    @property
    def pictures(self) -> bool:
        """Whether examples are images, which are normalised."""
        return bool(self.mean)


def stratified(labels: Indices, count: int, rng: np.random.Generator) -> Indices:
    """Choose `count` examples so that every class has its share, to within one example.

    Args:
        labels: Labels of shape ``(N,)``.
        count: How many to choose, at most ``N``.
        rng: Decides which examples of a class are chosen.

    Returns:
        Sorted indices of the chosen examples.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    quota = sizes * (count / max(1, len(labels)))
    chosen = np.floor(quota).astype(np.int64)
    # Largest remainders get what rounding down left over; a stable sort breaks ties by label.
    for k in np.argsort(chosen - quota, kind="stable")[: count - int(chosen.sum())]:
        chosen[k] += 1
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    return np.sort(by_class[rank < np.repeat(chosen, sizes)]).astype(np.int64)


def set_aside(images: Images, fraction: float, rng: np.random.Generator) -> tuple[Images, Images]:
    """Split `images` into what stays and a stratified `fraction` of them.

    A fraction above zero sets at least one image aside and never all of them.
    """
    labels = images.groups
    count = min(max(1, round(fraction * len(labels))), len(labels) - 1) if fraction > 0.0 else 0
    apart = stratified(labels, count, rng)
    stays = np.setdiff1d(np.arange(len(labels)), apart, assume_unique=True)
    return images.take(stays), images.take(apart)


def quantiles(values: NDArray[np.float32], count: int = 10) -> Indices:
    """Return in which of `count` groups of like size each of some numbers is, ``(N,)``."""
    inner = np.quantile(values, np.arange(1, count) / count)
    return np.searchsorted(inner, values, side="right").astype(np.int64)


def mean_and_std(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of ``pixels / 255``.

    They are computed from counts of the 256 values, exactly, hence the same with any number of
    threads; a channel that never changes has standard deviation 1.

    Args:
        pixels: uint8 of shape ``(N, C, H, W)``; at most `STATISTICS_FROM` images, evenly spaced,
            are looked at.
    """
    spread = np.linspace(0, len(pixels) - 1, min(len(pixels), STATISTICS_FROM)).astype(np.int64)
    seen = pixels[torch.from_numpy(spread)].numpy()
    values = np.arange(256) / 255.0
    mean, std = [], []
    for channel in range(seen.shape[1]):
        counts = np.bincount(seen[:, channel].ravel(), minlength=256)
        weights = counts / counts.sum()
        center = float(weights @ values)
        deviation = float(np.sqrt(weights @ (values - center) ** 2))
        mean.append(center)
        std.append(deviation if deviation > 1e-6 else 1.0)
    return tuple(mean), tuple(std)
