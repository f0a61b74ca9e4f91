"""The whole life of a model in one run, by one configuration and one fleet; every decision told.

::

    train      unequal devices and edge servers, pipelined, private; devices move, an edge dies
    prune      the model becomes a portfolio: after training, so that the promise still holds
    partition  a variant and its cuts are chosen for the hosts
    switch     the portfolio alone answers; load rises
    chain      the hosts answer; load rises, bandwidth falls, a host dies

Each stage is done by the command of its name (``fedsys serve`` for the last two), and kept
(`lifecycle_stages`): with ``bench.kept=FOLDER`` a life that was interrupted goes on. What comes out
is one JSON object, a table for each list, and one page, ``life.html``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.commands.bench.lifecycle_making import partition_stage, prune_stage, train_stage
from fedsys.commands.bench.lifecycle_serving import chain_stage, switch_stage
from fedsys.commands.bench.lifecycle_stages import STAGES, Life
from fedsys.config import Config
from fedsys.files import write_atomic
from fedsys.runs.report.life import page

PAGE = "life.html"
_WORK = {
    "train": train_stage,
    "prune": prune_stage,
    "partition": partition_stage,
    "switch": switch_stage,
    "chain": chain_stage,
}
_TABLES = ("rounds", "moves", "recoveries", "variants", "switching", "phases", "latency")
_FIGURES = {
    "train": ("accuracy", "epsilon"),
    "partition": ("variant",),
    "switch": ("objective_p95_ms", "switches"),
    "chain": (
        *("requests", "failed", "late", "technique", "gap_ms", "predicted_gap_ms"),
        *("silence_ms", "detect_ms", "decide_ms"),
    ),
}
"""Single figures by stage."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Live the life, or what is asked for of it.

    Args:
        config: Of the run; that of the stages is composed anew, smaller with ``quick``.
        options: See ``conf/bench/lifecycle.yaml``.

    Returns:
        ``stages`` with their seconds and folders, ``decisions``, the tables and single figures of
        the stages, ``off_median`` of all that was predicted and measured, and the ``page``.

    Raises:
        ConfigError: An option is not usable, or what is kept is of another configuration.
        FedsysError: A stage failed; those before it are kept.
    """
    folder = Path(str(config.run.dir))
    kept = Path(str(options["kept"])).expanduser().absolute() if options["kept"] else folder
    life = Life(kept, options, configuration.given(), config.json)
    for stage in life.stages:
        life.carried_out(stage, _WORK[stage])
    found = {stage: result for stage in STAGES if (result := life.kept(stage)) is not None}
    figures = figures_of(found, kept)
    write_atomic(folder / PAGE, page(figures, datetime.now()).encode())
    return {**figures, "page": str(folder / PAGE)}


def figures_of(found: Mapping[str, Mapping[str, Any]], kept: Path) -> dict[str, Any]:
    """Return what the stages found as one.

    Args:
        found: What each stage found, by its name.
        kept: Where it is kept.
    """
    decisions = [row for result in found.values() for row in result["decisions"]]
    figures: dict[str, Any] = {"kept": str(kept)}
    for stage, names in _FIGURES.items():
        figures |= {name: found[stage].get(name) for name in names if stage in found}
    figures["seconds"] = round(sum(result["seconds"] for result in found.values()), 1)
    figures["off_median"] = off_median(decisions)
    figures["stages"] = [
        {
            "stage": stage, "seconds": result["seconds"], "decisions": len(result["decisions"]),
            "left": result.get("run_dir") or str(result.get("log", "")),
        }
        for stage, result in found.items()
    ]  # fmt: skip
    figures["decisions"] = decisions
    for table in _TABLES:
        rows = [row for result in found.values() for row in result.get(table, ())]
        figures |= {table: rows} if rows else {}
    return figures


def off_median(decisions: list[dict[str, Any]]) -> float | None:
    """Return by which share predictions were off in the median; None where none was measured."""
    pairs = [(row["predicted"], row["measured"]) for row in decisions]
    off = sorted(abs(p - m) / abs(m) for p, m in pairs if p is not None and m)
    return off[len(off) // 2] if off else None


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what a request of the chain took in each phase, beside what was expected."""
    rows = figures.get("phases", ())
    nan = float("nan")
    return Chart(
        "A life: what a request takes while conditions change",
        "phase",
        "ms",
        [row["phase"] for row in rows],
        {
            "expected": [nan if row["expected_ms"] is None else row["expected_ms"] for row in rows],
            "measured, median": [nan if row["p50_ms"] is None else row["p50_ms"] for row in rows],
        },
    )
