"""The pictures of a round of the modelled fleet: the lanes of one mini-batch, and who is idle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final

from fedsys.planning.resources import RESOURCES, Event
from fedsys.runs import plots
from fedsys.runs.virtual_trace import FleetRound, Shown, by_resource, one_iteration, workers

MOST_DRAWN: Final = 8
"""Devices in a picture of lanes: the slowest ones."""

MOST_BARS: Final = 10
"""Devices in a picture of idle shares: the slowest ones."""

MOST_EDGES: Final = 4
"""Edge servers in a picture: that of the critical path, and those that work most."""

_WORDS: Final = {"edge": "work of the edge"}
_CRITICAL: Final = plots.COLORS[3]

Lane = tuple[str, list[list[Event]]]


def lanes_of(shown: FleetRound, part: Shown) -> list[Lane]:
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


def lanes_panel(shown: FleetRound) -> tuple[plots.Paint, float]:
    """Return what paints the lanes of one mini-batch, and its height in inches."""
    part = one_iteration(shown)
    lanes = lanes_of(shown, part)
    scale, unit = plots.time_unit(part.end_s - part.begin_s)

    def paint(axes: Any) -> None:
        seen: set[str] = set()
        places: dict[int, float] = {}
        for row, (_, several) in enumerate(lanes):
            height = 0.72 / max(1, len(several))
            for number, events in enumerate(several):
                low = row - 0.36 + number * height
                places |= {id(event): low + height / 2 for event in events}
                _bars(axes, events, (low, height * 0.94), part, scale, seen)
        _critical(axes, shown, places, part, scale)
        axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0.0, (part.end_s - part.begin_s) / scale)
        axes.grid(visible=False, axis="y")
        took = f"{(part.end_s - part.begin_s) / scale:.3g} {unit}"
        title = f"{shown.title}: one mini-batch of {shown.names[part.device]}\n{took}"
        axes.set(
            title=plots.capitalised(title) + _shown_of(shown, MOST_DRAWN),
            xlabel=f"time ({unit})",
        )
        _legend(axes, [name for name in plots.SHADES if name in seen])

    return paint, 1.7 + 0.24 * len(lanes)


def _bars(
    axes: Any, events: Sequence[Event], place: tuple[float, float], part: Shown, scale: float,
    seen: set[str],
) -> None:  # fmt: skip
    by_shade: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        begin, end = max(event.start_s, part.begin_s), min(event.end_s, part.end_s)
        span = (begin - part.begin_s) / scale, (end - begin) / scale
        by_shade.setdefault(_shade(event), []).append(span)
    for shade, spans in by_shade.items():
        # What is narrow would vanish behind the white between it and the next one
        wide = median(length for _, length in spans) * scale > 0.01 * (part.end_s - part.begin_s)
        line = {"edgecolor": "white", "linewidth": 0.3} if wide else {"linewidth": 0.0}
        axes.broken_barh(spans, place, facecolor=plots.SHADES[shade], **line)
    seen |= set(by_shade)


def _shade(event: Event) -> str:
    kind = event.kind
    if kind in ("up", "down"):
        return "transfer"
    return event.name if kind == "device" or event.name == "update" else "edge"


def _critical(
    axes: Any, shown: FleetRound, places: Mapping[int, float], part: Shown, scale: float
) -> None:
    """Draw the critical path as one line through the bars; it is slanted where latency passes."""
    x: list[float] = []
    y: list[float] = []
    for event in shown.critical_path:
        if id(event) in places:
            for moment in (event.start_s, event.end_s):
                x.append((min(max(moment, part.begin_s), part.end_s) - part.begin_s) / scale)
                y.append(places[id(event)])
    axes.plot(x, y, color="white", linewidth=3.2, marker="", zorder=3)
    axes.plot(x, y, color=_CRITICAL, linewidth=1.6, marker="", zorder=4)


def _legend(axes: Any, seen: Iterable[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=plots.SHADES[n], label=_WORDS.get(n, n)) for n in seen]
    handles.append(Line2D([], [], color=_CRITICAL, linewidth=1.8, label="critical path"))
    axes.legend(handles=handles, **_below(4))


def _below(columns: int, points: float = 30.0) -> dict[str, Any]:
    """Return where a legend stands whatever the height of the axes: below their label."""
    return {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "ncols": columns,
            "borderaxespad": points / 9.5}  # fmt: skip


def _shown_of(shown: FleetRound, most: int) -> str:
    """Return what a title says of devices and edge servers that are not drawn."""
    edges = {e.resource for e in shown.played.timeline.events if e.kind == "edge"}
    parts = []
    if len(shown.names) > most:
        parts.append(f"the {most} slowest of {len(shown.names)} devices")
    if len(edges) > MOST_EDGES:
        parts.append(f"{MOST_EDGES} of {len(edges)} edge servers")
    return "\n" + " and ".join(parts) if parts else ""


def idle_panel(shown: FleetRound) -> tuple[plots.Paint, float]:
    """Return what paints the idle shares of resources and their mean, and its height in inches."""
    groups = idle_groups(shown)

    def paint(axes: Any) -> None:
        width = 0.8 / len(RESOURCES)
        for i, kind in enumerate(RESOURCES):
            bars = [
                (place + (list(shares).index(kind) - (len(shares) - 1) / 2) * width, shares[kind])
                for place, shares in enumerate(groups.values())
                if kind in shares
            ]
            drawn = axes.bar(
                [x for x, _ in bars],
                [100 * share for _, share in bars],
                width,
                label=RESOURCES[kind],
                color=plots.COLORS[i],
            )
            axes.bar_label(drawn, fmt="%.0f", fontsize=6)
        axes.set_xticks(range(len(groups)), groups, fontsize=8)
        axes.set_ylim(0, 106)
        axes.grid(visible=False, axis="x")
        title = f"{shown.title}: share of the round in which nothing is done"
        axes.set(title=plots.capitalised(title) + _shown_of(shown, MOST_BARS), ylabel="percent")
        axes.legend(**_below(len(RESOURCES), 38.0))

    return paint, 3.4


def idle_width(shown: FleetRound) -> float:
    """Return the inches that the groups of `idle_groups` need beside each other."""
    return max(6.4, 0.72 * len(idle_groups(shown)))


def idle_groups(shown: FleetRound) -> dict[str, dict[str, float]]:
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
