"""The part of the page about the decisions of a policy: cuts over rounds, and the last reasons."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedsys.errors import RunError
from fedsys.runs import decisions
from fedsys.runs.cuts import percent
from fedsys.runs.decision_plots import PICTURE
from fedsys.runs.decisions import OffloadDecision
from fedsys.runs.lines import seconds_text
from fedsys.runs.report import charts
from fedsys.runs.report.fleet import picture
from fedsys.runs.report.loading import Run

MOST_ROWS = 40
"""Devices in the table: the first ones, and it says so."""


def section(run: Run) -> str:
    """Return what a policy decided, as HTML without a head; empty if none did."""
    try:
        made = decisions.read(run.path)
    except (RunError, ValueError) as problem:
        return f'<p class="note failed">{escape(str(problem))}</p>'
    if not made:
        return ""
    title = "Cuts and bandwidth over rounds"
    drawn = picture(run, PICTURE, title)
    wide = f'<div class="wide">{charts.figure(title, drawn)}</div>' if drawn else ""
    return wide + _last_round(made)


def _last_round(made: Sequence[OffloadDecision]) -> str:
    number = max(entry.round for entry in made)
    entries = [entry for entry in made if entry.round == number]
    oracle = any(entry.oracle_cut is not None for entry in entries)
    head = ["device", "cut", "seen before", "predicted", "took", *["oracle"] * oracle, "why"]
    rows = "".join(_row(entry, oracle) for entry in entries[:MOST_ROWS])
    cells = "".join(f"<th>{name}</th>" for name in head)
    more = len(entries) - MOST_ROWS
    rest = f'<p class="muted">The first {MOST_ROWS} of {len(entries)}.</p>' if more > 0 else ""
    return (
        f'<h3>Why, in round {number}</h3>{rest}<div class="table"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(entry: OffloadDecision, oracle: bool) -> str:
    cells = [_cut(entry), _seen(entry), _seconds(entry.predicted_s), _seconds(entry.measured_s)]
    told = [*cells, *[_oracle(entry)] * oracle, entry.reason]
    name = f"{entry.machine} {entry.client}".strip() if entry.machine else f"client {entry.client}"
    body = "".join(f"<td>{escape(cell)}</td>" for cell in told)
    return f"<tr><th>{escape(name)}</th>{body}</tr>"


def _cut(entry: OffloadDecision) -> str:
    if entry.whole:
        return "whole model"
    return _place(entry.cut, entry.unit, entry.device_share, entry.pieces, entry.codec)


def _oracle(entry: OffloadDecision) -> str:
    if entry.oracle_cut is None:
        return "–"
    share, pieces = entry.oracle_share or 0.0, entry.oracle_pieces or 1
    place = _place(entry.oracle_cut, entry.oracle_unit, share, pieces, entry.oracle_codec)
    return f"{'whole model' if share >= 1.0 else place}: {_seconds(entry.oracle_s)}"


def _place(cut: int, unit: str, share: float, pieces: int, codec: str) -> str:
    count = "one piece" if pieces == 1 else f"{pieces} pieces"
    return f"{cut} after {unit}, {percent(share)} on the device, {count}, {codec}"


def _seen(entry: OffloadDecision) -> str:
    parts = []
    if entry.iteration_s is not None:
        parts.append(f"{seconds_text(entry.iteration_s)} an iteration")
    if entry.seen_up_mbit_s is not None and entry.seen_down_mbit_s is not None:
        parts.append(f"{entry.seen_up_mbit_s:.3g}/{entry.seen_down_mbit_s:.3g} Mbit/s")
    return ", ".join(parts) or "–"


def _seconds(value: float | None) -> str:
    return "–" if value is None else seconds_text(value)
