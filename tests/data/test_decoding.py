"""Depth, orientation and pages of image files, against files that are written byte by byte here.

Before, whatever had more than 8 bits was clipped by Pillow: a 16-bit twin of a data set on which a
model learned 100 % gave 50 %, because almost all its pixels were white. The orientation of photos
was ignored, but for TIFF, which Pillow turns itself.
"""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fedsys.data import load
from fedsys.data.decoding import to_pixels
from fedsys.errors import DataError

FOUR = [0, 257 * 10 + 200, 30_000, 65_535]  # 16-bit values of which the high bytes are HIGH
HIGH = [0, 10, 117, 255]


def png(depth, colour, row, width=4):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(bits, data, *, sample=1, white_is_zero=False, end="<", width=4):
    """A grey strip of one row, uncompressed."""
    photometric = 0 if white_is_zero else 1
    shorts = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1, 339: sample}
    tags = {tag: struct.pack(end + "HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items()}
    tags[273] = struct.pack(end + "HHII", 273, 4, 1, 8)
    tags[279] = struct.pack(end + "HHII", 279, 4, 1, len(data))
    data += b"\0" * (len(data) % 2)
    mark = b"II*\0" if end == "<" else b"MM\0*"
    entries = b"".join(tags[tag] for tag in sorted(tags))
    directory = struct.pack(end + "H", len(tags)) + entries + struct.pack(end + "I", 0)
    return mark + struct.pack(end + "I", 8 + len(data)) + data + directory


def grey(data):
    with Image.open(io.BytesIO(data)) as opened:
        return to_pixels(opened, 1, None)[0]


def colours(values):
    return b"".join(struct.pack(">3H", v, v, v) for v in values)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(16, 0, struct.pack(">4H", *FOUR)), HIGH),
        (png(16, 2, colours(FOUR)), HIGH),
        (png(16, 4, b"".join(struct.pack(">2H", v, 65_535) for v in FOUR)), HIGH),
        (png(8, 0, bytes(HIGH)), HIGH),
        (png(4, 0, b"\x07\x8f"), [0, 119, 136, 255]),
        (png(1, 0, b"\x50"), [0, 255, 0, 255]),
        (tiff(16, struct.pack("<4H", *FOUR)), HIGH),
        (tiff(16, struct.pack(">4H", *FOUR), end=">"), HIGH),
        (tiff(16, struct.pack("<4H", *FOUR), white_is_zero=True), [255, 245, 138, 0]),
        (tiff(12, bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF])), [0, 128, 255, 255]),
        (tiff(8, bytes(HIGH)), HIGH),
        (tiff(8, bytes(HIGH), white_is_zero=True), [255, 245, 138, 0]),
        (tiff(32, struct.pack("<4f", 0.0, 0.04, 0.5, 1.0), sample=3), [0, 10, 128, 255]),
        (tiff(32, struct.pack("<f", 0.2) * 4, sample=3, white_is_zero=True), [204] * 4),
        (b"P5\n4 1\n65535\n" + struct.pack(">4H", *FOUR), HIGH),
        (b"P5\n4 1\n1023\n" + struct.pack(">4H", 0, 341, 512, 1023), [0, 85, 128, 255]),
        (b"P5\n4 1\n15\n" + bytes([0, 3, 7, 15]), [0, 51, 119, 255]),
    ],
)  # fmt: skip
def test_pixels_are_scaled_by_the_range_of_their_depth(data, expected):
    assert grey(data)[0].tolist() == expected


@pytest.mark.parametrize(
    ("data", "depth"),
    [
        (tiff(32, struct.pack("<4I", 0, 5, 300, 2**32 - 1)), "32-bit integers"),
        (tiff(32, struct.pack("<4i", 0, 5, 300, -7), sample=2), "32-bit signed integers"),
        (tiff(16, struct.pack("<4h", 0, -5, 300, 9), sample=2), "16-bit signed integers"),
        (tiff(8, bytes(HIGH), sample=2), "8-bit signed integers"),
        (
            tiff(32, struct.pack("<4f", 0, 1, 2, 255), sample=3),
            r"32-bit floats from 0 to 255, outside",
        ),
        (
            tiff(32, struct.pack("<4f", 0, -1, 0, 1), sample=3),
            r"32-bit floats from -1 to 1, outside",
        ),
        (
            tiff(32, struct.pack("<4f", 0, float("nan"), 0, 1), sample=3),
            "32-bit floats from nan to nan",
        ),
    ],
)
def test_a_range_that_cannot_be_known_is_refused_by_its_depth(data, depth):
    with pytest.raises(DataError, match=rf"^has {depth}.*save it with 8 or 16 bits"):
        grey(data)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=4, max_size=4))
def test_a_picture_is_the_same_in_every_encoding_of_its_brightness(values):
    wide = [257 * v for v in values]
    files = [
        png(8, 0, bytes(values)),
        png(16, 0, struct.pack(">4H", *wide)),
        png(16, 2, colours(wide)),
        tiff(16, struct.pack("<4H", *wide)),
        tiff(32, struct.pack("<4f", *(v / 255 for v in values)), sample=3),
        b"P5\n4 1\n65535\n" + struct.pack(">4H", *wide),
    ]
    assert [grey(file)[0].tolist() for file in files] == [values] * len(files)


def test_palettes_and_cmyk_become_colours():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert to_pixels(palette, 3, None)[:, 0, 0].tolist() == [40, 50, 60]
    ink = Image.new("CMYK", (2, 2), (0, 0, 255, 0))
    assert to_pixels(ink, 3, None)[:, 0, 0].tolist() == [255, 255, 0]


# --------------------------------------------------------------------------------------------------
# Orientation

FORMS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tif": {}}


def photo(suffix, orientation):
    """A sky over a ground, as a sensor stores it, with the tag."""
    upright = np.zeros((40, 24, 3), np.uint8)
    upright[:20, :12] = 220
    tag = Image.Exif()
    tag[0x0112] = orientation
    out = io.BytesIO()
    form = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    Image.fromarray(upright).save(out, form, exif=tag, **FORMS[suffix])
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", FORMS)
def test_photos_stand_as_viewers_show_them(suffix, orientation):
    data = photo(suffix, orientation)
    with Image.open(io.BytesIO(data)) as opened:
        seen = np.asarray(ImageOps.exif_transpose(opened).convert("L"), np.int64)
    got = grey(data)
    assert got.shape == ((24, 40) if orientation > 4 else (40, 24)) == seen.shape
    assert np.abs(got - seen).max() < 8  # of the compression of JPEG
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
    corner |= {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert got[corner[orientation]] > 200


def test_damaged_exif_leaves_a_photo_as_it_is_stored():
    out = io.BytesIO()
    Image.new("L", (6, 4), 9).save(out, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert grey(out.getvalue()).shape == (4, 6)


# --------------------------------------------------------------------------------------------------
# Several pictures in one file


def stack(form, **options):
    out = io.BytesIO()
    first, second = (Image.new("L", (6, 4), value) for value in (10, 200))
    first.save(out, form, save_all=True, append_images=[second], **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP", "GIF"])
def test_a_file_of_several_pictures_is_refused(form):
    """The first was taken without a word: of a stack of slices, all others were lost."""
    with pytest.raises(DataError, match="holds 2 pictures"):
        grey(stack(form))


def test_previews_are_no_second_picture():
    """Phones put one into JPEG files, scanners put reduced copies into TIFFs."""
    assert grey(stack("MPO")).max() < 20
    out = io.BytesIO()
    copy = Image.new("L", (3, 2), 200)
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    Image.new("L", (6, 4), 10).save(out, "TIFF", save_all=True, append_images=[copy])
    assert grey(out.getvalue()).shape == (4, 6)


# --------------------------------------------------------------------------------------------------
# In a folder


@pytest.fixture
def folder(tmp_path):
    for name, number in itertools.product(("dim", "lit"), range(4)):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        value = 257 * (40 if name == "dim" else 180)
        pixels = np.full((4, 4), value, np.uint16)
        Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return {
        "source": "image_folder", "root": str(tmp_path / "images"), "channels": 1,
        "cache": str(tmp_path / "cache"), "test": 0.25, "validation": 0.34,
    }  # fmt: skip


def test_a_folder_of_16_bit_images_keeps_their_brightness(folder):
    assert set(load(folder, seed=0).train.pixels.unique().tolist()) == {40, 180}


def test_a_file_of_unknown_range_is_named(folder, tmp_path):
    file = tmp_path / "images" / "lit" / "deep.tif"
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(file)
    with pytest.raises(DataError, match=rf"^{file}: has 32-bit"):
        load(folder, seed=0)


def test_what_was_decoded_by_another_rule_is_decoded_again(folder, monkeypatch):
    """The cache was named after the files alone: clipped pixels would have lived on."""
    monkeypatch.setattr("fedsys.data.decoding.VERSION", 1)
    monkeypatch.setattr(
        "fedsys.data.decoding.to_pixels", lambda *_: np.full((1, 4, 4), 255, np.uint8)
    )
    assert load(folder, seed=0).train.pixels.unique().tolist() == [255]
    monkeypatch.undo()
    assert set(load(folder, seed=0).train.pixels.unique().tolist()) == {40, 180}
