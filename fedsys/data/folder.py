"""A folder of images, decoded once and cached.

Two layouts are understood, `<root>/{train,test}/<class>/…` (with an optional `val`, `valid` or
`validation` beside them) and `<root>/<class>/…`. The decoded pixels are kept as one uint8 `.npy`
file beside a JSON manifest; both are named after a digest of the names, sizes and modification
times of all files and of the version of `fedsys.data.decoding`, so a folder that changed, or that
would be decoded otherwise now, is decoded again. Files appear by renaming, so
processes that decode the same folder at the same time do not disturb each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsys.data import decoding
from fedsys.data.dataset import Images
from fedsys.data.options import Spec, cache_folder
from fedsys.errors import ConfigError, DataError, need

_log = logging.getLogger(__name__)

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_VALIDATION_NAMES = ("val", "valid", "validation")
_FORMAT = 1  # raised when what a cache file means changes
_PER_TASK = 512  # images that one thread decodes before it asks for more

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """The parts of a folder; those that it does not have are None."""

    train: Images
    test: Images | None
    validation: Images | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class _Form:
    """The form that all images are brought to; `size` is (height, width), None to keep it."""

    channels: int
    size: tuple[int, int] | None


def read(spec: Spec) -> Found:
    """Read the folder `data.root`.

    Args:
        spec: The keys ``root``; ``channels``, 3 for colour and 1 for grey; ``size``, null if all
            images have one size, else the side or [height, width] that they are resized to,
            without keeping the aspect ratio; ``cache``, the folder of the cache.

    Raises:
        ConfigError: The folder does not exist or has another layout, or the sizes differ.
        DataError: A class is empty or missing in one part, or an image cannot be read.
    """
    need("PIL", "data=image_folder")
    form = _form(spec)
    root = _root(spec)
    try:
        parts = _parts(root)
        listed = {name: _list_classes(path) for name, path in parts.items()}
    except OSError as error:
        raise DataError(f"data.root={root}: cannot be listed: {error}") from error
    classes = tuple(listed["train"])
    for name, by_class in listed.items():
        if tuple(by_class) != classes:
            different = ", ".join(sorted(set(by_class) ^ set(classes)))
            raise DataError(
                f"{parts[name]}: must have the same classes as {parts['train']}; "
                f"in one of the two only: {different}"
            )
    files = [file for by_class in listed.values() for found in by_class.values() for file in found]
    pixels = torch.from_numpy(_pixels(files, parts["train"], form, cache_folder(spec) / "images"))
    images: dict[str, Images] = {}
    start = 0
    for name, by_class in listed.items():
        sizes = [len(found) for found in by_class.values()]
        labels = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        stop = start + len(labels)
        images[name] = Images(pixels[start:stop], torch.from_numpy(labels))
        start = stop
    return Found(images["train"], images.get("test"), images.get("validation"), classes)


def _form(spec: Spec) -> _Form:
    channels, size = spec.get("channels", 3), spec.get("size")
    if channels not in (1, 3):
        raise ConfigError.of("data.channels", channels, "must be 3 (colour) or 1 (grey)")
    if size is None:
        return _Form(channels, None)
    sides = (
        [size, size] if isinstance(size, int) else list(size) if hasattr(size, "__len__") else []
    )
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ConfigError.of("data.size", size, "must be null, a side in pixels or [height, width]")
    return _Form(channels, (sides[0], sides[1]))


# --------------------------------------------------------------------------------------------------
# What is there


def _root(spec: Spec) -> Path:
    named = spec.get("root")
    if not named:
        raise ConfigError.of(
            "data.root", named, "must name a folder of images", "for instance data.root=~/pictures"
        )
    root = Path(str(named)).expanduser()
    if not root.is_dir():
        raise ConfigError.of("data.root", named, "must be an existing folder")
    return root


def _parts(root: Path) -> dict[str, Path]:
    """Return the folder of each part that there is; `train` always."""
    folders = {entry.name: entry for entry in _folders(root)}
    if "train" in folders:
        parts = {"train": folders["train"]}
        if "test" in folders:
            parts["test"] = folders["test"]
        for name in _VALIDATION_NAMES:
            if name in folders:
                parts["validation"] = folders[name]
                break
        return parts
    nested = [entry for entry in folders.values() if (entry / "train").is_dir()]
    if len(folders) == 1 and nested:
        _log.info("data.root=%s: its only folder, %s, is taken", root, nested[0].name)
        return _parts(nested[0])  # an archive that was unpacked into a folder of its own
    if len(folders) < 2 or "test" in folders:
        raise ConfigError.of(
            "data.root",
            root,
            "must hold train/<class>/ and test/<class>/, or at least two folders <class>/",
            f"it holds {', '.join(sorted(folders)) or 'no folder'}",
        )
    return {"train": root}


def _folders(folder: Path) -> list[Path]:
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _list_classes(part: Path) -> dict[str, list[_File]]:
    """Return the images of each class, classes and files in the order of their names."""
    found = {folder.name: list(_walk(str(folder))) for folder in _folders(part)}
    if len(found) < 2:
        raise DataError(f"{part}: must hold at least two class folders, and holds {len(found)}")
    for name, files in found.items():
        if not files:
            raise DataError(
                f"{part / name}: the class has no image ({' '.join(_SUFFIXES)}); "
                "add images or remove the folder"
            )
    return found


def _walk(folder: str) -> Iterator[_File]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif entry.name.lower().endswith(_SUFFIXES):
            status = entry.stat()
            yield _File(entry.path, status.st_size, status.st_mtime_ns)


# --------------------------------------------------------------------------------------------------
# Cache


def _pixels(files: list[_File], root: Path, form: _Form, cache: Path) -> Pixels:
    """Return the pixels of all files, from the cache if it has them."""
    place = hashlib.blake2b(f"{_FORMAT}\0{root.resolve()}\0{form}".encode(), digest_size=8)
    state = hashlib.blake2b(str(decoding.VERSION).encode(), digest_size=16)
    for file in files:
        state.update(f"{file.path}\0{file.size}\0{file.modified_ns}\n".encode("utf-8", "replace"))
    stem = f"{place.hexdigest()}-{state.hexdigest()}"
    cached = _open(cache, stem, len(files))
    if cached is not None:
        return cached
    _log.info("decoding %d images below %s; the next run finds them in %s", len(files), root, cache)
    pixels = _decode_all(files, form)
    manifest = {
        "format": _FORMAT,
        "decoding": decoding.VERSION,
        "root": str(root),
        "files": len(files),
        "files_digest": state.hexdigest(),
        "shape": list(pixels.shape),
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _write(cache / f"{stem}.npy", lambda file: np.save(file, pixels, allow_pickle=False))
        _write(
            cache / f"{stem}.json",
            lambda file: file.write(json.dumps(manifest, indent=2).encode()),
        )
        _forget(cache, place.hexdigest(), stem)
    except OSError as error:
        _log.warning(
            "data.cache=%s: the decoded images cannot be kept (%s), so the next run decodes them "
            "again; name another folder with data.cache=…",
            cache,
            error,
        )
    # The mapped file is shared by all processes that read it; what was decoded here is not.
    mapped = _open(cache, stem, len(files))
    return pixels if mapped is None else mapped


def _open(cache: Path, stem: str, count: int) -> Pixels | None:
    """Map a cached array into memory; None if it is absent or not what its manifest says.

    The pages are private (copy on write) because PyTorch warns about arrays that it may not write.
    """
    try:
        manifest = json.loads((cache / f"{stem}.json").read_bytes())
        pixels: Pixels = np.load(cache / f"{stem}.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(manifest, dict) and manifest.get("shape") == list(pixels.shape)
    if not fits or pixels.ndim != 4 or len(pixels) != count or pixels.dtype != np.uint8:
        return None
    return pixels


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _forget(cache: Path, place: str, stem: str) -> None:
    """Remove what was cached for an earlier state of the same folder."""
    for old in cache.glob(f"{place}-*"):
        if old.stem != stem:
            old.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Decoding


def _decode_all(files: list[_File], form: _Form) -> Pixels:
    """Decode all files, several at a time; the decoders of Pillow let other threads run."""
    first = _decode(files[0].path, form)
    pixels = np.empty((len(files), *first.shape), dtype=np.uint8)

    def fill(start: int) -> None:
        for row in range(start, min(start + _PER_TASK, len(files))):
            image = _decode(files[row].path, form)
            if image.shape != first.shape:
                raise ConfigError.of(
                    "data.size",
                    None,
                    "must be set when images differ in size: "
                    f"{files[0].path} has {first.shape[2]}x{first.shape[1]} pixels, "
                    f"{files[row].path} has {image.shape[2]}x{image.shape[1]}",
                    "for instance data.size=64",
                )
            pixels[row] = image

    pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
    try:
        for _ in pool.map(fill, range(0, len(files), _PER_TASK)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


def _decode(path: str, form: _Form) -> Pixels:
    """Return one image as uint8 of shape ``(C, H, W)``."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return decoding.to_pixels(opened, form.channels, form.size)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
        raise DataError(f"{path}: cannot be read as an image: {error}; repair or remove it") from (
            error
        )
