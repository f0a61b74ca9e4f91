"""The page of a whole life (``fedsys bench lifecycle``): every decision, predicted and measured.

One page that needs nothing else, in the style of the report: no scripts, no other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any, Final

from fedsys.runs.lines import seconds_text
from fedsys.runs.report import charts
from fedsys.runs.report.charts import Curve, Dots
from fedsys.runs.report.style import CSS

TITLES: Final = {
    "train": "Training by the fleet",
    "prune": "From the model to a portfolio",
    "partition": "Which host computes what",
    "switch": "The portfolio alone, while load rises",
    "chain": "The chain of hosts: load rises, bandwidth falls, a host dies",
}
"""Stages in their order."""

_STYLE: Final = """
.off{color:var(--muted)}.far{color:var(--bad)}.near{color:var(--good)}
.decisions td:nth-child(3){min-width:180px}.decisions td:nth-child(4){min-width:220px}
.decisions td:nth-child(5){min-width:90px}.decisions tbody th{white-space:nowrap}
.panel+.table,.grid2+.table,.grid2+.panel{margin-top:14px}
"""
_NEAR, _FAR = 0.25, 1.0
_WORDS = 400  # characters of a reason

Row = Mapping[str, Any]


def page(figures: Row, written: datetime) -> str:
    """Return the page.

    Args:
        figures: Of the benchmark: ``stages``, ``decisions``, and what tables there are.
        written: When, for the foot of the page.
    """
    stages = [str(row["stage"]) for row in figures["stages"]]
    parts = [_head(figures), _time(figures["stages"])]
    parts += [_section(stage, figures) for stage in stages]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>The life of a model · fedsys</title><link rel="icon" href="data:,">'
        f"<style>{CSS}{_STYLE}</style></head><body><main>"
        f"{''.join(parts)}<footer>written by fedsys bench lifecycle on "
        f"{written:%Y-%m-%d at %H:%M}; the same figures stand in run.json</footer>"
        "</main></body></html>\n"
    )


def _head(figures: Row) -> str:
    cards = [
        ("test accuracy", _form(figures.get("accuracy"), "accuracy")),
        ("ε spent", _form(figures.get("epsilon"), "epsilon")),
        ("served variant", figures.get("variant") or "–"),
        ("technique after the failure", figures.get("technique") or "–"),
        ("without an answer of the new route", _form(figures.get("gap_ms"), "gap, ms")),
        ("requests, without an answer", _requests(figures)),
        ("predictions off, in the median", _share(figures.get("off_median"))),
        ("time", seconds_text(float(figures["seconds"]))),
    ]
    told = "".join(
        f'<div class="card"><b>{escape(str(value))}</b><span>{escape(name)}</span></div>'
        for name, value in cards
    )
    return (
        "<h1>The life of a model</h1>"
        '<p class="muted">One configuration and one fleet, from training to the failure of a host. '
        "Every decision stands beside what was predicted of it and what was measured.</p>"
        f'<div class="cards">{told}</div>'
    )


def _requests(figures: Row) -> str:
    if figures.get("requests") is None:
        return "–"
    return f"{figures['requests']}, {figures.get('failed', 0)}"


def _time(stages: Sequence[Row]) -> str:
    names = [str(row["stage"]) for row in stages]
    seconds = [float(row["seconds"]) for row in stages]
    return charts.shares("Where the time went", names, [("all stages", seconds)])


def _section(stage: str, figures: Row) -> str:
    rows = [row for row in figures["decisions"] if row["stage"] == stage]
    pictures = "".join(_pictures(stage, figures))
    drawn = f'<div class="grid2">{pictures}</div>' if pictures else ""
    tables = "".join(_tables(stage, figures))
    return f"<h2>{escape(TITLES[stage])}</h2>{drawn}{tables}{decision_table(rows)}"


def _pictures(stage: str, figures: Row) -> Iterator[str]:
    if stage == "train":
        yield _rounds(figures.get("rounds", ()))
        yield _pauses(figures.get("moves", ()))
    elif stage == "prune":
        yield front(figures.get("variants", ()))
    elif stage == "chain":
        yield _latency(figures)


def _tables(stage: str, figures: Row) -> Iterator[str]:
    if stage == "switch":
        yield _table("What clients waited for", figures.get("switching", ()))
    elif stage == "chain":
        yield _table("Requests by phase", figures.get("phases", ()))


# --------------------------------------------------------------------------------------------------
# Decisions


def decision_table(rows: Sequence[Row]) -> str:
    """Return decisions as a table: what, why, predicted, measured, and how far off."""
    cells = "".join(f"<th>{name}</th>" for name in ("when", "who", "decision", "why", "what"))
    cells += "".join(f'<th class="num">{name}</th>' for name in ("predicted", "measured", "off"))
    body = "".join(_decision(row) for row in rows)
    return (
        f'<div class="table"><table class="decisions"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _decision(row: Row) -> str:
    quantity = str(row["quantity"])
    off = off_by(row["predicted"], row["measured"])
    near = "off" if off is None else "near" if off <= _NEAR else "far" if off > _FAR else "off"
    reason = str(row["why"])
    cells = [row["who"], row["decision"], reason[:_WORDS] + ("…" if len(reason) > _WORDS else "")]
    numbers = [_form(row["predicted"], quantity), _form(row["measured"], quantity)]
    told = "".join(f"<td>{escape(str(cell))}</td>" for cell in [*cells, quantity])
    told += "".join(f'<td class="num">{escape(text)}</td>' for text in numbers)
    return (
        f"<tr><th>{escape(str(row['when']))}</th>{told}"
        f'<td class="num {near}">{_share(off)}</td></tr>'
    )


def off_by(predicted: float | None, measured: float | None) -> float | None:
    """Return by which share of what was measured a prediction is off; None: not known.

    >>> off_by(1.5, 1.0), off_by(None, 1.0), off_by(1.0, 0.0)
    (0.5, None, None)
    """
    if predicted is None or not measured:
        return None
    return abs(predicted - measured) / abs(measured)


def _form(value: Any, quantity: str) -> str:
    """Return a number with the unit that stands behind the comma of its quantity."""
    if value is None:
        return "–"
    unit = quantity.rpartition(", ")[2] if ", " in quantity else ""
    if unit == "s":
        return seconds_text(float(value))
    if quantity == "accuracy":
        return f"{value:.2%}"
    return f"{charts.number(float(value))} {unit}".strip()


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


# --------------------------------------------------------------------------------------------------
# Pictures


def _rounds(rows: Sequence[Row]) -> str:
    curves = []
    for color, (name, key) in enumerate((("predicted", "predicted_s"), ("measured", "measured_s"))):
        known = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
        if known:
            curves.append(Curve(name, [x for x, _ in known], [y for _, y in known], color))
    if not curves:
        return ""
    return charts.lines("The slowest device of each round", curves, by="round", note="(s)")


def _pauses(moves: Sequence[Row]) -> str:
    if not moves:
        return ""
    rows = [
        [f"device {m['client']}", str(m["round"]), f"{m['source']} → {m['target']}",
         _form(m["predicted_pause_s"], "pause, s"), _form(m["pause_s"], "pause, s")]
        for m in moves
    ]  # fmt: skip
    head = ["who", "round", "from and to", "predicted", "measured"]
    return charts.figure("Pauses of moves", charts.table(head, rows))


def front(variants: Sequence[Row]) -> str:
    """Return the portfolio as points of latency and accuracy."""
    kinds = [
        Dots(
            str(one["name"]), [float(one["p50_ms"])], [float(one["accuracy"])],
            [f"{one['name']}: {one['accuracy']:.2%} in {one['p50_ms']:.3g} ms"],
        )
        for one in variants
    ]  # fmt: skip
    return charts.scatter(
        "The portfolio", kinds, x_label="median latency (ms)", note="validation accuracy (%)",
        percent=True,
    )  # fmt: skip


def _latency(figures: Row) -> str:
    points, phases = figures.get("latency", ()), figures.get("phases", ())
    names = list(dict.fromkeys(str(point["technique"]) for point in points))
    marks = [(float(row["began_s"]), str(row["phase"])) for row in phases]
    kinds = [_requests_by(name, points) for name in names]
    return charts.scatter(
        "Requests", kinds, x_label="seconds", note="milliseconds until the answer", marks=marks
    )


def _requests_by(technique: str, points: Sequence[Row]) -> Dots:
    own = [point for point in points if point["technique"] == technique]
    return Dots(
        "all hosts" if technique == "none" else technique,
        [float(point["at_s"]) for point in own],
        [float(point["ms"]) for point in own],
        [f"{point['ms']:.4g} ms by cuts {point['cuts']}" for point in own],
    )


def _table(title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return charts.figure(title, charts.table([name.replace("_", " ") for name in names], cells))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return charts.number(value) if isinstance(value, float) else str(value)
