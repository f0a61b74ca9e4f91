"""Benchmarks: ours and the alternatives side by side in one run, one module each.

A benchmark is a module here with two functions, and a file of its name in ``conf/bench/`` that
chooses the groups it runs on and holds its options::

    def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]   # the figures
    def chart(figures: Mapping[str, Any]) -> Chart                          # the picture of them

Figures are numbers and texts by name, and tables: lists of rows by column.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import yaml

from fedsys import config as configuration
from fedsys.errors import ConfigError
from fedsys.runs.folder import RunFolder, default_path, write_atomic

_ROOM = 90  # characters that fit below a picture side by side
_KINDS = (
    ((list, tuple), "a list", "[1,2]"),
    (Mapping, "a mapping", "{a: 1}"),
    (bool, "true or false", "true"),
    ((int, float), "a number", "3"),
)
HOME = Path(__file__).resolve().parents[3]
"""The folder in which the package of fedsys is."""

SINGLE = "figures"
"""Name of the table whose one row has the figures that stand in no other table."""


@dataclass(frozen=True)
class Chart:
    """One picture of the figures.

    Attributes:
        title: Says what is compared.
        x_label: What `labels` are.
        y_label: What is measured, with its unit.
        labels: One for each position on the x axis.
        series: Values by name, one for each label; NaN for none.
        lines: Whether the positions are a sequence (lines) or cases (bars).
        log: Whether the y axis is logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    lines: bool = False
    log: bool = False


def job(tree: Any) -> Mapping[str, Any]:
    """Run the benchmark that ``bench.name`` names, in a run folder of its own.

    The folder holds ``run.json`` with the figures, a CSV file for each table and one for the
    single figures, and a picture.

    Args:
        tree: The composed configuration (a DictConfig).

    Returns:
        The figures, and the run folder as ``run_dir``.

    Raises:
        FedsysError: The configuration is not usable, or the benchmark failed.
    """
    configuration.parse(configuration.to_text(tree))  # bad values are said before a folder is made
    name = str(tree.bench.name)
    path = Path(tree.run.dir or default_path(Path("outputs"), f"bench-{name}")).absolute()
    tree.run.dir = str(path)
    config = configuration.parse(configuration.to_text(tree))
    module = importlib.import_module(f"fedsys.commands.bench.{name}")
    _check_kinds(name, config.bench)
    with RunFolder.create(path, config.text) as folder:
        options = {key: value for key, value in config.bench.items() if key != "name"}
        before = os.getloadavg()[0]
        figures = dict(module.run(config, options))
        # What else the machine did stands beside the figures: they mean less when it was busy.
        figures |= {"load_before": round(before, 2), "load_after": round(os.getloadavg()[0], 2)}
        _write_tables(folder.path, figures)
        draw(module.chart(figures), folder.path / "plots" / f"{name}.png")
        result = {**figures, "run_dir": str(path)}
        folder.finish(result)
    show(name, figures, path, sys.stderr)
    return result


def _check_kinds(name: str, options: Mapping[str, Any]) -> None:
    """Raise a ConfigError if an option is of another kind than its default in ``conf/bench/``."""
    text = (configuration.CONF / "bench" / f"{name}.yaml").read_text(encoding="utf-8")
    for key, default in yaml.safe_load(text)["bench"].items():
        value = options.get(key)
        for kind, word, example in _KINDS:
            if isinstance(default, kind):
                if value is not None and not isinstance(value, kind):
                    rule = f"must be {word}"
                    raise ConfigError.of(f"bench.{key}", value, rule, f"for instance {example}")
                break


def given_options(name: str, options: Mapping[str, Any]) -> set[str]:
    """Return the options of a benchmark that have other values than in ``conf/bench/``.

    What ``quick=true`` makes smaller are the others.
    """
    text = (configuration.CONF / "bench" / f"{name}.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)["bench"]
    return {key for key, value in options.items() if plain(value) != defaults.get(key)}


def plain(value: Any) -> Any:
    """Return a value with dicts for mappings and lists for tuples, as YAML has them."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def python_path(*first: Path) -> str:
    """Return a PYTHONPATH by which processes of a benchmark import this fedsys.

    Args:
        first: Folders before it.
    """
    return os.pathsep.join([*map(str, (*first, HOME)), *filter(None, [os.getenv("PYTHONPATH")])])


def with_quartiles(name: str, values: Iterable[float]) -> dict[str, float]:
    """Return the median of values under a name, and as ``_q1`` and ``_q3`` the quartiles."""
    ordered = sorted(values)
    return {
        name: median(ordered),
        f"{name}_q1": ordered[len(ordered) // 4],
        f"{name}_q3": ordered[len(ordered) * 3 // 4],
    }


def tables_of(figures: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the tables by name; single figures are one row of the table `SINGLE`."""
    tables = {name: list(rows) for name, rows in figures.items() if isinstance(rows, list)}
    single = {name: value for name, value in figures.items() if not isinstance(value, list)}
    return tables | ({SINGLE: [single]} if single else {})


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every column of a table in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _write_tables(folder: Path, figures: Mapping[str, Any]) -> None:
    for name, rows in tables_of(figures).items():
        text = io.StringIO()
        writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(folder / f"{name}.csv", text.getvalue().encode())


def show(name: str, figures: Mapping[str, Any], folder: Path, stream: TextIO) -> None:
    """Print the figures for a person: a table for each list of rows."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, soft_wrap=True)
    console.print(f"bench {name}", markup=False)
    for title, rows in tables_of(figures).items():
        columns = columns_of(rows)
        if title == SINGLE:
            table = Table.grid(padding=(0, 2))
            for column in columns:
                table.add_row(column, _cell(rows[0][column]))
        else:
            table = Table(*columns, title=title, title_justify="left", box=None)
            for row in rows:
                table.add_row(*(_cell(row.get(column)) for column in columns))
        # A terminal that is narrower wraps lines; cells that are cut to nothing say nothing
        natural = console.measure(table, options=console.options.update(width=10_000)).maximum
        console.width = max(console.width, natural)
        console.print(table, crop=False)
    console.print(f"figures in {folder}", markup=False)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def draw(chart: Chart, path: Path) -> Path:
    """Draw a chart in the style of all pictures and return its path."""
    from fedsys.runs import plots

    def paint(axes: Any) -> None:
        places = range(len(chart.labels))
        width = 0.8 / max(1, len(chart.series))
        for i, (name, values) in enumerate(chart.series.items()):
            color = plots.COLORS[i % len(plots.COLORS)]
            if chart.lines:
                axes.plot(places, values, label=name, color=color, marker="o")
            else:
                left = [place + (i - (len(chart.series) - 1) / 2) * width for place in places]
                axes.bar(left, values, width, label=name, color=color)
        step = max(1, len(chart.labels) // 10)
        shown = chart.labels[::step]
        axes.set_xticks(places[::step], shown)
        if sum(map(len, shown)) > _ROOM:
            axes.tick_params("x", rotation=30)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        if chart.log:
            plots.log_scale(axes)
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        if chart.series:  # below, where it covers nothing
            axes.figure.legend(loc="outside lower center", ncols=min(len(chart.series), 3))

    return plots.draw(path, paint)
