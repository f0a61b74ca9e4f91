"""From what a client sends to what a model takes: the same steps as in training."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from fedsys.data import decoding
from fedsys.errors import DataError, RequestError
from fedsys.serving.engine import Array, Card

FORMATS = ("PNG", "JPEG")
"""Formats of image files that are decoded; no other decoder is tried on bytes of strangers."""

MAX_PIXELS = 64_000_000
"""An image that is to be resized may have so many: a small file can hold a huge image."""

_TOO_MANY = f"{{}} has more than {MAX_PIXELS:,} pixels"


def decode(
    data: bytes, card: Card, *, resize: bool = False, where: str = "image"
) -> NDArray[np.uint8]:
    """Return one image file as uint8 of shape ``(C, H, W)``.

    Args:
        data: The bytes of a file.
        card: Gives channels and size.
        resize: Whether an image of another size is resized, bilinearly as in training.
        where: What to call it in an error.

    Raises:
        RequestError: It is no image, damaged, or of another size.
    """
    from PIL import Image, UnidentifiedImageError  # of an extra; tensors are answered without

    channels, height, width = card.input_shape
    try:
        # No filter of warnings: these are of the whole process, and files are decoded by threads.
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            # The orientation may stand behind the pixels, and swaps the sides.
            if not resize and opened.size not in ((width, height), (height, width)):
                raise _other_size(where, opened.size, (width, height))
            if opened.width * opened.height > MAX_PIXELS:
                raise RequestError(400, _TOO_MANY.format(where))
            pixels = decoding.to_pixels(opened, channels, (height, width) if resize else None)
    except RequestError:
        raise
    except DataError as error:
        raise RequestError(400, f"{where}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(400, _TOO_MANY.format(where)) from error
    except UnidentifiedImageError as error:
        known = " or ".join(FORMATS)
        raise RequestError(400, f"{where} ({len(data):,} bytes) is no {known} file") from error
    except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
        raise RequestError(400, f"{where} is damaged: {error}") from error
    if pixels.shape[1:] != (height, width):
        raise _other_size(where, pixels.shape[:0:-1], (width, height))
    return pixels.copy()


def _other_size(where: str, size: tuple[int, ...], must: tuple[int, int]) -> RequestError:
    return RequestError(
        400, f"{where} has {size[0]}x{size[1]} pixels, and must have {must[0]}x{must[1]}; "
        "fedsys serve with serving.resize=true resizes images",
    )  # fmt: skip


def normalise(pixels: NDArray[np.uint8], card: Card) -> Array:
    """Turn uint8 ``(batch, C, H, W)`` into ``(pixels / 255 - mean) / std``, to the bit as training.

    `fedsys.data.loader` computes the same by one product and one sum.
    """
    mean = np.array(card.mean, np.float64).reshape(-1, 1, 1)
    std = np.array(card.std, np.float64).reshape(-1, 1, 1)
    images = np.asarray(pixels).astype(np.float32)
    images *= (1.0 / (255.0 * std)).astype(np.float32)
    images += (-mean / std).astype(np.float32)
    return images
