"""The pictures of a trace: the lanes of one mini-batch, and what share of the time nothing is done.

Both are drawn from the events of the last round (`fedsys.tracing`): the first for the device whose
mini-batches take longest, of which its median one is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fedsys import plots
from fedsys.files import json_text, write_atomic
from fedsys.tracing import LANES, Event, perfetto

Traces = Mapping[str, Sequence[Event]]

_SHADES = {
    "load": plots.COLORS[6],
    "forward": plots.COLORS[0],
    "tail": plots.COLORS[3],
    "backward": plots.COLORS[1],
    "update": plots.COLORS[7],
    "step": plots.COLORS[0],
    "transfer": plots.COLORS[2],
}


def write(folder: Path, traces: Traces, *, draw: bool = True) -> list[Path]:
    """Write ``trace.json``, and ``plots/timeline.png`` and ``plots/idle.png``.

    Args:
        folder: Of the run.
        traces: Events by device; nothing is written if there are none.
        draw: Whether pictures are drawn.

    Returns:
        The files.

    Raises:
        RunError: A file cannot be written.
    """
    held = {device: events for device, events in traces.items() if events}
    if not held:
        return []
    path = folder / "trace.json"
    write_atomic(path, json_text(perfetto(held)).encode())
    drawn = [path]
    spans = {device: span for device, events in held.items() if (span := _typical(events))}
    if spans and draw:
        slowest = max(spans, key=lambda device: spans[device][1] - spans[device][0])
        paint = _lanes_painter(slowest, held[slowest], spans[slowest])
        drawn.append(plots.draw(folder / "plots" / "timeline.png", paint))
        drawn.append(plots.draw(folder / "plots" / "idle.png", _idle_painter(idle_shares(held))))
    return drawn


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
            shares[device] = {lane: max(0.0, 1.0 - _busy(events, lane) / whole) for lane in LANES}
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


def _lanes_painter(device: str, events: Sequence[Event], span: tuple[float, float]) -> plots.Paint:
    begin, end = span

    def paint(axes: Any) -> None:
        named: set[str] = set()
        for event in events:
            if not _works(event) or event.end_s <= begin or event.start_s >= end:
                continue
            start = max(event.start_s, begin) - begin
            axes.barh(
                LANES.index(event.lane),
                min(event.end_s, end) - begin - start,
                left=start,
                height=0.62,
                color=_SHADES[event.name],
                edgecolor="white",
                linewidth=0.5,
                label=None if event.name in named else event.name,
            )
            named.add(event.name)
        axes.set_yticks(range(len(LANES)), LANES)
        axes.invert_yaxis()
        axes.set_xlim(0.0, end - begin)
        axes.grid(visible=False, axis="y")
        axes.set(title=f"One mini-batch of {device}: {end - begin:.3g} s", xlabel="seconds")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(named))

    return paint


def _idle_painter(shares: Mapping[str, Mapping[str, float]]) -> plots.Paint:
    def paint(axes: Any) -> None:
        width = 0.8 / len(LANES)
        for i, lane in enumerate(LANES):
            places = [n + (i - (len(LANES) - 1) / 2) * width for n in range(len(shares))]
            values = [100 * by_lane[lane] for by_lane in shares.values()]
            axes.bar(places, values, width, label=lane, color=plots.COLORS[i])
        step = max(1, len(shares) // 10)
        axes.set_xticks(range(0, len(shares), step), list(shares)[::step])
        axes.set_ylim(0, 100)
        axes.grid(visible=False, axis="x")
        axes.set(title="Share of the time in which nothing is done", ylabel="percent")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(LANES))

    return paint
