"""By which metric a run was judged, from the names of its columns and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedsys.config.task import METRICS, Metric


def metric_in(names: Iterable[str], config: Any = None) -> Metric:
    """Return the metric of a run: what it has a ``val_`` of beside the loss.

    Args:
        names: Of the columns of ``metrics.csv``, or of figures in ``run.json``.
        config: Of the run, as ``run.json`` has it: says of a metric of the user's own whether it is
            a share, and whether more is better. Without it, it is no share, and more is better.

    >>> metric_in(["round", "val_mae", "val_loss"]).title, metric_in(["round"]).title
    ('mean absolute error', 'accuracy')
    """
    for name in names:
        found = name.removeprefix("val_")
        if found not in (name, "loss"):
            own = _own(config)
            kind = bool(own.get("percent", False)), bool(own.get("higher", True))
            return METRICS.get(found) or Metric(found, found.replace("_", " "), *kind)
    return METRICS["accuracy"]


def _own(config: Any) -> Mapping[str, Any]:
    """Return the group ``task.metric`` of a run; empty where it has none."""
    for key in ("task", "metric"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def shown(row: Mapping[str, Any], prefix: str = "") -> str:
    """Return the metric of a row or of figures for a table; empty if it has none.

    >>> shown({"val_mae": 0.5, "mae": 0.4}), shown({"val_accuracy": 0.5}, "val_")
    ('mae 0.4000', '50.00%')
    """
    metric = metric_in(row)
    value = row.get(f"{prefix}{metric.name}")
    if not isinstance(value, int | float):
        return ""
    return (
        metric.text(value) if metric.name == "accuracy" else f"{metric.name} {metric.text(value)}"
    )
