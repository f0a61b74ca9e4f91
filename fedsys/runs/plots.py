"""The pictures of a run, drawn from its ``metrics.csv`` alone.

One house style for all: colours that colour-blind readers can tell apart (Okabe and Ito, "Color
Universal Design", 2008), labelled axes with units, no decoration. Matplotlib is imported when the
first picture is drawn, and without ``pyplot``, which would choose a window system.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsys.config.task import Metric
from fedsys.files import write_atomic, writing
from fedsys.runs.measured import metric_in
from fedsys.runs.progress import seconds_text

if TYPE_CHECKING:
    from fedsys.runs.folder import RunFolder

Rows = Sequence[Mapping[str, float | str]]
Points = tuple[list[float], list[float]]
Paint = Callable[[Any], None]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
"""Okabe and Ito's colours, without their yellow, which is too light for lines, and with a grey."""

SHADES = {
    "forward": COLORS[0],
    "backward": COLORS[1],
    "tail": COLORS[3],
    "step": COLORS[0],
    "transfer": COLORS[2],
    "edge": COLORS[5],
    "load": COLORS[6],
    "update": COLORS[7],
}
"""What a device, a link or an edge does, in the colour that it has in all pictures."""

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#4D4D4D",
    "axes.grid": True,
    "axes.labelcolor": "#262626",
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "xtick.color": "#4D4D4D",
    "xtick.labelcolor": "#262626",
    "ytick.color": "#4D4D4D",
    "ytick.labelcolor": "#262626",
}
_MARKED = 40  # points up to which each gets a marker
_BARS = 60  # bars at most; of more rounds, each bar is the mean of several


def draw_all(folder: RunFolder) -> list[Path]:
    """Draw every picture for which the run has numbers, into ``plots/``.

    Returns:
        Paths of the pictures.

    Raises:
        RunError: ``metrics.csv`` cannot be read or a picture cannot be written.
    """
    rows = folder.rounds()
    plots = folder.path / "plots"
    drawn = []
    metric = metric_in((name for row in rows for name in row), folder.info.get("config"))
    for kind in (metric.name, "loss"):
        for by, column in (("round", "round"), ("time", "seconds_elapsed")):
            curves = curves_of(rows, kind, column)
            if curves:
                path = plots / f"{kind}_by_{by}.png"
                drawn.append(draw(path, _curves_painter(curves, metric, kind == "loss", by)))
    parts = time_parts(rows)
    if parts:
        drawn.append(draw(plots / "round_time.png", _time_painter(parts)))
    return drawn


# --------------------------------------------------------------------------------------------------
# Numbers: what is drawn


def curves_of(rows: Rows, kind: str, x_column: str) -> dict[str, Points]:
    """Return the points of every ``train_``, ``val_`` and other curve of a kind.

    Args:
        rows: Rounds; any value may be absent or not finite, and such points are left out.
        kind: Name of a metric, or ``"loss"``.
        x_column: Column of the horizontal axis.

    Returns:
        By what comes before the kind (``"val"``): x and y. Curves without points are left out.
    """
    columns = dict.fromkeys(name for row in rows for name in row if name.endswith(f"_{kind}"))
    curves: dict[str, Points] = {}
    for name in sorted(columns, key=lambda name: (not name.startswith("val_"), name)):
        x, y = points_of(rows, x_column, name)
        if x:
            curves[name.removesuffix(f"_{kind}")] = x, y
    return curves


def points_of(rows: Rows, x_column: str, y_column: str) -> Points:
    """Return the points of a curve; of values that are absent or not finite there is none."""
    points = [
        (x, y)
        for row in rows
        if (x := _finite(row.get(x_column))) is not None
        and (y := _finite(row.get(y_column))) is not None
    ]
    return [x for x, _ in points], [y for _, y in points]


def time_parts(rows: Rows) -> dict[str, Points]:
    """Return where the time of each round goes.

    Returns:
        By part, as in ``seconds_train``: rounds and seconds, of one length for all parts; absent
        seconds are zero. What the parts leave of ``seconds_round`` is the part ``"other"``.
        Empty if no round has a part.
    """
    rows = [row for row in rows if _finite(row.get("round")) is not None]
    whole = ("seconds_round", "seconds_elapsed")
    names = dict.fromkeys(n for r in rows for n in r if n.startswith("seconds_") and n not in whole)
    rounds = [float(row["round"]) for row in rows]
    parts: dict[str, Points] = {}
    for name in names:
        seconds = [max(_finite(row.get(name)) or 0.0, 0.0) for row in rows]
        if any(seconds):
            parts[name.removeprefix("seconds_")] = rounds, seconds
    if not parts:
        return {}
    sums = [sum(column) for column in zip(*(y for _, y in parts.values()), strict=True)]
    totals = [_finite(row.get("seconds_round")) or 0.0 for row in rows]
    other = [max(total - part, 0.0) for total, part in zip(totals, sums, strict=True)]
    if sum(other) > 0.005 * sum(sums):
        parts["other"] = rounds, other
    return parts


def time_unit(longest: float) -> tuple[float, str]:
    """Return the seconds in the unit that shows `longest` best, and its symbol.

    >>> time_unit(0.3), time_unit(90.0), time_unit(1000.0), time_unit(1e5)
    ((0.001, 'ms'), (1.0, 's'), (60.0, 'min'), (3600.0, 'h'))
    """
    for seconds, symbol, limit in ((0.001, "ms", 0.5), (1.0, "s", 300.0), (60.0, "min", 10_800.0)):
        if longest < limit:
            return seconds, symbol
    return 3600.0, "h"


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# --------------------------------------------------------------------------------------------------
# Pictures: how it is drawn


@contextmanager
def _house_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def capitalised(text: str) -> str:
    """Return a text that begins with a capital letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def draw(path: Path, paint: Paint, size: tuple[float, float] = (6.4, 4.0)) -> Path:
    """Draw one picture in the house style and return its path.

    Args:
        path: The PNG file; its folder is made.
        paint: Receives the matplotlib ``Axes`` and draws on them.
        size: Width and height in inches, at 150 dots per inch.

    Raises:
        RunError: The file cannot be written.
    """
    return draw_panels(path, [(paint, size[1])], size[0])


def draw_panels(path: Path, panels: Sequence[tuple[Paint, float]], width: float = 6.4) -> Path:
    """Draw panels below each other as one picture, in the house style, and return its path.

    Args:
        path: The PNG file; its folder is made.
        panels: What draws each, as for `draw`, and its height in inches.
        width: Of the picture in inches, at 150 dots per inch.

    Raises:
        RunError: The file cannot be written.
    """
    heights = [height for _, height in panels]
    with _house_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, sum(heights)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
        for (paint, _), (own,) in zip(panels, axes, strict=True):
            paint(own)
        data = io.BytesIO()
        figure.savefig(data, format="png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data.getvalue())
    return path


_NAMES = {"val": "validation", "train": "training"}


def _curves_painter(curves: Mapping[str, Points], metric: Metric, loss: bool, by: str) -> Paint:
    """Return what paints curves of the metric of a run, or of its loss."""
    share = metric.percent and not loss
    title = "Loss" if loss else f"{metric.title[0].upper()}{metric.title[1:]}"
    label = f"{metric.title}{' (%)' if share else ''}"
    if loss:
        label = "cross-entropy loss (nats)" if metric.name == "accuracy" else "loss"

    def paint(axes: Any) -> None:
        scale, unit = 1.0, ""
        if by == "time":
            scale, unit = time_unit(max(x[-1] for x, _ in curves.values()))
        percent = 100.0 if share else 1.0
        for color, (name, (x, y)) in zip(_cycle(len(curves)), curves.items(), strict=True):
            few = len(x) <= _MARKED
            last = f"{y[-1]:.1%}" if share else f"{y[-1]:.3g}"
            axes.plot(
                [value / scale for value in x],
                [value * percent for value in y],
                color=color,
                marker="o" if few else "",
                linewidth=1.8 if few else 1.2,
                label=f"{_NAMES.get(name, name)} {last}",
            )
        axes.set_title(f"{title} by {by}")
        axes.set_ylabel(label)
        if by == "round":
            axes.set_xlabel("round")
            _whole_rounds(axes, [value for x, _ in curves.values() for value in x])
        else:
            axes.set_xlabel(f"time since the start ({unit})")
            axes.set_xlim(left=0.0)
        # Above the axes, where no curve can run into it.
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(len(curves), 3))

    return paint


def _time_painter(parts: Mapping[str, Points]) -> Paint:
    def paint(axes: Any) -> None:
        group = -(-len(next(iter(parts.values()))[0]) // _BARS)
        means = {name: _grouped(points, group) for name, points in parts.items()}
        rounds = next(iter(means.values()))[0]
        sums = [sum(column) for column in zip(*(y for _, y in means.values()), strict=True)]
        all_seconds = sum(sum(seconds) for _, seconds in parts.values())
        scale, unit = time_unit(max(sums))
        base = [0.0] * len(rounds)
        for color, (name, (_, seconds)) in zip(_cycle(len(parts)), means.items(), strict=True):
            heights = [value / scale for value in seconds]
            whole = sum(parts[name][1])
            axes.bar(
                rounds,
                heights,
                bottom=base,
                width=0.8 * group,
                color=COLORS[6] if name == "other" else color,
                label=f"{name}  {seconds_text(whole / len(parts[name][1]))}, "
                f"{whole / all_seconds:.0%}",
            )
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axes.set_title("Where a round's time goes")
        axes.set_xlabel("round" if group == 1 else f"round (each bar is the mean of {group})")
        axes.set_ylabel(f"time ({unit})")
        axes.grid(visible=False, axis="x")
        _whole_rounds(axes, rounds)
        axes.legend(
            *(items[::-1] for items in axes.get_legend_handles_labels()),
            title="part, mean and share",
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )

    return paint


def _grouped(points: Points, size: int) -> Points:
    """Return the mean of every `size` points that follow each other."""
    x, y = (
        [sum(part) / len(part) for i in range(0, len(v), size) if (part := v[i : i + size])]
        for v in points
    )
    return x, y


def _cycle(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def log_scale(axes: Any) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _whole_rounds(axes: Any, rounds: Sequence[float]) -> None:
    """Give the horizontal axis whole numbers only, and room for a single round."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    if min(rounds) == max(rounds):
        axes.set_xlim(rounds[0] - 1.0, rounds[0] + 1.0)
