"""Run folders as values: whatever is left of a run, however it ended."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsys.config import secret
from fedsys.config.task import Metric
from fedsys.errors import RunError
from fedsys.files import whole_lines
from fedsys.runs import plain_yaml
from fedsys.runs.folder import RunFolder
from fedsys.runs.measured import metric_in

Row = Mapping[str, float | str]

_MACHINES = re.compile(r"(fleet|hosts)\.machines\b")


@dataclass(frozen=True)
class Counts:
    """How many examples of each class every client holds.

    Attributes:
        classes: Names of the classes.
        cells: For each client the numbers by class.
    """

    classes: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: What tells it from the other runs of the report.
        path: The folder.
        status: ``finished``, ``failed``, ``running``, ``interrupted`` (its process is gone and did
            not say goodbye) or ``damaged``.
        error: What went wrong; empty if nothing did.
        info: What ``run.json`` says.
        rounds: The rows of ``metrics.csv``.
        events: The lines of ``events.jsonl``.
        counts: Who holds what; None if the run did not come so far.
    """

    name: str
    path: Path
    status: str
    error: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[Row] = ()
    events: Sequence[Mapping[str, Any]] = ()
    counts: Counts | None = None

    @property
    def result(self) -> Mapping[str, Any]:
        """The figures with which it finished; empty if it has not."""
        result = self.info.get("result")
        return result if isinstance(result, Mapping) else {}

    @property
    def metric(self) -> Metric:
        """By what it was judged."""
        names = (*self.result, *(name for row in self.rounds[:1] for name in row))
        return metric_in(names, self.info.get("config"))

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, by dotted key."""
        config = self.info.get("config")
        return dict(_flat(config, "")) if isinstance(config, Mapping) else {}

    def best(self, column: str) -> float | None:
        """Return the largest value of a column, None if there is none."""
        values = [v for row in self.rounds if isinstance(v := row.get(column), float) and v == v]
        return max(values, default=None)

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the seconds after which the validation accuracy was first that high."""
        for row in self.rounds:
            value, seconds = row.get("val_accuracy"), row.get("seconds_elapsed")
            if isinstance(value, float) and isinstance(seconds, float) and value >= accuracy:
                return seconds
        return None


def load(path: Path) -> Run:
    """Read a run folder; what is missing or damaged is left out, and said in `Run.error`."""
    status, error, info = "damaged", "", dict[str, Any]()
    try:
        info = dict(RunFolder.open(path).info)
        status = str(info["status"])
    except RunError as problem:
        error = str(problem)
    if status == "running" and not _at_work(path):
        status, error = "interrupted", f"its process is gone; fedsys train resume={path} continues"
    if status == "interrupted":
        error = error or f"fedsys train resume={path} continues"
    if status == "failed" and isinstance(info.get("error"), Mapping):
        error = f"{info['error'].get('type')}: {info['error'].get('message')}"
    info["config"] = secret.public(info["config"] if "config" in info else _config(path))
    folder = RunFolder(path, info)
    try:
        rounds, events = folder.rounds(), folder.events()
        if problems := folder.table().problems:
            error = error or f"{path / 'metrics.csv'} is damaged: {problems[0]}"
    except RunError as problem:
        rounds, events = [], []
        error = error or str(problem)
    return Run(path.name, path, status, error, info, rounds, events, _counts(path))


def named(runs: Sequence[Run]) -> list[Run]:
    """Give each run the shortest end of its path that no other one has."""
    for length in range(1, max((len(run.path.parts) for run in runs), default=0) + 1):
        names = ["/".join(run.path.parts[-length:]) for run in runs]
        if len(set(names)) == len(set(run.path for run in runs)):
            break
    return [dataclasses.replace(r, name=name) for r, name in zip(runs, names, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ: for each key the value of every run.

    Where results went, and how the run was started, is no difference, nor is a configuration that
    is lost. What a machine takes is one only between runs that have it: that others do not have
    it is said by their devices.
    """
    settings = [run.settings for run in runs]
    known = [values for values in settings if values]
    keys = dict.fromkeys(key for values in settings for key in values)
    found = {key: [values.get(key) for values in settings] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if key not in ("run.dir", "json", "resume", "dashboard")
        and not (_MACHINES.match(key) and any(key not in values for values in known))
        and any(values.get(key) != known[0].get(key) for values in known)
    }


def _flat(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _at_work(path: Path) -> bool:
    """Tell whether a process holds the run; True if that cannot be told."""
    try:
        with (path / "checkpoints" / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _config(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        tree = plain_yaml.load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, Mapping) else {}


def _counts(path: Path) -> Counts | None:
    try:
        header, *rows = csv.reader(whole_lines(path / "class_counts.csv"))
        cells = tuple(tuple(int(cell) for cell in row[1:]) for row in rows)
    except (RunError, ValueError, csv.Error):
        return None
    fits = all(len(row) == len(header) - 1 and min(row, default=-1) >= 0 for row in cells)
    return Counts(tuple(header[1:]), cells) if cells and fits else None


def as_json(run: Run) -> dict[str, Any]:
    """Return what a run is known by, for a machine."""
    last = run.rounds[-1] if run.rounds else {}
    known: dict[str, Any] = {
        "name": run.name,
        "run_dir": str(run.path),
        "status": run.status,
        "error": run.error or None,
        "rounds": len(run.rounds),
        f"val_{run.metric.name}": last.get(f"val_{run.metric.name}"),
        "seconds": last.get("seconds_elapsed"),
    }
    figures = {k: v for k, v in run.result.items() if k not in ("run_dir",)}
    return json.loads(json.dumps(known | figures, default=str))  # type: ignore[no-any-return]  # a dict stays one
