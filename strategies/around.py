"""What strategies that wrap another one have in common: they pass on what they do not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

S = TypeVar("S", bound=Strategy)


class Around(Strategy):
    """A strategy around another one, to which it passes on everything.

    Wrappers override what they change and call `inner` there. A complete one::

        class Loud(Around):
            def aggregate_train(self, server_round, replies):
                print("round", server_round)
                return self.inner.aggregate_train(server_round, replies)

    Args:
        inner: The strategy that it wraps.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """Attributes that outlive a round: they are kept in checkpoints."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def summary(self) -> None:
        """Log the settings of the inner strategy."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass on."""
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Pass on."""
        return self.inner.aggregate_evaluate(server_round, replies)


def find(strategy: Strategy, kind: type[S]) -> S | None:
    """Return the outermost layer of a strategy that is of a kind; None if there is none."""
    return next((layer for layer in _layers(strategy) if isinstance(layer, kind)), None)


def innermost(strategy: Strategy) -> Strategy:
    """Return the strategy inside all wrappers."""
    *_, last = _layers(strategy)
    return last


def _layers(strategy: Strategy) -> Iterator[Strategy]:
    layer: object = strategy
    while isinstance(layer, Strategy):
        yield layer
        layer = getattr(layer, "inner", None)
