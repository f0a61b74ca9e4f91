"""Chains of host processes: planning, requests as predicted, moves, throughput, and adaptation.

Each part is in a module of its own: `partition_planner`, `partition_requests`, `partition_moves`,
`partition_trace`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch

from fedsys.commands.bench import Chart, given_options
from fedsys.commands.bench.partition_hosts import host_processes
from fedsys.commands.bench.partition_moves import in_order, moves_rows
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
from fedsys.errors import ConfigError, ModelError
from fedsys.planning.costs import Messaging
from fedsys.runs import plots
from fedsys.runs.folder import write_atomic

PARTS = ("planner", "latency", "overhead", "throughput", "moves", "trace")
_QUICK = {
    "repeats": 5, "exhaustive": 40, "seconds": 1, "moves": 20, "slow_moves": 2, "trace_s": 4,
    "trace_mbit_s": [50, 4, 50], "minutes": 4,
}  # fmt: skip
_QUICK_MODELS = ("lenet", "alexnet")
_SHARES = {"latency": 0.5, "moves": 0.3, "trace": 0.2}
"""Of the time, which the other parts need little of."""
SO_FAR = "so_far.json"
"""In the run folder: the figures of a benchmark that goes on, or was interrupted."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the parts that are asked for.

    Args:
        config: Its ``seed`` draws problems; pictures go to ``run.dir``.
        options: See ``conf/bench/partition.yaml``.

    Returns:
        Of ``planner``: ``plan_two_ms``, ``plan_four_ms`` (100 units each),
        ``planner_equal`` of ``planner_compared``. Of ``latency``: ``requests``, a row for
        each model, network and partition; ``prediction_error_median``, ``…_p90``,
        ``same_bits``, ``off_max``. Of ``overhead``: ``data_plane_us`` for 102 kB at the
        cut, ``entry_us`` without a cut. Of ``throughput``: ``throughput_ratio``. Of
        ``moves``: ``ways``, a row for each, ``lost_or_wrong`` of all, ``ways_in_order``. Of
        ``trace``: ``contenders``, ``mean_to_static``, ``p95_to_static``,
        ``share_of_oracle_gain``, ``moves_per_change``, ``undone``, and ``points``, each
        request of the one that moves. ``refused``: models that cannot be divided or sent, if there
        are any, and why. What there is stands in `SO_FAR` in the run folder
        meanwhile.

    Raises:
        ConfigError: A part has another name.
        FedsysError: A host does not start, or fails.
    """
    if options["quick"]:
        options = _quick(options)
    parts = list(options["parts"])
    if not parts or not set(parts) <= set(PARTS):
        raise ConfigError.of("bench.parts", parts, f"must name some of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        measured = _Parts(config, options, parts)
        measured.measure()
        return measured.found
    finally:
        sys.setswitchinterval(before)


def _quick(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with fewer of everything; those that were given stay."""
    given = given_options("partition", options)
    found = {key: value for key, value in _QUICK.items() if key not in given}
    if "models" not in given:
        found["models"] = [name for name in options["models"] if name in _QUICK_MODELS]
    return {**options, **found}


@final
class _Parts:
    """Measures parts one after the other, and keeps what there is.

    Args:
        config: Of the run.
        options: Of the benchmark.
        parts: Which.
    """

    def __init__(self, config: Config, options: Mapping[str, Any], parts: Sequence[str]) -> None:
        self._config, self._options, self._parts = config, options, parts
        self._folder = Path(str(config.run.dir))
        self._messaging = Messaging()
        self.found: dict[str, Any] = {"quick": bool(options["quick"])}

    def _most_s(self, part: str) -> float:
        """Return for how long a part may measure, about."""
        shares = sum(share for name, share in _SHARES.items() if name in self._parts)
        return 60 * float(self._options["minutes"]) * _SHARES[part] / shares

    def _keep(self, **more: Any) -> None:
        self.found |= more
        write_atomic(self._folder / SO_FAR, (json.dumps(self.found) + "\n").encode())

    def measure(self) -> None:
        """Measure all parts."""
        options, parts = self._options, self._parts
        if "planner" in parts:
            _say("planner")
            count, repeats = int(options["exhaustive"]), int(options["repeats"])
            self._keep(**planner_figures(count, repeats, self._config.seed))
        if {"latency", "overhead", "trace"} & set(parts):
            self._requests()
        if "throughput" in parts:
            _say("throughput")
            name, side = str(options["model"]), int(options["side"])
            self._keep(**throughput_figures(name, side, float(options["seconds"])))
        if "moves" in parts:
            self._moves()
        if "trace" in parts:
            _say("trace")
            most_s = self._most_s("trace")
            self._keep(**trace_figures(options, self._messaging, most_s, _say))
            draw_trace(self.found["points"], self._folder / "plots" / "trace.png")

    def _requests(self) -> None:
        options, rows, refused = self._options, list[dict[str, Any]](), dict[str, str]()
        with host_processes(("edge", "cloud")) as processes, device_and(processes) as hosts:
            _say("overhead")
            added, self._messaging = overhead_figures(hosts, 4 * int(options["repeats"]))
            self._keep(**added)
            for name in options["models"] if "latency" in self._parts else ():
                _say(f"requests of {name}")
                most_s = self._most_s("latency") / len(options["models"])
                entry_s = 1e-6 * self.found["entry_us"]
                measured = latency_rows(hosts, str(name), options, self._messaging, most_s, entry_s)
                try:
                    for row in measured:
                        rows.append(row)
                        self._keep(requests=rows, **errors(rows))
                except ModelError as error:  # the others are measured all the same
                    refused[str(name)] = str(error)
                    self._keep(refused=refused)
                    _say(f"{name}: {error}")

    def _moves(self) -> None:
        _say("moves")
        rows = list[dict[str, Any]]()
        for row in moves_rows(self._options, self._most_s("moves"), _say):
            rows.append(row)
            self._keep(ways=rows)
            _say(json.dumps(row))
        lost = sum(row["lost"] + row["wrong"] for row in rows)
        moves = sum(row["moves"] for row in rows)
        self._keep(moves=moves, lost_or_wrong=lost, ways_in_order=in_order(rows))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def draw_trace(points: list[dict[str, Any]], path: Path) -> Path:
    """Draw the latency of requests over time, in colours of their cuts, above the link's rate."""
    moves = [other["at_s"] for one, other in pairwise(points) if one["cuts"] != other["cuts"]]
    cuts = sorted({point["cuts"] for point in points}, key=lambda cut: (len(cut), cut))

    def requests(axes: Any) -> None:
        for number, cut in enumerate(cuts):
            own = [point for point in points if point["cuts"] == cut]
            color = plots.COLORS[number % len(plots.COLORS)]
            axes.plot([p["at_s"] for p in own], [p["ms"] for p in own], ".", color=color,
                      label=f"cut at {cut}")  # fmt: skip
        axes.set(title="Cuts that follow the link", ylabel="a request, ms")
        plots.log_scale(axes)
        _mark(axes, moves, "a move")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(len(cuts) + 1, 5))

    def link(axes: Any) -> None:
        axes.step([p["at_s"] for p in points], [p["mbit_s"] for p in points], where="post",
                  color="black")  # fmt: skip
        _mark(axes, moves)
        axes.set(xlabel="seconds", ylabel="the link, Mbit/s", ylim=(0, None))

    return plots.draw_panels(path, [(requests, 3.4), (link, 1.6)], 9.0)


def _mark(axes: Any, moments: Sequence[float], label: str | None = None) -> None:
    for number, moment in enumerate(moments):
        axes.axvline(moment, color="gray", linestyle=":", label=None if number else label)
    axes.yaxis.set_major_formatter("{x:g}")


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return requests as predicted and as measured, or what contenders make of the trace."""
    if rows := figures.get("requests"):
        labels = [f"{row['model']} {row['mbit_s']} Mbit/s, {row['cuts']}" for row in rows]
        series = {key: [row[f"{key}_ms"] for row in rows] for key in ("predicted", "measured")}
        return Chart("Requests", "model, link, cuts", "milliseconds", labels, series, log=True)
    if not (rows := figures.get("contenders", ())) and (ways := figures.get("ways")):
        series = {key: [row[key] for row in ways] for key in ("blocked_ms", "gap_ms")}
        labels = [row["way"] for row in ways]
        return Chart("Changes of cuts", "way", "milliseconds", labels, series, log=True)
    return Chart(
        "A link that changes", "contender", "milliseconds", [row["contender"] for row in rows],
        {key: [row[f"{key}_ms"] for row in rows] for key in ("mean", "p95")},
    )  # fmt: skip
