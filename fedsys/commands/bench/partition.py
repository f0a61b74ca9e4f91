"""Chains of host processes: planning, requests as predicted, moves, throughput, and adaptation.

Each part is in a module of its own: `partition_planner`, `partition_requests`, `partition_moves`,
`partition_trace`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fedsys.commands.bench import Chart
from fedsys.commands.bench.partition_hosts import host_processes
from fedsys.commands.bench.partition_moves import moves_rows
from fedsys.commands.bench.partition_planner import planner_figures
from fedsys.commands.bench.partition_requests import (
    device_and,
    errors,
    latency_rows,
    overhead_figures,
    throughput_figures,
)
from fedsys.commands.bench.partition_trace import trace_figures
from fedsys.commands.serve import SWITCH_S
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.planning.costs import Messaging
from fedsys.runs import plots

PARTS = ("planner", "latency", "overhead", "throughput", "moves", "trace")
_QUICK = {
    "repeats": 5, "exhaustive": 40, "seconds": 1, "moves": 20, "slow_moves": 2, "trace_s": 4,
    "trace_mbit_s": [50, 4, 50],
}  # fmt: skip
_QUICK_MODELS = ("lenet", "alexnet")


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the parts that are asked for.

    Args:
        config: Its ``seed`` draws problems; pictures go to ``run.dir``.
        options: See ``conf/bench/partition.yaml``.

    Returns:
        Of ``planner``: ``plan_two_ms``, ``plan_four_ms`` (100 units each), ``planner_equal`` of
        ``planner_compared``. Of ``latency``: ``requests``, a row for each model, network and
        partition; ``prediction_error_median``, ``…_p90``, ``same_bits``, ``off_max``. Of
        ``overhead``: ``data_plane_us`` for 102 kB at the cut. Of ``throughput``:
        ``throughput_ratio``. Of ``moves``: ``ways``, a row for each. Of ``trace``: ``contenders``,
        ``mean_to_static``, ``p95_to_static``, ``share_of_oracle_gain``, ``moves_per_change``,
        ``undone``, and ``points``, each request of the one that moves.

    Raises:
        ConfigError: A part has another name.
        FedsysError: A host does not start, or fails.
    """
    options = {**options, **(_QUICK if options["quick"] else {})}
    parts = list(options["parts"])
    if not parts or not set(parts) <= set(PARTS):
        raise ConfigError.of("bench.parts", parts, f"must name some of {', '.join(PARTS)}")
    if options["quick"]:
        options["models"] = [m for m in options["models"] if m in _QUICK_MODELS]
    torch.set_num_threads(1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        return _figures(config, options, parts)
    finally:
        sys.setswitchinterval(before)


def _figures(config: Config, options: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"quick": bool(options["quick"])}
    messaging = Messaging()
    if "planner" in parts:
        found |= planner_figures(int(options["exhaustive"]), int(options["repeats"]), config.seed)
    if {"latency", "overhead", "trace"} & set(parts):
        with host_processes(("edge", "cloud")) as processes, device_and(processes) as hosts:
            added, messaging = overhead_figures(hosts, 4 * int(options["repeats"]))
            found |= added
            if "latency" in parts:
                rows: list[dict[str, Any]] = []
                for name in options["models"]:
                    _say(f"requests of {name}")
                    rows += latency_rows(hosts, str(name), options, messaging)
                found |= {"requests": rows, **errors(rows)}
    if "throughput" in parts:
        _say("throughput")
        name, side = str(options["model"]), int(options["side"])
        found |= throughput_figures(name, side, float(options["seconds"]))
    if "moves" in parts:
        _say("moves")
        found["ways"] = []
        for row in moves_rows(options):
            found["ways"].append(row)
            _say(json.dumps(row))  # it takes long, and may be ended
    if "trace" in parts:
        _say("trace")
        found |= trace_figures(options, messaging)
        draw_trace(found["points"], Path(str(config.run.dir)) / "plots" / "trace.png")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def draw_trace(points: list[dict[str, Any]], path: Path) -> Path:
    """Draw the latency of requests over time, in colours of their cuts, above the link's rate."""

    def paint(axes: Any) -> None:
        cuts = list(dict.fromkeys(point["cuts"] for point in points))
        for number, cut in enumerate(cuts):
            own = [point for point in points if point["cuts"] == cut]
            color = plots.COLORS[number % len(plots.COLORS)]
            axes.plot([p["at_s"] for p in own], [p["ms"] for p in own], ".", color=color,
                      label=f"a request, cut at {cut}")  # fmt: skip
        for one, other in pairwise(points):
            if one["cuts"] != other["cuts"]:
                axes.axvline(other["at_s"], color="gray", linestyle=":")
        rate = axes.twinx()
        rate.step([p["at_s"] for p in points], [p["mbit_s"] for p in points], where="post",
                  color="gray", label="the link")  # fmt: skip
        rate.set(ylabel="Mbit/s", yscale="log")
        axes.set(title="Cuts that follow the link", xlabel="seconds", ylabel="milliseconds")
        axes.set_yscale("log")
        axes.figure.legend(loc="outside lower center", ncols=3)

    return plots.draw(path, paint)


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return requests as predicted and as measured, or what contenders make of the trace."""
    if rows := figures.get("requests"):
        labels = [f"{row['model']} {row['mbit_s']} Mbit/s, {row['cuts']}" for row in rows]
        series = {key: [row[f"{key}_ms"] for row in rows] for key in ("predicted", "measured")}
        return Chart("Requests", "model, link, cuts", "milliseconds", labels, series, log=True)
    rows = figures.get("contenders", ())
    return Chart(
        "A link that changes", "contender", "milliseconds", [row["contender"] for row in rows],
        {key: [row[f"{key}_ms"] for row in rows] for key in ("mean", "p95")},
    )  # fmt: skip
