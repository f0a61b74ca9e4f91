"""``fedsys runs``: the runs in a folder, with what differs between them and how they ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsys.commands.arguments import Given
from fedsys.errors import ConfigError
from fedsys.runs.lines import aligned, seconds_text
from fedsys.runs.measured import shown
from fedsys.runs.naming import shortest
from fedsys.runs.report.labels import settings_text
from fedsys.runs.report.loading import Run, as_json, differences, load

KNOWN = ("json=true", "json=false")
UNTOLD = frozenset({"rounds", "run.plots"})
"""Settings that are told otherwise, or say nothing of a result."""


def job(given: Given) -> Mapping[str, Any]:
    """Print a line for each run below a folder, the last one at the end.

    Args:
        given: What stands behind the verb: folders, ``outputs`` if there are none, and ``json=``.

    Returns:
        ``runs``, what is known of each.

    Raises:
        ConfigError: A folder does not exist, or an option is unknown.
    """
    for override in given.overrides:
        if override not in KNOWN:
            raise ConfigError(
                f"{override}: no such option; fedsys runs takes folders and json=true"
            )
    folders = [Path(word) for word in given.words or ("outputs",)]
    for folder in folders:
        if not folder.is_dir():
            rule = "must be a folder with runs"
            raise ConfigError.of("runs", folder, rule, "fedsys train makes outputs/")
    runs = [load(path) for folder in folders for path in found_in(folder)]
    runs.sort(key=lambda run: float(run.info.get("started") or 0.0))
    if "json=true" not in given.overrides:
        print(table(runs) if runs else f"no runs in {', '.join(map(str, folders))}")
    return {"runs": [as_json(run) for run in runs]}


def found_in(folder: Path) -> list[Path]:
    """Return the run folders below a folder; what a link points to is not listed twice."""
    files = {file.resolve() for file in folder.rglob("run.json")}
    return sorted(file.parent for file in files)


def table(runs: Sequence[Run]) -> str:
    """Return a line for each run."""
    told = {key: values for key, values in differences(runs).items() if key not in UNTOLD}
    rows = [_row(run, settings_text({k: v[i] for k, v in told.items()}))
            for i, run in enumerate(runs)]  # fmt: skip
    usual = all(run.metric.name == "accuracy" for run in runs)
    scores = ["test accuracy", "val accuracy"] if usual else ["test", "validation"]
    head = ["started", "status", "rounds", *scores, "time"]
    return aligned([*head, "folder", "what differs"], rows, ["rounds", *head[3:]])


def _row(run: Run, differs: str) -> list[str]:
    last = run.rounds[-1] if run.rounds else {}
    wanted = run.settings.get("rounds")
    started, seconds = run.info.get("started"), run.result.get("seconds")
    seconds = last.get("seconds_elapsed") if seconds is None else seconds
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else ""
    return [
        when,
        run.status,
        f"{len(run.rounds)}/{wanted}" if wanted is not None and run.rounds else "",
        shown(run.result),
        shown(last, "val_"),
        seconds_text(float(seconds)) if isinstance(seconds, int | float) else "",
        shortest(run.path),
        differs,
    ]
