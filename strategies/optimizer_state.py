"""Optimizer state of clients that lives on from round to round (``client.keep_optimizer``).

Clients hold nothing between messages: the state travels with the reply and comes back with the
next message to the same partition. So it makes no difference which process serves a client in
which round, and one checkpoint of the server is a checkpoint of the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.transport import records
from fedsys.transport.messages import OPTIMIZER
from strategies.around import Around
from strategies.roster import Roster


class KeptState(Around):
    """Keeps the record ``optimizer`` of each client's reply and sends it with its next message.

    Attributes:
        states: The record of each client by partition id.
    """

    STATE = ("states",)

    def __init__(self, inner: Strategy, roster: Roster) -> None:
        super().__init__(inner)
        self.roster = roster
        self.states: dict[int, ArrayRecord] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Add to each message what its client left behind in its last round."""
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        for message in messages:
            state = self.states.get(self.roster.partition_of(message.metadata.dst_node_id))
            if state is not None:
                message.content = records.own_copy(message.content)
                message.content[OPTIMIZER] = state
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the states out of the replies and keep them."""
        return self.inner.aggregate_train(server_round, self._kept_of(replies))

    def _kept_of(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            state = reply.content.array_records.get(OPTIMIZER)
            if state is not None:
                client = self.roster.partition_of(reply.metadata.src_node_id)
                self.states[client] = records.lasting(state)
                del reply.content[OPTIMIZER]
            yield reply
