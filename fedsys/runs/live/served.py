"""What the live page shows of an endpoint: one JSON value, from the endpoint's own status.

The process of the page asks ``/status`` once a second, whether or not somebody looks, so that the
curves have what happened before; what does not change (the portfolio, ids of processes) it was told
at its start.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, final

import httpx

from fedsys.runs.live.snapshot import finite

EVERY_S: Final = 1.0
POINTS: Final = 600
"""Of a curve at most, the last ones: ten minutes."""

EVENTS: Final = 100
_ASK_S = 5.0
_TOLD = {
    "lost": "{host} is lost: {why}",
    "returned": "{host} is back",
    "leaves": "{host} is about to end: it is left out",
    "stays": "{host} stays",
    "nobody": "{reason}",
    "failover": "{technique} {route} stands in for {host}, {replayed} requests went on",
    "prepares": "{route} is prepared",
    "switched": "{route} answers",
    "applied": "{route} answers, {replayed} requests went on",
    "not_built": "{route} could not be built: {error}",
    "proved": "{route} is proved by requests",
}

Status = Mapping[str, Any]


@dataclass(frozen=True)
class AboutServed:
    """What does not change of an endpoint.

    Attributes:
        name: Of the model.
        portfolio: Folder of the portfolio.
        front: Its variants: ``name``, ``accuracy``, ``p50_ms``, ``p95_ms``.
        processes: Ids of hosts that were started, by name.
        objective_ms: What 95 of 100 requests are to be answered within.
    """

    name: str = "classifier"
    portfolio: str = ""
    front: Sequence[Mapping[str, Any]] = ()
    processes: Mapping[str, int] = field(default_factory=dict)
    objective_ms: float | None = None


@final
class ServedSnapshots:
    """Asks an endpoint again and again until it is closed.

    Args:
        address: Of the endpoint, as ``http://host:port``.
        about: What does not change of it.
    """

    def __init__(self, address: str, about: AboutServed) -> None:
        self._address, self._about = address, about
        self._began_s, self._rows = time.time(), deque[dict[str, Any]](maxlen=POINTS)
        self._status: Status = {}
        self._there, self._answered, self._asked_s = True, 0, 0.0
        self._client = httpx.Client(timeout=_ASK_S)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="endpoint-watch")
        self._look()
        self._thread.start()

    def take(self) -> dict[str, Any]:
        """Return the endpoint as it was a moment ago, as JSON has it."""
        shown = shown_of(self._status, self._about, self._began_s)
        status = "running" if self._there else "gone"
        heading = {"status": status, "rows": list(self._rows), "address": self._address}
        found: dict[str, Any] = finite({**shown, **heading})
        return found

    def close(self) -> None:
        """Ask no more."""
        self._end.set()
        self._thread.join(_ASK_S)
        self._client.close()

    def _watch(self) -> None:
        while not self._end.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            status = self._client.get(f"{self._address}/status").json()
        except (httpx.HTTPError, ValueError):
            self._there = False
            return
        now, answered = time.time(), sum(status.get("answers", {}).values())
        rate = (answered - self._answered) / max(1e-3, now - self._asked_s)
        self._rows.append({
            "at_s": round(now - self._began_s, 3),
            "p95_ms": p95_of(status),
            "expected_ms": expected_of(status),
            "rate": rate if self._asked_s else None,
        })  # fmt: skip
        self._status, self._there, self._answered, self._asked_s = status, True, answered, now


def p95_of(status: Status) -> float | None:
    """Return within which time 95 of 100 of the last requests were answered."""
    value = status.get("p95_ms", (status.get("signals") or {}).get("p95_ms"))
    return None if value is None else float(value)


def expected_of(status: Status) -> float | None:
    """Return what is expected of a request by who answers now, in milliseconds."""
    if estimate := status.get("estimate"):
        return float(estimate["latency_ms"])
    now_ms = (status.get("decision") or {}).get("now_ms")
    if now_ms is None:
        now_ms = (status.get("predicted_p95_ms") or {}).get(status.get("variant"))
    return None if now_ms is None else float(now_ms)


def shown_of(status: Status, about: AboutServed, began_s: float) -> dict[str, Any]:
    """Return what the page shows of a status.

    Args:
        status: Of the endpoint.
        about: What does not change of it.
        began_s: When the page began, in seconds since 1970.
    """
    hosts = [_host(row, about) for row in status.get("chain", ())]
    return {
        "kind": "served",
        "name": about.name,
        "ready": bool(status.get("ready")),
        "error": "",
        "chosen": {"portfolio": about.portfolio} if about.portfolio else {},
        "cards": [list(card) for card in _cards(status, about)],
        "hosts": hosts,
        "links": _links(status, hosts),
        "front": [_variant(row, status) for row in about.front],
        "why": [list(line) for line in _why(status)],
        "happened": _happened(status, began_s)[-EVENTS:],
        "decided": list(_decided(status, began_s))[-EVENTS:],
    }


# --------------------------------------------------------------------------------------------------
# How it is now


def _cards(status: Status, about: AboutServed) -> Iterator[tuple[str, str, str]]:
    yield "answers", "images answered", f"{sum(status.get('answers', {}).values()):,}"
    seen = p95_of(status)
    goal = f" of {about.objective_ms:g}" if about.objective_ms is not None else ""
    yield "p95", "p95, ms", "–" if seen is None else f"{seen:.3g}{goal}"
    if "chain" in status:
        yield "cuts", "route in force", str(status.get("variant", ""))
        yield "moves", "changes of cuts", str(status.get("moves", 0))
    else:
        yield "variant", "variant in force", str(status.get("variant", ""))
        yield "switches", "switches", str(status.get("switches", 0))
    if "technique" in status:
        yield "technique", "technique in force", str(status["technique"])
        yield "lost", "hosts lost", str(status.get("hosts_lost", 0))
        yield "failovers", "failovers", str(status.get("failovers", 0))


def _host(row: Mapping[str, Any], about: AboutServed) -> dict[str, Any]:
    units = list(row.get("units", ()))
    keys = ("compute_ms", "queue_ms", "link_ms", "round_trip_ms", "bytes")
    return {
        "name": row["host"],
        "address": row["address"],
        "pid": about.processes.get(row["host"]),
        "state": row.get("state", "alive"),
        "why": row.get("why", ""),
        "units": len(units),
        "where": _units(units),
        **{key: row.get(key) for key in keys},
    }


def _units(units: Sequence[str]) -> str:
    if not units:
        return "nothing"
    return units[0] if len(units) == 1 else f"{units[0]} … {units[-1]}"


def _links(status: Status, hosts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the links between neighbours, with the rates that requests told."""
    conditions = (status.get("decision") or {}).get("conditions") or {}
    rates = list(conditions.get("up_mbit_s") or ())
    return [
        {
            "from": before["name"],
            "to": after["name"],
            "mbit_s": rates[index] if index < len(rates) else None,
            "ms": before["link_ms"],
            "lost": "lost" in (before["state"], after["state"]),
        }
        for index, (before, after) in enumerate(pairwise(hosts))
    ]


def _variant(row: Mapping[str, Any], status: Status) -> dict[str, Any]:
    way, _, cuts = str(status.get("variant", "")).rpartition("@")
    served = way or str(status.get("model", "")) if "chain" in status else cuts
    held = [str(name).rpartition("@")[0] or str(name) for name in status.get("in_memory", ())]
    return {**row, "now": row["name"] == served, "ready": row["name"] in held}


def _why(status: Status) -> Iterator[tuple[str, str]]:
    """Yield the explanation of each decision in force."""
    if reason := status.get("reason"):
        yield f"{status.get('variant')} answers", str(reason)
    decision = status.get("decision") or {}
    if decision:
        cuts = "/".join(map(str, decision.get("cuts", ())))
        yield f"cuts {cuts}, {decision.get('verdict')}" if cuts else "cuts", str(decision["reason"])
    found = [event for event in status.get("events", ()) if event.get("event") == "failover"]
    if found and status.get("technique") != "none":
        last = found[-1]
        what = f"{status['technique']} {status['route']} for {last['host'] or 'the chain'}"
        yield what, str(last["reason"])


# --------------------------------------------------------------------------------------------------
# What happened


def _happened(status: Status, began_s: float) -> list[dict[str, Any]]:
    told = [
        {"kind": str(event["event"]), "text": _text(event), "time_s": event["time_s"]}
        for event in status.get("events", ())
    ]
    told += [
        {"kind": "move", "text": _moved(record), "time_s": record["time_s"]}
        for record in status.get("records", ())
        if "chain" in status
    ]
    told += [
        {"kind": "switch", "text": f"{record['before']} → {record['after']}", "time_s": None}
        for record in status.get("records", ())
        if "chain" not in status
    ]
    told.sort(key=lambda event: event["time_s"] or 0.0)
    return [
        {
            "kind": event["kind"], "text": event["text"], "round": None,
            "after_s": None if event["time_s"] is None else max(0.0, event["time_s"] - began_s),
        }
        for event in told
    ]  # fmt: skip


def _text(event: Mapping[str, Any]) -> str:
    host = event.get("host") or "the chain"
    try:
        return _TOLD.get(str(event["event"]), "{event}").format(**{**event, "host": host})
    except KeyError:  # of another version
        return str(event["event"])


def _moved(record: Mapping[str, Any]) -> str:
    blocked = record.get("blocked_ms")
    without = "" if blocked is None else f", {blocked:.3g} ms without service"
    return f"cuts {record.get('before', '')} → {record.get('after', '')}{without}"


def _decided(status: Status, began_s: float) -> Iterator[dict[str, Any]]:
    """Yield what was decided, with what was predicted of it and what came."""
    proved = {e["route"]: e["measured_ms"] for e in status.get("events", ()) if "measured_ms" in e}
    for event in status.get("events", ()):
        if event.get("event") == "failover":
            yield {
                "after_s": max(0.0, event["time_s"] - began_s),
                "text": _text(event),
                "predicted_ms": event.get("predicted_ms"),
                "measured_ms": proved.get(event["route"]),
                "why": event.get("reason", ""),
            }
    for record in status.get("records", ()):
        if "chain" in status:
            yield {
                "after_s": max(0.0, record["time_s"] - began_s),
                "text": _moved(record),
                "predicted_ms": record.get("predicted_ms"),
                "measured_ms": record.get("measured_ms"),
                "why": record.get("reason", ""),
            }
        else:
            yield {
                "after_s": None,
                "text": f"{record['before']} → {record['after']}",
                "predicted_ms": record.get("predicted_p95_ms"),
                "measured_ms": record.get("p95_after_ms"),
                "why": record.get("error") or record.get("reason", ""),
            }
