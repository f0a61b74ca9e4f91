"""Split training by plans, on links shaped in real time, with devices slowed by waiting.

A cell is a network, a kind of device, a codec and a method. All its devices are alike, on one edge
server, which is slowed too, to a rate that this machine can keep up with. Before anything is
measured, the costs and what the model predicts from them are written to ``profile.json`` in the run
folder; nothing is fitted afterwards. Beside the measured iteration stand

* ``bound_s``: the model's best over the micro-batches for that cut and codec, without any overhead
  (no fixed cost of operations or messages, no processor time for bytes, no loading), fill and drain
  of the pipeline included;
* ``busiest_s``: the busy time of the busiest resource, likewise without overhead.

Methods that choose the same plan in a cell share one measurement (``same_as``), and so do all cells
in which everything stays on the devices. A cell whose real work takes more than half of the
processors is void: the waiting could not hide it. So is one in which a device lost its edge server
and trained otherwise than planned.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from fedsys import config as configuration
from fedsys.commands.bench import Chart, pipeline_cpu, pipeline_virtual
from fedsys.commands.bench.rounds import (
    BEFORE,
    EdgeProcess,
    RoundWatch,
    edge_process,
    watched_round,
)
from fedsys.config import Config
from fedsys.errors import ConfigError, did_you_mean
from fedsys.files import json_text, write_atomic
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import MachineCosts, Messaging
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.planning.planner import Plan, evaluate, plan
from fedsys.planning.timeline import play
from fedsys.planning.workload import Workload, counts, job_of
from fedsys.runs.folder import RunFolder
from fedsys.training import federation
from fedsys.training.federation import layers_of

METHODS: Final = ("classic", "splitfed", "pipar", "exhaustive", "auto", "auto_offloaded")
VOID: Final = 0.5
"""Share of the processors that the real work may take."""

LEAST: Final = 2
"""Iterations of a device that have a median and a spread."""

ACCURACY_ROUNDS: Final = 5
"""Rounds of training with real images; synthetic ones say nothing of accuracy."""

_OFFLOADED: Final = {"pipar", "auto_offloaded"}  # PiPar's rule cannot say "do not split"


@dataclass(frozen=True)
class Cell:
    """One setting, and what is planned for it.

    Attributes:
        link: Name of the network.
        device: Name of the machine.
        codec: How tensors are written at the cut.
        method: Who planned.
        plan: The plan.
        load: What was planned for.
        values: Configuration of the run.
    """

    link: str
    device: str
    codec: str
    method: str
    plan: Plan
    load: Workload
    values: Mapping[str, Any]

    @property
    def alone(self) -> bool:
        """Whether everything stays on the devices."""
        return all(choice.cut == self.load.units for choice in self.plan.choices)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two cells have in common that are one measurement."""
        where = () if self.alone else (self.link, self.codec)
        return self.device, self.plan.choices if not self.alone else (), *where

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.link}-{self.device}-{self.codec}-{self.method}"


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plan, measure, compare.

    Args:
        config: Data, model, client and number of devices.
        options: Of ``conf/bench/pipeline.yaml``.

    Returns:
        ``cells``; ``accuracies`` and ``cpu`` (`fedsys.commands.bench.pipeline_cpu`) if asked for;
        and the figures of `summary`.

    Raises:
        ConfigError: An option names something that there is not.
        FedsysError: A run failed.
    """
    if options.get("virtual"):
        return pipeline_virtual.run(config, options.get("on_virtual_clock") or {})
    count = options["iterations"]
    if type(count) is not int or count < LEAST:
        raise ConfigError.of(
            "bench.iterations", count, f"must be a whole number of at least {LEAST}"
        )
    cells = list(planned(_sized(config, count), options))
    folder = Path(str(config.run.dir))
    write_atomic(folder / "profile.json", json_text(_profile(cells), indent=2).encode())
    rows: list[dict[str, Any]] = []
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    with edge_process(config.link.between_processes) as edge:
        for cell in cells:
            if cell.key not in done:
                done[cell.key] = _measured(cell, edge, folder, count)
            rows.append(row_of(cell, done[cell.key]))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
            write_atomic(folder / "cells.json", json_text(rows).encode())
        more = {
            "accuracies": _accuracies(config, options, cells, edge, folder),
            "cpu": pipeline_cpu.measured(config, options, edge, folder),
        }
    figures: dict[str, Any] = {"cells": rows, **{k: v for k, v in more.items() if v}}
    return {**figures, **summary(rows), "iterations": count, "devices": config.num_clients}


def _sized(config: Config, iterations: int) -> Config:
    """Return the configuration with enough examples for each device, and no more."""
    size = config.client.batch_size
    # one mini-batch before those that count, one that may be smaller behind them
    wanted = config.num_clients * size * (iterations + BEFORE + 2)
    part = 1.0 - float(config.data.get("validation", 0.0) or 0.0)
    key = "max_examples" if config.data.get("source") != "synthetic" else "examples"
    text = configuration.with_values(config.text, data={key: round(wanted / part)})
    return configuration.parse(text)


# --------------------------------------------------------------------------------------------------
# Before: plans, predictions, bounds


def planned(config: Config, options: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield all cells with their plans.

    Raises:
        ConfigError: An option names something that there is not.
    """
    for key, known in (("methods", METHODS), ("links", options["networks"])):
        for name in options[key]:
            if name not in known:
                hint = did_you_mean(str(name), known) or f"one of {', '.join(known)}"
                raise ConfigError.of(f"bench.{key}", name, "must be a known name", hint.strip())
    fed = federation.federation(config)
    layers = layers_of(config, fed.dataset)
    for link in options["links"]:
        for device in options["devices"]:
            network = {**options["networks"][link], "emulate": True}
            fleet = {"devices": [device], "servers": [options["server"]], "emulate": True}
            values = {"network": network, "fleet": fleet}
            made = configuration.parse(configuration.with_values(config.text, **values))
            for codec in options["codecs"]:
                load = _workload(made, layers, str(codec), options["micro_batches"])
                for method in options["methods"]:
                    found = _plan(load, str(method))
                    yield Cell(
                        str(link), str(device), str(codec), str(method), found, load,
                        {**values, "_text": made.text},
                    )  # fmt: skip


def _workload(
    config: Config, layers: LayeredModel, codec: str, micro_batches: Sequence[int]
) -> Workload:
    machines = machines_of(config, layers)
    fitting = tuple(m for m in micro_batches if m <= config.client.batch_size)
    options = PlanOptions(codec=(codec,), micro_batches=fitting, objective="iteration")
    return run_workload(config, layers, machines, [config.client.batch_size], options)


def _plan(load: Workload, method: str) -> Plan:
    name = "auto" if method == "auto_offloaded" else method
    return plan(load, name, offload=method in _OFFLOADED)


def free_of_overhead(load: Workload) -> Workload:
    """Return the workload on machines that do nothing but compute, and load in no time."""

    def bare(costs: MachineCosts) -> MachineCosts:
        return dataclasses.replace(costs, operation_s=0.0, load_s=0.0, messaging=Messaging())

    return dataclasses.replace(
        load,
        devices=tuple(dataclasses.replace(d, costs=bare(d.costs)) for d in load.devices),
        edges=tuple(bare(edge) for edge in load.edges),
    )


def bounds(cell: Cell) -> tuple[float, float]:
    """Return ``bound_s`` and ``busiest_s`` of a cell."""
    bare = free_of_overhead(cell.load)
    best = min(
        max(evaluate(bare, [_with(c, m, bare) for c in cell.plan.choices]).iteration_s)
        for m in (*bare.micro_batches, *counts(bare.batch_size))
    )
    jobs = [
        job_of(bare, device, choice, iterations=1)
        for device, choice in zip(bare.devices, cell.plan.choices, strict=True)
    ]
    workers = {f"edge:{i}": edge.workers for i, edge in enumerate(bare.edges)}
    timeline = play(jobs, [edge.workers for edge in bare.edges])
    busy = {name: s / workers.get(name, 1) for name, s in timeline.busy().items()}
    return best, max(busy.values())


def _with(choice: Assignment, micro_batches: int, load: Workload) -> Assignment:
    if choice.cut == load.units:
        return choice
    return dataclasses.replace(choice, micro_batches=micro_batches)


def _profile(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return what is believed before anything is measured."""
    machines = {cell.load.devices[0].costs.name: cell.load.devices[0].costs for cell in cells}
    machines |= {edge.name: edge for cell in cells for edge in cell.load.edges}
    predicted = [
        {
            "cell": cell.name,
            "choices": [dataclasses.asdict(choice) for choice in cell.plan.choices],
            "predicted_s": max(cell.plan.iteration_s),
            "bound_s": bounds(cell)[0],
        }
        for cell in cells
    ]
    costs = {name: dataclasses.asdict(machine) for name, machine in machines.items()}
    return {"machines": costs, "predicted": predicted}


# --------------------------------------------------------------------------------------------------
# The measurement


def _measured(cell: Cell, edge: EdgeProcess, folder: Path, count: int) -> dict[str, Any]:
    config = configuration.parse(str(cell.values["_text"]))
    watch, accuracy = watched_round(
        config,
        edge,
        run={"dir": str(folder / cell.name), "plots": True},
        rounds=1,
        policy=_policy(cell.plan, cell.codec),
        schedule={"kind": "pipelined"},
    )
    took = watch.iterations(count)
    low, _, high = quantiles(took, n=4)
    cpu = watch.device_cpu_s + watch.edge_cpu_s
    events = RunFolder.open(folder / cell.name).events()
    return {
        "measured_by": cell.name,
        "recoveries": sum(
            event.get("kind") == "recovery" and event.get("what") != "stays" for event in events
        ),
        "iteration_s": median(took),
        "iteration_q1_s": low,
        "iteration_q3_s": high,
        "iterations": len(took),
        "edge_idle_s": _edge_idle(watch, median(took)),
        "device_cpu_s": watch.device_cpu_s / watch.steps,
        "edge_cpu_s": watch.edge_cpu_s / watch.steps,
        "emulation_load": cpu / (watch.window_s * (os.cpu_count() or 1)),
        "late_s": sum(watch.late_s.values()) / watch.steps,
        "accuracy": accuracy,
    }


def _policy(made: Plan, codec: str) -> dict[str, Any]:
    return {
        "kind": "fixed",
        "cut": [choice.cut for choice in made.choices],
        "codec": codec,
        "micro_batches": [choice.pieces for choice in made.choices],
    }


def _edge_idle(watch: RoundWatch, iteration_s: float) -> float:
    """Return the seconds of an iteration in which the session of a device waits."""
    busy = [seen.edge_s for seen in watch.observations.values()]
    return iteration_s - (sum(busy) / len(busy) if busy else 0.0)


def row_of(cell: Cell, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was planned for a cell beside what was measured of it."""
    cuts = [choice.cut for choice in cell.plan.choices]
    counts = [choice.pieces for choice in cell.plan.choices]
    bound, busiest = bounds(cell)
    took, predicted = float(measured["iteration_s"]), max(cell.plan.iteration_s)
    own = {name: value for name, value in measured.items() if name != "measured_by"}
    load = float(measured["emulation_load"])
    return {
        "link": cell.link,
        "device": cell.device,
        "codec": cell.codec,
        "method": cell.method,
        "cut": _one_or_all(cuts),
        "micro_batches": _one_or_all(counts),
        **own,
        "busiest_s": busiest,
        "bound_s": bound,
        "predicted_s": predicted,
        "bound_ratio": bound / took,
        "prediction_error": predicted / took - 1.0,
        "planned_s": cell.plan.planned_s,
        "void": load > VOID or measured["recoveries"] > 0,
        "same_as": "" if measured["measured_by"] == cell.name else measured["measured_by"],
    }


def _one_or_all(values: Sequence[int]) -> int | str:
    return values[0] if len(set(values)) == 1 else " ".join(map(str, values))


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['link']} {row['device']} {row['codec']} {row['method']}: cut {row['cut']}, "
        f"{row['micro_batches']} pieces, {row['iteration_s']:.3f} s, predicted "
        f"{row['predicted_s']:.3f}, bound {row['bound_s']:.3f}, load {row['emulation_load']:.2f}"
        f"{', void' if row['void'] else ''}{', as ' + row['same_as'] if row['same_as'] else ''}"
    )


def _accuracies(
    config: Config, options: Mapping[str, Any], cells: Sequence[Cell], edge: EdgeProcess,
    folder: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train each codec by one plan for the same steps, without waiting, and score the models."""
    rounds = options["accuracy_rounds"]
    if rounds is None:
        rounds = 0 if config.data.get("source") == "synthetic" else ACCURACY_ROUNDS
    split = [cell for cell in cells if not cell.alone]
    split.sort(key=lambda cell: cell.method != "auto_offloaded")  # the first of these, if any
    scores = []
    for codec in options["codecs"] if rounds and split else ():
        _, accuracy = watched_round(
            config,
            edge,
            run={"dir": str(folder / f"accuracy-{codec}"), "plots": False},
            rounds=int(rounds),
            policy=_policy(split[0].plan, str(codec)),
            schedule={"kind": "pipelined"},
        )
        scores.append({"codec": codec, "rounds": int(rounds), "accuracy": accuracy})
    return scores


# --------------------------------------------------------------------------------------------------
# The comparison


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures that have goals, over the cells that are not void.

    Returns:
        Least ``bound_ratio`` of the plans of auto; median and largest error of the prediction; how
        much slower auto is than classic and exhaustive, at most; how much faster auto_offloaded is
        than splitfed at fp32 in the median cell, and int8 than splitfed at fp32, each by the cells
        in which both are valid; and the number of void cells.
    """
    valid = [row for row in rows if not row["void"]]
    at = {(r["link"], r["device"], r["codec"], r["method"]): r["iteration_s"] for r in valid}

    def ratios(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        """Return how many times longer `one` takes than `other`, each a codec and a method."""
        places = {key[:2] for key in at}
        pairs = [(at.get((*p, *one)), at.get((*p, *other))) for p in sorted(places)]
        return [a / b for a, b in pairs if a and b]

    codecs = sorted({row["codec"] for row in rows})
    errors = [abs(row["prediction_error"]) for row in valid]
    own = [row["bound_ratio"] for row in valid if str(row["method"]).startswith("auto")]
    slower = [r for c in codecs for r in ratios((c, "auto"), (c, "classic"))]
    worse = [r for c in codecs for r in ratios((c, "auto"), (c, "exhaustive"))]
    faster = ratios(("fp32", "splitfed"), ("fp32", "auto_offloaded"))
    small = ratios(("fp32", "splitfed"), ("int8", "auto_offloaded"))
    found = {
        "bound_ratio_least": min(own, default=None),
        "prediction_error_median": median(errors) if errors else None,
        "prediction_error_largest": max(errors, default=None),
        "auto_by_classic_largest": max(slower, default=None),
        "auto_by_exhaustive_largest": max(worse, default=None),
        "splitfed_by_auto_offloaded_median": median(faster) if faster else None,
        "splitfed_by_int8_largest": max(small, default=None),
    }
    return {**found, "void_cells": len(rows) - len(valid)}


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the seconds of an iteration of each method, by setting."""
    if "cells" not in figures:
        return pipeline_virtual.chart(figures)
    cells = figures["cells"]
    labels = list(dict.fromkeys(f"{c['link']}\n{c['device']}\n{c['codec']}" for c in cells))
    at = {(f"{c['link']}\n{c['device']}\n{c['codec']}", c["method"]): c for c in cells}
    methods = list(dict.fromkeys(c["method"] for c in cells))
    nothing = {"iteration_s": float("nan"), "bound_s": float("nan")}
    series = {m: [at.get((x, m), nothing)["iteration_s"] for x in labels] for m in methods}
    if "auto" in methods:
        series["bound of auto"] = [at.get((x, "auto"), nothing)["bound_s"] for x in labels]
    return Chart(
        "One iteration of split training, measured", "", "seconds", labels, series, log=True
    )
