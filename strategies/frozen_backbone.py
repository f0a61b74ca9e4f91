"""A backbone that stays as it is while exits are trained on it, to the bit.

Clients send it back as it came, but an average of equal numbers is rounded: so what goes on is what
was sent out.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config.resilience import ResilienceConfig
from fedsys.models.resilient import PREFIXES
from fedsys.transport import records
from strategies.around import Around


class FrozenBackbone(Around):
    """Puts the backbone that a round began with into what the inner strategy makes of it.

    Args:
        inner: The strategy that it wraps.
        resilience: Says in which rounds the backbone is frozen.
    """

    def __init__(self, inner: Strategy, resilience: ResilienceConfig) -> None:
        super().__init__(inner)
        self._resilience = resilience
        self._sent = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep what is sent."""
        self._sent = arrays
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return new exits and adapters, and the backbone of before."""
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        if arrays is not None and self._resilience.frozen(server_round):
            own = [name for name in arrays if not name.startswith(PREFIXES)]
            kept, _ = records.select(self._sent, own)
            arrays = records.joined(arrays, kept)
        return arrays, metrics
