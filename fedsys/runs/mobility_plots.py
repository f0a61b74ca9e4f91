"""``plots/mobility.png``: at which edge server each device was when, and where it stood still.

Each device has a band over the rounds, in the colour of its edge server; within a round, time is
the share of its mini-batches that are done. A move is a stroke with the seconds of its pause, below
them those that the virtual clock had predicted, if it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from fedsys.runs import decisions, plots
from fedsys.runs.decisions import OffloadDecision

PICTURE: Final = "mobility.png"

MOST_DEVICES: Final = 12
"""Devices in the picture: those that move most."""

MOST_PAUSES: Final = 24
"""Moves up to which each has its seconds beside it."""

WIDTH: Final = 9.0
"""Of the picture, in inches."""

ALONE: Final = "no edge"

Moves = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class DrawnStay:
    """Where one device was for a while.

    Attributes:
        client: Partition id.
        begin: In rounds, from 1; the fraction is the share of mini-batches that are done.
        end: Likewise.
        edge: Name of the edge server; `ALONE` for none.
    """

    client: int
    begin: float
    end: float
    edge: str


def whereabouts(
    made: Sequence[OffloadDecision], moves: Moves, steps: Sequence[int]
) -> list[DrawnStay]:
    """Return where devices were, one after the other, by client.

    Args:
        made: Where they began each round.
        moves: Handovers, as the result of a run has them.
        steps: Mini-batches of each client in a round.
    """
    found = []
    for entry in sorted(made, key=lambda e: (e.client, e.round)):
        own = [m for m in moves if (m["client"], m["round"]) == (entry.client, entry.round)]
        stops = [(float(entry.round), entry.edge or ALONE)]
        for move in own:
            stops.append((entry.round + share_of(move, steps), str(move["target"])))
        stops.append((entry.round + 1.0, ""))
        found += [
            DrawnStay(entry.client, begin, max(begin, end), edge)
            for (begin, edge), (end, _) in pairwise(stops)
        ]
    return found


def share_of(move: Mapping[str, Any], steps: Sequence[int]) -> float:
    """Return the share of its mini-batches that a device had done when it moved."""
    return min(1.0, float(move["step"]) / max(1, steps[int(move["client"])]))


def draw(folder: Path, moves: Moves, steps: Sequence[int]) -> Path | None:
    """Draw where the devices of a run were; None if none moved.

    Args:
        folder: Of the run.
        moves: Handovers, as the result of the run has them.
        steps: Mini-batches of each client in a round.

    Raises:
        RunError: The picture cannot be written.
    """
    if not moves:
        return None
    try:
        made = decisions.read(folder)
    except ValueError:
        return None
    count = {entry.client: 0 for entry in made}
    for move in moves:
        count[int(move["client"])] = count.get(int(move["client"]), 0) + 1
    shown = sorted(sorted(count, key=lambda client: (-count[client], client))[:MOST_DEVICES])
    paint = _painter(whereabouts(made, moves, steps), moves, steps, shown)
    return plots.draw_panels(folder / "plots" / PICTURE, [(paint, 1.4 + 0.5 * len(shown))], WIDTH)


def _painter(
    where: Sequence[DrawnStay], moves: Moves, steps: Sequence[int], shown: Sequence[int]
) -> plots.Paint:
    edges = sorted({stay.edge for stay in where} - {ALONE})
    colors = {edge: plots.COLORS[i % len(plots.COLORS)] for i, edge in enumerate(edges)}
    colors[ALONE] = "#d0d0d0"

    def paint(axes: Any) -> None:
        for stay in where:
            if stay.client in shown:
                row = shown.index(stay.client)
                axes.barh(
                    row, stay.end - stay.begin, 0.6, stay.begin, color=colors[stay.edge], lw=0
                )
        for move in moves:
            if move["client"] in shown:
                _stroke(axes, move, steps, shown.index(move["client"]), len(moves))
        present = [name for name in (*edges, ALONE) if any(s.edge == name for s in where)]
        handles = [axes.barh([0], [0], color=colors[name]) for name in present]
        axes.legend(
            handles, present, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=6, frameon=False
        )
        last = max(stay.end for stay in where)
        axes.set_xticks(range(1, int(last) + 1) if last < 20 else axes.get_xticks())
        axes.set_xlim(1.0, last)
        axes.set_yticks(range(len(shown)), [f"device {client}" for client in shown])
        axes.set_ylim(len(shown) - 0.4, -0.75)
        axes.set_xlabel("round, and share of its mini-batches")
        axes.set_title(_title(moves))

    return paint


def _stroke(axes: Any, move: Mapping[str, Any], steps: Sequence[int], row: int, count: int) -> None:
    """Draw one move, with its pause beside it where there are few."""
    at = move["round"] + share_of(move, steps)
    axes.plot([at, at], [row - 0.36, row + 0.36], color="black", lw=1.5)
    if count <= MOST_PAUSES:
        told = f"{1e3 * move['pause_s']:.0f} ms"
        if move.get("predicted_pause_s") is not None:
            told += f"\n({1e3 * move['predicted_pause_s']:.0f})"
        axes.annotate(told, (at, row), (3, 0), textcoords="offset points", va="center", fontsize=6)


def _title(moves: Moves) -> str:
    pauses = [float(move["pause_s"]) for move in moves]
    return (
        f"{len(moves)} handovers, pauses {sum(pauses):.2f} s together and {max(pauses):.2f} s at "
        "most (predicted)"
    ).replace(" (predicted)", " (in brackets: predicted)" if _told(moves) else "")


def _told(moves: Moves) -> bool:
    return any(move.get("predicted_pause_s") is not None for move in moves)
