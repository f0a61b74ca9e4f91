"""What the live page shows of a run: one JSON value, read from the run's folder.

Each figure is that of the file where it stands: rounds of ``metrics.csv``, devices of
``decisions.csv`` and, before their round has ended, of ``plan.json``, what happened of
``events.jsonl``, status and result of ``run.json``. A file is read again only when it has
changed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedsys.errors import FedsysError
from fedsys.runs.decisions import OffloadDecision, read_plan
from fedsys.runs.decisions import read as read_decisions
from fedsys.runs.folder import RunFolder
from fedsys.runs.happened import in_words
from fedsys.runs.measured import metric_in

POINTS: Final = 400
"""Rounds of a curve at most; of more, evenly spaced ones are shown."""

EVENTS: Final = 200
"""Events at most, the last ones."""

DEVICES: Final = 200
"""Devices at most, the first ones by partition id."""


class Snapshots:
    """Reads the folder of a run again and again.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, tuple[object, Any]] = {}

    def take(self) -> dict[str, Any]:
        """Return the run as it is now, as JSON has it: numbers that are not finite are None."""
        run = RunFolder(self._folder, {"status": "running"})
        info = self._of("run.json", lambda: dict(RunFolder.open(self._folder).info), {})
        rows = self._of("metrics.csv", run.rounds, [])
        events = self._of("events.jsonl", run.events, [])
        decided = self._of("decisions.csv", lambda: read_decisions(self._folder), [])
        planned = self._of("plan.json", lambda: read_plan(self._folder), (0, {}))
        last, config = rows[-1] if rows else {}, info.get("config") or {}
        done = int(last.get("round", 0))
        devices, edges, moves = _fleet(config, decided, planned, events, done)
        taken = {
            **_heading(self._folder, info),
            "rows": _thinned(rows),
            "last": last,
            "metric": dataclasses.asdict(metric_in(last, config)),
            "devices": devices,
            "edges": edges,
            "happened": _happened(events, moves, float(info.get("started") or 0.0))[-EVENTS:],
        }
        found: dict[str, Any] = finite(taken)
        return found

    def close(self) -> None:
        """End: nothing is open."""

    def _of(self, name: str, read: Callable[[], Any], absent: Any) -> Any:
        """Return what a file holds, or what it held before where it is damaged for a moment."""
        try:
            state = os.stat(self._folder / name)
        except OSError:
            return absent
        mark = (state.st_mtime_ns, state.st_size, state.st_ino)
        before = self._kept.get(name)
        if before is None or before[0] != mark:
            try:
                self._kept[name] = (mark, read())
            except (FedsysError, OSError, ValueError, TypeError, KeyError):
                self._kept.setdefault(name, (None, absent))
        return self._kept[name][1]


def _heading(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    config = info.get("config") or {}
    chosen = {
        "clients": config.get("num_clients"),
        "strategy": _last_word(config.get("strategy")),
        "policy": (config.get("policy") or {}).get("kind"),
        "model": _last_word(config.get("model")),
        "data": (config.get("data") or {}).get("source"),
        "seed": config.get("seed"),
    }
    return {
        "name": folder.name,
        "status": info.get("status", "running"),
        "error": (info.get("error") or {}).get("message", ""),
        "started": info.get("started"),
        "rounds": config.get("rounds"),
        "budget": (config.get("privacy") or {}).get("epsilon"),
        "chosen": {key: value for key, value in chosen.items() if value is not None},
        "result": {k: v for k, v in (info.get("result") or {}).items() if _plain(v)},
    }


def _last_word(group: Any) -> str | None:
    target = (group or {}).get("_target_")
    return None if not target else str(target).rpartition(".")[2]


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _thinned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the numbers of at most `POINTS` rows, evenly spaced, with the last one."""
    step = max(1, math.ceil(len(rows) / POINTS))
    kept = [*rows[:-1][::step], *rows[-1:]]
    return [{k: v for k, v in row.items() if isinstance(v, float)} for row in kept]


# --------------------------------------------------------------------------------------------------
# The map


def _fleet(
    config: Mapping[str, Any],
    decided: Sequence[OffloadDecision],
    planned: tuple[int, Mapping[int, Mapping[str, Any]]],
    events: Sequence[Mapping[str, Any]],
    done: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the devices and the edge servers as they are now, and the moves between these."""
    latest: dict[int, OffloadDecision] = {}
    moves = []
    for entry in decided:
        before = latest.get(entry.client)
        if before is not None and before.edge and entry.edge and before.edge != entry.edge:
            moves.append({
                "round": entry.round, "client": entry.client,
                "from": before.edge, "to": entry.edge,
            })  # fmt: skip
        latest[entry.client] = entry
    if any(event.get("kind") == "move" for event in events):
        moves = []  # the run has told them itself, and more of each
    now = max((entry.round for entry in decided), default=0)
    if planned[0] > max(now, done):
        for client, cut in planned[1].items():
            latest[client] = _in_work(planned[0], client, cut, latest.get(client))
    lost = {
        int(event["client"])
        for event in events
        if event.get("kind") == "client_lost" and event.get("round", 0) >= done
    }
    known = sorted({*range(int(config.get("num_clients") or 0)), *latest})
    _go_on_elsewhere(latest, events)
    split = _is_split(config)
    devices = [_device(c, latest.get(c), now, c in lost, split) for c in known[:DEVICES]]
    return devices, _edges(config, latest.values(), events), moves


def _go_on_elsewhere(
    latest: dict[int, OffloadDecision], events: Sequence[Mapping[str, Any]]
) -> None:
    """Take devices to the edge servers at which their rounds ended, after moves and losses."""
    for event in events:
        entry = latest.get(int(event.get("client", -1)))
        to = event.get("target") if event.get("kind") == "move" else event.get("to")
        is_edge = event.get("kind") == "move" or event.get("what") == "edge"
        if entry is not None and is_edge and to and event.get("round") == entry.round:
            latest[entry.client] = dataclasses.replace(entry, edge=str(to))


def _is_split(config: Mapping[str, Any]) -> bool:
    return bool((config.get("policy") or {}).get("kind", "none") != "none")


def _in_work(
    number: int, client: int, cut: Mapping[str, Any], before: OffloadDecision | None
) -> OffloadDecision:
    """Return what a device does in a round that goes on, or did before if that is the same.

    Of the round itself nothing was measured yet.
    """
    share = float(cut["device_share"])
    entry = OffloadDecision(
        round=number,
        client=client,
        machine=str(cut.get("machine") or ""),
        cut=int(cut["index"]),
        unit=str(cut.get("unit") or ""),
        whole=share >= 1.0,
        device_share=share,
        pieces=int(cut.get("micro_batches") or 1),
        codec=str(cut.get("codec") or ""),
        edge=str(cut.get("edge") or ""),
        reason=f"round {number} goes on: reason and times come with its end",
    )
    same = before is not None and all(
        getattr(before, name) == getattr(entry, name) for name in ("cut", "pieces", "codec", "edge")
    )
    return before if before is not None and same else entry


def _device(
    client: int, entry: OffloadDecision | None, now: int, lost: bool, split: bool
) -> dict[str, Any]:
    if entry is None:
        return {"client": client, "lost": lost, "undecided": split}
    return {
        "client": client,
        "lost": lost,
        "round": entry.round,
        "now": entry.round == now,
        "machine": entry.machine,
        "cut": entry.cut,
        "unit": entry.unit,
        "whole": entry.whole,
        "share": entry.device_share,
        "pieces": entry.pieces,
        "codec": entry.codec,
        "edge": entry.edge,
        "up_mbit_s": entry.up_mbit_s if entry.up_mbit_s is not None else entry.seen_up_mbit_s,
        "down_mbit_s": (
            entry.down_mbit_s if entry.down_mbit_s is not None else entry.seen_down_mbit_s
        ),
        "predicted_s": entry.predicted_s,
        "measured_s": entry.measured_s,
        "reason": entry.reason,
    }


def _edges(
    config: Mapping[str, Any], latest: Iterable[OffloadDecision], events: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return the edge servers: those of the configuration and those that devices were sent to."""
    if not _is_split(config):
        return []
    named = [str(e.get("name")) for e in (config.get("fleet") or {}).get("edges") or ()]
    names = named or [f"edge-{i}" for i in range(int(config.get("num_edges") or 0))]
    names += sorted({e.edge for e in latest if e.edge} - set(names))
    lost = {
        str(event["from"])
        for event in events
        if event.get("kind") == "recovery"
        and event.get("what") not in ("link", "stays")
        and "from" in event
    }
    return [{"name": name, "lost": name in lost} for name in names]


# --------------------------------------------------------------------------------------------------
# What happened


def _happened(
    events: Sequence[Mapping[str, Any]], moves: Sequence[Mapping[str, Any]], began: float
) -> list[dict[str, Any]]:
    told = [
        {
            "kind": str(event.get("kind", "")).replace("_", " "),
            "round": _round_of(event),
            "after_s": max(float(event.get("time") or began) - began, 0.0),
            "text": in_words(event),
        }
        for event in events
    ]
    told += [
        {
            "kind": "move", "round": move["round"], "after_s": None,
            "text": f"device {move['client']} went from {move['from']} to {move['to']}",
        }
        for move in moves
    ]  # fmt: skip
    return sorted(told, key=lambda event: event["round"] or 0)


def _round_of(event: Mapping[str, Any]) -> int | None:
    fault = event.get("fault")
    inner = fault if isinstance(fault, Mapping) else event
    number = inner.get("round")
    return number if isinstance(number, int) else None


def finite(value: Any) -> Any:
    """Return a value with None in place of numbers that are not finite, as JSON has it."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
