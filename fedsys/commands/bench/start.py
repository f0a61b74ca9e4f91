"""From the command to the first round, and from the last round to the end, in each runtime.

Each case is one call of ``fedsys train`` in a new process, as a person would make it: Python's
start, imports, Ray or a SuperLink with its nodes, data and model come before the first round;
scores, plots, the model's file and the end of all processes behind the last.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys.commands.bench import Chart
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.runs.folder import RunFolder


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Call the command once for each case.

    Args:
        config: ``num_clients`` and ``rounds`` of each run.
        options: ``cases``: what follows ``fedsys train``, by name.

    Returns:
        ``cases``: for each the seconds ``command_s`` in all, ``to_first_round_s`` and
        ``after_last_round_s``; and ``stages``: what the time before the first round went into.

    Raises:
        RuntimeFailure: A run failed.
    """
    cases, stages = [], []
    for name, overrides in options["cases"].items():
        print(f"fedsys train {overrides}", file=sys.stderr)
        figures, parts = _call(config, str(name), shlex.split(overrides))
        cases.append({"case": name, **figures})
        stages += [{"case": name, "stage": stage, "seconds": s} for stage, s in parts.items()]
    return {"cases": cases, "stages": stages, "num_clients": config.num_clients}


def _call(
    config: Config, name: str, overrides: list[str]
) -> tuple[dict[str, float], Mapping[str, float]]:
    folder = Path(str(config.run.dir)) / name
    common = [f"num_clients={config.num_clients}", f"rounds={config.rounds}", "json=true"]
    command = [sys.executable, "-m", "fedsys.main", "train", *common, f"run.dir={folder}"]
    began = time.perf_counter()
    done = subprocess.run([*command, *overrides], capture_output=True, text=True)
    total = time.perf_counter() - began
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeFailure(f"{name}: the run failed: {said[-1] if said else 'no word'}")
    result = json.loads(done.stdout.splitlines()[-1])
    before = float(result["seconds_to_first_round"])
    rounds = float(RunFolder.open(folder).rounds()[-1]["seconds_elapsed"])
    figures = {
        "command_s": total,
        "to_first_round_s": before,
        "after_last_round_s": total - before - rounds,
        "rounds_s": rounds,
    }
    return figures, result["startup"]


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the two times of each case."""
    cases = figures["cases"]
    names = ("to_first_round_s", "after_last_round_s")
    return Chart(
        f"What a run of {figures['num_clients']} clients takes beside its rounds",
        "runtime",
        "seconds",
        [case["case"] for case in cases],
        {name.removesuffix("_s").replace("_", " "): [c[name] for c in cases] for name in names},
    )
