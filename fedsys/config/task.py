"""The group ``task``: what a model is to learn, by which loss, and how good it is at it.

Nothing here needs torch: what a run learns is shown in tables and pictures, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedsys.errors import ConfigError, did_you_mean

KINDS: Final = ("classification", "multilabel", "regression", "segmentation", "next_token")
LOSSES: Final = ("cross_entropy", "bce", "mse", "l1", "huber")


@dataclass(frozen=True)
class Metric:
    """How good a model is: the mean of a number for each example, or a number for a whole part.

    Attributes:
        name: In files: ``val_NAME``, ``train_NAME``, ``NAME`` of the test part.
        title: For people.
        percent: Whether it is a share, which is shown in percent.
        higher: Whether more of it is better.
    """

    name: str
    title: str
    percent: bool = True
    higher: bool = True

    def text(self, value: float) -> str:
        """Return a value for people.

        >>> METRICS["accuracy"].text(0.961), METRICS["mae"].text(0.25)
        ('96.10%', '0.2500')
        """
        return f"{value:.2%}" if self.percent else f"{value:.4f}"


METRICS: Final = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy"),
        Metric("label_accuracy", "label accuracy"),
        Metric("pixel_accuracy", "pixel accuracy"),
        Metric("token_accuracy", "token accuracy"),
        Metric("mae", "mean absolute error", percent=False, higher=False),
        Metric("mse", "mean squared error", percent=False, higher=False),
        Metric("f1", "F1 score"),
        Metric("auroc", "area under ROC"),
        Metric("iou", "mean IoU"),
        Metric("r2", "R2", percent=False),
        Metric("perplexity", "perplexity", percent=False, higher=False),
    )
}
"""Those that have a name here, by it."""

USUAL: Final[Mapping[str, tuple[str, str, str]]] = {
    "classification": ("cross_entropy", "accuracy", "nats"),
    "multilabel": ("bce", "label_accuracy", "nats for each label"),
    "regression": ("mse", "mae", "mean squared error"),
    "segmentation": ("cross_entropy", "pixel_accuracy", "nats for each pixel"),
    "next_token": ("cross_entropy", "token_accuracy", "nats for each token"),
}
"""Of each kind the loss and the metric where nothing else is chosen, and in what the loss is."""


WHOLE: Final[Mapping[str, tuple[str, ...]]] = {
    "classification": ("f1", "auroc"),
    "multilabel": ("f1", "auroc"),
    "regression": ("r2",),
    "segmentation": ("iou",),
    "next_token": ("perplexity",),
}
"""Of each kind the metrics that are no mean over examples; they need torchmetrics."""

OWN_KEYS: Final = ("name", "percent", "higher", "whole")
"""Keys beside the ``_target_`` of a metric that are not given to it."""


@dataclass(frozen=True)
class TaskConfig:
    """What is learned.

    Attributes:
        kind: One of `KINDS`.
        loss: One of `LOSSES`, or a group with a ``_target_``; None: that of the kind.
        metric: One of `METRICS`, or a group with a ``_target_``, a ``name``, ``percent``,
            ``higher`` and ``whole``; None: that of the kind.
    """

    kind: str = "classification"
    loss: Any = None
    metric: Any = None

    @property
    def usual(self) -> bool:
        """Whether classes are told apart, by the cross-entropy, as all that is here can do."""
        return self.kind == "classification" and self.loss in (None, "cross_entropy")

    @property
    def classes(self) -> bool:
        """Whether targets are classes, as whole numbers."""
        return self.kind in ("classification", "segmentation", "next_token")

    @property
    def measure(self) -> Metric:
        """Return the metric, for tables and pictures."""
        return metric_of(self.metric or USUAL[self.kind][1])

    @property
    def loss_unit(self) -> str:
        """Return in what the loss is, for pictures."""
        loss = self.loss or USUAL[self.kind][0]
        if loss == USUAL[self.kind][0]:
            return USUAL[self.kind][2]
        return "of your own" if isinstance(loss, Mapping) else str(loss)


def metric_of(value: Any) -> Metric:
    """Return the metric that a value of ``task.metric`` means, as far as people see it.

    Raises:
        ConfigError: There is none of this name, or one of the user's own has no name.
    """
    if isinstance(value, Mapping):
        name = str(value.get("name") or "")
        if not name.isidentifier() or name in ("loss", *METRICS):
            raise ConfigError.of(
                "task.metric.name", name or None,
                "must be a word of letters, digits and _ that no other metric has",
            )  # fmt: skip
        kind = bool(value.get("percent", False)), bool(value.get("higher", True))
        return Metric(name, name.replace("_", " "), *kind)
    if value not in METRICS:
        hint = did_you_mean(str(value), METRICS)
        raise ConfigError.of("task.metric", value, f"must be one of {', '.join(METRICS)}", hint)
    return METRICS[value]


def check(task: TaskConfig) -> None:
    """Refuse values that name nothing.

    Raises:
        ConfigError: Names the key, its value, the rule and the way out.
    """
    if task.kind not in KINDS:
        hint = did_you_mean(task.kind, KINDS)
        raise ConfigError.of("task.kind", task.kind, f"must be one of {', '.join(KINDS)}", hint)
    for key, value in (("loss", task.loss), ("metric", task.metric)):
        if isinstance(value, Mapping) and not isinstance(value.get("_target_"), str):
            raise ConfigError.of(
                f"task.{key}._target_", value.get("_target_"), "must name a function or a class"
            )
    if task.loss is not None and not isinstance(task.loss, Mapping) and task.loss not in LOSSES:
        hint = did_you_mean(str(task.loss), LOSSES)
        raise ConfigError.of(
            "task.loss", task.loss, f"must be one of {', '.join(LOSSES)}",
            hint or "task.loss._target_=package.function takes one of your own",
        )  # fmt: skip
    loss, metric, _ = USUAL[task.kind]
    if task.loss in LOSSES and (task.loss == "cross_entropy") != task.classes:
        raise ConfigError.of("task.loss", task.loss, f"is not of task={task.kind}", f"{loss} is")
    named = metric_of(task.metric or metric).name
    errors = ("mae", "mse") if not task.classes else ()
    if named in METRICS and named not in (metric, *errors, *WHOLE[task.kind]):
        raise ConfigError.of("task.metric", named, f"is not of task={task.kind}", f"{metric} is")
