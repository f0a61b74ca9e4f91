"""Changing variants: what a switch costs, in four ways, and what switching is good for.

*Cost*: under a constant load of requests the variant changes again and again, in a process of its
own for each way (`fedsys.commands.bench.switch_load`): load beside the running one (ours),
stop-load-start, all variants resident, and a slimmable network. Every answer is compared, to the
bit, with what the variant that it names gives.

*Use*: on held-out traces of load, memory budgets and busy neighbours, played in real time, the
portfolio that switches against each of its variants alone, and against an oracle that takes the
best of them in each segment. `fedsys.commands.bench.switch_trace` says how the traces are made; on
one of them each variant is the right one for as many requests, on the other nearly all are for the
small.

*Over HTTP*: what a request takes by one connection that is kept, beside what the engine takes for
it (`fedsys.commands.bench.switch_http`).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedsys.commands.bench import Chart, switch_http
from fedsys.commands.bench.switch_load import WAYS, Case, measure
from fedsys.commands.bench.switch_portfolio import make_portfolio
from fedsys.commands.bench.switch_trace import TRACES, Played, Segment, make_trace, play
from fedsys.commands.serve import SWITCH_S
from fedsys.config import Config
from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.switch.policy import profile_of

_OURS = "beside"
REQUESTS = (
    "requests_per_s", "requests", "answered", "failed", "lost", "wrong",
    "wait_ms_p99", "wait_ms_max", "gap_quiet_ms", "gap_ms",
)  # fmt: skip
"""Figures of the requests: how long they waited for their variant, and the longest time without an
answer, before the switches and during them."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure both.

    Args:
        config: ``portfolio``, or data, model and pruning that make one; ``serving``.
        options: See ``conf/bench/switch.yaml``.

    Returns:
        ``ways``: what a switch takes in each way; ``requests``: what became of them meanwhile;
        ``ratios`` of the others to ours; ``traces`` with the best single variant and the oracle;
        ``contenders`` on them, with the share of requests that each is the right one for;
        ``segments`` with what became of the requests of the one that switches; ``http``: requests
        over HTTP in either encoding, while nothing changes and while variants do; and the goals.

    Raises:
        FedsysError: No portfolio can be made or read, or a process failed.
    """
    traces = list(options["traces"])
    if not traces or not set(traces) <= set(TRACES):
        rule = f"must name at least one of {', '.join(TRACES)}"
        raise ConfigError.of("bench.traces", traces, rule)
    for name in ("turns", "http_switches"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ConfigError.of(f"bench.{name}", options[name], "must be an integer of at least 1")
    if config.portfolio is None:
        folder = Path(str(config.run.dir)) / "portfolio"
        portfolio = make_portfolio(config, folder, int(options["epochs"]), _say)
    else:
        portfolio = Portfolio.load(Path(config.portfolio))
    if len(portfolio.variants) < 2:
        raise ConfigError.of(
            "portfolio", portfolio.folder, "must hold at least two variants to change between",
            "lower pruning.sparsity, or name another one",
        )  # fmt: skip
    threads = config.serving.threads or 1
    torch.set_num_threads(threads)
    ways = _ways(portfolio, options, threads)
    _say(f"{options['http_switches']} switches while requests come over HTTP")
    http = switch_http.measure(portfolio, options, threads)
    tables, objective = _traces(portfolio, config, options, threads)
    return _goals(ways, tables["traces"]) | {
        "variants": len(portfolio.variants),
        "threads": threads,
        "objective_p95_ms": objective,
        "trace_seed": int(options["trace_seed"]),
        "ways": [{k: v for k, v in row.items() if k not in REQUESTS} for row in ways],
        "requests": [{k: row[k] for k in ("way", *REQUESTS)} for row in ways],
        "ratios": _ratios(ways),
        "http": http,
        "goal_http": switch_http.is_prompt(http),
        **tables,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ways(portfolio: Portfolio, options: Mapping[str, Any], threads: int) -> list[dict[str, Any]]:
    slowest = max(profile_of(v, threads).latency[0].p50_ms for v in portfolio.variants)
    rate = float(options["load"]) * 1e3 / slowest
    rows = []
    chosen = list(options["ways"])
    if _OURS not in chosen or not set(chosen) <= set(WAYS):
        rule = f"must name {_OURS}, and may name {', '.join(WAYS[1:])}"
        raise ConfigError.of("bench.ways", chosen, rule)
    for way in chosen:
        count = int(options["switches"] if way == _OURS else options["other_switches"])
        _say(f"{count} switches {way} at {rate:.0f} requests per second")
        quiet = float(options["quiet_seconds"])
        case = Case(str(portfolio.folder.absolute()), way, count, rate, threads, quiet)
        rows.append({"way": way, "requests_per_s": rate, **measure(case)})
    return rows


def _ratios(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = next(row for row in ways if row["way"] == _OURS)
    return [
        {
            "way": row["way"],
            "switch_ms_to_ours": row["switch_ms"] / ours["switch_ms"],
            "blocked_ms_to_ours": row["blocked_ms"] / max(ours["blocked_ms"], 1e-6),
            "memory_to_ours": row["memory_after_mb"] / max(ours["memory_after_mb"], 1e-6),
        }
        for row in ways
        if row is not ours
    ]


def _traces(
    portfolio: Portfolio, config: Config, options: Mapping[str, Any], threads: int
) -> tuple[dict[str, list[dict[str, Any]]], float]:
    profiles = [profile_of(v, threads) for v in portfolio.variants]
    slowest = max(profiles, key=lambda v: v.latency[0].p95_ms)
    given = options["objective_p95_ms"]
    p95_ms = float(given) if given else float(options["objective"]) * slowest.latency[0].p95_ms
    goal = dataclasses.replace(config.serving.objective, p95_ms=p95_ms, memory_bytes=None)
    serving = dataclasses.replace(config.serving, objective=goal, threads=threads)
    seed, chosen, turns = int(options["trace_seed"]), list(options["traces"]), int(options["turns"])
    tables: dict[str, list[dict[str, Any]]] = {"traces": [], "contenders": [], "segments": []}
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        for kind in chosen:
            count, seconds = int(options["segments"]), float(options["segment_seconds"])
            trace = make_trace(kind, profiles, count, seconds, seed)
            played = _in_turns(portfolio, serving, kind, trace, seed, turns)
            for table, rows in _compared(kind, trace, played).items():
                tables[table] += rows
    finally:
        sys.setswitchinterval(before)
    return tables, p95_ms


def _in_turns(
    portfolio: Portfolio,
    serving: ServingConfig,
    kind: str,
    trace: Sequence[Segment],
    seed: int,
    turns: int,
) -> list[Played]:
    order = [None, *(v.name for v in portfolio.variants)]
    seconds = sum(segment.seconds for segment in trace)
    played: dict[str | None, Played] = {}
    for turn in range(turns):
        for name in order if turn % 2 == 0 else reversed(order):
            _say(f"{kind} trace, {seconds:.0f} s, turn {turn + 1}: {name or 'switching'}")
            now = play(portfolio, serving, trace, seed, variant=name)
            played[name] = played[name] + now if turn else now
    return [played[name] for name in order]


def _compared(
    kind: str, trace: Sequence[Segment], played: Sequence[Played]
) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of one trace: the first of `played` is the one that switches."""
    adaptive, *alone = played
    issued = [row["requests"] for row in adaptive.log]
    right = [max(alone, key=lambda p: p.values[number]) for number in range(len(trace))]
    best = max(alone, key=lambda p: p.figures["attainment_x_accuracy"])
    total = max(1, sum(issued))
    oracle = sum(p.values[number] for number, p in enumerate(right)) / total
    value = adaptive.figures["attainment_x_accuracy"]
    summary = {
        "trace": kind,
        "requests": total,
        "attainment_x_accuracy": value,
        "best_single": best.figures["attainment_x_accuracy"],
        "best_single_is": best.contender,
        "oracle": oracle,
        "goal": value > best.figures["attainment_x_accuracy"],
    }
    share = {p.contender: sum(n for n, r in zip(issued, right, strict=True) if r is p) / total
             for p in alone}  # fmt: skip
    contenders = [
        {"trace": kind, "contender": p.contender, **p.figures,
         "right_for": share.get(p.contender, math.nan)}
        for p in played
    ]  # fmt: skip
    segments = [
        {
            "trace": kind,
            "seconds": segment.seconds,
            "requests_per_s": segment.rate,
            "budget_mb": segment.memory_bytes / 1e6 if segment.memory_bytes else math.nan,
            "busy": segment.busy,
            "right": right[number].contender,
            "right_value": right[number].values[number] / max(1, issued[number]),
            **adaptive.log[number],
        }
        for number, segment in enumerate(trace)
    ]
    return {"traces": [summary], "contenders": contenders, "segments": segments}


def _goals(ways: list[dict[str, Any]], traces: list[dict[str, Any]]) -> dict[str, Any]:
    ours = next(row for row in ways if row["way"] == _OURS)
    return {
        "switches": ours["switches"],
        "blocked_ms_max": ours["blocked_ms_max"],
        "lost_or_mixed": ours["lost"] + ours["failed"] + ours["wrong"],
        "memory_after_to_one": ours["memory_after_mb"] / ours["memory_mb"],
        "goal_blocked": ours["blocked_ms_max"] <= 1.0,
        "goal_requests": ours["lost"] + ours["failed"] + ours["wrong"] == 0,
        "goal_memory": ours["memory_after_mb"] <= 1.1 * ours["memory_mb"],
        "goal_trace": all(row["goal"] for row in traces),
    }


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what each contender makes of the trace."""
    rows = figures["contenders"]
    return Chart(
        f"Traces with seed {figures['trace_seed']}, objective p95 "
        f"{figures['objective_p95_ms']:.3g} ms",
        "what answers",
        "share of requests",
        [f"{row['contender']}, {row['trace']}" for row in rows],
        {
            "in time": [row["attainment"] for row in rows],
            "in time x accuracy": [row["attainment_x_accuracy"] for row in rows],
        },
    )
