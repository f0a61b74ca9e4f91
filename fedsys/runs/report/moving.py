"""The part of a run's page about devices that moved between edge servers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from fedsys.runs.mobility_plots import PICTURE
from fedsys.runs.report import charts
from fedsys.runs.report.fleet import picture
from fedsys.runs.report.loading import Run


def section(run: Run) -> str:
    """Return who was where when, as HTML without a head; empty if nobody moved.

    The list of all moves stands with the other lists of the result.
    """
    listed = run.result.get("moves")
    moves = [m for m in listed if isinstance(m, Mapping)] if isinstance(listed, list) else []
    if not moves:
        return ""
    pauses = [float(move.get("pause_s", 0.0)) for move in moves]
    repeated = sum(int(move.get("repeated_steps", 0)) for move in moves)
    text = (
        f"<p>{len(moves)} moves; the pause was {median(pauses):.3f} s in the median and "
        f"{max(pauses):.3f} s at most; {repeated} steps were repeated.</p>"
    )
    title = "Who was where when"
    drawn = picture(run, PICTURE, title)
    return text + (f'<div class="wide">{charts.figure(title, drawn)}</div>' if drawn else "")
