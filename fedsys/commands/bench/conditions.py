"""Whether DNNs should adapt: which cut is the best one under which conditions, and what that gains.

The study of McNamee et al. (CLOUD 2021) on real host processes: every combination of three rates of
the link, and three levels of CPU and of memory load at either end; every cut, in random order.
Conditions are made in process, and measured before each (`fedsys.commands.bench.condition_sweep`).
What is asked of the measurements is in `fedsys.partition.study`; the files that the authors have
published are analysed by the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fedsys.commands.bench import Chart, given_options
from fedsys.commands.bench.condition_sweep import ConditionSweep, RawSample, measure
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.partition.study import Study, distinct_best, read_published, tables

_QUICK_REPEATS = 4
_RATE_OFF = 0.05


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure, and analyse.

    Args:
        config: Its ``seed`` gives the orders, ``run.dir`` the place of samples.
        options: See ``conf/bench/conditions.yaml``.

    Returns:
        ``gains``: a row for each model with what the initial cut, the best one that stays and the
        oracle take, and the gains (`fedsys.partition.study.gains`); ``best``: the best cut of each
        condition; ``sensitivity`` for each factor; ``effects``, main and two-way; ``made``: whether
        conditions were what was asked for; ``samples``: the file of raw ones.

    Raises:
        ConfigError: A value is not usable.
        DataError: A file of samples is damaged.
    """
    sweep, file = sweep_of(config, options), _file(config, options)
    every = options["cuts"] == "all" and not options["quick"]  # the default: useful ones, if quick
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in options["models"]:
        raw = list(measure(str(name), int(options["side"]), sweep, every,
                           int(options["threads"]), file))  # fmt: skip
        found["made"] += _made(str(name), raw, sweep)
        _analyse(found, str(name), Study.of(one.sample for one in raw))
    if options["published"]:
        folder = Path(str(options["published"]))
        _analyse(found, f"published {folder.name}", Study.of(read_published(folder)))
    if not found:
        rule = "must name a model, unless bench.published names measurements"
        raise ConfigError.of("bench.models", options["models"], rule)
    return {"conditions": len(sweep.conditions()), "repeats": sweep.repeats,
            "quick": bool(options["quick"]), "samples": str(file), **found}  # fmt: skip


def sweep_of(config: Config, options: Mapping[str, Any]) -> ConditionSweep:
    """Return what is swept.

    Raises:
        ConfigError: A value is not usable.
    """
    given, repeats = given_options("conditions", options), int(options["repeats"])
    quick = {key for key in ("rates", "cpu", "memory", "repeats") if key not in given}
    quick = quick if options["quick"] else set()
    if repeats < 1:
        raise ConfigError.of("bench.repeats", repeats, "must be at least 1")
    if options["cuts"] not in ("all", "useful"):
        raise ConfigError.of("bench.cuts", options["cuts"], "must be all or useful")
    bytes_each = float(options["memory_mb"]) * 1e6
    return ConditionSweep(
        rates=tuple(1e6 * rate for rate in _levels(options, "rates", "rates" in quick, 1e9)),
        latency_s=float(options["latency_ms"]) / 1e3,
        cpu=tuple(_levels(options, "cpu", "cpu" in quick, 1.0)),
        memory=tuple(
            int(share * bytes_each) for share in _levels(options, "memory", "memory" in quick, 1.0)
        ),
        repeats=min(repeats, _QUICK_REPEATS) if "repeats" in quick else repeats,
        seed=config.seed,
        verify_s=float(options["verify_s"]),
        tolerance=float(options["tolerance"]),
    )


def _levels(options: Mapping[str, Any], key: str, quick: bool, most: float) -> list[float]:
    given = [float(value) for value in options[key]]
    ordered = sorted(given, reverse=key == "rates")
    if not given or given != ordered or len(set(given)) < len(given):
        way = "descending" if key == "rates" else "ascending"
        raise ConfigError.of(f"bench.{key}", given, f"must be levels, {way}: the mildest first")
    if min(given) < 0 or max(given) > most or (key == "rates" and min(given) == 0):
        raise ConfigError.of(f"bench.{key}", given, f"must be in (0, {most:g}]")
    return given if not quick or len(given) < 2 else [given[0], given[-1]]


def _file(config: Config, options: Mapping[str, Any]) -> Path:
    given = str(options["samples"])
    return Path(given).absolute() if given else Path(str(config.run.dir)) / "samples.csv"


def _analyse(found: dict[str, list[dict[str, Any]]], name: str, study: Study) -> None:
    made = tables(study)
    moves = distinct_best(made["best"])
    found["gains"].append({"model": name, "cuts": len(study.cuts), "best_cuts": moves,
                           **made.pop("gains")})  # fmt: skip
    for table, rows in made.items():
        found[table] += [{"model": name, **row} for row in rows]


def _made(name: str, raw: Sequence[RawSample], sweep: ConditionSweep) -> list[dict[str, Any]]:
    """Return what became of the rates and loads that were asked for."""
    rows = []
    for level, rate in enumerate(sweep.rates):
        got = [1e6 * one.mbit_s / rate for one in raw if int(one.condition[0]) == level]
        got = [share for share in got if share == share]
        if got:
            good = sum(abs(share - 1) <= _RATE_OFF for share in got) / len(got)
            rows.append({"model": name, "factor": f"network {rate / 1e6:g} Mbit/s",
                         "achieved": median(got), "within": good})  # fmt: skip
    for end, digit in (("edge", 4), ("cloud", 1)):
        for level, share in enumerate(sweep.cpu):
            took = [getattr(one, f"{end}_cpu") for one in raw if int(one.condition[digit]) == level]
            if took:
                good = sum(abs(one - share) <= sweep.tolerance for one in took) / len(took)
                rows.append({"model": name, "factor": f"{end} CPU {share:.0%}",
                             "achieved": median(took), "within": good})  # fmt: skip
    verified = sum(one.verified for one in raw) / max(1, len(raw))
    return [*rows, {"model": name, "factor": "all loads", "achieved": None, "within": verified}]


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what requests take with each policy, by model."""
    rows = figures["gains"]
    names = {"initial": "best at first", "static": "best that stays", "oracle": "best of each"}
    return Chart(
        f"Requests over {rows[0]['conditions']} conditions",
        "model",
        "milliseconds, mean",
        [row["model"] for row in rows],
        {told: [1e3 * row[f"{key}_s"] for row in rows] for key, told in names.items()},
    )
