"""The pictures of a trace: the lanes of one mini-batch, and what share of the time nothing is done.

Both are drawn from the events of the last round (`fedsys.runs.tracing`): the first for the device
whose mini-batches take longest, of which its median one is shown. Where a fleet is modelled, trace
and pictures have a part for it (`fedsys.runs.virtual_trace`), before the measured one unless time
is real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fedsys.files import json_text, write_atomic
from fedsys.planning.resources import Event
from fedsys.runs import plots
from fedsys.runs import virtual_plots as fleet_plots
from fedsys.runs import virtual_trace as fleet_trace
from fedsys.runs.tracing import LANES, lanes_in, perfetto
from fedsys.runs.virtual_trace import FleetRound

Traces = Mapping[str, Sequence[Event]]
Panel = tuple[plots.Paint, float]

HEIGHT = 4.0
"""Of a panel, in inches."""


def write(
    folder: Path, traces: Traces, fleet: FleetRound | None = None, *, draw: bool = True
) -> list[Path]:
    """Write ``trace.json``, and ``plots/timeline.png`` and ``plots/idle.png``.

    Args:
        folder: Of the run.
        traces: Events by device, as they were measured.
        fleet: The round on the modelled fleet; None if there is none. Nothing is written if there
            are no events either.
        draw: Whether pictures are drawn.

    Returns:
        The files.

    Raises:
        RunError: A file cannot be written.
    """
    held = {device: events for device, events in traces.items() if events}
    if not held and fleet is None:
        return []
    path = folder / "trace.json"
    write_atomic(path, json_text(_trace(held, fleet)).encode())
    drawn = [path]
    if draw and (panels := _lanes_panels(held, fleet)):
        drawn.append(plots.draw_panels(folder / "plots" / "timeline.png", panels))
        width = 6.4 if fleet is None else fleet_plots.idle_width(fleet)
        panels = _idle_panels(held, fleet)
        drawn.append(plots.draw_panels(folder / "plots" / "idle.png", panels, width))
    return drawn


def _trace(held: Traces, fleet: FleetRound | None) -> dict[str, Any]:
    if fleet is None:
        return perfetto(held)
    named = {f"{fleet.own}: {device}": events for device, events in held.items()}
    if fleet.real:
        trace = perfetto(named)
        trace["traceEvents"] += fleet_trace.perfetto(fleet, len(named) + 1)
        return trace
    trace = perfetto(named, 2)
    trace["traceEvents"] = fleet_trace.perfetto(fleet) + trace["traceEvents"]
    return trace


def _lanes_panels(held: Traces, fleet: FleetRound | None) -> list[Panel]:
    panels: list[Panel] = []
    spans = {device: span for device, events in held.items() if (span := _typical(events))}
    if spans:
        slowest = max(spans, key=lambda device: spans[device][1] - spans[device][0])
        paint = _lanes_painter(slowest, held[slowest], spans[slowest], _whose(fleet))
        panels.append((paint, HEIGHT))
    return _with_fleet(panels, fleet, fleet_plots.lanes_panel)


def _idle_panels(held: Traces, fleet: FleetRound | None) -> list[Panel]:
    shares = idle_shares(held)
    panels = [(_idle_painter(shares, _whose(fleet)), HEIGHT)] if shares else []
    return _with_fleet(panels, fleet, fleet_plots.idle_panel)


def _with_fleet(
    measured: list[Panel], fleet: FleetRound | None, panel_of: Callable[[FleetRound], Panel]
) -> list[Panel]:
    if fleet is None:
        return measured
    return [*measured, panel_of(fleet)] if fleet.real else [panel_of(fleet), *measured]


def _whose(fleet: FleetRound | None) -> str:
    return "" if fleet is None else f"{fleet.own}: ".capitalize()


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


def _works(event: Event) -> bool:
    return event.name not in ("wait", "send")


def _lanes_painter(
    device: str, events: Sequence[Event], span: tuple[float, float], whose: str
) -> plots.Paint:
    (begin, end), lanes = span, lanes_in(events)

    def paint(axes: Any) -> None:
        named: set[str] = set()
        for event in events:
            if not _works(event) or event.end_s <= begin or event.start_s >= end:
                continue
            start = max(event.start_s, begin) - begin
            axes.barh(
                lanes.index(event.lane),
                min(event.end_s, end) - begin - start,
                left=start,
                height=0.62,
                color=plots.SHADES[event.name],
                edgecolor="white",
                linewidth=0.5,
                label=None if event.name in named else event.name,
            )
            named.add(event.name)
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.set_xlim(0.0, end - begin)
        axes.grid(visible=False, axis="y")
        title = f"{whose}one mini-batch of {device}: {end - begin:.3g} s"
        axes.set(title=plots.capitalised(title), xlabel="seconds")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(named))

    return paint


def _idle_painter(shares: Mapping[str, Mapping[str, float]], whose: str) -> plots.Paint:
    lanes = [lane for lane in LANES.values() if any(lane in by_lane for by_lane in shares.values())]

    def paint(axes: Any) -> None:
        width = 0.8 / len(lanes)
        for i, lane in enumerate(lanes):
            places = [n + (i - (len(lanes) - 1) / 2) * width for n in range(len(shares))]
            values = [100 * by_lane.get(lane, 1.0) for by_lane in shares.values()]
            axes.bar(places, values, width, label=lane, color=plots.COLORS[i])
        step = max(1, len(shares) // 10)
        axes.set_xticks(range(0, len(shares), step), list(shares)[::step])
        axes.set_ylim(0, 100)
        axes.grid(visible=False, axis="x")
        title = f"{whose}share of the time in which nothing is done"
        axes.set(title=plots.capitalised(title), ylabel="percent")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(lanes))

    return paint
