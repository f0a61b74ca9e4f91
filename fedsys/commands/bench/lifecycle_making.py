"""The first half of a life: a model is trained by a fleet, pruned to a portfolio, and partitioned.

What was decided is read from what the commands leave: ``decisions.csv`` and the figures of the
run, the portfolio, and the plan of the chain.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedsys.commands import partition as partition_command
from fedsys.commands import python
from fedsys.commands import train as train_command
from fedsys.commands.bench.lifecycle_stages import Found, Life, LifeDecision
from fedsys.commands.bench.rounds import edge_process
from fedsys.config import Config, edge_names
from fedsys.models.layers import layered
from fedsys.pruning.portfolio import ONNX, PARENT, Portfolio
from fedsys.runs import decisions
from fedsys.runs.cuts import percent
from fedsys.runs.decisions import OffloadDecision
from fedsys.runs.folder import RunFolder
from fedsys.transport.security import new_token

# --------------------------------------------------------------------------------------------------
# Training


def train_stage(life: Life) -> Found:
    """Train by the fleet; one that was interrupted is continued."""
    path = life.folder / "train"
    begun = (path / "run.json").is_file()
    with _edges(life.config) as edges:
        own = [f"resume={path}"] if begun else [*life.overrides, f"run.dir={path}"]
        figures = dict(python.called(train_command.job, [*own, *edges], told=edges))
    run = python.FinishedRun(path, figures)
    made = decisions.read(path)
    return {
        "run_dir": str(path),
        "rounds": list(rounds_of(made, run.history)),
        "moves": list(moves_of(figures.get("moves", ()))),
        "recoveries": list(figures.get("recoveries", ())),
        "accuracy": figures.get(run.metric.name),
        "epsilon": figures.get("epsilon"),
        "decisions": [one.row() for one in training_decisions(made, figures, life.config)],
    }


@contextmanager
def _edges(config: Config) -> Iterator[list[str]]:
    """Start the edge servers as processes where nobody else does; yield the overrides for them."""
    if config.fleet.edges or config.runtime.kind != "local":
        yield []
        return
    token, names = new_token(), edge_names(config)
    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        started = [edge_process(name=name, token=token, faults=True) for name in names]
        edges = list(pool.map(stack.enter_context, started))
        listed = ",".join(f"{{name:{e.name},address:'{e.address}'}}" for e in edges)
        yield [f"fleet.edges=[{listed}]", f"fleet.control_token={token}"]


def rounds_of(
    made: Sequence[OffloadDecision], history: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield for each round what its slowest device was expected to take, and what it took."""
    for row in history:
        number = int(row["round"])
        own = [one for one in made if one.round == number]
        yield {
            "round": number,
            "predicted_s": max((o.predicted_s for o in own if o.predicted_s), default=None),
            "measured_s": max((o.measured_s for o in own if o.measured_s), default=None),
            "seconds": row.get("seconds_round"),
            "val_accuracy": row.get("val_accuracy"),
            "epsilon": row.get("epsilon"),
        }


def moves_of(moves: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the moves between edge servers cost, beside what they were expected to."""
    keys = ("round", "client", "source", "target", "how", "predicted_bytes", "bytes")
    for move in moves:
        yield {
            **{key: move.get(key) for key in keys},
            "predicted_pause_s": move.get("predicted_pause_s"),
            "pause_s": move.get("pause_s"),
        }


def training_decisions(
    made: Sequence[OffloadDecision], figures: Mapping[str, Any], config: Config
) -> Iterator[LifeDecision]:
    """Yield what was decided while the model was trained."""
    promised = figures.get("privacy")
    if isinstance(promised, Mapping):
        noise = promised.get("noise_multiplier")
        yield LifeDecision(
            "train", "before round 1", "all devices",
            f"noise of {noise:.3g} times the norm of an example" if noise else "noise",
            str(promised.get("claim", "")), "epsilon",
            config.privacy.epsilon, promised.get("epsilon"),
        )  # fmt: skip
    for one in made:
        yield LifeDecision(
            "train", f"round {one.round}", f"device {one.client}, {one.machine}", _cut(one),
            one.reason, "round, s", one.predicted_s, one.measured_s,
        )  # fmt: skip
    for move in figures.get("moves", ()):
        yield LifeDecision(
            "train", f"round {move['round']}", f"device {move['client']}",
            f"moves from {move['source']} to {move['target']}",
            f"{move.get('how', '')}, as mobility={config.mobility.kind} says", "pause, s",
            move.get("predicted_pause_s"), move.get("pause_s"),
        )  # fmt: skip
    for one in figures.get("recoveries", ()):
        if one.get("what") == "stays":
            yield LifeDecision(
                "train", f"round {one['round']}", f"device {one['client']}",
                f"stays at {one['from']}, not {one['to']}", str(one.get("why", "")),
                "until it was told so, s", None, one.get("seconds"),
            )  # fmt: skip
            continue
        yield LifeDecision(
            "train", f"round {one['round']}", f"device {one['client']}",
            f"goes on at {one.get('to', 'its edge server')}, {one.get('repeated_steps', 0)} steps "
            "repeated", f"{one.get('from', one.get('what'))} is lost: {one.get('why', '')}",
            "without an edge server, s", None, one.get("seconds"),
        )  # fmt: skip


def _cut(one: OffloadDecision) -> str:
    if one.whole:
        return "trains the whole model"
    pieces = "one piece" if one.pieces == 1 else f"{one.pieces} pieces"
    place = f"cut after {one.unit}" if one.unit else "all units at the edge"
    return f"{place}, {percent(one.device_share)} of the work; {pieces}, {one.codec}; {one.edge}"


# --------------------------------------------------------------------------------------------------
# Pruning


def prune_stage(life: Life) -> Found:
    """Prune the trained model to a portfolio; one that was interrupted is made anew."""
    path, run = life.folder / "prune", life.needed("train")["run_dir"]
    shutil.rmtree(path, ignore_errors=True)
    own = [f"run.dir={path}", "run.plots=false", f"json={str(life.config.json).lower()}"]
    portfolio = python.prune(run, *map(str, life.options["prune"]), *own)
    made = RunFolder.open(path).info["result"]
    return {
        "run_dir": str(path),
        "portfolio": str(portfolio.folder),
        "variants": [variant_row(row) for row in made["variants"]],
        "decisions": [one.row() for one in pruning_decisions(made)],
    }


def variant_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is told of a variant."""
    keys = ("name", "accuracy", "test_accuracy", "params", "macs", "p50_ms", "p95_ms", "sparsity")
    return {key: row.get(key) for key in keys}


def pruning_decisions(made: Mapping[str, Any]) -> Iterator[LifeDecision]:
    """Yield which variants stay, with both accuracies, and which do not."""
    for row in made["variants"]:
        smaller = row["parent_params"] / row["params"]
        yield LifeDecision(
            "prune", "after training", row["name"], "stays in the portfolio",
            f"1/{smaller:.3g} of the parameters, {row['p50_ms']:.3g} ms", "accuracy",
            row["accuracy"], row.get("test_accuracy"),
        )  # fmt: skip
    for name, reason in made["refused"].items():
        yield LifeDecision("prune", "after training", name, "is refused", str(reason))


# --------------------------------------------------------------------------------------------------
# Partitioning


def partition_stage(life: Life) -> Found:
    """Choose the variant and its cuts for the hosts, which are described by what was measured."""
    path, portfolio = life.folder / "partition", life.needed("prune")["portfolio"]
    shutil.rmtree(path, ignore_errors=True)
    hosts = host_overrides(life.config, Portfolio.load(Path(portfolio)))
    own = [f"portfolio={portfolio}", f"run.dir={path}"]
    own.append(f"partition.max_drop={life.options['max_drop']}")
    made = python.called(partition_command.job, [*life.overrides, *hosts, *own])
    return {
        "run_dir": str(path),
        "variant": made["variant"],
        "hosts": hosts,
        "latency_ms": made["latency_ms"],
        "plan": {key: made[key] for key in ("cuts", "chain", "why", "alternatives", "variants")},
        "decisions": [one.row() for one in partition_decisions(made)],
    }


def host_overrides(config: Config, portfolio: Portfolio) -> list[str]:
    """Return what hosts are told to take, and that images stay on the first.

    Machines that ``hosts.machines`` does not describe are as fast as this one was when it measured
    the parent, or slower by the factor with which they are started.
    """
    parent = portfolio.parent
    rate = parent.macs / (parent.p50_ms / 1e3)
    found = []
    for one in config.hosts.list:
        if one.machine and one.machine not in config.hosts.machines:
            entry = f"{{macs_per_s:{rate / one.slower!r},source:measured by fedsys prune}}"
            found.append(f"+hosts.machines.{one.machine}={entry}")
    if not config.partition.must:
        unit = layered(portfolio.module(PARENT), portfolio.about.input_shape).units[0].name
        others = [v.name for v in portfolio.variants if ONNX not in v.files]
        if all(_first_unit(portfolio, name) == unit for name in others):
            found.append(f"partition.must={{{unit}:{config.hosts.list[0].name}}}")
    return found


def _first_unit(portfolio: Portfolio, name: str) -> str:
    return layered(portfolio.module(name), portfolio.about.input_shape).units[0].name


def partition_decisions(made: Mapping[str, Any]) -> Iterator[LifeDecision]:
    """Yield the choice of the variant and of the cuts; what a request takes is measured later."""
    for row in made["variants"]:
        chosen = row["variant"] == made["variant"]
        yield LifeDecision(
            "partition", "before serving", row["variant"],
            f"{'is served' if chosen else 'is not served'}: {row['chain']}",
            made["why"] if chosen else f"accuracy {row['accuracy']:.2%}",
            "request, ms", row["latency_ms"],
        )  # fmt: skip
