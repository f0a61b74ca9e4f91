"""Charts as SVG that takes its colours from the page, so that they follow its light or dark theme.

Every chart is drawn in a box of fixed size and scaled to its place. Marks have a `title`, which
browsers show when one points at them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fedsys.runs.plots import time_unit
from fedsys.runs.progress import seconds_text

WIDTH, HEIGHT = 460.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 40.0
COLORS = 8
"""Colours of the page's style sheet, as classes ``k0`` to ``k7``."""


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        name: For the legend.
        x: Rounds, or seconds.
        y: Values.
        color: Number of the colour.
        dashed: Whether it is the second of its colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within ``[low, high]``.

    >>> ticks(0.0, 10.0)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> ticks(0.31, 0.94)
    [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((f * power for f in (1.0, 2.0, 5.0, 10.0)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Return a short text of a number.

    >>> number(1200.0), number(0.125), number(3.0), number(10_212.4)
    ('1200', '0.125', '3', '10,212')
    """
    return f"{value:,.0f}" if 9_999.5 <= abs(value) < 1e9 else f"{value:.4g}"


def legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    """Return the legend of a chart: name, colour, and whether the line is dashed."""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true"><line x1="0" y1="4" x2="18" '
        f'y2="4" class="line k{color % COLORS}{" dashed" if dashed else ""}"/></svg>'
        f"{escape(name)}</li>"
        for name, color, dashed in entries
    )
    return f'<ul class="legend">{items}</ul>'


def lines(
    title: str, curves: Sequence[Curve], *, by: str, percent: bool = False, note: str = ""
) -> str:
    """Return a line chart with its legend.

    Args:
        title: Above the chart.
        curves: At least one, with at least one point each.
        by: ``round``, or ``time`` where x is in seconds.
        percent: Whether y is a share, shown in percent.
        note: What y is, where the title does not say it.
    """
    xs = [x for curve in curves for x in curve.x]
    factor = 100.0 if percent else 1.0
    ys = [y * factor for curve in curves for y in curve.y]
    unit, unit_name = time_unit(max(xs)) if by == "time" else (1.0, "")
    x_low, x_high = (0.0 if by == "time" else min(xs)) / unit, max(xs) / unit
    if x_low == x_high:
        x_low, x_high = x_low - 1.0, x_high + 1.0
    y_low, y_high = _room(ys, percent)

    def px(x: float) -> float:
        return LEFT + (x / unit - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y * factor) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    x_ticks = [t for t in ticks(x_low, x_high, 6) if by == "time" or t == int(t)]
    parts = [_axes([(py(t / factor), number(t)) for t in ticks(y_low, y_high)],
                   [(px(t * unit), number(t)) for t in x_ticks])]  # fmt: skip
    for curve in curves:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
        kind = f"k{curve.color % COLORS}{' dashed' if curve.dashed else ''}"
        parts.append(f'<polyline class="line {kind}" points="{points}"/>')
        for x, y in zip(curve.x, curve.y, strict=True) if len(curve.x) <= 200 else ():
            value = f"{y:.2%}" if percent else f"{y:.4g}"
            where = f"round {x:g}" if by == "round" else seconds_text(x)
            parts.append(
                f'<circle class="dot {kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" '
                f'r="{2.6 if len(curve.x) <= 40 else 1.2}">'
                f"<title>{escape(curve.name)}, {where}: {value}</title></circle>"
            )
    label = "round" if by == "round" else f"time since the start ({unit_name})"
    parts.append(_x_label(label))
    entries = [(curve.name, curve.color, curve.dashed) for curve in curves]
    return figure(title, _svg("".join(parts), title), legend(entries), note)


@dataclass(frozen=True)
class Dots:
    """Points of one kind.

    Attributes:
        name: For the legend.
        x: Places.
        y: Values.
        told: What each is, where one points at it; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    told: Sequence[str] = ()


def scatter(
    title: str, kinds: Sequence[Dots], *, x_label: str, note: str = "",
    marks: Sequence[tuple[float, str]] = (), percent: bool = False,
) -> str:  # fmt: skip
    """Return a chart of points with its legend; empty if there are none.

    Args:
        title: Above the chart.
        kinds: Points, one colour each.
        x_label: What x is, with its unit.
        note: What y is.
        marks: Upright lines: where, and what begins there.
        percent: Whether y is a share, shown in percent.
    """
    factor = 100.0 if percent else 1.0
    xs = [x for kind in kinds for x in kind.x] + [x for x, _ in marks]
    ys = [y * factor for kind in kinds for y in kind.y]
    if not ys:
        return ""
    (x_low, x_high), (y_low, y_high) = _room(xs, False), _room(ys, percent)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y * factor) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes([(py(t / factor), number(t)) for t in ticks(y_low, y_high)],
                   [(px(t), number(t)) for t in ticks(x_low, x_high, 6)])]  # fmt: skip
    for place, (x, text) in enumerate(marks):
        parts.append(_mark(px(x), text, place))
    for color, kind in enumerate(kinds):
        for index, (x, y) in enumerate(zip(kind.x, kind.y, strict=True)):
            text = kind.told[index] if kind.told else f"{kind.name}: {number(y * factor)}"
            parts.append(
                f'<circle class="dot k{color % COLORS}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3">'
                f"<title>{escape(text)}</title></circle>"
            )
    parts.append(_x_label(x_label))
    entries = [(kind.name, color, False) for color, kind in enumerate(kinds) if kind.y]
    return figure(title, _svg("".join(parts), title), legend(entries), note)


def _mark(x: float, text: str, place: int) -> str:
    """Return an upright line with a text beside it; texts of neighbours are on two heights."""
    left = x + 6.5 * len(text) > WIDTH - RIGHT  # it would end behind the right margin
    where = f'x="{x + (-3 if left else 3):.1f}" y="{TOP + 10 + 13 * (place % 2):.1f}"'
    anchor = ' text-anchor="end"' if left else ""
    return (
        f'<line class="axis dashed" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f"<text {where}{anchor}>{escape(text)}</text>"
    )


def _room(ys: Sequence[float], percent: bool) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - pad, high + pad
    if percent:
        low, high = max(low, 0.0), min(high, 100.0)
    return (0.0 if min(ys) >= 0 and low < 0 else low), high


def stacked(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return upright bars of stacked seconds, one for each row.

    Args:
        title: Above the chart.
        names: Of the parts, from the bottom up.
        rows: Label of each bar, and the seconds of its parts.
    """
    tallest = max(sum(seconds) for _, seconds in rows) or 1.0
    unit, unit_name = time_unit(tallest)
    slot = (WIDTH - LEFT - RIGHT) / len(rows)
    width = min(0.74 * slot, 34.0)
    height = HEIGHT - TOP - BOTTOM
    marks = ticks(0.0, tallest / unit)
    every = -(-len(rows) // 12)
    parts = [
        _axes(
            [(TOP + height * (1 - t * unit / tallest), number(t)) for t in marks],
            [
                (LEFT + (i + 0.5) * slot, label)
                for i, (label, _) in enumerate(rows)
                if i % every == 0
            ],
            grid_x=False,
        )
    ]
    for i, (label, seconds) in enumerate(rows):
        y = TOP + height
        for color, (name, value) in enumerate(zip(names, seconds, strict=True)):
            size = height * value / tallest
            y -= size
            parts.append(
                f'<rect class="bar k{color % COLORS}" x="{LEFT + (i + 0.5) * slot - width / 2:.1f}"'
                f' y="{y:.1f}" width="{width:.1f}" height="{size:.2f}"><title>round {escape(label)}'
                f", {escape(name)}: {seconds_text(value)}</title></rect>"
            )
    parts.append(_x_label(f"round (time in {unit_name})"))
    entries = [(name, color, False) for color, name in enumerate(names)]
    return figure(title, _svg("".join(parts), title), legend(entries))


def shares(
    title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], below: str = ""
) -> str:
    """Return one lying bar for each row that shows the shares of its parts, as HTML.

    Args:
        title: Above the bars.
        names: Of the parts.
        rows: Label of each bar, and the seconds of its parts.
        below: HTML instead of a legend.
    """
    bars = []
    for label, seconds in rows:
        total = sum(seconds) or 1.0
        parts = [value / total for value in seconds]
        told = [
            f"{name}: {seconds_text(value)}, {part:.0%}"
            for name, value, part in zip(names, seconds, parts, strict=True)
        ]
        beside = f'<span class="muted">{seconds_text(total)}</span>'
        bars.append(_lying_bar(label, parts, told, beside))
    entries = [(name, color, False) for color, name in enumerate(names)]
    return figure(title, "".join(bars), below or legend(entries))


def _lying_bar(label: str, parts: Sequence[float], told: Sequence[str], beside: str = "") -> str:
    """Return a bar of portions of one, each with what is told of it when it is pointed at."""
    pieces = "".join(
        f'<span class="piece b{color % COLORS}" style="flex-grow:{part:.5f}" '
        f'title="{escape(text)}">{f"{part:.0%}" if part > 0.09 else ""}</span>'
        for color, (part, text) in enumerate(zip(parts, told, strict=True))
        if part > 0
    )
    return (
        f'<div class="share"><div class="share-name">{escape(label)}{beside}</div>'
        f'<div class="share-bar">{pieces}</div></div>'
    )


def portions(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return one lying bar for each row that shows portions of one, as HTML.

    Args:
        title: Above the bars.
        names: Of the portions.
        rows: Label of each bar, and its portions, whose sum is 1.
    """
    bars = [
        _lying_bar(label, parts, [f"{n}: {p:.0%}" for n, p in zip(names, parts, strict=True)])
        for label, parts in rows
    ]
    entries = [(name, color, False) for color, name in enumerate(names)]
    return figure(title, "".join(bars), legend(entries))


def heat_map(title: str, classes: Sequence[str], cells: Sequence[Sequence[int]]) -> str:
    """Return a map of class by client: the darker, the more examples."""
    most = max((count for row in cells for count in row), default=0) or 1
    left, top, bottom = 74.0, 6.0, 34.0
    width = (WIDTH - left - RIGHT) / len(cells)
    height = min(24.0, max(3.0, 400.0 / len(classes)))
    box = top + height * len(classes) + bottom
    numbered = width >= 20 and height >= 13
    parts = []
    for client, row in enumerate(cells):
        for kind, count in enumerate(row):
            x, y = left + client * width, top + kind * height
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                f'height="{height - 1:.1f}" style="fill-opacity:{0.06 + 0.94 * count / most:.3f}">'
                f"<title>client {client}, {escape(classes[kind])}: {count}</title></rect>"
            )
            if numbered:
                shade = "on" if count > 0.55 * most else "off"
                parts.append(
                    f'<text class="{shade}" x="{x + width / 2:.1f}" y="{y + height / 2 + 3.5:.1f}" '
                    f'text-anchor="middle">{count}</text>'
                )
    step = max(1, math.ceil(12 / height))
    for kind in range(0, len(classes), step):
        y = top + kind * height + height / 2 + 4
        name = classes[kind] if len(classes[kind]) <= 11 else classes[kind][:10] + "…"
        parts.append(
            f'<text x="{left - 6}" y="{y:.1f}" text-anchor="end">{escape(name)}'
            f"<title>{escape(classes[kind])}</title></text>"
        )
    step = max(1, math.ceil(24 / width))
    for client in range(0, len(cells), step):
        x = left + (client + 0.5) * width
        y = box - bottom + 14
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{client}</text>')
    x = left + (WIDTH - left - RIGHT) / 2
    parts.append(f'<text x="{x:.1f}" y="{box - 4:.1f}" text-anchor="middle">client</text>')
    return figure(title, _svg("".join(parts), title, box))


def figure(title: str, picture: str, below: str = "", note: str = "") -> str:
    """Return a picture with its title, as one block of the page."""
    noted = f' <span class="muted">{escape(note)}</span>' if note else ""
    return (
        f'<figure class="panel"><figcaption>{escape(title)}{noted}</figcaption>'
        f"{picture}{below}</figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column names its rows; one of empty names has no head."""
    top = ""
    if any(head):
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        top = f"<thead><tr>{cells}</tr></thead>"
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(c)}</td>' for c in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'


def embedded(path: Path, title: str) -> str:
    """Return a picture within the page, which needs no other file; empty if there is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    code = base64.b64encode(data).decode()
    return f'<img class="plot" alt="{escape(title)}" src="data:image/png;base64,{code}"/>'


def _svg(content: str, title: str, height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{content}</svg>'
    )


def _axes(
    y_marks: Sequence[tuple[float, str]],
    x_marks: Sequence[tuple[float, str]],
    *,
    grid_x: bool = True,
) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for y, text in y_marks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x, text in x_marks:
        if grid_x:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _x_label(text: str) -> str:
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'
