"""What events of `fedsys bench failure` come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

GOAL_MS = 175.0
"""FailLite's mean time to recovery (Guo et al., 2025), on other machines."""

_MEDIANS = (
    *("silence_ms", "exit_ms", "detect_ms", "tell_ms", "decide_ms", "apply_ms"),
    *("answer_ms", "gap_ms"),
)


def figures_of(
    rows: Sequence[Mapping[str, Any]], about: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the figures of all events, with those of each chain.

    Goals are met by what happened only: not where nothing did, and the gap not where requests had
    no answer after a kill.

    Args:
        rows: The events.
        about: What else was seen, by chain.
    """
    killed = [row for row in rows if row["fault"] == "kill"]
    kills = [row for row in killed if row.get("gap_ms") is not None]
    judged = [row for row in rows if "agrees" in row]
    pairs = [r for r in rows if r.get("measured_ms") and r.get("predicted_ms")]
    off = [abs(r["predicted_ms"] / r["measured_ms"] - 1) for r in pairs]
    lost, twice = sum(row["lost"] for row in rows), sum(row["twice"] for row in rows)
    gap = median(row["gap_ms"] for row in kills) if kills else None
    slowest = max(_known(about, "decide_ms_p99"), default=None)
    decided, errors = _known(about, "decide_ms_median"), _known(about, "latency_error")
    cells = [one for one in about if one["grid"]]
    return {
        "gap_ms_median": gap,
        "detect_ms_median": median(row["detect_ms"] for row in kills) if kills else None,
        "seen_ms_median": _seen_ms(kills),
        "decisions": sum(one["decisions"] for one in about),
        "decide_ms_median": median(decided) if decided else None,
        "decide_ms_p99": slowest,
        "prediction_error_mean": fmean(off) if off else None,
        "candidates_error_mean": fmean(errors) if errors else None,
        "oracle_agreement": fmean(row["agrees"] for row in judged) if judged else None,
        "regret": max((row["regret"] for row in judged), default=None),
        "grid_agreement": fmean(one["grid_agreement"] for one in cells) if cells else None,
        "grid_regret_max": max((one["grid_regret_max"] or 0.0 for one in cells), default=None),
        "lost": lost,
        "twice": twice,
        "replayed": sum(row.get("replayed", 0) for row in rows),
        "left_out": sum(one["left_out"] for one in about),
        "goal_gap": gap is not None and gap < GOAL_MS and len(kills) == len(killed),
        "goal_requests": bool(rows) and lost == twice == 0,
        "goal_decision": slowest is not None and slowest < 1.0,
        "faults": list(_by_fault(rows)),
        "chains": [{k: v for k, v in one.items() if k != "estimates"} for one in about],
        "estimates": [row for one in about for row in _estimates(one)],
        "events": list(rows),
    }


def _known(about: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return a figure of the chains that have it."""
    return [one[key] for one in about if one[key] is not None]


def _seen_ms(kills: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how long after the end of a process its loss was known: median, at least 0."""
    seen = [max(0.0, r["detect_ms"] - r["exit_ms"]) for r in kills if "exit_ms" in r]
    return median(seen) if seen else None


def _by_fault(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for fault in dict.fromkeys(row["fault"] for row in rows):
        own = [row for row in rows if row["fault"] == fault]
        medians = {}
        for key in _MEDIANS:
            values = [row[key] for row in own if row.get(key) is not None]
            medians[key] = median(values) if values else None
        told = sum(row["technique"] != "none" for row in own)
        lost = sum(row["lost"] for row in own)
        found.append({"fault": fault, "events": len(own), "told": told, **medians, "lost": lost})
    return found


def _estimates(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the errors of estimators on what they were not given."""
    return [
        {"chain": about["chain"], "of": kind, **dict(errors)}
        for kind, errors in about["estimates"].items()
    ]
