"""Originals beside what is made of their activations, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsys.runs import plots

_STRIP_IN = 0.62  # height of a row in inches
_SIDE_IN = 0.6  # of an image


def draw_reconstructions(path: Path, strips: Sequence[tuple[str, Tensor, float]]) -> Path:
    """Draw a row of images for each of the strips, the originals first.

    Args:
        path: The PNG file.
        strips: A name, images ``(N, C, H, W)`` from 0 to 1, and their mean SSIM with the originals.
    """

    def painted(name: str, images: Tensor, likeness: float) -> plots.Paint:
        def paint(axes: Any) -> None:
            row = images.permute(2, 0, 3, 1).flatten(1, 2).clamp(0, 1)  # H, N W, C
            pixels = row.numpy()
            grey = pixels.shape[2] == 1
            axes.imshow(pixels[:, :, 0] if grey else pixels, cmap="gray" if grey else None,
                        vmin=0, vmax=1, interpolation="nearest")  # fmt: skip
            axes.grid(False)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            told = name if likeness >= 1.0 else f"{name}\nSSIM {likeness:.2f}"
            axes.set_ylabel(told, rotation=0, ha="right", va="center", fontsize=8)

        return paint

    panels = [(painted(*strip), _STRIP_IN) for strip in strips]
    count = max(len(images) for _, images, _ in strips)
    return plots.draw_panels(path, panels, width=1.6 + _SIDE_IN * count)
