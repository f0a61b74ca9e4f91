"""Federated sets of flwr-datasets by name, from the cache of Hugging Face's ``datasets``.

Nothing is fetched unless ``data.download=true``: a set that is not in the cache is an error at
once, also where there is a network. Rows stay in the order of the set (flwr-datasets shuffles them
by a seed of its own), so that who has what depends on the seed of the run alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsys.data import own
from fedsys.data.dataset import Images
from fedsys.data.decoding import to_pixels
from fedsys.data.options import Spec, brought, choice, fraction
from fedsys.data.own import Read
from fedsys.data.partitioners import NOBODY
from fedsys.errors import ConfigError, DataError, did_you_mean, first_line
from fedsys.transport.several import Inputs, Several

_ROW = "fedsys_row"
_GREY = ("1", "L", "I", "I;16", "F")


def read(spec: Spec) -> Read:
    """Read the set that ``data.name`` names.

    Args:
        spec: ``name`` and ``subset``: as flwr-datasets' ``FederatedDataset`` takes them; ``cache``
            and ``download``; ``train_split`` and ``test_split``; which columns are ``inputs``,
            ``target`` and ``client``, or an ``example`` that makes (inputs, targets) of a row;
            ``partitioner``: one of flwr-datasets', by which rows belong to clients; ``channels``
            and ``size`` of images.

    Raises:
        ConfigError: The set, a split or a column is not there, or flwr-datasets is not installed.
        DataError: An example cannot be read.
    """
    name = str(spec.get("name") or "")
    if not name:
        raise ConfigError.of("data.name", None, "must name a set, as in data.name=flwrlabs/femnist")
    fraction(spec, "test", 0.2, open_below=True)
    parts = _splits(name, spec)
    columns = _Columns.of(parts[0], spec)
    read_parts = [columns.part(part, spec) for part in parts]
    train = dataclasses.replace(read_parts[0], owners=_owners(parts[0], spec))
    both = [train, *read_parts[1:]]
    names, outputs = own.outputs_of(columns.classes(parts[0]), both, spec)
    return Read(train, both[1] if len(both) > 1 else None, names, outputs)


def _splits(name: str, spec: Spec) -> list[Any]:
    """Return the training part of a set as it is in the cache, and its test part if it has one."""
    datasets, flower = (_library(each) for each in ("datasets", "flwr_datasets"))
    cache, subset = spec.get("cache"), spec.get("subset")
    more = {"cache_dir": str(Path(str(cache)).expanduser())} if cache else {}
    train, test = str(spec.get("train_split") or "train"), str(spec.get("test_split") or "test")
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    made = flower.FederatedDataset(
        dataset=name, subset=None if subset is None else str(subset), partitioners={},
        shuffle=False, **more,
    )  # fmt: skip
    with _offline(not spec.get("download", False)):
        try:
            parts = [made.load_split(train)]
        except Exception as error:  # whatever the libraries below raise
            raise _absent(name, spec, error) from error
        with suppress(ValueError):  # there is none
            parts.append(made.load_split(test))
    return parts


def _library(name: str) -> Any:
    return brought(name, "data.source", "flwr_datasets")


def _absent(name: str, spec: Spec, error: Exception) -> ConfigError:
    says = " ".join(str(error).split())
    if "is not present in the dataset's splits" in says:
        train = str(spec.get("train_split") or "train")
        return ConfigError.of("data.train_split", train, "must be a split of the set", says)
    where = spec.get("cache") or "the cache of Hugging Face's datasets (HF_HOME)"
    way_out = "data.download=true fetches it; data.cache=FOLDER is where it may be"
    if spec.get("download", False):
        way_out = "look for its name, its subset (data.subset) and the network"
    return ConfigError.of("data.name", name, f"must be in {where}: {says}", way_out)


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let the libraries of Hugging Face take what is in their cache, and ask no network."""
    libraries = ("datasets.config", "huggingface_hub.constants") if wanted else ()
    places = [_library(each) for each in libraries]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


class _Columns:
    """Which columns of a set are inputs and targets.

    Args:
        inputs: Names of the columns that a model is given.
        target: Name of that which it is to tell.
        example: Makes (inputs, targets) of a row; None: the columns as they are.
    """

    def __init__(self, inputs: Sequence[str], target: str, example: Any) -> None:
        self._inputs, self._target, self._example = inputs, target, example

    @classmethod
    def of(cls, split: Any, spec: Spec) -> _Columns:
        """Return what the options say, or what the types of the columns suggest.

        Raises:
            ConfigError: They name no column of the set, or nothing is suggested.
        """
        if example := spec.get("example"):
            return cls((), "", own.function_of(example, "data.example"))
        features = split.features
        client = spec.get("client")
        target = str(spec.get("target") or _suggested_target(features))
        told = spec.get("inputs")
        inputs = [told] if isinstance(told, str) else list(told or ())
        for key, column in (("target", target), *(("inputs", str(one)) for one in inputs)):
            if column not in features:
                raise _unknown(key, column, list(features))
        inputs = inputs or _suggested_inputs(features, {target, client})
        if not inputs:
            raise ConfigError.of(
                "data.inputs", None, "must be given: no column of this set has images or numbers",
                f"it has {', '.join(features)}; data.example=package.function makes (inputs, "
                "targets) of a row",
            )  # fmt: skip
        return cls([str(one) for one in inputs], target, None)

    def classes(self, split: Any) -> list[str] | None:
        """Return the names of the classes, where the set has them."""
        names = getattr(split.features.get(self._target), "names", None)
        return [str(name) for name in names] if names else None

    def part(self, split: Any, spec: Spec) -> Images:
        """Return a split as tensors."""
        named = ("data.name", str(spec.get("name")))
        if self._example is not None:
            rows = _Rows(split, self._example)
            return own.part_of(rows, named, own.collate_of(spec), spec)
        columns = [self._column(split, name, spec) for name in self._inputs]
        single = all(column.dim() == 1 for column in columns)
        inputs: Inputs = columns[0]
        if single:
            inputs = torch.stack([c.to(torch.float32) for c in columns], 1)
        elif len(columns) > 1:
            inputs = Several(tuple(columns))
        targets = self._column(split, self._target, spec)
        return own.images_of(inputs, targets, str(spec.get("task", "classification")))

    def _column(self, split: Any, name: str, spec: Spec) -> Tensor:
        if _is_image(split.features[name]):
            return torch.from_numpy(_pixels(split[name], name, spec))
        values = np.asarray(split.with_format("numpy")[name][:])
        if values.dtype.kind not in "biuf":
            raise ConfigError.of(
                "data.inputs" if name in self._inputs else "data.target", name,
                f"must hold numbers of one shape, and holds {split.features[name]}",
                "data.example=package.function makes (inputs, targets) of a row, and data.collate "
                "pads them",
            )  # fmt: skip
        return torch.from_numpy(np.ascontiguousarray(values))


class _Rows:
    """A split as a map-style data set, of which a function of the user's makes examples."""

    def __init__(self, split: Any, example: Any) -> None:
        self._split, self._example = split, example

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Any:
        return self._example(self._split[index])


def _suggested_target(features: Mapping[str, Any]) -> str:
    named = [name for name, kind in features.items() if getattr(kind, "names", None)]
    if len(named) == 1:
        return named[0]
    for name in ("label", "labels", "target"):
        if name in features:
            return name
    raise ConfigError.of(
        "data.target", None, "must be given: the set does not tell which column is learned",
        f"it has {', '.join(features)}",
    )  # fmt: skip


def _suggested_inputs(features: Mapping[str, Any], apart: set[Any]) -> list[str]:
    images = [name for name, kind in features.items() if _is_image(kind) and name not in apart]
    if images:
        return images[:1]
    numbers = ("int", "float", "uint", "bool", "double")
    return [
        name
        for name, kind in features.items()
        if name not in apart and str(getattr(kind, "dtype", "")).startswith(numbers)
        and not getattr(kind, "names", None)
    ]  # fmt: skip


def _is_image(kind: Any) -> bool:
    return type(kind).__name__ == "Image"


def _pixels(column: Any, name: str, spec: Spec) -> np.ndarray[Any, Any]:
    """Return a column of images as uint8 ``(N, C, H, W)``."""
    side = spec.get("size")
    size = (side, side) if isinstance(side, int) else tuple(side) if side else None
    channels, found = spec.get("channels"), []
    if channels is not None:
        choice("data.channels", channels, (1, 3))
    for index, image in enumerate(column):
        channels = channels or (1 if image.mode in _GREY else 3)
        try:
            found.append(to_pixels(image, int(channels), size))  # type: ignore[arg-type]
        except Exception as error:  # whatever decoders raise for a damaged image
            raise DataError(f"data.name: image {index} of {name}: {first_line(error)}") from error
        if found[-1].shape != found[0].shape:
            raise ConfigError.of(
                "data.size", None, f"must be given: images of {name} are {found[0].shape[1:]} and "
                f"{found[-1].shape[1:]} pixels large", "data.size=32",
            )  # fmt: skip
    return np.stack(found)


def _owners(split: Any, spec: Spec) -> Tensor | None:
    """Return whose the rows are: by a column, or by a partitioner of flwr-datasets."""
    client, told = spec.get("client"), spec.get("partitioner")
    if told:
        return _dealt(split, told)
    if not client:
        return None
    if client not in split.features:
        raise _unknown("client", str(client), list(split.features))
    ids = np.asarray(split[str(client)][:])
    return torch.from_numpy(np.unique(ids, return_inverse=True)[1].astype(np.int64))


def _dealt(split: Any, told: Any) -> Tensor:
    """Return owners by a partitioner; rows that it leaves out are nobody's."""
    made = own.made_of(told, "data.partitioner")
    rows = split.add_column(_ROW, np.arange(len(split)))
    owners = np.full(len(split), NOBODY, dtype=np.int64)
    try:
        made.dataset = rows
        for k in range(made.num_partitions):
            owners[np.asarray(made.load_partition(k)[_ROW][:])] = k
    except Exception as error:  # whatever a partitioner raises for such a set
        raise ConfigError.of(
            "data.partitioner._target_", dict(told).get("_target_"),
            f"cannot divide this set: {first_line(error)}",
        ) from error  # fmt: skip
    return torch.from_numpy(owners)


def _unknown(key: str, value: str, known: Sequence[str]) -> ConfigError:
    hint = did_you_mean(value, known) or f"there are {', '.join(known)}"
    return ConfigError.of(f"data.{key}", value, "must be one that the set has", hint)
