"""What happens when a host of a chain fails, over hosts, faults and objectives.

Each event begins when all hosts answer and what is to stand ready does; then a fault strikes under
constant load. The gap is from the fault to the first answer that was made after requests had been
sent another way; its parts are detection, telling, decision, sending, and that answer. The oracle
measures every candidate of the decision afterwards, and chooses among them by the same objective.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedsys.commands.bench import Chart
from fedsys.commands.bench.failure_chain import (
    ConstantLoad,
    HostProcess,
    host_processes,
    opened_chain,
    seconds_of,
)
from fedsys.commands.own_chain import made_model
from fedsys.commands.serve import SWITCH_S
from fedsys.config import Config
from fedsys.config.serving import WeightsConfig
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.chain import ChainEngine
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective, choose
from fedsys.transport.security import new_token

FAULTS = ("kill", "pause", "cut", "slow")
_SETTLE_S, _QUIET_S, _PATIENCE_S = 1.0, 0.5, 60.0
_VERDICT_S = 10.0  # for a host that was killed to be noticed
_IMAGES = 16
GOAL_MS = 175.0
"""FailLite's mean time to recovery (Guo et al., 2025), on other machines."""

Event = Mapping[str, Any]


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Let hosts fail, and look.

    Args:
        config: ``hosts``, ``partition``, ``serving``, and what a model is made of where no
            ``portfolio`` is named.
        options: See ``conf/bench/failure.yaml``.

    Returns:
        ``events``, medians by fault as ``faults``, ``oracle_agreement``, ``regret``, ``lost``,
        ``twice``, ``replayed``, and the goals.

    Raises:
        FedsysError: No model can be made, or a chain does not come to rest.
    """
    faults = [str(fault) for fault in options["faults"]]
    if not faults or not set(faults) <= set(FAULTS):
        rule = f"must name at least one of {', '.join(FAULTS)}"
        raise ConfigError.of("bench.faults", faults, rule)
    quick = bool(options["quick"])
    if config.portfolio is None:
        config = made_model(config, ["+experiment=chain_of_three"])
    portfolio, token = Portfolio.load(Path(str(config.portfolio))), new_token()
    objectives = dict(list(options["objectives"].items())[: 1 if quick else None])
    repeats, faults = (1, faults[:2]) if quick else (int(options["repeats"]), faults)
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    rows: list[dict[str, Any]] = []
    with host_processes(config, token) as (own, hosts):
        for name, wishes in objectives.items():
            told: list[Event] = []
            asked = _asked(own, wishes)
            with opened_chain(asked, portfolio, told.append) as engine:
                for turn in range(repeats):
                    for fault in faults:
                        for host in hosts:
                            _say(f"{name}, {fault} {host.name}, {turn + 1} of {repeats}")
                            row = _event(engine, host, fault, told, asked, options)
                            rows.append({"objective": name, **row})
    return _figures(rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _asked(config: Config, wishes: Mapping[str, Any]) -> Config:
    weights = {key: float(value) for key, value in wishes.items() if key != "techniques"}
    objective = replace(config.serving.objective, weights=WeightsConfig(**weights))
    if "techniques" in wishes:
        objective = replace(objective, techniques=tuple(wishes["techniques"]))
    return replace(config, serving=replace(config.serving, objective=objective))


def _at_rest(engine: ChainEngine) -> None:
    """Wait until all hosts answer, the first route does, and nothing is built any more."""
    until, quiet, seen = time.monotonic() + _PATIENCE_S, time.monotonic(), None
    while time.monotonic() < until:
        status = engine.status()
        now = status["variant"], status["hosts_lost"], tuple(status["in_memory"])
        alone = len(status["in_memory"]) < 2  # nothing stands ready yet
        if now != seen or alone or status["hosts_lost"] or status["variant"] != engine.home:
            quiet, seen = time.monotonic(), now
        if time.monotonic() - quiet > _SETTLE_S:
            return
        time.sleep(0.05)
    raise RuntimeFailure(f"the chain did not come to rest: {engine.status()}")


def _event(
    engine: ChainEngine,
    host: HostProcess,
    fault: str,
    told: list[Event],
    config: Config,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    _at_rest(engine)
    images = torch.randn(_IMAGES, *engine.card.input_shape)
    load = ConstantLoad(engine, images, float(options["requests_per_s"]))
    time.sleep(_QUIET_S)
    told.clear()
    struck, struck_at = time.monotonic(), time.time()
    seconds = float(options["pause_s"])
    host.strike(fault, seconds, float(options["slow"]))
    until = time.monotonic() + max(seconds, _VERDICT_S if fault == "kill" else 0.0)
    while (found := _failover(told)) is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(_SETTLE_S)
    oracle: dict[str, Any] = {}
    if found is not None and fault == "kill" and int(options["oracle"]):
        oracle = _oracle(engine, found, images[:1], config, int(options["oracle"]))
    host.mend(fault)
    ledger = load.close()
    after = sorted(at for at, _ in ledger.answers.values() if at >= struck)
    before = [at for at, _ in ledger.answers.values() if at < struck]
    silence = max((b - a for a, b in zip([max(before), *after], after, strict=False)), default=0.0)
    lost = ledger.issued - len(ledger.answers)
    row = {"host": host.name, "fault": fault, "silence_ms": 1e3 * silence, "lost": lost}
    row |= {"twice": ledger.twice, "why": next(iter(ledger.failed.values()), "")}
    return row | _parts(found, told, struck_at, struck, after, engine) | oracle


def _failover(told: Sequence[Event]) -> Event | None:
    return next((one for one in list(told) if one["event"] == "failover"), None)


def _parts(
    found: Event | None,
    told: Sequence[Event],
    struck_at: float,
    struck: float,
    after: Sequence[float],
    engine: ChainEngine,
) -> dict[str, Any]:
    """Return what the gap was made of, in milliseconds; nothing where none failed over."""
    if found is None:
        return {"technique": "none"}
    done = struck + found["time_s"] - struck_at
    next_at = next((at for at in after if at >= done), None)
    began_ms = 1e3 * (found["time_s"] - struck_at) - found["decide_ms"] - found["apply_ms"]
    whole = engine.took_s.get(engine.home)
    measured = engine.took_s.get(found["route"])
    return {
        "technique": found["technique"],
        "route": found["route"],
        "ready": found["ready"],
        "detect_ms": began_ms - found["tell_ms"],
        "tell_ms": found["tell_ms"],
        "decide_ms": found["decide_ms"],
        "apply_ms": found["apply_ms"],
        "answer_ms": None if next_at is None else 1e3 * (next_at - done),
        "gap_ms": None if next_at is None else 1e3 * (next_at - struck),
        "replayed": sum(one.get("replayed", 0) for one in told),
        "accuracy_after": found["accuracy"],
        "predicted_ms": found["predicted_ms"],
        "measured_ms": None if measured is None else 1e3 * measured,
        "before_ms": None if whole is None else 1e3 * whole,
    }


def _oracle(
    engine: ChainEngine, found: Event, image: Tensor, config: Config, count: int
) -> dict[str, Any]:
    """Measure all candidates of a decision, choose among them, and compare."""
    objective = RecoveryObjective.of(config.serving.objective)
    measured = []
    for one in found["candidates"]:
        took = seconds_of(engine, one["route"], image, count)
        if took is not None:
            measured.append(RecoveryCandidate(
                one["technique"], one["route"], 1e3 * took, one["accuracy"], one["downtime_ms"]
            ))  # fmt: skip
    if not measured:
        return {}
    best = choose(measured, objective)
    scores = {each.candidate.path: each.score for each in best.candidates}
    chosen = found["decided"]
    regret = scores[best.choice.path] - scores.get(chosen, 0.0)
    return {"oracle": best.choice.path, "agrees": best.choice.path == chosen, "regret": regret}


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [row for row in rows if "agrees" in row]
    kills = [row["gap_ms"] for row in rows if row["fault"] == "kill" and row.get("gap_ms")]
    seen = [row["detect_ms"] for row in rows if row["fault"] == "kill" and "detect_ms" in row]
    decides = sorted(row["decide_ms"] for row in rows if "decide_ms" in row)
    off = [
        abs(row["predicted_ms"] / row["measured_ms"] - 1)
        for row in rows if row.get("measured_ms") and row.get("predicted_ms")
    ]  # fmt: skip
    lost, twice = sum(row["lost"] for row in rows), sum(row["twice"] for row in rows)
    return {
        "gap_ms_median": median(kills) if kills else None,
        "detect_ms_median": median(seen) if seen else None,
        "decide_ms_p99": decides[int(0.99 * (len(decides) - 1))] if decides else None,
        "prediction_error_mean": sum(off) / len(off) if off else None,
        "oracle_agreement": sum(r["agrees"] for r in judged) / len(judged) if judged else None,
        "regret": max((row["regret"] for row in judged), default=None),
        "lost": lost,
        "twice": twice,
        "replayed": sum(row.get("replayed", 0) for row in rows),
        "goal_gap": bool(kills) and median(kills) < GOAL_MS,
        "goal_requests": lost == twice == 0,
        "faults": _by_fault(rows),
        "events": rows,
    }


def _by_fault(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for fault in dict.fromkeys(row["fault"] for row in rows):
        own = [row for row in rows if row["fault"] == fault]
        medians = {}
        for key in ("silence_ms", "detect_ms", "decide_ms", "apply_ms", "answer_ms", "gap_ms"):
            values = [row[key] for row in own if row.get(key) is not None]
            medians[key] = median(values) if values else None
        told = sum(row["technique"] != "none" for row in own)
        lost = sum(row["lost"] for row in own)
        found.append({"fault": fault, "events": len(own), "told": told, **medians, "lost": lost})
    return found


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what the gap is made of, by fault."""
    rows = figures["faults"]
    keys = ("detect_ms", "decide_ms", "apply_ms", "answer_ms")
    return Chart(
        "A host fails: what the gap is made of (medians)",
        "fault",
        "ms",
        [row["fault"] for row in rows],
        {key: [row[key] or 0.0 for row in rows] for key in keys},
    )
