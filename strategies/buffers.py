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
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
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
from fedsys.transport.messages import ARRAYS, METRICS, NUM_EXAMPLES, number
from strategies.around import Around

READERS = (FedAvg, FedAvgM, FedProx, FedAdam, FedYogi, FedAdagrad, FedMedian, FedTrimmedAvg)
"""Strategies known to write into no array that they are given; others get copies to write into."""


class TypedBuffers(Around):
    """Gives every array of the aggregate the type it had, whatever the inner strategy returns.

    Args:
        inner: Sees the parameters, and the float buffers if `step_buffers`.
        parameters: Names of the trainable parameters; every other array is a buffer.
        step_buffers: Whether float buffers go through the inner strategy, as robust rules such as
            Krum need, or are averaged by the number of examples, as server optimizers need.
            Integer buffers are always averaged, and rounded to the nearest (half to even).
    """

    def __init__(
        self, inner: Strategy, parameters: frozenset[str], *, step_buffers: bool = True
    ) -> None:
        super().__init__(inner)
        self.parameters, self.step_buffers = parameters, step_buffers
        self._sent: ArrayRecord = ArrayRecord()
        self._show = records.readable if type(inner) in READERS else records.writable

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
        """Return the aggregate with names, order and types of what was sent."""
        replies = list(replies)
        others: list[ArrayRecord] = []
        weights: list[float] = []
        for reply in replies:
            received = cast(ArrayRecord, reply.content[ARRAYS])
            reply.content[ARRAYS], rest = self._divide(self._show(received))
            others.append(rest)
            weights.append(number(reply.content.metric_records[METRICS], NUM_EXAMPLES))
        aggregate, metrics = self.inner.aggregate_train(server_round, replies)
        if aggregate is None:
            return None, metrics
        averages = average(others, weights)
        typed = ArrayRecord()
        for name, sent in self._sent.items():
            array = aggregate.get(name)
            if type(array) is Array and array.dtype == sent.dtype:
                typed[name] = array  # encoded already
            else:
                value = averages[name] if array is None else records.view(array)
                typed[name] = records.encode(with_type(value, np.dtype(sent.dtype)))
        return typed, metrics

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
    total = sum(weights)
    mean: dict[str, NDArray[Any]] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, array in state.items():
            share = records.view(array) * (weight / total)
            mean[name] = mean[name] + share if name in mean else np.asarray(share)
    return mean


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
