"""How well an attack does: pictures beside pictures, and scores of two kinds of examples.

Pure functions. What an attack has to beat stands beside each: `ssim` of an image with itself is 1
and with noise about 0, an area under the curve of guessing is 0.5, and the share of true positives
of guessing is that of the false ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedsys.errors import ModelError

WINDOW = 7
"""Side of the window of `ssim`, in pixels; the largest odd side that fits into smaller images."""

Scores = NDArray[np.float64]


def psnr(images: Tensor, others: Tensor, peak: float = 1.0) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, in decibels; infinite for equal ones.

    Args:
        images: ``(N, C, H, W)``.
        others: Likewise.
        peak: Largest value of a pixel, less the smallest.
    """
    error = (images - others).double().pow(2).flatten(1).mean(1)
    return 20 * math.log10(peak) - 10 * error.log10()


def ssim(images: Tensor, others: Tensor, peak: float = 1.0) -> Tensor:
    """Return the structural similarity of each image, from -1 to 1: the mean over its channels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
    Transactions on Image Processing 2004, equation 13, with a square window of `WINDOW` pixels
    whose values count alike and whose variances are those of a sample, as scikit-image has it.
    Windows that lie wholly in the image count.

    Args:
        images: ``(N, C, H, W)``, of at least 3x3 pixels.
        others: Likewise.
        peak: Largest value of a pixel, less the smallest.

    Returns:
        ``(N,)``, in float64.

    Raises:
        ModelError: The shapes differ, or there are fewer pixels.
    """
    side = min((WINDOW, *images.shape[-2:]))
    side -= 1 - side % 2
    if images.shape != others.shape or images.dim() != 4 or side < 3:
        raise ModelError(
            f"ssim: images of {tuple(images.shape)} and {tuple(others.shape)} must have one shape "
            "(N, C, H, W) and at least 3x3 pixels"
        )
    x, y = images.double(), others.double()
    pixels = side * side

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, side, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    sample = pixels / (pixels - 1)
    variance_x = sample * (mean(x * x) - mean_x**2)
    variance_y = sample * (mean(y * y) - mean_y**2)
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    small_1, small_2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    likeness = (2 * mean_x * mean_y + small_1) * (2 * covariance + small_2)
    likeness /= (mean_x**2 + mean_y**2 + small_1) * (variance_x + variance_y + small_2)
    similar: Tensor = likeness.flatten(1).mean(1)
    return similar


def auc(positives: Scores, negatives: Scores) -> float:
    """Return the area under the curve: how often a positive scores above a negative; ties half.

    NaN where there are none of one kind.
    """
    if not len(positives) or not len(negatives):
        return math.nan
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    return float(roc_auc_score(truth, np.r_[positives, negatives]))


def true_positives_at(positives: Scores, negatives: Scores, false_positives: float) -> float:
    """Return the largest share of positives above a threshold that few negatives exceed.

    Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, section
    III.B: an attack that is sure of a few examples has a small area and does harm.

    Args:
        positives: Scores of positives.
        negatives: Scores of negatives.
        false_positives: Largest share of the negatives that may lie above the threshold. Below one
            over their number it is that none may.
    """
    if not len(positives) or not len(negatives):
        return math.nan
    allowed = math.floor(false_positives * len(negatives) + 1e-9)
    threshold = np.sort(negatives)[::-1][allowed] if allowed < len(negatives) else -np.inf
    return float(np.mean(positives > threshold))


def one_against_rest(scores: Scores, labels: NDArray[np.int64]) -> float:
    """Return the mean over classes of the area under the curve of one class against the others.

    Args:
        scores: ``(N, classes)``; higher where an attack believes in the class.
        labels: The truth, ``(N,)``.

    Returns:
        The mean over the classes that are there; NaN if there is only one.
    """
    areas = [
        auc(scores[labels == k, k], scores[labels != k, k])
        for k in range(scores.shape[1])
        if 0 < int((labels == k).sum()) < len(labels)
    ]
    return float(np.mean(areas)) if areas else math.nan


def pixels_of(images: Tensor) -> Tensor:
    """Return uint8 images as float32 from 0 to 1."""
    return images.to(torch.float32) / 255.0
