"""Where new runs go, how their folders are called, and which of them was the last.

::

    outputs/
    ├── 2026-11-23/14-03-55-train/
    ├── 2026-11-23/14-09-12-train-fedprox-lr0.1/    of a sweep, with what differs in it
    └── latest -> 2026-11-23/14-09-12-train-…       the last run of ``fedsys train``
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from fedsys.errors import ConfigError, RunError
from fedsys.files import ELSEWHERE, NO_SPACE

LATEST = "latest"
LONGEST = 80
"""Characters of a folder's name at most."""


def default_path(outputs: Path, label: str, now: datetime | None = None) -> Path:
    """Make and return a new folder ``outputs/2026-11-23/14-03-55-label``.

    Of two runs that start in the same second, the second gets ``14-03-55-label-2``.

    Raises:
        ConfigError: The folder cannot be made.
    """
    now = now or datetime.now()
    day = outputs / now.strftime("%Y-%m-%d")
    name = f"{now.strftime('%H-%M-%S')}-{label}"
    number = 1
    while True:
        path = day / (name if number == 1 else f"{name}-{number}")
        try:
            day.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError as error:
            if not day.is_dir():
                raise unusable(day, error) from error
            number += 1
        except OSError as error:
            raise unusable(path, error) from error


def unusable(path: Path, error: OSError) -> ConfigError | RunError:
    """Return what is to be said of a folder that cannot be made or written to."""
    if error.errno in NO_SPACE:
        return RunError(f"cannot write {path}: {error.strerror}; free some space, or {ELSEWHERE}")
    rule = f"must be a folder that can be written to ({error.strerror})"
    return ConfigError.of("run.dir", path, rule, ELSEWHERE)


def label_of(verb: str, differs: Mapping[str, str]) -> str:
    """Return the name of a run of a sweep, behind the time.

    Args:
        verb: The command.
        differs: Values by option or group, of those in which the runs of the sweep differ.

    >>> label_of("train", {"strategy": "fedprox", "client.lr": "0.1"})
    'train-fedprox-lr0.1'
    """
    parts = [verb]
    for key, value in differs.items():
        name = "" if value[:1].isalpha() else key.rpartition(".")[2]
        parts.append(re.sub(r"[^\w.+-]+", "_", f"{name}{value}").strip("_."))
    return "-".join(part for part in parts if part)[:LONGEST]


def point_to(outputs: Path, target: Path | None) -> Path | None:
    """Make ``outputs/latest`` point to a folder, or to nothing; return where it pointed before.

    Where a file system has no links there is none, and no run fails for that.
    """
    link = outputs / LATEST
    before = Path(os.readlink(link)) if link.is_symlink() else None
    if link.exists() and before is None:  # somebody's own folder of that name
        return None
    with suppress(OSError):
        if target is None:
            link.unlink(missing_ok=True)
        else:
            inside = os.path.relpath(outputs / target, outputs)
            temporary = outputs / f".{LATEST}-{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(inside)
            temporary.replace(link)
    return before


def take_back(path: Path, before: Path | None) -> None:
    """Remove a new folder of `default_path` in which nothing was trained.

    Args:
        path: The folder; one with a finished round stays.
        before: What ``latest`` pointed to before it was made.
    """
    table = path / "metrics.csv"
    if table.exists() and table.stat().st_size:
        return
    import shutil  # brings every format of archives

    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.parent.rmdir()  # the day, if it is empty
    point_to(path.parents[1], before)
    with suppress(OSError):
        path.parents[1].rmdir()


def shortest(path: Path) -> str:
    """Return a path from here where it is below, as one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
