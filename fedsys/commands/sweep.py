"""The runs of ``--multirun``: which one begins, and in the end a table of all."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsys.errors import FedsysError
from fedsys.runs.lines import aligned, seconds_text
from fedsys.runs.measured import metric_in, shown
from fedsys.runs.naming import shortest


@dataclass
class Sweep:
    """What is known of a sweep.

    Attributes:
        runs: What differs, by run; empty if it is not known beforehand.
        ends: Result of each run that has ended, or its error.
    """

    runs: Sequence[Mapping[str, str]]
    ends: list[Mapping[str, Any] | FedsysError] = field(default_factory=list)

    def heading(self) -> str:
        """Return the line above the run that begins now."""
        number = len(self.ends) + 1
        if number > len(self.runs):
            return f"run {number}"
        values = ", ".join(f"{key}={value}" for key, value in self.runs[number - 1].items())
        return f"run {number}/{len(self.runs)}: {values}"

    def table(self) -> str:
        """Return a table of the runs that have ended."""
        keys = list(self.runs[0]) if self.runs else []
        rows = []
        for index, end in enumerate(self.ends):
            values = self.runs[index] if index < len(self.runs) else {}
            result = end if isinstance(end, Mapping) else {}
            rows.append([
                str(index + 1),
                *(values.get(key, "") for key in keys),
                shown(result),
                shown(result, "val_"),
                *_figures(result),
                str(end) if isinstance(end, FedsysError) else "",
            ])  # fmt: skip
        ends = [end for end in self.ends if isinstance(end, Mapping)]
        usual = all(metric_in(end).name == "accuracy" for end in ends)
        scores = ["test accuracy", "val accuracy"] if usual else ["test", "validation"]
        numbers = ["run", *scores, "test loss", "time", "virtual"]
        return aligned([numbers[0], *keys, *numbers[1:], "refused or failed"], rows, numbers)

    def report_line(self) -> str:
        """Return the command that compares its runs; empty if fewer than two are there."""
        folders = [shortest(Path(end["run_dir"])) for end in self.ends
                   if isinstance(end, Mapping) and "run_dir" in end]  # fmt: skip
        if len(folders) < 2:
            return ""
        return f"compare them: fedsys report {' '.join(map(shlex.quote, folders))}"


def _figures(result: Mapping[str, Any]) -> list[str]:
    loss, seconds, virtual = (result.get(key) for key in ("loss", "seconds", "virtual_s"))
    return [
        f"{loss:.4f}" if isinstance(loss, int | float) else "",
        seconds_text(float(seconds)) if isinstance(seconds, int | float) else "",
        seconds_text(float(virtual)) if isinstance(virtual, int | float) else "",
    ]


def percent(value: object) -> str:
    """Return a share in percent; empty if there is none.

    >>> percent(0.9731), percent(None)
    ('97.31%', '')
    """
    return f"{value:.2%}" if isinstance(value, int | float) else ""
