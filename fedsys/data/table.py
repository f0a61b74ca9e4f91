"""Tables: columns of numbers in a CSV or Parquet file, and one that is to be learned.

Where no file is named, the table is that of 442 patients with diabetes (Efron, Hastie, Johnstone
and Tibshirani, "Least Angle Regression", Annals of Statistics 2004), which scikit-learn installs.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsys.data.dataset import Images, set_aside
from fedsys.data.options import Spec, brought, fraction
from fedsys.data.own import Read, images_of
from fedsys.errors import ConfigError, DataError, did_you_mean
from fedsys.randomness import Address

Numbers = NDArray[np.float64]
Column = NDArray[Any] | Sequence[str]
"""Numbers, or words that may be numbers."""

_PARQUET = b"PAR1"
"""What a Parquet file begins with."""

_DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6", "progression")


def read(spec: Spec, test_seed: int) -> Read:
    """Read a table.

    Args:
        spec: ``file``: a CSV or Parquet file, or null; ``target``: name of the column that is to be
            learned, null: the last; ``client``: name of a column that says whose a row is, or null;
            ``test``: share of the rows that is the test part. Columns of numbers have mean 0 and
            deviation 1 in the training part, with ``task=regression`` the target, too: losses and
            errors are in its standard deviations.
        test_seed: Decides which rows those are.

    Raises:
        ConfigError: There is no such column, or the task is another.
        DataError: The file cannot be read, or holds something else than numbers.
    """
    task = str(spec.get("task", "classification"))
    if task not in ("regression", "classification"):
        raise ConfigError.of(
            "task.kind", task, "must be regression or classification with data=table"
        )
    table = _table(spec.get("file"))
    names = list(table)
    target = _column(names, str(spec.get("target") or names[-1]), "target")
    owner = spec.get("client")
    client = _column(names, str(owner), "client") if owner else None
    given = [name for name in names if name not in (target, client)]
    if client == target:
        raise ConfigError.of("data.client", client, "must be another column than data.target")
    if not given:
        raise ConfigError.of(
            "data.file", spec.get("file"),
            f"must have a column beside {', '.join(filter(None, (target, client)))}",
            "columns are separated by commas",
        )  # fmt: skip
    features = np.stack([_numbers(table[name], name) for name in given], 1)
    classes: tuple[str, ...] = ()
    if task == "regression":
        values = torch.from_numpy(_numbers(table[target], target)[:, None])
    else:
        found, values = _codes(table[target])
        classes = tuple(map(str, found))
    ids = _codes(table[client])[1] if client else None
    whole = images_of(torch.from_numpy(features), values, task, ids)
    share = fraction(spec, "test", 0.2, open_below=True)
    train, test = set_aside(whole, share, Address(test_seed).numpy("test"))
    outputs = len(classes) or 1
    return Read(*_standardised(train, test, task), classes, outputs)


def _standardised(train: Images, test: Images, task: str) -> tuple[Images, Images]:
    center, scale = _moments(train.pixels)
    parts = [(part, (part.pixels - center) / scale) for part in (train, test)]
    if task != "regression":
        return _both([Images(x, p.labels, p.strata, p.owners) for p, x in parts])
    mean, deviation = _moments(train.labels)
    return _both([Images(x, (p.labels - mean) / deviation, p.strata, p.owners) for p, x in parts])


def _both(parts: list[Images]) -> tuple[Images, Images]:
    return parts[0], parts[1]


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of each column; a column that never changes has deviation 1."""
    known = values.numpy().astype(np.float64)
    deviation = known.std(0)
    deviation[deviation < 1e-12] = 1.0
    return torch.from_numpy(known.mean(0)).float(), torch.from_numpy(deviation).float()


def _column(names: list[str], name: str, key: str) -> str:
    if name not in names:
        hint = did_you_mean(name, names) or f"it has {', '.join(names[:12])}"
        raise ConfigError.of(f"data.{key}", name, "must be a column of the table", hint)
    return name


def _codes(column: Column) -> tuple[NDArray[Any], torch.Tensor]:
    """Return the different values of a column in their order, and which of them each row has."""
    found, codes = np.unique(np.asarray(column), return_inverse=True)
    return found, torch.from_numpy(codes.astype(np.int64))


def _numbers(column: Column, name: str) -> Numbers:
    if isinstance(column, np.ndarray):
        made = column.astype(np.float64)
    else:
        made = np.empty(len(column))
        for line, value in enumerate(column):
            try:
                made[line] = float(value)
            except ValueError:
                raise DataError(
                    f"data.file: line {line + 2}, column {name}: {value!r:.40} is no number; "
                    + (
                        "fill in what is missing"
                        if not value.strip()
                        else "turn categories into columns of zeros and ones"
                    )
                ) from None
    if not np.isfinite(made).all():
        raise DataError(f"data.file: column {name}: all numbers must be finite; fill in what is "
                        "missing")  # fmt: skip
    return made


def _table(file: Any) -> Mapping[str, Column]:
    """Return the columns of a table by name."""
    if not file:
        return dict(zip(_DIABETES, zip(*_diabetes(), strict=True), strict=True))
    path = Path(str(file)).expanduser()
    try:
        with path.open("rb") as stream:
            parquet = stream.read(len(_PARQUET)) == _PARQUET
    except OSError as error:
        raise DataError(f"data.file={path}: cannot be read: {error}") from error
    table = _parquet(path) if parquet else _csv(path)
    if not table or len(next(iter(table.values()))) < 4:
        raise DataError(f"data.file={path}: must have 4 or more rows")
    return table


def _csv(path: Path) -> Mapping[str, Column]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            names, *rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.file={path}: cannot be read as CSV: {error}") from error
    except ValueError:
        raise DataError(f"data.file={path}: is empty; it must begin with a line of names") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:  # a dictionary would keep the last one alone
        raise DataError(f"data.file={path}: has several columns {twice[0]!r}; rename all but one")
    counted = names == [str(index) for index in range(len(names))]  # as pandas writes an array
    if not counted and all(_is_number(name) for name in names):
        raise DataError(
            f"data.file={path}: must begin with a line of names, and begins with "
            f"{', '.join(names[:4])}"
        )
    for line, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"data.file={path}: row {line + 1} has {len(row)} columns instead of {len(names)}"
            )
    return dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> Mapping[str, Column]:
    """Return the columns of a Parquet file: numbers as such, all others as words."""
    parquet, types = (brought(f"pyarrow.{m}", "data.file", path) for m in ("parquet", "types"))
    try:
        found = parquet.read_table(path)
    except Exception as error:  # whatever is raised for a file that is damaged
        raise DataError(f"data.file={path}: cannot be read as Parquet: {error}") from error
    columns: dict[str, Column] = {}
    for name in found.column_names:
        column, kind = found[name], found[name].type
        if column.null_count:
            raise DataError(
                f"data.file={path}: column {name} lacks {column.null_count} values; fill them in"
            )
        numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
        whole = numbers or types.is_boolean(kind)
        columns[name] = (
            np.asarray(column.to_numpy()) if whole else [str(value) for value in column.to_pylist()]
        )
    return columns


def _diabetes() -> list[list[str]]:
    """Return the rows of the set that scikit-learn installs, without importing it."""
    found = importlib.util.find_spec("sklearn")
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "datasets" / "data"
        files = [folder / f"diabetes_{name}.csv.gz" for name in ("data_raw", "target")]
        if all(file.is_file() for file in files):
            parts = [gzip.decompress(file.read_bytes()).decode().split("\n") for file in files]
            both = zip(*(filter(None, part) for part in parts), strict=True)
            return [[*left.split(), right.strip()] for left, right in both]
    raise DataError(
        "data=table: the set of patients is installed with scikit-learn, which is not here "
        "(pip install 'fedsys[learn]'); data.file= names a table of yours"
    )
