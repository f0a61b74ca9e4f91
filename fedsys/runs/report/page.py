"""The report as one HTML page that needs nothing else: no network, no scripts, no other files."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from fedsys.config.task import METRICS, Metric
from fedsys.runs.happened import in_words
from fedsys.runs.plots import curves_of, time_parts
from fedsys.runs.progress import seconds_text
from fedsys.runs.report import charts, fleet, moving
from fedsys.runs.report.charts import COLORS, Curve
from fedsys.runs.report.decided import section as decided_section
from fedsys.runs.report.figures import bytes_text, figure, name_of
from fedsys.runs.report.loading import Run, differences
from fedsys.runs.report.promised import section as promised_section
from fedsys.runs.report.style import CSS

_NAMES = {"val": "validation", "train": "training", "clients_eval": "clients' own examples"}
_TOLD = (*METRICS, "loss", *(f"val_{name}" for name in METRICS), "val_loss", "rounds", "seconds",
         "model_sha256")  # fmt: skip
_SHOWN = ("cuts", "idle")  # in a part of their own
_EVENTS = 200  # rows at most


def page(runs: Sequence[Run], written: datetime, audit: Path | None = None) -> str:
    """Return the page.

    Args:
        runs: One, or several to compare.
        written: When, for the foot of the page.
        audit: Folder of an audit of what leaks; None: that which a run's ``policy.leakage`` names.
    """
    single = len(runs) == 1
    title = runs[0].name if single else f"{len(runs)} runs compared"
    parts = [_single_head(runs[0])] if single else [_comparison_head(runs)]
    parts += [_problems(runs), _curves(runs)]
    parts += [_privacy(run, audit, not single) for run in runs]
    parts += [_fleet(run, not single) for run in runs]
    parts += [_time(runs), _class_counts(runs)]
    parts += [_events(run, not single) for run in runs]
    parts += [_tables(run, not single) for run in runs]
    parts += [_environment(runs), _configuration(runs)]
    foot = f"written by fedsys report on {written:%Y-%m-%d at %H:%M}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · fedsys report</title><style>{CSS}</style></head><body><main>"
        f"{''.join(parts)}<footer>{foot}</footer></main></body></html>\n"
    )


# --------------------------------------------------------------------------------------------------
# The head: how good, how long


def _single_head(run: Run) -> str:
    settings = run.settings
    what = [_model(settings), f"on {settings.get('data.source') or 'unknown data'}"]
    what += [f"{settings.get('num_clients', '?')} clients", _strategy(settings)]
    what += [f"seed {settings.get('seed', '?')}", str(settings.get("runtime.kind", ""))]
    last = run.rounds[-1] if run.rounds else {}
    wanted = settings.get("rounds")
    rounds = f"{len(run.rounds)}" + (f" of {wanted}" if wanted != len(run.rounds) else "")
    sent = sum(float(row.get("bytes_up") or 0) + float(row.get("bytes_down") or 0)
               for row in run.rounds)  # fmt: skip
    metric = run.metric
    cards = [
        (f"test {metric.title}", _metric(metric, run.result.get(metric.name))),
        (f"validation {metric.title}", _metric(metric, last.get(f"val_{metric.name}"))),
        ("test loss", _number(run.result.get("loss"))),
        ("rounds", rounds),
        ("time", _seconds(run.result.get("seconds", last.get("seconds_elapsed")))),
        *_virtual(run),
        ("sent to and from clients", bytes_text(sent)),
    ]
    digest = run.result.get("model_sha256")
    known = f'<p class="small muted">model <code>{escape(str(digest))}</code></p>' if digest else ""
    return (
        f"<h1>{escape(run.name)} {_badge(run)}</h1>"
        f'<p class="muted">{escape(", ".join(filter(None, what)))}</p>{_cards(cards)}{known}'
    )


def _virtual(run: Run) -> list[tuple[str, str]]:
    seconds = run.result.get("virtual_s")
    return [] if seconds is None else [("time on the fleet", _seconds(seconds))]


def _comparison_head(runs: Sequence[Run]) -> str:
    goal, metrics = _common_goal(runs), {run.metric.name: run.metric for run in runs}
    columns: list[tuple[str, Callable[[Run], Any], Callable[[Any], str], int]] = [
        *(column for metric in metrics.values() for column in _metric_columns(metric)),
        ("test loss", lambda r: r.result.get("loss"), _number, -1),
        ("rounds", lambda r: len(r.rounds), str, 0),
        ("time", lambda r: r.result.get("seconds") or _last(r, "seconds_elapsed"), _seconds, 0),
    ]
    if goal is not None:
        columns.append((f"time to {goal:.0%}", lambda r: r.seconds_to(goal), _seconds, -1))
    head = "".join(f'<th class="num">{escape(name)}</th>' for name, *_ in columns)
    best = [_best([value(run) for run in runs], sign) for _, value, _, sign in columns]
    rows = []
    for index, run in enumerate(runs):
        cells = "".join(
            f'<td class="num{" best" if value(run) == top and top is not None else ""}">'
            f"{escape(form(value(run)))}</td>"
            for (_, value, form, _), top in zip(columns, best, strict=True)
        )
        rows.append(f"<tr><th>{_swatch(index)}{escape(run.name)} {_badge(run)}</th>{cells}</tr>")
    digests = {run.result.get("model_sha256") for run in runs}
    same = ""
    if len(digests) == 1 and None not in digests:
        same = (
            '<p class="note finished">All of them ended with the same model, to the bit: '
            f"<code>{escape(str(digests.pop()))}</code></p>"
        )
    return (
        f"<h1>{len(runs)} runs compared</h1>"
        f'<div class="table"><table><thead><tr><th>run</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{same}{_differences(runs)}"
    )


def _metric(metric: Metric, value: Any) -> str:
    return _percent(value) if metric.percent else _number(value)


def _metric_columns(
    metric: Metric,
) -> Iterator[tuple[str, Callable[[Run], Any], Callable[[Any], str], int]]:
    """Yield the two columns of a metric for a table of runs."""
    name, sign = metric.name, 1 if metric.higher else -1
    form = functools.partial(_metric, metric)
    yield f"test {metric.title}", lambda r: r.result.get(name), form, sign
    yield f"validation {metric.title}", lambda r: _last(r, f"val_{name}"), form, sign


def _common_goal(runs: Sequence[Run]) -> float | None:
    """Return the highest whole percent of validation accuracy that every run reached."""
    bests = [run.best("val_accuracy") for run in runs]
    reached = [best for best in bests if best is not None]
    goal = math.floor(100 * min(reached, default=0.0)) / 100
    return goal if len(reached) == len(runs) and goal > 0 else None


def _best(values: Sequence[Any], sign: int) -> Any:
    known = [v for v in values if isinstance(v, int | float) and not math.isnan(v)]
    if sign == 0 or len(known) < 2 or len(set(known)) == 1:
        return None
    return max(known) if sign > 0 else min(known)


def _differences(runs: Sequence[Run]) -> str:
    found = differences(runs)
    if not found:
        return '<h2>Configuration</h2><p class="muted">All runs have the same configuration.</p>'
    head = ["setting", *(run.name for run in runs)]
    rows = [[key, *(_value(v) for v in values)] for key, values in found.items()]
    return "<h2>What differs in their configurations</h2>" + charts.table(head, rows)


def _problems(runs: Sequence[Run]) -> str:
    return "".join(
        f'<p class="note {run.status}"><b>{escape(run.name)} {run.status}</b><br>'
        f"{escape(run.error)}</p>"
        for run in runs
        if run.error
    )


# --------------------------------------------------------------------------------------------------
# Pictures


def _curves(runs: Sequence[Run]) -> str:
    pictures = []
    metrics = {run.metric.name: run.metric for run in runs}
    usual = [*metrics] == ["accuracy"]
    for kind, percent in (*((m.name, m.percent) for m in metrics.values()), ("loss", False)):
        for by, column in (("round", "round"), ("time", "seconds_elapsed")):
            curves = _curves_of(runs, kind, column)
            if curves:
                title = metrics[kind].title if kind in metrics else kind
                what = f"{title[0].upper()}{title[1:]} by {by}"
                note = "(%)" if percent else "cross-entropy (nats)" if usual else ""
                pictures.append(charts.lines(what, curves, by=by, percent=percent, note=note))
    if not pictures:
        return '<p class="note running">No round has ended yet.</p>'
    return f'<h2>Training</h2><div class="grid2">{"".join(pictures)}</div>'


def _curves_of(runs: Sequence[Run], kind: str, column: str) -> list[Curve]:
    if len(runs) == 1:
        found = curves_of(runs[0].rounds, kind, column)
        return [
            Curve(_NAMES.get(name, name), x, y, color)
            for color, (name, (x, y)) in enumerate(found.items())
        ]
    return [
        Curve(run.name, *points, color=index % COLORS, dashed=index >= COLORS)
        for index, run in enumerate(runs)
        if (points := curves_of(run.rounds, kind, column).get("val")) is not None
    ]


def _time(runs: Sequence[Run]) -> str:
    by_run = {run.name: parts for run in runs if (parts := time_parts(run.rounds))}
    if not by_run:
        return ""
    names = list(dict.fromkeys(name for parts in by_run.values() for name in parts))
    total = [
        (run, [sum(parts[name][1]) if name in parts else 0.0 for name in names])
        for run, parts in by_run.items()
    ]
    if len(runs) > 1:
        pictures = [charts.shares("All rounds together", names, total)]
    else:
        (parts,) = by_run.values()
        rounds = next(iter(parts.values()))[0]
        table = _part_table({name: sum(parts[name][1]) for name in names}, len(rounds))
        pictures = [charts.shares("All rounds together", names, total, table)]
        size = -(-len(rounds) // 60)  # of more than 60 rounds, every few
        rows = [
            (f"{rounds[i]:g}", [parts[name][1][i] for name in names])
            for i in range(0, len(rounds), size)
        ]
        pictures.append(charts.stacked("Round by round", names, rows))
    return f'<h2>Where the time went</h2><div class="grid2">{"".join(pictures)}</div>'


def _part_table(seconds: Mapping[str, float], rounds: int) -> str:
    total = sum(seconds.values()) or 1.0
    rows = []
    for color, (name, value) in enumerate(seconds.items()):
        cells = (_seconds(value), _seconds(value / rounds), f"{value / total:.1%}")
        numbers = "".join(f'<td class="num">{cell}</td>' for cell in cells)
        rows.append(f"<tr><th>{_swatch(color)}{escape(name)}</th>{numbers}</tr>")
    head = "".join(f'<th class="num">{name}</th>' for name in ("in all", "per round", "share"))
    return (
        f'<table class="parts"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _class_counts(runs: Sequence[Run]) -> str:
    seen = []
    pictures = []
    for run in runs:
        if run.counts is None or run.counts in seen:
            continue
        seen.append(run.counts)
        same = [other.name for other in runs if other.counts == run.counts]
        title = "Training examples" if len(same) == len(runs) else ", ".join(same)
        pictures.append(charts.heat_map(title, run.counts.classes, run.counts.cells))
    if not pictures:
        return ""
    return f'<h2>Who holds what</h2><div class="grid2">{"".join(pictures)}</div>'


# --------------------------------------------------------------------------------------------------
# Tables


def _events(run: Run, several: bool) -> str:
    if not run.events:
        return ""
    began = float(run.info.get("started") or run.events[0].get("time") or 0.0)
    rows = []
    for event in run.events[:_EVENTS]:
        number = event.get("round", (event.get("fault") or {}).get("round"))
        begin = "" if number is None else f"round {number}: "
        when = seconds_text(max(float(event.get("time", began)) - began, 0.0))
        rows.append(
            [
                when.replace(" ", "\N{NO-BREAK SPACE}"),
                str(event.get("kind", "")).replace("_", " "),
                f"{begin}{in_words(event)}",
            ]
        )
    lost = [e for e in run.events if e.get("kind") == "client_lost"]
    clients = sorted({str(e.get("client")) for e in lost})
    told = ""
    if lost:
        times = "time" if len(lost) == 1 else "times"
        told = f"<p>Clients were lost {len(lost)} {times}: {escape(', '.join(clients))}.</p>"
    if len(run.events) > _EVENTS:
        told += f'<p class="muted">The first {_EVENTS} of {len(run.events)} events.</p>'
    listed = charts.table(["after", "what", "more"], rows)
    return _heading("What happened", run, several) + told + listed


def _fleet(run: Run, several: bool) -> str:
    text = fleet.section(run)
    told = _heading("Devices, edge servers and network", run, several) + text if text else ""
    decided, moved = decided_section(run), moving.section(run)
    told += _heading("Moves between edge servers", run, several) + moved if moved else ""
    return told + (_heading("Decisions", run, several) + decided if decided else "")


def _privacy(run: Run, audit: Path | None, several: bool) -> str:
    text = promised_section(run, audit)
    return _heading("Privacy", run, several) + text if text else ""


def _tables(run: Run, several: bool) -> str:
    """Return the lists in the result, such as faults and recoveries, and its other figures."""
    parts = []
    for name, value in run.result.items():
        rows = value
        if isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()):
            rows = [{"client": key, **entry} for key, entry in value.items()]
        if name in _SHOWN or not isinstance(rows, list) or not rows:
            continue
        if all(isinstance(row, Mapping) for row in rows):
            keys = list(dict.fromkeys(k for row in rows for k, v in row.items() if v is not None))
            cells = [[figure(key, row.get(key)) for key in keys] for row in rows]
            parts.append(_heading(name.replace("_", " ").capitalize(), run, several))
            parts.append(charts.table([name_of(key) for key in keys], cells))
    rows_ = [[name_of(key), figure(key, value)] for key, value in _plain_figures(run)]
    if rows_:
        parts.append(_heading("More figures", run, several))
        parts.append(charts.table(["figure", "value"], rows_))
    return "".join(parts)


def _plain_figures(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield the figures that stand alone, and those of groups such as the start."""
    for key, value in run.result.items():
        if key in (*_TOLD, *_SHOWN, "run_dir", "num_clients") or isinstance(value, list):
            continue
        if not isinstance(value, Mapping):
            yield key, value
        elif key == "startup":
            yield from ((f"startup: {part}_s", seconds) for part, seconds in value.items())


def _environment(runs: Sequence[Run]) -> str:
    def described(run: Run) -> dict[str, str]:
        threads = run.info.get("threads") or {}
        versions = run.info.get("versions") or {}
        facts = {
            "processor": run.info.get("cpu"),
            "instruction set": run.info.get("instruction_set"),
            "cores": threads.get("cores"),
            "platform": run.info.get("platform"),
            **versions,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}

    facts = [described(run) for run in runs]
    names = list(dict.fromkeys(name for found in facts for name in found))
    if not names:
        return ""
    if all(found == facts[0] for found in facts):
        rows = [[name, facts[0].get(name, "–")] for name in names]
        return "<h2>Environment</h2>" + charts.table(
            ["", "all runs"] if len(runs) > 1 else ["", ""], rows
        )
    rows = [[name, *(found.get(name, "–") for found in facts)] for name in names]
    return "<h2>Environment</h2>" + charts.table(["", *(run.name for run in runs)], rows)


def _configuration(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [[key, _value(value)] for key, value in run.settings.items()]
        if rows:
            table = charts.table(["setting", "value"], rows)
            name = f" of {escape(run.name)}" if len(runs) > 1 else ""
            parts.append(f"<details><summary>Configuration{name}</summary>{table}</details>")
    where = "".join(f"<p><code>{escape(str(run.path))}</code></p>" for run in runs)
    return f"<h2>Everything else</h2>{''.join(parts)}{where}"


# --------------------------------------------------------------------------------------------------
# Small parts


def _heading(text: str, run: Run, several: bool) -> str:
    name = f' <span class="muted">{escape(run.name)}</span>' if several else ""
    return f"<h2>{escape(text)}{name}</h2>"


def _cards(cards: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in cards
    )
    return f'<div class="cards">{items}</div>'


def _badge(run: Run) -> str:
    return f'<span class="badge {escape(run.status)}">{escape(run.status)}</span>'


def _swatch(index: int) -> str:
    return f'<span class="swatch b{index % COLORS}"></span>'


def _model(settings: Mapping[str, Any]) -> str:
    name = settings.get("model.name") or settings.get("model._target_") or "unknown model"
    return str(name).rpartition(".")[2]


def _strategy(settings: Mapping[str, Any]) -> str:
    return str(settings.get("strategy._target_") or "").rpartition(".")[2]


def _last(run: Run, column: str) -> Any:
    return run.rounds[-1].get(column) if run.rounds else None


def _percent(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else "–"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _seconds(value: Any) -> str:
    return seconds_text(float(value)) if isinstance(value, int | float) else "–"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
