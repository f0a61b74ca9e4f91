"""fedsys beside other simulators of federated learning, on the same work in one run.

======================  ========================================================================
``fedsys``              ``runtime=local``; two workers are processes (``runtime.pool=processes``)
``batched``             the same with ``runtime.batched_clients``: other bits
``pfl``                 Apple's pfl-research, installed into a folder of its own
``flower``              Flower's simulation engine, as ``runtime=simulation`` starts it
======================  ========================================================================

All have the same users, examples, initial model, local steps, batch and optimizer, and one thread
of PyTorch for each worker. Each is a process that does a round when it is asked for: fedsys, with
one worker and with two, and pfl stand at the same time and are asked in turns, so that whatever
else the machine does meets all of them. Flower's engine, whose processes are never quite idle, runs
after them. The first round is not counted. Memory is looked at in rounds that are not timed: the
largest of all processes of a simulator, where shared memory and libraries count once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import yaml

from fedsys import config as configuration
from fedsys.commands.bench import HOME, Chart, given_options, plain, python_path
from fedsys.commands.bench.rivals import installed
from fedsys.commands.bench.simulators_process import Simulator
from fedsys.config import Config
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runs.folder import RunFolder
from fedsys.runtime.processes import free_ports
from fedsys.training import federation

PINNED = ("pfl==0.6.0",)
"""What pip installs; what it needs comes along, but for PyTorch, which is that of fedsys."""

FASTER: Mapping[str, float] = {"fedsys": 1.3, "batched": 2.5}
"""How many times as fast as pfl with the small model and two workers; else 1.0."""

SPEEDUP, MEMORY, GROWTH = 1.7, 1.0, 1.1
"""Two workers to one; peak memory to pfl's with the large model; the larger cohort to the other."""

OURS = ("fedsys", "batched")
BY_FEDSYS = (*OURS, "flower")
"""Who is started by ``fedsys train``, and so leaves the folder of a run."""

KNOWN = ("fedsys", "batched", "pfl", "flower")

Key = tuple[str, int, str, int]
"""Model, workers, who, and cohort."""


@dataclass
class SimulatorCell:
    """What one simulator did with one model and number of workers.

    Attributes:
        seconds: Of each round that counts.
        cpu_s: Processor time of each of them, of all processes.
        peak: Largest memory seen, in bytes.
        loss: Of the last model, on the examples on which rounds are judged.
        sha256: Of the last model; None: it is not told.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak: float = 0.0
    loss: float = float("nan")
    sha256: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the figures of a row; None for what was not measured."""
        return {
            "round_s": median(self.seconds) if self.seconds else None,
            "peak_mb": self.peak / 1e6,
            "cpu_s": median(self.cpu_s) if self.cpu_s else None,
            "rounds": len(self.seconds),
            "loss": self.loss,
        }


_OF_MODEL: Final = ("model", "examples", "turns", "batched")
"""What is told of a model that is measured."""


@dataclass(frozen=True)
class Work:
    """What all simulators do with one model.

    Attributes:
        name: Of the model.
        config: The run, with its model, users and examples.
        turns: Rounds that count.
        batched: Clients that ``runtime.batched_clients`` trains at once; below 2: it is left out.
        folder: Where files and logs go.
    """

    name: str
    config: Config
    turns: int
    batched: int
    folder: Path

    @property
    def rounds(self) -> int:
        """Those that count, one before them, and one in which memory is looked at."""
        return self.turns + 2


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure all simulators.

    Args:
        config: What all runs have in common.
        options: See ``conf/bench/simulators.yaml``.

    Returns:
        ``cells``: a row for each model, number of workers and simulator; ``ratios``: how many times
        as fast fedsys is, and its memory to theirs; ``goals``: each with what was seen and whether
        it is met; ``left_out``: who could not be installed or failed, and why.

    Raises:
        ConfigError: An option is not usable.
        RuntimeFailure: fedsys itself failed.
    """
    options = _quick(options) if options["quick"] else options
    _check(options)
    left_out: dict[str, str] = {}
    environment = _environment(options, left_out)
    cells: dict[Key, SimulatorCell] = {}
    for name in options["models"]:
        work = _work(config, options, str(name), int(options["cohort"]))
        bench = _Bench(work, options, environment, left_out)
        cells |= bench.measured()
    if options["large"] in options["models"] and int(options["large_cohort"]):
        cells |= _larger(config, options, environment, left_out)
    rows = [
        {"model": model, "workers": workers, "who": who, "cohort": cohort, **cell.row()}
        for (model, workers, who, cohort), cell in cells.items()
    ]
    ratios = ratios_of(cells)
    return {
        "cells": rows,
        "ratios": ratios,
        "goals": goals_of(cells, options),
        "left_out": [{"who": who, "why": why} for who, why in left_out.items()],
        "users": int(options["users"]),
        "cohort": int(options["cohort"]),
    }


def _quick(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return smaller options in place of those that were not given."""
    small = {"users": 40, "cohort": 8, "large_cohort": 16, "flower_turns": 1}
    given = given_options("simulators", options)
    made = {**options, **{key: value for key, value in small.items() if key not in given}}
    if "models" not in given:
        made["models"] = {
            name: {**about, "turns": 1, "examples": 20} for name, about in options["models"].items()
        }
    return made


def _check(options: Mapping[str, Any]) -> None:
    """Raise a ConfigError for what cannot be measured."""
    users = int(options["users"])
    for key in ("cohort", "large_cohort"):
        if not 0 <= int(options[key]) <= users:
            rule = f"must be from 0 to bench.users={users}"
            raise ConfigError.of(f"bench.{key}", options[key], rule)
    for name, about in plain(options["models"]).items():
        lacking = [key for key in _OF_MODEL if key not in about] if isinstance(about, dict) else []
        if lacking or not isinstance(about, dict) or not isinstance(about["model"], dict):
            rule = f"must be a group with {', '.join(_OF_MODEL)}, the first of them one itself"
            raise ConfigError.of(f"bench.models.{name}", about, rule)
    for who in options["who"]:
        if who not in KNOWN:
            raise ConfigError.of("bench.who", who, f"must be among {', '.join(KNOWN)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _environment(options: Mapping[str, Any], left_out: dict[str, str]) -> Path | None:
    """Return where pfl is installed; None, with the reason noted, where it cannot be."""
    if "pfl" not in options["who"]:
        return None
    try:
        return installed("pfl", PINNED, Path(options["environments"]).expanduser())
    except RuntimeFailure as error:
        left_out["pfl"] = str(error)
        _say(f"left out: {error}")
        return None


def _work(config: Config, options: Mapping[str, Any], name: str, cohort: int) -> Work:
    """Return what is to be done with a model."""
    about, users = options["models"][name], int(options["users"])
    folder = Path(str(config.run.dir)) / f"{name}-{cohort}"
    folder.mkdir(parents=True, exist_ok=True)
    tree = yaml.safe_load(config.text)
    held_out = 100
    examples = users * int(about["examples"])
    tree |= {
        "model": {"norm": "none", "init": None, **plain(about["model"])},
        "num_clients": users,
        "bench": {},
        "json": True,
    }
    tree["data"] |= {
        "examples": examples + held_out, "validation": held_out / (examples + held_out),
        "max_examples": None, "augmentation": "none",
    }  # fmt: skip
    tree["data"]["partition"] |= {"kind": "iid"}
    tree["strategy"] |= {"fraction_train": cohort / users, "fraction_evaluate": 0.0}
    tree["checkpoint"]["every"] = 1 << 30
    tree["run"] |= {"plots": False, "oracle": False}
    made = configuration.parse(yaml.safe_dump(tree))
    return Work(name, made, int(about["turns"]), int(about["batched"]), folder)


# --------------------------------------------------------------------------------------------------
# One model


class _Bench:
    """The simulators of one model.

    Args:
        work: What they do.
        options: Of the benchmark.
        environment: Where pfl is installed; None: nowhere.
        left_out: Gets who failed, and why.
    """

    def __init__(
        self,
        work: Work,
        options: Mapping[str, Any],
        environment: Path | None,
        left_out: dict[str, str],
    ) -> None:
        self._work, self._options = work, options
        self._environment, self._left_out = environment, left_out
        self._cells: dict[Key, SimulatorCell] = {}
        self._cohort = round(work.config.strategy["fraction_train"] * work.config.num_clients)

    def measured(self) -> dict[Key, SimulatorCell]:
        """Have all do their rounds; return what was seen."""
        workers = [int(count) for count in self._options["workers"]]
        absent = {"flower"} if self._environment is not None else {"flower", "pfl"}
        if self._work.batched < 2:
            absent.add("batched")
        here = [who for who in self._options["who"] if who not in absent]
        self._together([(count, who) for who in here for count in workers], self._work)
        if "flower" in self._options["who"]:
            turns = int(self._options["flower_turns"])
            for count in workers:
                fewer = replace(self._work, turns=min(turns, self._work.turns))
                self._together([(count, "flower")], fewer)
        return self._cells

    def peak(self, who: str, workers: int) -> dict[Key, SimulatorCell]:
        """Have one do a round in which its memory is looked at, and nothing else."""
        work = replace(self._work, turns=-1)  # one round in all
        self._together([(workers, who)], work)
        return self._cells

    def _together(self, whom: Sequence[tuple[int, str]], work: Work) -> None:
        """Start some, and have them do a round each in turns."""
        standing: dict[tuple[int, str], Simulator] = {}
        try:
            for workers, who in whom:
                with self._tolerant(standing, (workers, who)):
                    standing[workers, who] = self._started(workers, who, work)
            for key, one in list(standing.items()):
                with self._tolerant(standing, key):
                    one.ready()
            self._watched(standing)
            for turn in range(work.turns):
                each = list(standing)
                first = turn % max(1, len(each))
                for key in (*each[first:], *each[:first]):
                    self._timed(standing, key)
            if work.turns > 0:
                self._watched(standing)
            for key, one in list(standing.items()):
                one.close()
                self._ended(key, work)
                del standing[key]
        finally:
            for one in standing.values():
                one.kill()
        told = (f"{who}/{workers} {_seconds(self._cell((workers, who)))}" for workers, who in whom)
        _say(f"{work.name}, {self._cohort} users a round: {', '.join(told)}")

    @contextlib.contextmanager
    def _tolerant(
        self, standing: dict[tuple[int, str], Simulator], key: tuple[int, str]
    ) -> Iterator[None]:
        """Leave a rival out that fails in the block; what fedsys itself raises is passed on."""
        workers, who = key
        try:
            yield
        except RuntimeFailure as error:
            if who in OURS:
                raise
            if (one := standing.pop(key, None)) is not None:
                one.kill()
            self._cells.pop((self._work.name, workers, who, self._cohort), None)
            self._left_out.setdefault(who, str(error))
            _say(f"left out: {error}")

    def _cell(self, key: tuple[int, str]) -> SimulatorCell:
        workers, who = key
        return self._cells.setdefault(
            (self._work.name, workers, who, self._cohort), SimulatorCell()
        )

    def _watched(self, standing: dict[tuple[int, str], Simulator]) -> None:
        for key, one in list(standing.items()):
            with self._tolerant(standing, key):
                with one.watched() as peak:
                    told = one.round()
                cell = self._cell(key)
                cell.peak = max(cell.peak, peak[0])
                cell.loss = float(told["loss"])

    def _timed(self, standing: dict[tuple[int, str], Simulator], key: tuple[int, str]) -> None:
        if key not in standing:
            return
        with self._tolerant(standing, key):
            told = standing[key].round()
            cell = self._cell(key)
            cell.seconds.append(float(told["seconds"]))
            cell.cpu_s.append(float(told["cpu_s"]))
            cell.loss = float(told["loss"])

    def _ended(self, key: tuple[int, str], work: Work) -> None:
        if key[1] in BY_FEDSYS:
            result = RunFolder.open(self._folder(*key)).info["result"]
            self._cell(key).sha256 = str(result["model_sha256"])

    # --- how each is started ----------------------------------------------------------------------

    def _folder(self, workers: int, who: str) -> Path:
        return self._work.folder / f"{who}-{workers}"

    def _started(self, workers: int, who: str, work: Work) -> Simulator:
        calls = self._pfl(workers, work) if who == "pfl" else [self._fedsys(workers, who, work)]
        name, log = f"{who} with {workers} worker(s)", self._folder(workers, who)
        return Simulator(name, calls, log.with_suffix(".log"), float(self._options["longest_s"]))

    def _fedsys(self, workers: int, who: str, work: Work) -> tuple[list[str], dict[str, str]]:
        runtime: dict[str, Any] = {"kind": "local", "workers": workers, "batched_clients": 1}
        runtime["pool"] = "processes" if workers > 1 and hasattr(os, "memfd_create") else "threads"
        if who == "batched":
            runtime |= {"batched_clients": work.batched, "pool": "threads"}
        elif who == "flower":
            runtime = {"kind": "simulation", "workers": workers}
        folder = self._folder(workers, who)
        text = configuration.with_values(
            work.config.text, rounds=work.rounds, runtime=runtime, run={"dir": str(folder)}
        )
        configuration.parse(text)  # what is wrong is said before anything is started
        file = folder.with_suffix(".yaml")
        file.write_text(text, encoding="utf-8")
        module = "fedsys.commands.bench.simulators_fedsys"
        return [sys.executable, "-m", module, str(file)], {"PYTHONPATH": python_path()}

    def _pfl(self, workers: int, work: Work) -> list[tuple[list[str], dict[str, str]]]:
        folder = self._folder(workers, "pfl")
        write_work(work.config, folder, work.rounds, self._cohort)
        program = str(Path(__file__).with_name("simulators_pfl.py"))
        path = os.pathsep.join(map(str, (self._environment, HOME)))  # its own NumPy comes first
        command = [sys.executable, "-P", program, str(folder)]
        if workers == 1:
            return [(command, {"PYTHONPATH": path})]
        ports = free_ports(workers)
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        return [
            (command, {
                "PYTHONPATH": path, "PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank),
            })
            for rank in range(workers)
        ]  # fmt: skip


def write_work(config: Config, folder: Path, rounds: int, cohort: int) -> None:
    """Write what `fedsys.commands.bench.simulators_pfl` does, as JSON and arrays of NumPy.

    Args:
        config: The run.
        folder: Where it goes.
        rounds: How many.
        cohort: Users that train in a round.
    """
    fed = federation.federation(config)
    data = fed.dataset
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation"):
        images = getattr(data, part)
        np.save(folder / f"{part}_pixels.npy", images.pixels.numpy())
        np.save(folder / f"{part}_labels.npy", images.labels.numpy())
    np.save(folder / "parts.npy", np.stack(fed.parts))
    about = {
        "model": plain(config.model), "shape": list(data.input_shape),
        "classes": data.num_classes, "mean": list(data.mean), "std": list(data.std),
        "epochs": config.client.epochs, "batch_size": config.client.batch_size,
        "lr": config.client.lr, "momentum": config.client.momentum, "seed": config.seed,
        "rounds": rounds, "cohort": cohort,
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(about), encoding="utf-8")


def _larger(
    config: Config,
    options: Mapping[str, Any],
    environment: Path | None,
    left_out: dict[str, str],
) -> dict[Key, SimulatorCell]:
    """Return the memory of fedsys with more users in a round."""
    if "fedsys" not in options["who"]:
        return {}
    work = _work(config, options, str(options["large"]), int(options["large_cohort"]))
    bench = _Bench(work, options, environment, left_out)
    found: dict[Key, SimulatorCell] = {}
    for workers in options["large_workers"]:
        found |= bench.peak("fedsys", int(workers))
    return found


def _seconds(cell: SimulatorCell) -> str:
    took = f"{median(cell.seconds):.3g} s, " if cell.seconds else ""
    return f"{took}{cell.peak / 1e6:,.0f} MB"


# --------------------------------------------------------------------------------------------------
# What follows from the figures


def ratios_of(cells: Mapping[Key, SimulatorCell]) -> list[dict[str, Any]]:
    """Return how fedsys stands to each rival, by model and number of workers.

    ``faster`` is their seconds of a round over ours: the median over turns of those that were
    asked in the same turns, else the medians' ratio; ``cpu`` the same of processor time, and
    ``memory`` our peak over theirs.
    """
    rows = []
    for (model, workers, who, cohort), cell in cells.items():
        for rival in ("pfl", "flower"):
            other = cells.get((model, workers, rival, cohort))
            if who not in OURS or other is None or not cell.seconds:
                continue
            rows.append({
                "model": model, "workers": workers, "who": who, "rival": rival,
                "faster": ratio(other.seconds, cell.seconds),
                "cpu": ratio(other.cpu_s, cell.cpu_s),
                "memory": cell.peak / other.peak,
            })  # fmt: skip
    return rows


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median ratio of two that were measured in the same turns, else that of medians.

    >>> ratio([2.0, 30.0], [1.0, 10.0]), ratio([4.0], [1.0, 2.0, 3.0])
    (2.5, 2.0)
    """
    if len(above) == len(below):
        return median(a / b for a, b in zip(above, below, strict=True))
    return median(above) / median(below)


def goals_of(
    cells: Mapping[Key, SimulatorCell], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return each goal for which there are figures, with what was seen and whether it is met."""
    small, large = str(options["small"]), str(options["large"])
    rows: list[dict[str, Any]] = []

    def add(goal: str, model: str, workers: int, seen: float, needed: float, most: bool) -> None:
        met = seen <= needed if most else seen >= needed
        rows.append({
            "goal": goal, "model": model, "workers": workers, "seen": seen,
            "at_most" if most else "at_least": needed, "met": met,
        })  # fmt: skip

    for row in ratios_of(cells):
        model, workers, who = row["model"], row["workers"], row["who"]
        needed = FASTER[who] if (model, workers, row["rival"]) == (small, 2, "pfl") else 1.0
        add(f"{who} faster than {row['rival']}", model, workers, row["faster"], needed, False)
        if row["rival"] == "pfl" and model == large and who == "fedsys":
            add("memory to that of pfl", model, workers, row["memory"], MEMORY, True)
    for (model, workers, who, cohort), cell in cells.items():
        if who != "fedsys":
            continue
        one = cells.get((model, 1, who, cohort))
        if workers == 2 and one is not None and cell.seconds:
            add("two workers to one", model, 2, ratio(one.seconds, cell.seconds), SPEEDUP, False)
            same = float(one.sha256 == cell.sha256)
            add("two workers learn the same bits", model, 2, same, 1.0, False)
        usual = cells.get((model, workers, who, int(options["cohort"])))
        if cohort != int(options["cohort"]) and usual is not None:
            growth = cell.peak / usual.peak
            add(f"memory of {cohort} users to that of fewer", model, workers, growth, GROWTH, True)
    return rows


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the seconds of a round by model and number of workers."""
    timed = [row for row in figures["cells"] if row["round_s"] is not None]
    places = list(dict.fromkeys((row["model"], row["workers"]) for row in timed))
    took = {(row["who"], row["model"], row["workers"]): row["round_s"] for row in timed}
    return Chart(
        f"{figures['users']:,} users, {figures['cohort']} in a round",
        "model and workers",
        "seconds per round",
        [f"{model}\n{workers}" for model, workers in places],
        {
            who: [took.get((who, *place), float("nan")) for place in places]
            for who in dict.fromkeys(row["who"] for row in timed)
        },
        log=True,
    )
