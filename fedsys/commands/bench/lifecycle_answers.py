"""What requests tell of a life's chain and portfolio: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from fedsys.commands.bench.lifecycle_load import TimedAnswer
from fedsys.commands.bench.lifecycle_stages import LifeDecision
from fedsys.pruning.measuring import quantile

POINTS = 300
"""Requests of the picture at most, evenly spaced."""

_TOLD = {
    "lost": "is lost", "returned": "is back", "leaves": "is left out", "stays": "stays",
    "prepares": "another route is prepared", "switched": "another route answers",
    "applied": "requests go on by another route", "not_built": "a route could not be built",
    "nobody": "nobody is left",
}  # fmt: skip


@dataclass(frozen=True)
class LoadPhase:
    """A time in which the conditions of the chain are the same.

    Attributes:
        what: Which.
        began_s: By `time.time`; if a host dies in it, when it did.
        ended_s: Likewise.
        rate: Requests per second.
        expected_ms: What the chain expected of a request at the end of it; None: nothing.
        killed: Host that died; empty for none.
        route: What requests took at the end of it.
        why: Why that was not changed, as the chain said.
    """

    what: str
    began_s: float
    ended_s: float
    rate: float
    expected_ms: float | None = None
    killed: str = ""
    route: str = ""
    why: str = ""


def phase_rows(
    phases: Sequence[LoadPhase], answers: Sequence[TimedAnswer], planned_ms: float
) -> list[dict[str, Any]]:
    """Return for each phase what requests took, beside what was expected of them.

    Args:
        phases: In order.
        answers: All requests.
        planned_ms: What the plan of the chain said before anything was measured.
    """
    rows = []
    for number, phase in enumerate(phases):
        own = [one for one in answers if phase.began_s <= one.at_s < phase.ended_s]
        good = [one for one in own if not one.error]
        took = [one.ms for one in good]
        rows.append({
            "phase": phase.what,
            "began_s": phase.began_s - phases[0].began_s,
            "requests_per_s": phase.rate,
            "planned_ms": planned_ms if number == 0 else None,
            "expected_ms": phase.expected_ms,
            "p50_ms": median(took) if took else None,
            "p95_ms": quantile(took, 0.95) if took else None,
            "answers": len(good),
            "failed": len(own) - len(good),
            "cuts": good[-1].cuts if good else "",
            "technique": good[-1].technique if good else "",
        })  # fmt: skip
    return rows


def chain_figures(
    phases: Sequence[LoadPhase], answers: Sequence[TimedAnswer], told: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what became of all requests, and of the failure: the gap, expected and measured.

    There is a gap where requests had to go another way at once: where the host was needed.
    """
    failed = [one for one in answers if one.error]
    return {
        "requests": len(answers),
        "failed": len(failed),
        "first_error": failed[0].error if failed else "",
        **_gap(phases, answers, told),
    }


def _gap(
    phases: Sequence[LoadPhase], answers: Sequence[TimedAnswer], told: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    death = next((phase for phase in phases if phase.killed), None)
    if death is None:
        return {"gap_ms": None, "predicted_gap_ms": None, "silence_ms": None}
    ends = sorted(one.ended_s for one in answers if not one.error)
    around = [
        one.ended_s for one in answers
        if not one.error and one.technique != "none" and one.ended_s >= death.began_s
    ]  # fmt: skip
    before = [end for end in ends if end < death.began_s]
    heard = [*before[-1:], *(end for end in ends if death.began_s <= end <= death.ended_s)]
    found = _failover(told)
    return {
        "gap_ms": 1e3 * (min(around) - death.began_s) if around and found else None,
        "predicted_gap_ms": _chosen(found).get("downtime_ms") if found else None,
        "silence_ms": 1e3 * max((b - a for a, b in pairwise(heard)), default=0.0),
        "detect_ms": 1e3 * (found["time_s"] - death.began_s) if found else None,
        "decide_ms": found["decide_ms"] if found else None,
    }


def _failover(told: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((one for one in told if one["event"] == "failover"), None)


def _chosen(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the candidate that a failover went by."""
    return next((one for one in found["candidates"] if one["route"] == found["route"]), {})


def thinned(answers: Sequence[TimedAnswer], since_s: float) -> list[dict[str, Any]]:
    """Return at most `POINTS` requests that were answered, as points of time."""
    good = [one for one in answers if not one.error]
    step = max(1, -(-len(good) // POINTS))
    return [
        {"at_s": one.at_s - since_s, "ms": one.ms, "technique": one.technique, "cuts": one.cuts}
        for one in good[::step]
    ]


# --------------------------------------------------------------------------------------------------
# Decisions


def switch_decisions(
    status: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], goal_ms: float
) -> Iterator[LifeDecision]:
    """Yield which variants answered while load rose, and why.

    Args:
        status: Of the endpoint, at the end.
        rows: What clients heard, calm and under load.
        goal_ms: The objective.
    """
    goal = f"95 of 100 requests within {goal_ms:g} ms are asked for"
    for one in status["records"]:
        what = f"{one['before']} → {one['after']}"
        if one.get("error"):
            yield LifeDecision("switch", "load rises", "portfolio", f"{what} failed", one["error"])
            continue
        yield LifeDecision(
            "switch", "load rises", "portfolio", what, f"{one['reason']}; {goal}", "p95, ms",
            one["predicted_p95_ms"], one["p95_after_ms"],
        )  # fmt: skip
    name = status["variant"]
    yield LifeDecision(
        "switch", rows[-1]["phase"], "portfolio", f"{name} answers", f"{status['reason']}; {goal}",
        "p95, ms", status["predicted_p95_ms"].get(name), rows[-1]["p95_ms"],
    )  # fmt: skip


def chain_decisions(
    plan: Mapping[str, Any],
    told: Mapping[str, Sequence[Mapping[str, Any]]],
    phases: Sequence[LoadPhase],
    answers: Sequence[TimedAnswer],
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[LifeDecision]:
    """Yield what was decided about the chain, with what requests then took.

    Args:
        plan: How it was divided at first, as ``fedsys partition`` says.
        told: What the endpoint said: ``move`` and ``recovery``.
        phases: In order.
        answers: All requests.
        rows: Of `phase_rows`.
    """
    label = "/".join(map(str, plan["cuts"]))
    so = [one.ms for one in answers if one.cuts == label and one.at_s < phases[0].ended_s]
    yield LifeDecision(
        "chain", "before", "chain", plan["chain"], plan["why"], "request, ms",
        rows[0]["planned_ms"], median(so) if so else None,
    )  # fmt: skip
    yield from _kept(phases, rows)
    events = sorted(
        [*told.get("move", ()), *told.get("recovery", ())], key=lambda event: event["time_s"]
    )
    ends = [*(event["time_s"] for event in events[1:]), phases[-1].ended_s]
    for event, end_s in zip(events, ends, strict=False):
        place = _phase_at(phases, event["time_s"])
        since = [one for one in answers if event["time_s"] <= one.at_s < end_s and not one.error]
        took = median(one.ms for one in since) if since else None
        yield from _event(event, place, took, phases, answers)


def _kept(phases: Sequence[LoadPhase], rows: Sequence[Mapping[str, Any]]) -> Iterator[LifeDecision]:
    """Yield what answered at the end of each phase, and why it was left so."""
    for phase, row in zip(phases, rows, strict=True):
        if phase.route:
            yield LifeDecision(
                "chain", f"{phase.what}, in the end", "chain", f"{phase.route} answers",
                phase.why, "request, ms", phase.expected_ms, row["p50_ms"],
            )  # fmt: skip


def _event(
    event: Mapping[str, Any], place: str, took: float | None, phases: Sequence[LoadPhase],
    answers: Sequence[TimedAnswer],
) -> Iterator[LifeDecision]:  # fmt: skip
    if "event" not in event:
        yield _move(event, place, took)
        return
    what, host = event["event"], event.get("host") or "chain"
    if what == "failover":
        gap = _gap(phases, answers, [event])
        text = f"{event['technique']} {event['route']} stands in"
        yield LifeDecision(
            "chain", place, host, text, event["reason"], "request, ms", event["predicted_ms"], took
        )
        yield LifeDecision(
            "chain", place, host, f"requests wait for {event['technique']} {event['route']}",
            f"{event['replayed']} were under way", "gap, ms", gap["predicted_gap_ms"],
            gap["gap_ms"],
        )  # fmt: skip
    elif what == "proved":
        yield LifeDecision(
            "chain", place, "chain", f"{event['route']} is proved", "requests of clients by it",
            "request, ms", event["predicted_ms"], event["measured_ms"],
        )  # fmt: skip
    else:
        more = event.get("why") or event.get("error") or event.get("reason") or ""
        route = f": {event['route']}" if event.get("route") else ""
        yield LifeDecision("chain", place, host, f"{_TOLD.get(what, what)}{route}", str(more))


def _move(event: Mapping[str, Any], place: str, took: float | None) -> LifeDecision:
    cuts = "/".join(map(str, event.get("cuts", ())))
    if "error" in event:
        return LifeDecision("chain", place, "chain", f"cuts {cuts} cannot be", str(event["error"]))
    return LifeDecision(
        "chain", place, "chain", f"cuts become {cuts}",
        f"{event['reason']}; {event['blocked_ms']:.3g} ms without service", "request, ms",
        event.get("best_ms"), took,
    )  # fmt: skip


def _phase_at(phases: Sequence[LoadPhase], at_s: float) -> str:
    """Return the phase of a moment, and how long after its beginning that was."""
    before = [phase for phase in phases if phase.began_s <= at_s]
    if not before:
        return "before"
    return f"{before[-1].what}, {at_s - before[-1].began_s:.1f} s"
