"""The sources behind `data=NAME`, read into one form.

Each source gives a training and a test part and the names of the classes. What follows is the
same for all: an optional stratified subset, a validation part set aside from the training part,
and the constants of the normalisation.
"""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsys.data import federated, folder, own, table, text
from fedsys.data.dataset import Dataset, Images, Indices, mean_and_std, set_aside, stratified
from fedsys.data.loader import AUGMENTATIONS
from fedsys.data.options import Spec, cache_folder, choice, fraction, shape, whole
from fedsys.errors import ConfigError, DataError, need
from fedsys.randomness import Address
from fedsys.transport.several import Inputs

_TEST_SEED = 0
"""Test parts that are set aside here do not depend on the seed of the run: runs with different
seeds stay comparable, and no test image of one was trained on by another."""

_CONNECT_S = 30.0
"""A download gives up when nothing arrives for this many seconds."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Parts:
    """What a source gives; `statistics` are its known (mean, std) of ``pixels / 255``."""

    train: Images
    test: Images
    classes: tuple[str, ...]
    validation: Images | None = None
    statistics: Statistics | None = None
    outputs: int = 0


def load(spec: Spec, *, seed: int) -> Dataset:
    """Read a data set.

    Args:
        spec: The `data` group. Common keys: ``source``; ``validation``, the fraction of the
            training part that is set aside (stratified by class; 0 for none; a folder of images
            that brings a validation part keeps that); ``max_examples``, which limits every part
            to a stratified subset of this size (null for all); ``augmentation``.
        seed: Seed of the run; decides the validation part and the subsets.

    Raises:
        ConfigError: An option is out of its range, or the files are not where `data.root` says.
        DataError: Files cannot be read, or cannot be downloaded.
    """
    name = choice("data.source", spec.get("source"), tuple(SOURCES))
    augmentation = choice("data.augmentation", spec.get("augmentation", "none"), AUGMENTATIONS)
    held_out = fraction(spec, "validation", 0.0)
    limit = spec.get("max_examples")
    most = None if limit is None else whole(spec, "max_examples", 1, least=2)
    _check_task(name, spec)
    parts = SOURCES[name](spec, seed)
    address = Address(seed)
    train = _subset(parts.train, most, address, 0)
    test = _subset(parts.test, most, address, 1)
    if parts.validation is not None:
        validation = _subset(parts.validation, most, address, 2)
    else:
        train, validation = set_aside(train, held_out, address.numpy("validation"))
    pixels = train.pixels
    pictures = isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8
    if augmentation != "none" and not pictures:
        raise ConfigError.of(
            "data.augmentation", augmentation, "is of images", "data.augmentation=none"
        )
    mean, std = parts.statistics or (_moments(pixels) if pictures else ((), ()))
    more = parts.classes, mean, std, augmentation, parts.outputs
    return Dataset(name, train, validation, test, *more)


def _moments(pixels: Inputs) -> Statistics:
    assert isinstance(pixels, torch.Tensor)  # as images are
    return mean_and_std(pixels)


def _check_task(source: str, spec: Spec) -> None:
    task = spec.get("task", "classification")
    if task != "classification" and source not in ANY:
        raise ConfigError.of(
            "task.kind", task, f"must be classification with data.source={source}, of classes",
            f"others are for {', '.join(ANY)}",
        )  # fmt: skip


def _subset(images: Images, most: int | None, address: Address, part: int) -> Images:
    if most is None or len(images) <= most:
        return images
    rng = address.numpy("subset", part)
    return images.take(stratified(images.groups, most, rng))


def _images(pixels: np.ndarray[Any, Any], labels: Indices) -> Images:
    contiguous = np.ascontiguousarray(pixels, dtype=np.uint8)
    return Images(torch.from_numpy(contiguous), torch.from_numpy(labels.astype(np.int64)))


# --------------------------------------------------------------------------------------------------
# Sources that need no file of the user


def _digits(spec: Spec, seed: int) -> Parts:
    """1,797 handwritten digits of 1x8x8 that are installed with scikit-learn."""
    table = _digits_table()
    pixels = np.rint(table[:, :-1] * (255.0 / 16.0)).reshape(-1, 1, 8, 8)
    whole_set = _images(pixels.astype(np.uint8), table[:, -1])
    share = fraction(spec, "test", 0.2, open_below=True)
    train, test = set_aside(whole_set, share, Address(_TEST_SEED).numpy("test"))
    return Parts(train, test, tuple(str(digit) for digit in range(10)))


def _digits_table() -> np.ndarray[Any, Any]:
    """Return the digits as rows of 64 values in 0..16 and the label, shape ``(1797, 65)``.

    The file is read past `sklearn.datasets`, whose import takes longer than a round of training.
    """
    need("sklearn", "data=digits")
    found = importlib.util.find_spec("sklearn")
    for place in (found.submodule_search_locations or []) if found else []:
        file = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as rows:
                return np.loadtxt(rows, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


_CHUNK = 4096  # images per draw of the synthetic source


def _synthetic(spec: Spec, seed: int) -> Parts:
    """Blocky patterns, one per class, under uniform noise: learnable, and of any size."""
    size = shape(spec, "shape", (1, 8, 8))
    classes = whole(spec, "classes", 10, least=2)
    noise = fraction(spec, "noise", 0.5)
    address = Address(seed)
    channels, height, width = size
    blocks = address.numpy("prototypes").integers(0, 256, (classes, channels, 4, 4), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    prototypes = blocks[:, :, rows][:, :, :, columns]
    sizes = whole(spec, "examples", 10_000, least=2), whole(spec, "test_examples", 1_000)
    train, test = (
        _noisy(prototypes, count, noise, address, purpose)
        for count, purpose in zip(sizes, ("synthetic train", "synthetic test"), strict=True)
    )
    return Parts(train, test, tuple(f"class {k}" for k in range(classes)))


def _noisy(
    prototypes: np.ndarray[Any, Any], count: int, noise: float, address: Address, purpose: str
) -> Images:
    """Mix prototypes with noise in steps of 1/256; each chunk has its own draws."""
    labels = np.arange(count, dtype=np.int64) % len(prototypes)
    pixels = np.empty((count, *prototypes.shape[1:]), dtype=np.uint8)
    strength = round(noise * 256)
    clean = prototypes.astype(np.uint16) * (256 - strength)
    for chunk, start in enumerate(range(0, count, _CHUNK)):
        stop = min(start + _CHUNK, count)
        drawn = address.numpy(purpose, chunk).integers(0, 256, pixels[start:stop].shape, np.uint8)
        mixed = drawn * np.uint16(strength)
        mixed += clean[labels[start:stop]]
        np.right_shift(mixed, 8, out=pixels[start:stop], casting="unsafe")
    return _images(pixels, labels)


# --------------------------------------------------------------------------------------------------
# A folder of images


def _image_folder(spec: Spec, seed: int) -> Parts:
    """Any folder of images in the layout of torchvision's ImageFolder."""
    found = folder.read(spec)
    if found.test is not None:
        return Parts(found.train, found.test, found.classes, found.validation)
    share = fraction(spec, "test", 0.2, open_below=True)
    train, test = set_aside(found.train, share, Address(_TEST_SEED).numpy("test"))
    return Parts(train, test, found.classes, found.validation)


# --------------------------------------------------------------------------------------------------
# Any data


def _own(spec: Spec, seed: int) -> Parts:
    """What a data set of the user's holds."""
    return _with_test(own.read(spec), spec)


def _with_test(found: own.Read, spec: Spec) -> Parts:
    """Return what was read, with a test part that is set aside where there is none."""
    train, test = found.train, found.test
    if test is None:
        share = fraction(spec, "test", 0.2, open_below=True)
        train, test = set_aside(train, share, Address(_TEST_SEED).numpy("test"))
    return Parts(train, test, found.classes, outputs=found.outputs)


def _federated(spec: Spec, seed: int) -> Parts:
    """A set of flwr-datasets."""
    return _with_test(federated.read(spec), spec)


def _text(spec: Spec, seed: int) -> Parts:
    """Windows of a text, byte by byte."""
    found = text.read(spec)
    assert found.test is not None
    return Parts(found.train, found.test, (), outputs=found.outputs)


def _table(spec: Spec, seed: int) -> Parts:
    """Rows of a table."""
    found = table.read(spec, _TEST_SEED)
    assert found.test is not None
    return Parts(found.train, found.test, found.classes, outputs=found.outputs)


# --------------------------------------------------------------------------------------------------
# Sources of torchvision


@dataclass(frozen=True)
class _Torchvision:
    """A data set of torchvision: its class there, and mean and std of its training part."""

    title: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, spec: Spec, seed: int) -> Parts:
        need("torchvision", f"data={self.title.lower()}")
        named = spec.get("root")
        root = Path(str(named)).expanduser() if named else cache_folder(spec) / "datasets"
        download = bool(spec.get("download", False))
        with self._explained(root, download):
            train, test = self._read(root, True, download), self._read(root, False, download)
        classes = getattr(train, "classes", None) or [str(digit) for digit in range(10)]
        return Parts(
            self._images(train), self._images(test), tuple(classes), None, (self.mean, self.std)
        )

    def _read(self, root: Path, train: bool, download: bool) -> Any:
        import torchvision

        make = getattr(torchvision.datasets, self.title)
        part = {"split": "train" if train else "test"} if self.title == "SVHN" else {"train": train}
        with warnings.catch_warnings():
            # The files of CIFAR were written by a NumPy of 2009 and cannot be changed.
            warnings.filterwarnings("ignore", r"dtype\(\): align should be passed")
            return make(str(root), download=download, **part)

    def _images(self, read: Any) -> Images:
        pixels = np.asarray(read.data)
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif pixels.shape[-1] == 3:
            pixels = pixels.transpose(0, 3, 1, 2)
        labels = read.labels if self.title == "SVHN" else read.targets
        return _images(pixels, np.asarray(labels))

    @contextmanager
    def _explained(self, root: Path, download: bool) -> Iterator[None]:
        """Turn what torchvision and the network raise into one message."""
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_CONNECT_S)  # torchvision opens its addresses without a limit
        try:
            yield
        except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
            raise self._error(root, download, error) from error
        except http.client.HTTPException as error:
            raise self._error(root, download, error) from error
        finally:
            socket.setdefaulttimeout(before)

    def _error(self, root: Path, download: bool, error: Exception) -> ConfigError | DataError:
        reason = " ".join(str(error).split()) or type(error).__name__
        if download:
            return DataError(
                f"data.download=true: {self.title} could not be fetched into {root}: {reason}; "
                "connect to the network, or put its files there by hand"
            )
        if "not found" in reason:
            return ConfigError.of(
                "data.root",
                root,
                f"must hold the files of {self.title}",
                "set data.download=true to fetch them, or name the folder that has them",
            )
        return DataError(
            f"data.root={root}: the files of {self.title} cannot be read: {reason}; "
            "delete them and set data.download=true to fetch them again"
        )


SOURCES: dict[str, Callable[[Spec, int], Parts]] = {
    "digits": _digits,
    "mnist": _Torchvision("MNIST", (0.1307,), (0.3081,)),
    "fashion_mnist": _Torchvision("FashionMNIST", (0.2860,), (0.3530,)),
    "cifar10": _Torchvision("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Torchvision("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _Torchvision("SVHN", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "image_folder": _image_folder,
    "synthetic": _synthetic,
    "own": _own,
    "flwr_datasets": _federated,
    "text": _text,
    "table": _table,
}
"""Readers by the name that `data.source` gives."""

ANY = ("own", "flwr_datasets", "text", "table")
"""Those whose targets need not be classes."""
