"""What privacy costs, beside training without it and beside Opacus.

Each cell is a run in a process of its own: classic training or pipelined split training, without a
promise or with one of a mechanism at some epsilon; noise at a cut is for split training alone.
Record-level training stands beside that of Opacus (`fedsys.commands.bench.privacy_opacus`), and
what pipelining gains with and without it on the virtual clock
(`fedsys.commands.bench.privacy_gains`).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fedsys import config as configuration
from fedsys import runtime
from fedsys.commands.bench import Chart
from fedsys.commands.bench.leakage_models import say
from fedsys.commands.bench.privacy_gains import gains
from fedsys.commands.bench.privacy_opacus import accuracies, gradients, rise
from fedsys.commands.bench.split import peak_rise
from fedsys.config import Config
from fedsys.config.targets import import_extra
from fedsys.errors import RuntimeFailure
from fedsys.privacy.accountant import Releases, epsilon
from fedsys.runs.folder import RunFolder
from fedsys.training import plain as training

DELTA = 1e-5
GRID = ((1.0, 0.01, 1000), (0.8, 0.2, 100), (2.0, 0.05, 500), (4.0, 1.0, 20))
"""Noise, rate and releases that accountants are compared on."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure gradients, accountants, gains, accuracies and cells.

    Args:
        config: Data, model, clients and rounds of the cells.
        options: Those of ``conf/bench/privacy.yaml``.

    Returns:
        ``cells``: method, mechanism, epsilon of the budget, accuracy on the test part, seconds of
        an iteration, peak resident size in MB (10^6 bytes), and what was spent. ``accountants``:
        epsilons by name. ``gains`` and ``alone``: as `gains` and `accuracies` say, and in
        ``points`` by how many points accuracies of one seed differ, in the mean of all. The other
        figures are of `gradients`.

    Raises:
        RuntimeFailure: A process failed.
        ModelError: Opacus or dp-accounting is not installed.
    """
    training.set_threads(config.client.threads)
    told = gradients(options, lambda side, examples: float(_in_process(side, str(examples))))
    alone = list(accuracies(config, options, DELTA))
    apart = [row["accuracy"] - row["opacus_accuracy"] for row in alone]
    return {
        **told,
        "points": 100 * fmean(apart) if apart else 0.0,
        "accountants": list(_accountants()),
        "gains": list(gains(options)),
        "alone": alone,
        "cells": list(_cells(config, options)),
    }


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the accuracies of the cells as a chart."""
    cells = figures["cells"]
    labels = list(dict.fromkeys(_promise(cell) for cell in cells))
    series = {
        method: [
            next(
                (c["accuracy"] for c in cells if (c["method"], _promise(c)) == (method, label)),
                math.nan,
            )
            for label in labels
        ]
        for method in dict.fromkeys(cell["method"] for cell in cells)
    }
    return Chart("Accuracy by epsilon", "promise", "accuracy on the test part", labels, series)


def _promise(cell: Mapping[str, Any]) -> str:
    return f"{cell['mechanism']} {cell['epsilon']:g}" if cell["epsilon"] else cell["mechanism"]


# --------------------------------------------------------------------------------------------------
# Runs


def _cells(config: Config, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cut, pieces = options["cut"], int(options["micro_batches"])
    methods: dict[str, dict[str, Any]] = {
        "classic": {"policy": {"kind": "none"}},
        "pipelined": {
            "policy": {"kind": "fixed", "cut": cut, "codec": "fp32", "micro_batches": None},
            "schedule": {"kind": "pipelined", "micro_batches": pieces},
        },
    }
    promises: list[tuple[str, float | None]] = [("none", None)]
    promises += [
        (m, float(budget)) for m in options["mechanisms"] for budget in options["epsilons"]
    ]
    for method, how in methods.items():
        for mechanism, budget in promises:
            if (method, mechanism) == ("classic", "cut"):  # nothing is released at a cut
                continue
            say(f"{method}, {mechanism} {budget or ''}")
            privacy = {"mechanism": mechanism, **({"epsilon": budget} if budget else {})}
            if mechanism != "none":
                privacy["clip_norm"] = float(options[f"{mechanism}_clip_norm"])
            found = [
                _cell(config, {**how, "privacy": privacy, "seed": config.seed + seed})
                for seed in range(int(options["seeds"]))
            ]
            means = {key: fmean(f[key] for f in found) for key in found[0]}
            yield {"method": method, "mechanism": mechanism, "epsilon": budget, **means}


def _cell(config: Config, values: Mapping[str, Any]) -> dict[str, float]:
    """Carry a run out in a process of its own."""
    text = configuration.with_values(
        config.text, **values, json=False, bench={}, resume=None,
        run={"dir": f"{config.run.dir}/{time.monotonic_ns()}", "plots": False, "oracle": False},
    )  # fmt: skip
    found: dict[str, float] = _in_process("run", text)
    return found


def _in_process(what: str, text: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "fedsys.commands.bench.privacy", what],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word of it"]
        raise RuntimeFailure(f"a process of the benchmark failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _carried_out(text: str) -> dict[str, float]:
    config = configuration.parse(text)
    peak = peak_rise(lambda: runtime.run(config))
    folder = RunFolder.open(Path(str(config.run.dir)))
    result, rows = folder.info["result"], folder.rounds()
    taken = [float(row["seconds_train"]) / float(row["steps"]) for row in rows[1:] or rows]
    return {
        "accuracy": float(result["accuracy"]),
        "iteration_s": median(taken),
        "peak_mb": peak / 1e6,
        "spent_epsilon": float(result.get("epsilon", 0.0)),
    }


# --------------------------------------------------------------------------------------------------
# Accountants


def _accountants() -> Iterator[dict[str, float]]:
    library = import_extra("dp_accounting", "privacy", "fedsys bench privacy")
    pld = import_extra("dp_accounting.pld", "privacy", "fedsys bench privacy")
    for noise, rate, count in GRID:
        event = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise))
        reference = pld.PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE)
        reference.compose(event, count)
        releases = [Releases(noise, rate, count)]
        found = {name: epsilon(releases, DELTA, name) for name in ("pld", "rdp", "prv")}
        yield {
            "noise": noise, "rate": rate, "count": count,
            **found, "dp_accounting_pld": float(reference.get_epsilon(DELTA)),
        }  # fmt: skip


if __name__ == "__main__":
    told = sys.argv[1]
    if told == "run":
        print(json.dumps(_carried_out(sys.stdin.read())))
    else:
        print(json.dumps(rise(told, int(sys.stdin.read()))))
