"""What is learned, as functions: a loss on either side of a cut, and a metric.

A loss is a function of (outputs, targets, weight): ``weight`` times the mean over the examples of
a piece, so that the losses of micro-batches add up to that of their mini-batch. One of the user's
own may leave ``weight`` out; it is multiplied by it here.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsys.config import Config, call_target, locate
from fedsys.config.task import OWN_KEYS, USUAL, WHOLE, Metric, TaskConfig
from fedsys.errors import ConfigError, FedsysError, first_line
from fedsys.training import whole_metrics
from fedsys.training.whole_metrics import Whole, form_of

Loss = Callable[[Tensor, Tensor, float], Tensor]
Total = Callable[[Tensor, Tensor], Tensor]


def loss_of(outputs: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return `weight` times the mean cross-entropy of ``(rows, classes)`` outputs.

    With ``weight = rows / batch_size`` the losses of the micro-batches add up to the mean over
    the mini-batch, so their gradients add up to its gradient.
    """
    loss = F.cross_entropy(outputs, labels)
    return loss if weight == 1.0 else loss * weight


def hits_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return in how many rows of ``(rows, classes)`` the largest output is the label, int64."""
    return (outputs.argmax(1) == labels).sum()


@dataclass(frozen=True)
class Task:
    """What a run learns.

    Attributes:
        kind: One of `fedsys.config.task.KINDS`.
        loss: Of (outputs, targets, weight).
        total: Sum of the metric over the examples of a piece, a number without dimensions: int64
            of hits, or float64. Of a metric of whole parts it is not known.
        metric: How the metric is shown.
        whole: The metric of a whole part, where it is no mean over examples; else None.
    """

    kind: str
    loss: Loss
    total: Total
    metric: Metric
    whole: Whole | None = None

    @property
    def counts(self) -> bool:
        """Whether the metric counts hits."""
        return self.total is hits_of

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the loss over examples."""
        if self.kind == "classification" and self.loss is loss_of:
            return F.cross_entropy(outputs, targets, reduction="sum")
        return self.loss(outputs, targets, 1.0).double() * len(targets)

    def nothing(self, device: torch.device) -> Tensor:
        """Return a sum of the metric over no example."""
        kind = torch.int64 if self.counts else torch.float64
        return torch.zeros((), dtype=kind, device=device)


CLASSIFICATION = Task("classification", loss_of, hits_of, TaskConfig().measure)


def task_of(config: Config) -> Task:
    """Return what a run learns; kept per process and task.

    Raises:
        ConfigError: The user's own loss or metric cannot be imported or made.
    """
    task = config.task
    if task.usual and task.measure.name == "accuracy":
        return CLASSIFICATION
    return _task(json.dumps([task.kind, task.loss, task.metric], default=dict))


@functools.lru_cache(maxsize=16)
def _task(spec: str) -> Task:
    kind, loss, metric = json.loads(spec)
    shown = TaskConfig(kind, loss, metric).measure
    made = _loss(kind, loss or USUAL[kind][0])
    if shown.name in WHOLE.get(kind, ()):
        return Task(kind, made, _unknown, shown, whole_metrics.named(kind, shown.name))
    if not isinstance(metric, Mapping):
        return Task(kind, made, _by_name(shown), shown)
    function, told = _made(metric, "task.metric", *OWN_KEYS), _told(metric)
    if metric.get("whole"):
        return Task(kind, made, _unknown, shown, whole_metrics.of_function(function, told))
    if whole_metrics.is_whole(function):
        whole = whole_metrics.of_object(function, kind, told, shown.higher)
        return Task(kind, made, _unknown, shown, whole)
    return Task(kind, made, _own_total(function, told), shown)


def _weighted(mean: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def weighted(outputs: Tensor, targets: Tensor, weight: float) -> Tensor:
        loss = mean(outputs, targets)
        return loss if weight == 1.0 else loss * weight

    return weighted


_MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


def _loss(kind: str, loss: Any) -> Loss:
    if isinstance(loss, Mapping):
        return _own_loss(loss)
    if loss != "cross_entropy":
        return _weighted(_MEANS[loss])
    return _weighted(_over_tokens) if kind == "next_token" else loss_of


def _over_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``(rows, tokens, vocabulary)``."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _own_loss(spec: Mapping[str, Any]) -> Loss:
    function, told = _made(spec, "task.loss"), _told(spec)

    def checked(outputs: Tensor, *given: Any) -> Tensor:
        value = _called(function, "task.loss", told, outputs, *given)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ConfigError.of(
                "task.loss", told,
                f"must return the mean over the examples, one number, and it returned "
                f"{form_of(value)}",
                "take .mean() of it",
            )  # fmt: skip
        if outputs.requires_grad and not value.requires_grad:  # nothing would be learned
            raise ConfigError.of(
                "task.loss", told, "must be computed of the outputs, and it has no gradient",
                "leave .detach(), .item() and argmax out of it",
            )  # fmt: skip
        return value

    return checked if _takes_weight(function) else _weighted(checked)


def _told(spec: Mapping[str, Any]) -> str:
    """Return how a function of the user's is called for people: an object has a key alone."""
    return str(spec.get("key") or spec["_target_"])


def _called(function: Callable[..., Any], group: str, told: str, *given: Any) -> Any:
    """Call a function of the user's.

    Raises:
        ConfigError: It raises whatever it raises.
    """
    try:
        return function(*given)
    except FedsysError:
        raise
    except Exception as error:
        shapes = " and ".join(str(tuple(each.shape)) for each in given[:2])
        raise ConfigError.of(
            group, told,
            f"must be a function of (outputs, targets), and of {shapes} it raises "
            f"{type(error).__name__}: {first_line(error)}",
        ) from error  # fmt: skip


def _takes_weight(function: Callable[..., Any]) -> bool:
    """Return whether a function needs a weight; one that may be left out is that of classes."""
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        more = list(inspect.signature(called).parameters.values())[2:]
    except (TypeError, ValueError):  # some of torch's have no signature
        return False
    return any(each.name == "weight" and each.default is each.empty for each in more)


def _made(spec: Mapping[str, Any], group: str, *own: str) -> Callable[..., Any]:
    """Return the function of a ``_target_``, or what the class that it names makes."""
    rest = {key: value for key, value in spec.items() if key not in own}
    found = locate(str(rest["_target_"]), group)
    if inspect.isclass(found) or len(rest) > 1:
        found = call_target(rest, group)
    if not callable(found):
        raise ConfigError.of(
            f"{group}._target_", rest["_target_"], "must be a function of (outputs, targets)"
        )
    return found  # type: ignore[no-any-return]  # a callable, as was asked


# --------------------------------------------------------------------------------------------------
# Metrics: a number for each example, summed in float64, or one for a whole part


def _mean_rows(values: Tensor) -> Tensor:
    """Return the means of ``(rows, …)`` over all but the first, in float64."""
    return values.double().flatten(1).mean(1)


_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label_accuracy": lambda out, y: _mean_rows((out > 0) == (y > 0.5)),
    "pixel_accuracy": lambda out, y: _mean_rows(out.argmax(1) == y),
    "token_accuracy": lambda out, y: _mean_rows(out.argmax(-1) == y),
    "mae": lambda out, y: _mean_rows((out - y).abs()),
    "mse": lambda out, y: _mean_rows((out - y).double().square()),
}


def _by_name(shown: Metric) -> Total:
    if shown.name == "accuracy":
        return hits_of
    rows = _ROWS[shown.name]
    return lambda outputs, targets: rows(outputs, targets).sum()


def _unknown(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return what stands for the sum of a metric that is no sum."""
    return torch.full((), whole_metrics.NOTHING, dtype=torch.float64, device=outputs.device)


def _own_total(function: Callable[[Tensor, Tensor], Any], told: str) -> Total:
    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        found = _called(function, "task.metric", told, outputs, targets)
        if not isinstance(found, Tensor) or tuple(found.shape) != (len(targets),):
            raise ConfigError.of(
                "task.metric", told,
                f"must return a number for each of the {len(targets)} examples, and it returned "
                f"{form_of(found)}",
                "take the mean over all but the first dimension; what counts over a whole part, as "
                "F1, says so: task.metric.whole=true",
            )  # fmt: skip
        return found.double().sum()

    return total
