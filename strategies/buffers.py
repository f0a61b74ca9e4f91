"""Buffers are not parameters: they keep their type and no server optimizer steps them.

Flower's strategies see one dictionary of arrays. Averaging turns BatchNorm's integer counter into
a float64, and a server optimizer such as FedAdam would "step" a running variance, possibly below
zero. `TypedBuffers` shows the inner strategy what it may work on and averages the rest itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Strategy,
)
from numpy.typing import NDArray

from fedsys.transport import records
from fedsys.transport.messages import ARRAYS, METRICS, NUM_EXAMPLES, number, of_kind
from strategies.around import Around
from strategies.running_mean import RunningMean

AVERAGING = (FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad)
"""Strategies that look at nothing but the mean of replies, which can be made as they arrive."""

READERS = (FedAvg, FedAvgM, FedProx, FedAdam, FedYogi, FedAdagrad, FedMedian, FedTrimmedAvg)
"""Strategies known to write into no array that they are given; others get copies to write into."""


_ALIKE = records.readable(records.record_of({"": np.zeros(0, np.uint8)}))

Mean = tuple[ArrayRecord | None, MetricRecord | None, dict[str, NDArray[Any]]]
"""What the inner strategy made, and the mean of what it is not shown."""


class Unforeseen(Exception):
    """Replies do not weigh what they were expected to, so their mean is none.

    Attributes:
        weight: What they do weigh.
    """

    def __init__(self, weight: float) -> None:
        super().__init__(f"the replies weigh {weight:g}")
        self.weight = weight


class TypedBuffers(Around):
    """Gives every array of the aggregate the type it had, whatever the inner strategy returns.

    Args:
        inner: Sees the parameters, and the float buffers if `step_buffers`.
        parameters: Names of the trainable parameters; every other array is a buffer.
        step_buffers: Whether float buffers go through the inner strategy, as robust rules such as
            Krum need, or are averaged by the number of examples, as server optimizers need.
            Integer buffers are always averaged, and rounded to the nearest (half to even).

    Attributes:
        total: Examples of the clients whose replies are about to come one by one, in the order of
            their sum; None: replies are looked at when all are there.
    """

    def __init__(
        self, inner: Strategy, parameters: frozenset[str], *, step_buffers: bool = True
    ) -> None:
        super().__init__(inner)
        self.parameters, self.step_buffers = parameters, step_buffers
        self._sent: ArrayRecord = ArrayRecord()
        self._show = records.readable if type(inner) in READERS else records.writable
        self.total: float | None = None

    @property
    def averages(self) -> bool:
        """Whether the inner strategy looks at the mean of replies alone."""
        inner = self.inner
        return (
            isinstance(inner, FedAvg)
            and type(inner) in AVERAGING
            and inner.weighted_by_key == NUM_EXAMPLES
            and inner.train_metrics_aggr_fn is FedAvg().train_metrics_aggr_fn
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the inner strategy work on its arrays; the messages carry all of them."""
        self._sent = arrays
        shown, _ = self._divide(self._show(arrays))
        messages = list(self.inner.configure_train(server_round, shown, config, grid))
        for message in messages:
            message.content[ARRAYS] = arrays
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the aggregate with names, order and types of what was sent.

        Raises:
            Unforeseen: Replies that came one by one do not weigh `total`.
        """
        make = self._at_once if self.total is None else self._one_by_one
        aggregate, metrics, averages = make(server_round, replies)
        return (None if aggregate is None else self._typed(aggregate, averages)), metrics

    def _one_by_one(self, server_round: int, replies: Iterable[Message]) -> Mean:
        """Add each reply up as it comes, and let go of its arrays.

        Flower's code still checks that all replies are alike, and makes the mean of their figures.
        """
        assert self.total is not None
        mean, others, light = RunningMean(self.total), RunningMean(self.total), []
        names: frozenset[str] | None = None
        for reply in replies:
            received = cast(ArrayRecord, reply.content[ARRAYS])
            weight = number(of_kind(reply.content, MetricRecord)[METRICS], NUM_EXAMPLES)
            shown, rest = self._divide(received)
            mean.add(records.arrays_of(shown), weight)
            others.add(records.arrays_of(rest), weight)
            names = frozenset(shown) if names is None else names
            alike = names == shown.keys()
            reply.content[ARRAYS] = _ALIKE if alike else _named(shown)
            light.append(reply)
        if mean.weight != self.total:
            raise Unforeseen(mean.weight)
        _, metrics = FedAvg().aggregate_train(server_round, light)
        figures = MetricRecord({NUM_EXAMPLES: mean.weight})
        whole = records.record_of(mean.arrays)
        light[-1].content = RecordDict({ARRAYS: self._show(whole), METRICS: figures})
        aggregate, _ = self.inner.aggregate_train(server_round, light[-1:])
        return aggregate, metrics, others.arrays

    def _at_once(self, server_round: int, replies: Iterable[Message]) -> Mean:
        replies = list(replies)
        others: list[ArrayRecord] = []
        weights: list[float] = []
        for reply in replies:
            received = cast(ArrayRecord, reply.content[ARRAYS])
            # Bulyan of flwr 1.42 adds arrays up by their position
            in_order = records.joined(self._sent, received)
            in_order = in_order if in_order.keys() == received.keys() else received
            reply.content[ARRAYS], rest = self._divide(self._show(in_order))
            others.append(rest)
            weights.append(number(reply.content.metric_records[METRICS], NUM_EXAMPLES))
        aggregate, metrics = self.inner.aggregate_train(server_round, replies)
        return aggregate, metrics, {} if aggregate is None else average(others, weights)

    def _typed(self, aggregate: ArrayRecord, averages: dict[str, NDArray[Any]]) -> ArrayRecord:
        typed = ArrayRecord()
        for name, sent in self._sent.items():
            array = aggregate.get(name)
            if type(array) is Array and array.dtype == sent.dtype:
                typed[name] = array  # encoded already
            else:
                value = averages[name] if array is None else records.view(array)
                typed[name] = records.encode(with_type(value, np.dtype(sent.dtype)))
        return typed

    def _divide(self, arrays: ArrayRecord) -> tuple[ArrayRecord, ArrayRecord]:
        shown = {
            name
            for name, array in arrays.items()
            if name in self.parameters or (self.step_buffers and _is_floating(array.dtype))
        }
        return records.select(arrays, shown)


@functools.lru_cache(maxsize=256)
def _is_floating(dtype: str) -> bool:
    return np.issubdtype(np.dtype(dtype), np.floating)


def average(states: list[ArrayRecord], weights: list[float]) -> dict[str, NDArray[Any]]:
    """Return the weighted mean of each array, in float64 for integers.

    Args:
        states: The same names in each.
        weights: One for each state; need not add up to one.
    """
    mean = RunningMean(sum(weights))
    for state, weight in zip(states, weights, strict=True):
        mean.add(records.arrays_of(state), weight)
    return mean.arrays


def _named(record: ArrayRecord) -> ArrayRecord:
    """Return a record of the same names, in which nothing is."""
    return records.record_of(dict.fromkeys(record, np.zeros(0, np.uint8)))


def with_type(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the array in `dtype`; what becomes an integer is rounded, half to even.

    >>> with_type(np.array([1.5, 2.5, 2.51]), np.dtype("int64"))
    array([2, 2, 3])
    """
    if array.dtype == dtype:
        return array
    if np.issubdtype(dtype, np.integer):
        array = np.rint(array)
    return np.asarray(array.astype(dtype))
