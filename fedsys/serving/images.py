"""From what a client sends to what a model takes: the same steps as in training."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fedsys.errors import RequestError
from fedsys.serving.engine import Card

FORMATS = ("PNG", "JPEG")
"""Formats of image files that are decoded; no other decoder is tried on bytes of strangers."""

MAX_PIXELS = 64_000_000
"""An image that is to be resized may have so many: a small file can hold a huge image."""

_TOO_MANY = f"{{}} has more than {MAX_PIXELS:,} pixels"


def decode(data: bytes, card: Card, *, resize: bool = False, where: str = "image") -> Tensor:
    """Return one image file as uint8 of shape ``(C, H, W)``.

    Args:
        data: The bytes of a file.
        card: Gives channels and size.
        resize: Whether an image of another size is resized, bilinearly as in training.
        where: What to call it in an error.

    Raises:
        RequestError: It is no image, damaged, or of another size.
    """
    channels, height, width = card.input_shape
    try:
        # No filter of warnings: these are of the whole process, and files are decoded by threads.
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.size != (width, height) and not resize:
                raise RequestError(
                    400, f"{where} has {opened.width}x{opened.height} pixels, and must have "
                    f"{width}x{height}; serving.resize=true resizes images",
                )  # fmt: skip
            if opened.width * opened.height > MAX_PIXELS:
                raise RequestError(400, _TOO_MANY.format(where))
            image = opened.convert("RGB" if channels == 3 else "L")
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(image, dtype=np.uint8)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(400, _TOO_MANY.format(where)) from error
    except UnidentifiedImageError as error:
        known = " or ".join(FORMATS)
        raise RequestError(400, f"{where} ({len(data):,} bytes) is no {known} file") from error
    except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
        raise RequestError(400, f"{where} is damaged: {error}") from error
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def normalise(pixels: Tensor, card: Card) -> Tensor:
    """Turn uint8 ``(batch, C, H, W)`` into ``(pixels / 255 - mean) / std``, to the bit as training.

    `fedsys.data.loader` computes the same by one product and one sum.
    """
    mean = torch.tensor(card.mean, dtype=torch.float64).reshape(-1, 1, 1)
    std = torch.tensor(card.std, dtype=torch.float64).reshape(-1, 1, 1)
    return pixels.float().mul_((1.0 / (255.0 * std)).float()).add_((-mean / std).float())
