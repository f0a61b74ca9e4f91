"""``plots/decisions.png``: the cuts of devices over rounds, above their bandwidth.

Each device has two bands: what was decided, and below it, narrower, what the oracle would have
chosen. The last panel has the time of rounds, as they were and with the oracle's choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from fedsys.runs import decisions, plots
from fedsys.runs.cuts import percent
from fedsys.runs.decisions import OffloadDecision

PICTURE: Final = "decisions.png"

MOST_DEVICES: Final = 10
"""Devices in the picture: those whose rounds take longest."""

WIDTH: Final = 9.0
"""Of the picture, in inches."""

Made = Sequence[OffloadDecision]


def draw(folder: Path) -> Path | None:
    """Draw the decisions of a run; None if there are none that can be read.

    Args:
        folder: Of the run.

    Raises:
        RunError: The picture cannot be written.
    """
    try:
        made = decisions.read(folder)
    except ValueError:
        return None
    if not made:
        return None
    return plots.draw_panels(folder / "plots" / PICTURE, panels(made), WIDTH)


def panels(made: Made) -> list[tuple[plots.Paint, float]]:
    """Return what draws each panel, and its height in inches."""
    shown = slowest(made, MOST_DEVICES)
    rounds = sorted({entry.round for entry in made})
    found = [(_cuts_painter(made, shown, rounds), 1.3 + 0.42 * len(shown))]
    if any(_rate(entry) for entry in made):
        found.append((_rates_painter(made, shown, rounds), 2.5))
    if any(entry.oracle_s is not None for entry in made):
        found.append((_time_painter(made, rounds), 2.5))
    return found


def slowest(made: Made, most: int) -> list[int]:
    """Return the clients whose rounds take longest in the mean, at most so many, ascending."""
    took: dict[int, list[float]] = {}
    for entry in made:
        took.setdefault(entry.client, []).append(entry.measured_s or 0.0)
    order = sorted(took, key=lambda client: (-fmean(took[client]), client))
    return sorted(order[:most])


def _name(made: Made, client: int) -> str:
    machine = next((entry.machine for entry in made if entry.client == client), "")
    return f"{machine} {client}".strip() if machine else f"device {client}"


def _rate(entry: OffloadDecision) -> float | None:
    """Return the rate of a device to its edge in a round, in Mbit/s; else what was seen before."""
    return entry.up_mbit_s or entry.seen_up_mbit_s


# --------------------------------------------------------------------------------------------------
# Panels


def _cuts_painter(made: Made, shown: Sequence[int], rounds: Sequence[int]) -> plots.Paint:
    def paint(axes: Any) -> None:
        places = _places(made)
        colors = dict(zip(places, _shades(len(places)), strict=True))
        oracle = any(entry.oracle_cut is not None for entry in made)
        for y, client in enumerate(shown):
            mine = [entry for entry in made if entry.client == client]
            bands: list[tuple[float, float, dict[int, int | None]]] = [
                (y - 0.42, 0.54 if oracle else 0.84, {e.round: e.cut for e in mine}),
                (y + 0.16, 0.26, {e.round: e.oracle_cut for e in mine}),
            ]
            for bottom, height, cuts in bands:
                for first, count, cut in _stretches(cuts):
                    place = [(first - 0.5, count)], (bottom, height)
                    axes.broken_barh(*place, color=colors[cut], linewidth=0)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
        axes.set_yticks(range(len(shown)), [_name(made, client) for client in shown])
        axes.grid(visible=False)
        axes.set_xlabel("round")
        axes.set_title(_cuts_title(made, shown, oracle))
        _legend(axes, [(colors[cut], text) for cut, text in places.items()], "cut, share on device")

    return paint


def _cuts_title(made: Made, shown: Sequence[int], oracle: bool) -> str:
    devices = len({entry.client for entry in made})
    some = f" of the {len(shown)} slowest of {devices} devices" if len(shown) < devices else ""
    beside = ", and below them the oracle's" if oracle else ""
    return f"Cuts{some}{beside}"


def _places(made: Made) -> dict[int, str]:
    """Return the cuts that occur, ascending, in words."""
    found: dict[int, tuple[str, float]] = {}
    for entry in made:
        found[entry.cut] = entry.unit, entry.device_share
        if entry.oracle_cut is not None:
            found[entry.oracle_cut] = entry.oracle_unit, entry.oracle_share or 0.0
    return {
        cut: "whole model" if share >= 1.0 else f"{cut} after {unit}, {percent(share)}"
        for cut, (unit, share) in sorted(found.items())
    }


def _shades(count: int) -> list[Any]:
    """Return colours that are told apart by lightness, dark for little on the device."""
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    return [scale(i / max(1, count - 1)) for i in range(count)]


def _stretches(cuts: Mapping[int, int | None]) -> list[tuple[int, int, int]]:
    """Return stretches of rounds with the same cut: the first round, how many, and the cut.

    >>> _stretches({1: 2, 2: 2, 3: None, 4: 5, 6: 5})
    [(1, 2, 2), (4, 1, 5), (6, 1, 5)]
    """
    found: list[tuple[int, int, int]] = []
    for number, cut in sorted(cuts.items()):
        if cut is None:
            continue
        first, count, before = found[-1] if found else (number, 0, -1)
        if before == cut and first + count == number:
            found[-1] = first, count + 1, cut
        else:
            found.append((number, 1, cut))
    return found


def _rates_painter(made: Made, shown: Sequence[int], rounds: Sequence[int]) -> plots.Paint:
    def paint(axes: Any) -> None:
        for color, client in enumerate(shown):
            points = [(e.round, rate) for e in made if e.client == client and (rate := _rate(e))]
            if points:
                x, y = zip(*points, strict=True)
                axes.step(
                    x, y, where="mid", color=plots.COLORS[color % len(plots.COLORS)],
                    linestyle="-" if color < len(plots.COLORS) else "--",
                    label=_name(made, client),
                )  # fmt: skip
        plots.log_scale(axes)
        axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
        axes.set(title="Bandwidth to the edge", xlabel="round", ylabel="Mbit/s")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return paint


def _time_painter(made: Made, rounds: Sequence[int]) -> plots.Paint:
    own = _slowest_of(made, lambda entry: entry.measured_s)
    best = _slowest_of(made, lambda entry: entry.oracle_s)

    def paint(axes: Any) -> None:
        scale, unit = plots.time_unit(max([*own.values(), *best.values()], default=1.0))
        for color, (label, seconds) in enumerate({"as decided": own, "oracle": best}.items()):
            axes.step(
                list(seconds), [value / scale for value in seconds.values()], where="mid",
                color=plots.COLORS[color], label=label, linestyle="-" if not color else "--",
            )  # fmt: skip
        both = [(own[n], best[n]) for n in rounds if n in own and best.get(n, 0.0) > 0]
        over = fmean(a / b - 1.0 for a, b in both) if both else math.nan
        axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
        axes.set_ylim(bottom=0.0)
        title = f"Time of a round: {over:.1%} above the oracle's in the mean"
        axes.set(title=title, xlabel="round", ylabel=f"time ({unit})")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return paint


def _slowest_of(
    made: Made, seconds: Callable[[OffloadDecision], float | None]
) -> Mapping[int, float]:
    found: dict[int, float] = {}
    for entry in made:
        if (value := seconds(entry)) is not None:
            found[entry.round] = max(found.get(entry.round, 0.0), value)
    return found


def _legend(axes: Any, entries: Sequence[tuple[Any, str]], title: str) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=color, label=text) for color, text in entries],
        title=title, alignment="left", loc="upper left", bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
