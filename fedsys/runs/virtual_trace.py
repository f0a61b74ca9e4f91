"""A round of the modelled fleet as a trace for Perfetto, and which part of it is worth a picture.

The events are those that the virtual clock played (`fedsys.planning.timeline`).
`fedsys.runs.tracing` has the other trace, of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, Final, NamedTuple

from fedsys.planning.resources import RESOURCES, Event
from fedsys.planning.timeline import PlayedMove
from fedsys.planning.virtual_clock import VirtualRound
from fedsys.runs.tracing import span_of

MOST_DEVICES: Final = 40
"""Devices that a trace shows, the slowest ones."""

MOST_EVENTS: Final = 20_000
"""Events that a trace shows, the first ones; at about 130 bytes each."""

_OF_DEVICES: Final = ("device", "up", "down")


@dataclass(frozen=True)
class ModelledRound:
    """A round on the virtual clock, and what people call who took part.

    Attributes:
        played: The round.
        names: Of the devices, in the order of the jobs.
        workers: Sessions that each edge computes at the same time.
        real: Whether time is real: then the fleet's is a prediction of it.
    """

    played: VirtualRound
    names: tuple[str, ...]
    workers: tuple[int, ...] = ()
    real: bool = False

    @property
    def title(self) -> str:
        """What the fleet's part of a trace or a picture is called."""
        return "fleet (predicted)" if self.real else "fleet (virtual)"

    @property
    def own(self) -> str:
        """What the part that was measured here is called."""
        return "measured" if self.real else "this machine"

    def slowest(self, most: int) -> list[int]:
        """Return the devices that take longest, at most so many, in their order."""
        took, last = self.played.device_s, self.last
        return sorted(sorted(range(len(took)), key=lambda k: (k != last, -took[k], k))[:most])

    @property
    def last(self) -> int:
        """The device at which the critical path ends."""
        path = self.critical_path
        return path[-1].job if path else 0

    @cached_property
    def critical_path(self) -> tuple[Event, ...]:
        """The chain of events that decided the end of what was played, first one first."""
        return self.played.timeline.critical_path()


class Shown(NamedTuple):
    """One mini-batch of the device that decides when the round ends.

    Attributes:
        device: Index of the device.
        begin_s: When its mini-batch before has ended.
        end_s: When the mini-batch has.
    """

    device: int
    begin_s: float
    end_s: float


def one_iteration(shown: ModelledRound) -> Shown:
    """Return a mini-batch of the last device, of typical length.

    It is one in the middle of those in which all devices still train; the second one if there are
    none.
    """
    timeline = shown.played.timeline
    slowest = shown.last
    last: dict[int, dict[int, float]] = {k: {} for k in range(len(shown.names))}
    first = timeline.seconds + timeline.start_s
    for event in timeline.events:
        if event.kind == "device":
            ends = last[event.job]
            ends[event.step] = max(ends.get(event.step, 0.0), event.end_s)
            if event.job == slowest:
                first = min(first, event.start_s)
    mine = last[slowest]
    spans = [(mine.get(i - 1, first), mine[i]) for i in sorted(mine)]
    busy_until = min(max(ends.values()) for ends in last.values() if ends)
    spans = [s for s in spans[1:] if s[1] <= busy_until] or spans[1:2] or spans
    typical = median(end - begin for begin, end in spans)
    near = [s for s in spans if abs(s[1] - s[0] - typical) <= 0.02 * typical] or spans
    return Shown(slowest, *near[len(near) // 2])


def workers(events: Iterable[Event]) -> list[list[Event]]:
    """Return events of one resource as lanes in which nothing overlaps: one for each worker."""
    lanes: list[list[Event]] = []
    for event in sorted(events, key=lambda e: (e.start_s, e.end_s)):
        free = (lane for lane in lanes if lane[-1].end_s <= event.start_s)
        if (lane := next(free, None)) is None:
            lanes.append(lane := [])
        lane.append(event)
    return lanes


def by_resource(
    events: Iterable[Event], devices: Iterable[int]
) -> dict[tuple[str, int], list[Event]]:
    """Return the events of devices and of all edges, device by device, edges at the end.

    Returns:
        By kind (``device``, ``up``, ``down``, ``edge``) and index of the device or the edge.
    """
    found: dict[tuple[str, int], list[Event]] = {(k, d): [] for d in devices for k in _OF_DEVICES}
    edges: dict[tuple[str, int], list[Event]] = {}
    for event in events:
        kind, _, name = event.resource.partition(":")
        if kind == "edge":
            edges.setdefault((kind, int(name)), []).append(event)
        elif (kind, event.job) in found:
            found[kind, event.job].append(event)
    return {**found, **dict(sorted(edges.items()))}


def perfetto(shown: ModelledRound, pid: int = 1) -> list[dict[str, Any]]:
    """Return the events of a trace as Perfetto and ``chrome://tracing`` read it: one process.

    Its first thread is the critical path; then come device, uplink and downlink of each device, and
    the workers of the edges. Of large fleets and long rounds a part is shown, and the name of the
    process says which.

    Args:
        shown: The round.
        pid: Number of the process, from 1.
    """
    timeline = shown.played.timeline
    devices = shown.slowest(MOST_DEVICES)
    held = [e for lane in by_resource(timeline.events, devices).values() for e in lane]
    held = sorted((e for e in held if e.end_s > e.start_s), key=lambda e: e.start_s)
    until = held[MOST_EVENTS].start_s if len(held) > MOST_EVENTS else math.inf
    held = [e for e in held if e.start_s < until]
    path = [e for e in shown.critical_path if e.end_s > e.start_s and e.start_s < until]
    lanes: list[tuple[str, list[Event]]] = [("critical path", path)]
    for (kind, index), events in by_resource(held, devices).items():
        if kind != "edge":
            role = "" if kind == "device" else f" {RESOURCES[kind]}"
            lanes += [(shown.names[index] + role, events)] if events else []
            continue
        several = workers(events)
        for number, lane in enumerate(several):
            of = f" worker {number}" if len(several) > 1 else ""
            lanes.append((f"edge {index}{of}", lane))
    for index in devices:
        own = [move for move in timeline.moves if move.job == index and move.start_s < until]
        if own:
            lanes.append((f"{shown.names[index]} moves", [_pause(move) for move in own]))
    made = [_named("process_name", pid, 0, {"name": _title(shown, len(devices), until)})]
    for tid, (name, events) in enumerate(lanes, start=1):
        made.append(_named("thread_name", pid, tid, {"name": name}))
        made.append(_named("thread_sort_index", pid, tid, {"sort_index": tid}))
        made += [_span(shown, event, pid, tid) for event in events]
    return made


def _pause(move: PlayedMove) -> Event:
    there = f"edge {move.source} to edge {move.target}"
    name = there if move.source != move.target else f"edge {move.source} out of reach"
    return Event("move", name, move.iteration, -1, move.start_s, move.end_s, move.job)


def _title(shown: ModelledRound, devices: int, until: float) -> str:
    timeline = shown.played.timeline
    parts = [shown.title]
    if devices < len(shown.names):
        parts.append(f"the {devices} slowest of {len(shown.names)} devices")
    if until < math.inf:
        parts.append(f"the first {until - timeline.start_s:.3g} of {shown.played.seconds:.3g} s")
    return ", ".join(parts)


def _named(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _span(shown: ModelledRound, event: Event, pid: int, tid: int) -> dict[str, Any]:
    name, kind, device = event.title, event.kind, shown.names[event.job]
    if tid == 1:
        where = f"edge {event.resource.partition(':')[2]}" if kind == "edge" else device
        name = f"{name} ({where})"
    args = {"device": device, "mini-batch": event.step}
    return span_of(event, name, kind, (pid, tid), shown.played.timeline.start_s, args)
