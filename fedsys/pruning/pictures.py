"""The pictures of a portfolio: what accuracy costs, and where the channels went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsys.pruning.portfolio import Portfolio, Variant
from fedsys.runs.plots import COLORS, draw

_LAYERS = 40
"""Layers up to which each has its name below the picture."""


def draw_all(measured: Sequence[Variant], portfolio: Portfolio, folder: Path) -> list[Path]:
    """Draw accuracy over size and over latency, and the channels left in each layer.

    Args:
        measured: All candidates, those too that were refused.
        portfolio: Those that stay.
        folder: Gets the pictures.

    Returns:
        Their paths.

    Raises:
        RunError: A picture cannot be written.
    """
    stay = portfolio.variants
    first = portfolio.parent.latencies[0]
    case = f"batch {first.batch}, {first.threads} thread{'s' if first.threads > 1 else ''}"
    drawn = [
        draw(
            folder / "accuracy_by_size.png",
            _front_painter(measured, stay, lambda v: v.params, "parameters", "Accuracy by size"),
        ),
        draw(
            folder / "accuracy_by_latency.png",
            _front_painter(
                measured,
                stay,
                lambda v: v.p50_ms,
                f"median latency (ms), {case}",
                "Accuracy by latency",
            ),
        ),
    ]
    pruned = [v for v in measured if v.channels and v.precision == "float32"]
    if pruned:
        drawn.append(draw(folder / "channels.png", _channels_painter(pruned), (8.0, 4.2)))
    return drawn


def _front_painter(
    measured: Sequence[Variant],
    stay: Sequence[Variant],
    of: Callable[[Variant], float],
    x_label: str,
    title: str,
) -> Callable[[Any], None]:
    names = {variant.name for variant in stay}
    gone = [variant for variant in measured if variant.name not in names]

    def places(variants: Sequence[Variant]) -> tuple[list[float], list[float]]:
        return [of(v) for v in variants], [100.0 * v.accuracy for v in variants]

    def paint(axes: Any) -> None:
        line = sorted(stay, key=of)
        axes.plot(*places(line), color=COLORS[0], marker="o", label="in the portfolio")
        if gone:
            crosses = {"color": COLORS[6], "marker": "x", "linestyle": "", "label": "refused"}
            axes.plot(*places(gone), **crosses)
        for index, v in enumerate(line):  # the first must not reach over the axis
            axes.annotate(
                v.name,
                (of(v), 100.0 * v.accuracy),
                textcoords="offset points",
                xytext=(-6, 6) if index % 2 else (6, -11),
                horizontalalignment="right" if index % 2 else "left",
                fontsize=8,
                color="#4D4D4D",
            )
        _plain_log(axes)
        axes.margins(x=0.15, y=0.12)
        axes.set(title=title, xlabel=x_label, ylabel="validation accuracy (%)")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)

    return paint


def _plain_log(axes: Any) -> None:
    """Make the horizontal axis logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    large = EngFormatter(sep="")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(  # 0.2, not 200m, which reads badly beside a unit
        FuncFormatter(lambda x, place: f"{x:.4g}" if x < 1000.0 else large(x, place))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())


def _channels_painter(pruned: Sequence[Variant]) -> Callable[[Any], None]:
    layers = [name for name, _, _ in pruned[0].channels]

    def paint(axes: Any) -> None:
        places = range(len(layers))
        for index, variant in enumerate(pruned):
            left = {name: after / before for name, before, after in variant.channels}
            axes.plot(
                places,
                [100.0 * left.get(name, 0.0) for name in layers],
                color=COLORS[index % len(COLORS)],
                marker="o",
                label=variant.name,
            )
        step = -(-len(layers) // _LAYERS)
        axes.set_xticks(places[::step], layers[::step], rotation=90, fontsize=7)
        axes.set_ylim(0.0, 105.0)
        axes.set(title="Channels left in each layer", ylabel="channels left (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return paint
