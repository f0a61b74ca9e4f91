"""One image file as 8-bit pixels: the one rule that training and serving share.

Pillow clips what has more than 8 bits (``convert`` makes 300 and 65535 the same white), leaves some
inversions out, and shows the first of several pages without a word. Here

* pixels are scaled by the range of their depth: 16 bits by the high byte, as Pillow does itself for
  colours, 12 bits likewise, floats from [0, 1];
* an image stands upright as viewers show it: the orientation of EXIF or XMP is followed in every
  format that has one (JPEG, PNG, WebP, TIFF);
* transparency and colour profiles are left out;
* what cannot be known is refused with its depth: integers of 32 bits, signed ones, floats outside
  [0, 1], and files that hold several pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

VERSION = 2
"""Raised when the pixels of a file change; caches of decoded files carry it."""

_ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4
_BITS, _PHOTOMETRIC, _SUBFILE, _SAMPLE_FORMAT = 258, 262, 254, 339  # TIFF 6.0, section 8 and 19
_WHITE_IS_ZERO, _SIGNED = 0, 2
_NO_PAGE = 0b101  # of `_SUBFILE`: a smaller copy or a mask of another page
_WAY_OUT = "save it with 8 or 16 bits per channel, scaled from black to white"


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Return an opened image as uint8 of shape ``(C, H, W)``, upright.

    Args:
        image: As ``PIL.Image.open`` gives it; it is read, and not to be used afterwards.
        channels: 3 for colour, 1 for grey.
        size: (height, width) that it is resized to, bilinearly, without keeping the aspect ratio;
            None to keep its own.

    Raises:
        DataError: Its range or which of its pictures is meant cannot be known; without the file.
        Exception: Whatever the decoders of Pillow raise for a damaged file.
    """
    from PIL import Image

    _check_single(image)
    tags = _tags(image)
    image.load()
    turn = _turn(image)
    plain = _eight_bits(image, tags)
    mode = "RGB" if channels == 3 else "L"
    plain = plain if plain.mode == mode else plain.convert(mode)
    if turn is not None:
        plain = plain.transpose(turn)
    if size is not None and plain.size != size[::-1]:
        plain = plain.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.array(plain, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes the image upright; TIFFs are turned by Pillow as they are loaded."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # viewers show an image with damaged EXIF as it is stored
        return None
    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)


# --------------------------------------------------------------------------------------------------
# Depth


def _tags(image: Image.Image) -> dict[int, Any]:
    """Return the tags of a TIFF, with first values for those that count channels."""
    found = getattr(image, "tag_v2", {})
    names = (_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT)
    values = {name: found.get(name) for name in names}
    return {n: v[0] if isinstance(v, tuple) and v else v for n, v in values.items()}


def _eight_bits(image: Image.Image, tags: dict[int, Any]) -> Image.Image:
    """Return the image with 8 bits per channel, whatever they stand for."""
    from PIL import Image

    if tags[_SAMPLE_FORMAT] == _SIGNED:
        raise _unknown(f"{tags[_BITS]}-bit signed integers")
    if image.mode == "F":
        values = _from_floats(np.asarray(image))
    elif image.mode.startswith("I"):
        values = _from_integers(np.asarray(image), _bits(image, tags))
    elif image.mode == "LAB":
        raise DataError("its colours are CIE L*a*b*, which is not read here; save it as RGB")
    else:
        return image
    # Pillow inverts 8 bits and fewer itself.
    return Image.fromarray(255 - values if tags[_PHOTOMETRIC] == _WHITE_IS_ZERO else values)


def _bits(image: Image.Image, tags: dict[int, Any]) -> int:
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these hold 16 bits at most
        raise _unknown(f"{tags[_BITS] or 32}-bit integers")
    return int(tags[_BITS] or 16)


def _from_integers(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    return (values >> (bits - 8)).astype(np.uint8)


def _from_floats(values: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if not (low >= 0.0 and high <= 1.0):  # also for NaN
        raise _unknown(f"32-bit floats from {low:g} to {high:g}, outside [0, 1]")
    return np.rint(values * 255.0).astype(np.uint8)


def _unknown(depth: str) -> DataError:
    return DataError(f"has {depth}: which values are black and white cannot be known; {_WAY_OUT}")


# --------------------------------------------------------------------------------------------------
# Several pictures in a file


def _check_single(image: Image.Image) -> None:
    """Refuse animations and stacks; the second picture of a JPEG is a preview of the first.

    Raises:
        DataError: Which picture is meant cannot be known.
    """
    if image.format == "MPO":
        return
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format == "TIFF":
        count = sum(not _is_copy(image, page) for page in range(count))
        image.seek(0)
    if count > 1:
        raise DataError(f"holds {count} pictures, and one is taken; save each as a file of its own")


def _is_copy(image: Image.Image, page: int) -> bool:
    image.seek(page)
    tags: dict[int, Any] = image.tag_v2  # type: ignore[attr-defined]  # of Pillow's TiffImageFile
    return page > 0 and bool(tags.get(_SUBFILE, 0) & _NO_PAGE)
