"""Tables: a CSV file with a line of names, numbers in its columns, and one that is to be learned.

Where no file is named, the table is that of 442 patients with diabetes (Efron, Hastie, Johnstone
and Tibshirani, "Least Angle Regression", Annals of Statistics 2004), which scikit-learn installs.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsys.data.dataset import Images, set_aside
from fedsys.data.options import Spec, fraction
from fedsys.data.own import Read, images_of
from fedsys.errors import ConfigError, DataError, did_you_mean
from fedsys.randomness import Address

Numbers = NDArray[np.float64]

_DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6", "progression")


def read(spec: Spec, test_seed: int) -> Read:
    """Read a table.

    Args:
        spec: ``file``: a CSV file, or null; ``target``: name of the column that is to be learned,
            null: the last; ``client``: name of a column that says whose a row is, or null;
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
    names, rows = _rows(spec.get("file"))
    target = str(spec.get("target") or names[-1])
    column = _column(names, target, "target")
    owner = spec.get("client")
    apart = {column} | ({_column(names, str(owner), "client")} if owner else set())
    features = _numbers(rows, [i for i in range(len(names)) if i not in apart], names)
    classes: tuple[str, ...] = ()
    if task == "regression":
        values = torch.from_numpy(_numbers(rows, [column], names))
    else:
        found, codes = np.unique([row[column] for row in rows], return_inverse=True)
        classes, values = tuple(map(str, found)), torch.from_numpy(codes.astype(np.int64))
    ids = None
    if owner:
        own = [row[_column(names, str(owner), "client")] for row in rows]
        ids = torch.from_numpy(np.unique(own, return_inverse=True)[1].astype(np.int64))
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


def _column(names: list[str], name: str, key: str) -> int:
    if name not in names:
        hint = did_you_mean(name, names) or f"it has {', '.join(names[:12])}"
        raise ConfigError.of(f"data.{key}", name, "must be a column of the table", hint)
    return names.index(name)


def _numbers(rows: list[list[str]], columns: list[int], names: list[str]) -> Numbers:
    if not columns:
        raise ConfigError.of("data.file", "one column", "must have a column beside the target")
    made = np.empty((len(rows), len(columns)))
    for at, column in enumerate(columns):
        for line, row in enumerate(rows):
            try:
                made[line, at] = float(row[column])
            except ValueError:
                raise DataError(
                    f"data.file: line {line + 2}, column {names[column]}: {row[column]!r:.40} is "
                    "no number; turn categories into columns of zeros and ones"
                ) from None
    if not np.isfinite(made).all():
        raise DataError("data.file: all numbers must be finite; fill in what is missing")
    return made


def _rows(file: Any) -> tuple[list[str], list[list[str]]]:
    if not file:
        return list(_DIABETES), _diabetes()
    path = Path(str(file)).expanduser()
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            names, *rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.file={path}: cannot be read as CSV: {error}") from error
    except ValueError:
        raise DataError(f"data.file={path}: is empty; it must begin with a line of names") from None
    for line, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"data.file={path}: row {line + 1} has {len(row)} columns instead of {len(names)}"
            )
    if len(rows) < 4:
        raise DataError(f"data.file={path}: must have 4 or more rows below the names")
    return names, rows


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
        "data=table: the set of patients is installed with scikit-learn, which is not here; "
        "data.file= names a table of yours"
    )
