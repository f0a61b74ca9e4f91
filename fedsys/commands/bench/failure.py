"""What happens when a host of a chain fails, over chains, objectives, hosts and faults.

Each event begins when all hosts answer and what is to stand ready does; then a fault strikes under
constant load. The gap is from the fault to the first answer by another route; its parts are
detection, telling, decision, sending, and that answer.

The oracle measures every candidate after a kill. For each of many objectives, drawn by a seed, the
choice by what was expected stands beside the choice by what was measured
(`fedsys.commands.bench.failure_oracle`). Decisions are timed thousands of times on what is there.

What would take longer than it may (``bench.minutes``) is left out, and counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsys.commands.bench import Chart
from fedsys.commands.bench.failure_chain import HostProcess, host_processes, opened_chain
from fedsys.commands.bench.failure_event import Scene
from fedsys.commands.bench.failure_figures import figures_of
from fedsys.commands.bench.failure_models import BenchChain, chains_of
from fedsys.commands.bench.failure_soak import soak
from fedsys.commands.serve import SWITCH_S
from fedsys.config import Config
from fedsys.config.serving import WeightsConfig
from fedsys.errors import ConfigError
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.recovery.decision import RecoveryObjective
from fedsys.transport.security import new_token

FAULTS = ("kill", "pause", "cut", "slow")

Cell = tuple[str, str, HostProcess]


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Let hosts fail, and look.

    Args:
        config: ``hosts``, ``partition``, ``serving``, and what a model is made of where no
            ``portfolio`` is named.
        options: See ``conf/bench/failure.yaml``.

    Returns:
        ``events``, medians by fault as ``faults``, ``oracle_agreement``, ``regret``, ``lost``,
        ``twice``, ``replayed``, errors of estimators as ``estimates``, and the goals; or with
        ``soak_s`` what `fedsys.commands.bench.failure_soak.soak` returns.

    Raises:
        FedsysError: No model can be made, or a chain does not come to rest.
    """
    faults = [str(fault) for fault in options["faults"]]
    if not faults or not set(faults) <= set(FAULTS):
        rule = f"must name at least one of {', '.join(FAULTS)}"
        raise ConfigError.of("bench.faults", faults, rule)
    alone = {"quick": True} if options["soak_s"] else {}
    chains = list(chains_of(config, {**options, **alone}))
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    if options["soak_s"]:
        return soak(chains[0], options)
    until, rows, about = time.monotonic() + 60 * float(options["minutes"]), [], []
    for place, chain in enumerate(chains):
        share_s = (until - time.monotonic()) / (len(chains) - place)
        found = _chain(chain, faults, options, time.monotonic() + share_s)
        rows += found[0]
        about.append(found[1])
    return figures_of(rows, about)


def _chain(
    chain: BenchChain, faults: Sequence[str], options: Mapping[str, Any], until: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the events on a chain, and what else was seen of it."""
    portfolio, token = Portfolio.load(Path(str(chain.config.portfolio))), new_token()
    objectives = {k: _asked(chain.config, v) for k, v in options["objectives"].items()}
    told: list[Mapping[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with (
        host_processes(chain.config, token) as (own, hosts),
        opened_chain(own, portfolio, told.append) as (engine, continuer),
    ):
        scene = Scene(engine, continuer, told, options)
        cells = list(_cells(list(objectives), faults, hosts, options))
        for number, (wishes, fault, host) in enumerate(cells):
            if time.monotonic() > until:
                break
            _say(f"{chain.name}: {wishes}, {fault} {host.name}, {number + 1} of {len(cells)}")
            continuer.ask(objectives[wishes])
            row = scene.event(host, fault, objectives[wishes])
            rows.append({"chain": chain.name, "objective": wishes, **row})
        about = scene.about()
    left = len(cells) - len(rows)
    return rows, {"chain": chain.name, "events": len(rows), "left_out": left, **about}


def _cells(
    objectives: Sequence[str],
    faults: Sequence[str],
    hosts: Sequence[HostProcess],
    options: Mapping[str, Any],
) -> Iterator[Cell]:
    """Yield what happens: all faults with the first objective, kills with the others, too."""
    quick = bool(options["quick"])
    for _ in range(1 if quick else int(options["repeats"])):
        for place, wishes in enumerate(objectives[: 1 if quick else None]):
            for fault in faults[: 2 if quick else None] if place == 0 else faults[:1]:
                for host in hosts:
                    yield wishes, fault, host


def _asked(config: Config, wishes: Mapping[str, Any]) -> RecoveryObjective:
    """Return the objective of the configuration, with what a row of the grid says of it."""
    weights = {k: float(v) for k, v in wishes.items() if k in ("accuracy", "latency", "downtime")}
    least = {k: v for k, v in wishes.items() if k in ("techniques", "latency_ms", "downtime_ms")}
    if "techniques" in least:
        least["techniques"] = tuple(least["techniques"])
    objective = replace(config.serving.objective, weights=WeightsConfig(**weights), **least)
    return RecoveryObjective.of(objective)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what the gap is made of, by fault; of a soak, the memory over time."""
    if "samples" in figures:
        rows = figures["samples"]
        labels = [f"{row['minute']:.0f}" for row in rows]
        series = {"entry": [r["entry_mb"] for r in rows], "hosts": [r["hosts_mb"] for r in rows]}
        return Chart("Hosts fail again and again: memory", "minute", "MB", labels, series, True)
    rows = figures["faults"]
    keys = ("detect_ms", "decide_ms", "apply_ms", "answer_ms")
    return Chart(
        "A host fails: what the gap is made of (medians)",
        "fault",
        "ms",
        [row["fault"] for row in rows],
        {key: [row[key] or 0.0 for row in rows] for key in keys},
    )
