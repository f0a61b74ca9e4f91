"""The trace of a round and its pictures: the lanes of one mini-batch, and who is idle.

Two rounds may be shown: what was measured here (`fedsys.runs.tracing`), of which the median
mini-batch of the slowest device is drawn, and the modelled fleet (`fedsys.runs.virtual_trace`),
with the path that decided its end. The fleet comes first unless time is real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from fedsys.files import json_text, write_atomic
from fedsys.planning.resources import RESOURCES, Event
from fedsys.runs import plots, virtual_trace
from fedsys.runs.tracing import LANES, lanes_in, perfetto
from fedsys.runs.virtual_trace import ModelledRound, Shown, by_resource, one_iteration, workers

Traces = Mapping[str, Sequence[Event]]
Panel = tuple[plots.Paint, float]
Lane = tuple[str, list[list[Event]]]
Shares = Mapping[str, Mapping[str, float]]

MOST_DRAWN: Final = 8
"""Devices of a fleet in a picture of lanes: the slowest ones."""

MOST_BARS: Final = 10
"""Devices of a fleet in a picture of idle shares: the slowest ones."""

MOST_EDGES: Final = 4
"""Edge servers in a picture: that of the critical path, and those that work most."""

HEIGHT: Final = 4.0
"""Of a panel of what was measured, in inches."""

_WORDS: Final = {"edge": "work of the edge"}
_CRITICAL: Final = plots.COLORS[3]


def write(
    folder: Path, traces: Traces, modelled: ModelledRound | None = None, *, draw: bool = True
) -> list[Path]:
    """Write ``trace.json``, and ``plots/timeline.png`` and ``plots/idle.png``.

    Args:
        folder: Of the run.
        traces: Events by device, as they were measured.
        modelled: The round on the modelled fleet; None if there is none. Nothing is written if
            there are no events either.
        draw: Whether pictures are drawn.

    Returns:
        The files.

    Raises:
        RunError: A file cannot be written.
    """
    held = {device: events for device, events in traces.items() if events}
    if not held and modelled is None:
        return []
    path = folder / "trace.json"
    write_atomic(path, json_text(_trace(held, modelled)).encode())
    drawn = [path]
    if draw and (panels := _lanes_panels(held, modelled)):
        drawn.append(plots.draw_panels(folder / "plots" / "timeline.png", panels))
        width = 6.4 if modelled is None else idle_width(modelled)
        panels = _idle_panels(held, modelled)
        drawn.append(plots.draw_panels(folder / "plots" / "idle.png", panels, width))
    return drawn


def _trace(held: Traces, modelled: ModelledRound | None) -> dict[str, Any]:
    if modelled is None:
        return perfetto(held)
    named = {f"{modelled.own}: {device}": events for device, events in held.items()}
    pid = len(named) + 1 if modelled.real else 1
    trace, played = (
        perfetto(named, 1 if modelled.real else 2),
        virtual_trace.perfetto(modelled, pid),
    )
    own = trace["traceEvents"]
    return {**trace, "traceEvents": own + played if modelled.real else played + own}


def _with_modelled(
    measured: list[Panel],
    modelled: ModelledRound | None,
    panel_of: Callable[[ModelledRound], Panel],
) -> list[Panel]:
    if modelled is None:
        return measured
    return [*measured, panel_of(modelled)] if modelled.real else [panel_of(modelled), *measured]


def _whose(modelled: ModelledRound | None) -> str:
    return "" if modelled is None else f"{modelled.own}: ".capitalize()


# --------------------------------------------------------------------------------------------------
# One mini-batch


def _lanes_panels(held: Traces, modelled: ModelledRound | None) -> list[Panel]:
    panels: list[Panel] = []
    spans = {device: span for device, events in held.items() if (span := _typical(events))}
    if spans:
        slowest = max(spans, key=lambda device: spans[device][1] - spans[device][0])
        (begin, end), events = spans[slowest], held[slowest]
        within = [e for e in events if _works(e) and e.end_s > begin and e.start_s < end]
        lanes = [(lane, [[e for e in within if e.lane == lane]]) for lane in lanes_in(events)]
        title = f"{_whose(modelled)}one mini-batch of {slowest}: {end - begin:.3g} s"
        paint = _lanes_painter(title, "seconds", lanes, (begin, end), 1.0, lambda e: e.name)
        panels.append((paint, HEIGHT))
    return _with_modelled(panels, modelled, lanes_panel)


def _typical(events: Sequence[Event]) -> tuple[float, float] | None:
    """Return begin and end of a mini-batch of median length; None if none is complete."""
    ends: dict[int, float] = {}
    for event in events:
        if event.lane == "device" and event.name in ("update", "load"):
            ends[event.step] = max(ends.get(event.step, 0.0), event.end_s)
    updated = {e.step for e in events if e.name == "update"}
    spans = [(ends[s - 1], ends[s]) for s in sorted(updated) if s - 1 in updated]
    if not spans:
        return None
    typical = median(end - start for start, end in spans)
    return min(spans, key=lambda span: abs(span[1] - span[0] - typical))


def _works(event: Event) -> bool:
    return event.name not in ("wait", "send")


def lanes_of(shown: ModelledRound, part: Shown) -> list[Lane]:
    """Return the lanes of a picture, each with its name and the events of its workers."""
    within = [
        e
        for e in shown.played.timeline.events
        if e.end_s > max(part.begin_s, e.start_s) and e.start_s < part.end_s
    ]
    devices = shown.slowest(MOST_DRAWN)
    lanes: list[Lane] = []
    edges: dict[int, list[Event]] = {}
    for (kind, index), events in by_resource(within, devices).items():
        if kind == "edge":
            edges[index] = events
        elif events or kind == "device":
            name = shown.names[index] if kind == "device" else RESOURCES[kind]
            lanes.append((name, [events]))
    critical = {id(event) for event in shown.critical_path}

    def last(index: int) -> tuple[bool, float]:
        own = edges[index]
        return not any(id(e) in critical for e in own), -sum(e.end_s - e.start_s for e in own)

    most = sorted(edges, key=last)
    return lanes + [(f"edge {index}", workers(edges[index])) for index in sorted(most[:MOST_EDGES])]


def lanes_panel(shown: ModelledRound) -> Panel:
    """Return what paints one mini-batch of the modelled fleet, and its height in inches."""
    part = one_iteration(shown)
    lanes, span = lanes_of(shown, part), (part.begin_s, part.end_s)
    scale, unit = plots.time_unit(part.end_s - part.begin_s)
    took = f"{(part.end_s - part.begin_s) / scale:.3g} {unit}{_left_out(shown, MOST_DRAWN)}"
    title = f"{shown.title}: one mini-batch of {shown.names[part.device]}\n{took}"
    path, label = shown.critical_path, f"time ({unit})"
    paint = _lanes_painter(title, label, lanes, span, scale, _modelled, path)
    return paint, 1.7 + 0.24 * len(lanes)


def _modelled(event: Event) -> str:
    """Return the shade of an event of the fleet: an edge does forward and backward in one."""
    if event.kind in ("up", "down"):
        return "transfer"
    return event.name if event.kind == "device" or event.name == "update" else "edge"


def _lanes_painter(
    title: str, label: str, lanes: Sequence[Lane], span: tuple[float, float], scale: float,
    shade: Callable[[Event], str], path: Sequence[Event] = (),
) -> plots.Paint:  # fmt: skip
    """Return what paints lanes; `scale` is a unit of time in seconds, `path` a line over them."""
    begin, end = span

    def paint(axes: Any) -> None:
        seen: set[str] = set()
        places: dict[int, float] = {}
        for row, (_, several) in enumerate(lanes):
            height = 0.72 / max(1, len(several))
            for number, events in enumerate(several):
                low = row - 0.36 + number * height
                places |= {id(event): low + height / 2 for event in events}
                by_shade: dict[str, list[tuple[float, float]]] = {}
                for event in events:
                    at = max(event.start_s, begin)
                    stay = (at - begin) / scale, (min(event.end_s, end) - at) / scale
                    by_shade.setdefault(shade(event), []).append(stay)
                _bars(axes, by_shade, (low, height * 0.94), 0.01 * (end - begin) / scale)
                seen |= set(by_shade)
        if path:
            _critical(axes, path, places, span, scale)
        axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0.0, (end - begin) / scale)
        axes.grid(visible=False, axis="y")
        axes.set(title=plots.capitalised(title), xlabel=label)
        _legend(axes, [name for name in plots.SHADES if name in seen], critical=bool(path))

    return paint


def _bars(
    axes: Any, by_shade: Mapping[str, list[tuple[float, float]]], place: tuple[float, float],
    least: float,
) -> None:  # fmt: skip
    for shade, spans in by_shade.items():
        # What is narrow would vanish behind the white between it and the next one
        wide = median(length for _, length in spans) > least
        line = {"edgecolor": "white", "linewidth": 0.3} if wide else {"linewidth": 0.0}
        axes.broken_barh(spans, place, facecolor=plots.SHADES[shade], **line)


def _critical(
    axes: Any, path: Sequence[Event], places: Mapping[int, float], span: tuple[float, float],
    scale: float,
) -> None:  # fmt: skip
    """Draw the critical path as one line through the bars; it is slanted where latency passes."""
    x: list[float] = []
    y: list[float] = []
    for event in path:
        if id(event) in places:
            for moment in (event.start_s, event.end_s):
                x.append((min(max(moment, span[0]), span[1]) - span[0]) / scale)
                y.append(places[id(event)])
    axes.plot(x, y, color="white", linewidth=3.2, marker="", zorder=3)
    axes.plot(x, y, color=_CRITICAL, linewidth=1.6, marker="", zorder=4)


def _legend(axes: Any, seen: Sequence[str], *, critical: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=plots.SHADES[n], label=_WORDS.get(n, n)) for n in seen]
    if critical:
        handles.append(Line2D([], [], color=_CRITICAL, linewidth=1.8, label="critical path"))
    axes.legend(handles=handles, **_below(4 if critical else len(handles)))


def _below(columns: int, points: float = 30.0) -> dict[str, Any]:
    """Return where a legend stands whatever the height of the axes: below their label."""
    return {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "ncols": columns,
            "borderaxespad": points / 9.5}  # fmt: skip


def _left_out(shown: ModelledRound, most: int) -> str:
    """Return what a title says of devices and edge servers that are not drawn."""
    edges = {e.resource for e in shown.played.timeline.events if e.kind == "edge"}
    parts = []
    if len(shown.names) > most:
        parts.append(f"the {most} slowest of {len(shown.names)} devices")
    if len(edges) > MOST_EDGES:
        parts.append(f"{MOST_EDGES} of {len(edges)} edge servers")
    return "\n" + " and ".join(parts) if parts else ""


# --------------------------------------------------------------------------------------------------
# Who is idle


def _idle_panels(held: Traces, modelled: ModelledRound | None) -> list[Panel]:
    found = idle_shares(held)
    there = [lane for lane in LANES.values() if any(lane in own for own in found.values())]
    shares = {device: {n: own.get(n, 1.0) for n in there} for device, own in found.items()}
    title = f"{_whose(modelled)}share of the time in which nothing is done"
    step = max(1, len(shares) // 10)
    panels = [(_idle_painter(title, shares, step, 100), HEIGHT)] if shares else []
    return _with_modelled(panels, modelled, idle_panel)


def idle_panel(shown: ModelledRound) -> Panel:
    """Return what paints the idle shares of resources and their mean, and its height in inches."""
    title = f"{shown.title}: share of the round in which nothing is done"
    return _idle_painter(title + _left_out(shown, MOST_BARS), idle_groups(shown), 1, 106), 3.4


def _idle_painter(title: str, groups: Shares, step: int, top: float) -> plots.Paint:
    """Return what paints groups of bars; every step-th has its name, and above 100 fit numbers."""
    names = dict.fromkeys(name for both in LANES.items() for name in both)
    kinds = [name for name in names if any(name in shares for shares in groups.values())]

    def paint(axes: Any) -> None:
        width = 0.8 / len(kinds)
        for i, kind in enumerate(kinds):
            bars = [
                (place + (list(shares).index(kind) - (len(shares) - 1) / 2) * width, shares[kind])
                for place, shares in enumerate(groups.values())
                if kind in shares
            ]
            drawn = axes.bar(
                [x for x, _ in bars],
                [100 * share for _, share in bars],
                width,
                label=RESOURCES.get(kind, kind),
                color=plots.COLORS[i],
            )
            if top > 100:
                axes.bar_label(drawn, fmt="%.0f", fontsize=6)
        size = {"fontsize": 8} if top > 100 else {}
        axes.set_xticks(range(0, len(groups), step), list(groups)[::step], **size)
        axes.set_ylim(0, top)
        axes.grid(visible=False, axis="x")
        axes.set(title=plots.capitalised(title), ylabel="percent")
        axes.legend(**_below(len(kinds), 38.0))

    return paint


def idle_shares(traces: Traces) -> dict[str, dict[str, float]]:
    """Return for each device and lane the share of the time, 0 to 1, in which nothing is done.

    A lane is that of the device: an edge that computes for several is busier than each shows.
    """
    shares: dict[str, dict[str, float]] = {}
    for device, events in traces.items():
        begin = min((e.start_s for e in events), default=0.0)
        whole = max((e.end_s for e in events), default=0.0) - begin
        if whole > 0:
            shares[device] = {
                lane: max(0.0, 1.0 - _busy(events, lane) / whole) for lane in lanes_in(events)
            }
    return shares


def _busy(events: Sequence[Event], lane: str) -> float:
    """Return the seconds in which a lane does something; what overlaps counts once."""
    busy = until = 0.0
    spans = [(e.start_s, e.end_s) for e in events if e.lane == lane and _works(e)]
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def idle_width(shown: ModelledRound) -> float:
    """Return the inches that the groups of `idle_groups` need beside each other."""
    return max(6.4, 0.72 * len(idle_groups(shown)))


def idle_groups(shown: ModelledRound) -> dict[str, dict[str, float]]:
    """Return idle shares, 0 to 1, by group of bars and kind of resource.

    A resource that never did anything in the round was idle all the time. ``mean`` is over all
    devices and edges, those that are not shown as well: the ``idle_*`` of the round.
    """
    timeline = shown.played.timeline
    idle = timeline.idle(shown.workers)
    held = by_resource(timeline.events, shown.slowest(MOST_BARS))
    found: dict[str, dict[str, float]] = {}
    edges: dict[str, dict[str, float]] = {}
    for (kind, index), events in held.items():
        busy = sum(e.end_s - e.start_s for e in events)
        if kind != "edge":
            share = max(0.0, 1.0 - busy / timeline.seconds) if timeline.seconds else 0.0
            found.setdefault("\n".join(shown.names[index].rsplit(" ", 1)), {})[kind] = share
        else:
            edges[f"edge {index}"] = {kind: idle[f"edge:{index}"]}
    several = sorted(edges, key=lambda name: edges[name]["edge"])[:MOST_EDGES]
    mean = {kind: shown.played.idle[kind] for kind in RESOURCES}
    return {**found, **{name: edges[name] for name in edges if name in several}, "mean": mean}
