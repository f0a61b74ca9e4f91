"""Metrics that count over a whole part, and are no mean over its examples: F1, AUROC, R².

They are those of torchmetrics, by a name here or by ``_target_``, or whatever else has ``update``
and ``compute``, or a function. Outputs and targets of the part are put together before they are
looked at: a metric that is updated batch by batch may tell something else
(``findings/torchmetrics_batches_decide_accuracy.sh``). For the same reason metrics of classes are
given probabilities, which cannot be taken for logits, and numbers come in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fedsys.config import locate
from fedsys.data.options import brought
from fedsys.errors import ConfigError, FedsysError, first_line

Whole = Callable[[Tensor, Tensor], float]
"""Of outputs ``(N, …)`` and targets ``(N, …)`` of a whole part."""

_CLASSES = "torchmetrics.classification"

_NAMED: Final[Mapping[tuple[str, str], tuple[str, str]]] = {
    ("classification", "f1"): (f"{_CLASSES}.MulticlassF1Score", "num_classes"),
    ("classification", "auroc"): (f"{_CLASSES}.MulticlassAUROC", "num_classes"),
    ("multilabel", "f1"): (f"{_CLASSES}.MultilabelF1Score", "num_labels"),
    ("multilabel", "auroc"): (f"{_CLASSES}.MultilabelAUROC", "num_labels"),
    ("segmentation", "iou"): (f"{_CLASSES}.MulticlassJaccardIndex", "num_classes"),
    ("regression", "r2"): ("torchmetrics.regression.R2Score", ""),
    ("next_token", "perplexity"): ("torchmetrics.text.Perplexity", ""),
}
"""By kind of the task and name: the class of torchmetrics, and which argument has the outputs."""


def form_of(found: object) -> object:
    """Return what a function of the user's made, for people: a shape, or the name of its type."""
    return tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__


def is_whole(metric: Any) -> bool:
    """Return whether what a ``_target_`` made counts over a whole part by itself."""
    return callable(getattr(metric, "update", None)) and callable(getattr(metric, "compute", None))


def named(kind: str, name: str) -> Whole:
    """Return the metric of a name.

    Raises:
        ConfigError: torchmetrics is not installed.
    """
    brought("torchmetrics", "task.metric", name, extra="metrics")
    path, sized = _NAMED[kind, name]
    make: Any = locate(path, "task.metric")

    def whole(outputs: Tensor, targets: Tensor) -> float:
        metric = make(**{sized: outputs.shape[1]} if sized else {})
        return _computed(metric, kind, name, outputs, targets)

    return whole


def of_object(metric: Any, kind: str, told: str, higher: bool) -> Whole:
    """Return what an object with ``update`` and ``compute`` says of a whole part.

    Args:
        metric: Is copied each time.
        kind: Of the task.
        told: Its ``_target_``.
        higher: Whether more is better, as the run says.

    Raises:
        ConfigError: The object says the contrary.
    """
    better = getattr(metric, "higher_is_better", None)
    if isinstance(better, bool) and better is not higher:
        raise ConfigError.of(
            "task.metric.higher", higher, f"must be {str(better).lower()}, as {told} says"
        )
    return lambda outputs, targets: _computed(metric, kind, told, outputs, targets)


def of_function(function: Callable[[Tensor, Tensor], Any], told: str) -> Whole:
    """Return what a function of all outputs and targets says of a whole part."""
    return lambda outputs, targets: _number(_said(lambda: function(outputs, targets), told), told)


def _computed(metric: Any, kind: str, told: str, outputs: Tensor, targets: Tensor) -> float:
    outputs, targets = _shown(metric, kind, outputs, targets)

    def computed() -> Any:
        one = copy.deepcopy(metric)
        for setting, value in (("reset", ()), ("set_dtype", (torch.float64,))):
            if hasattr(one, setting):
                getattr(one, setting)(*value)
        one.update(outputs, targets)
        return one.compute()

    return _number(_said(computed, told), told)


def _shown(metric: Any, kind: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as a metric takes them."""
    outputs = outputs.double()
    if type(metric).__module__.startswith(_CLASSES):
        if kind == "multilabel":
            return outputs.sigmoid(), targets.long()
        if kind == "next_token":
            outputs, targets = outputs.flatten(0, 1), targets.flatten()
        if kind != "regression":
            return outputs.softmax(1), targets
    if kind == "regression" and outputs.shape[1:] == targets.shape[1:] == (1,):
        outputs, targets = outputs[:, 0], targets[:, 0]
    return outputs, targets.double() if targets.is_floating_point() else targets


def _said(call: Callable[[], Any], told: str) -> Any:
    try:
        return call()
    except FedsysError:
        raise
    except Exception as error:  # whatever a metric of somebody else raises
        raise ConfigError.of(
            "task.metric", told,
            f"cannot be computed: {type(error).__name__}: {first_line(error)}",
        ) from error  # fmt: skip


def _number(found: Any, told: str) -> float:
    if isinstance(found, Tensor) and found.numel() == 1:
        return float(found)
    if isinstance(found, int | float):
        return float(found)
    raise ConfigError.of(
        "task.metric", told,
        f"must return one number for a whole part, and it returned {form_of(found)}",
        "average over classes, such as average=macro",
    )  # fmt: skip


NOTHING: Final = math.nan
"""What such a metric says of mini-batches while they are trained: they are no whole part."""
