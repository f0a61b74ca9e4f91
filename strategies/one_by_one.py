"""Replies that are added up one by one as they arrive, in the order of partition ids.

What they weigh together must be known before the first is added (`strategies.running_mean`): it is
the number of examples of the clients that were asked. If one of them is lost, every product that
was added was one of the wrong factor. Then the clients that did answer train once more, which gives
the same replies to the bit, as every draw has an address. A client that was lost is not counted on
when it is asked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config import Apps, Config
from fedsys.planning.resources import Measured
from fedsys.transport import messages, records
from fedsys.transport.messages import NUM_EXAMPLES, OBSERVATION, STEPS, of_kind
from strategies.around import find, innermost
from strategies.buffers import TypedBuffers, Unforeseen
from strategies.roster import Roster
from strategies.sampling import Sampled

MUCH: int = 500_000_000
"""Bytes of the replies of a round that are worth a word where they are all kept."""


@runtime_checkable
class KeepsOrder(Protocol):
    """A grid that hands out replies in the order of the messages, as soon as that is possible."""

    def in_order(self, messages: Iterable[Message], *, timeout: float | None) -> Iterator[Message]:
        """Yield a reply to each message, in order; it counts only until the next one is taken."""


@dataclass
class RoundTally:
    """What a round counts of replies that pass by.

    Attributes:
        roster: Who is there.
        bytes_up: Of their arrays.
        examples: That they were trained on.
        steps: That they did.
        took: What an iteration took those that measured it, in seconds by partition id.
    """

    roster: Roster
    bytes_up: int = 0
    examples: int = 0
    steps: int = 0
    took: dict[int, float] = field(default_factory=dict)

    def of(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies, counted."""
        for reply in replies:
            if reply.has_content():
                self._count(reply)
            yield reply

    def _count(self, reply: Message) -> None:
        content = reply.content
        self.bytes_up += records.size_of(content)
        for told in of_kind(content, MetricRecord).values():
            self.examples += int(messages.number(told, NUM_EXAMPLES, 0))
            self.steps += int(messages.number(told, STEPS, 0))
        if (seen := of_kind(content, ConfigRecord).get(OBSERVATION)) is not None:
            client = self.roster.partition_of(reply.metadata.src_node_id)
            self.took[client] = messages.read(Measured, seen).iteration_s


def at_once_because(config: Config, strategy: Strategy) -> str:
    """Return why all replies of a round must be there before they are added up; empty: no reason.

    Args:
        config: The run.
        strategy: With all that stands around it.
    """
    layer = find(strategy, TypedBuffers)
    if layer is None or not layer.averages:
        return f"strategy {type(innermost(strategy)).__name__} needs all replies at once"
    if config.apps.client != Apps.client:
        return f"what the replies of {config.apps.client} weigh is known when all are there"
    if config.policy.get("kind", "none") != "none":
        return "what split training lost is repeated when all replies are there"
    if config.privacy.active:
        return "a client cannot be asked twice where privacy is promised"
    return "a round with faults needs all replies at once" if config.faults.list else ""


class OneByOne:
    """Has the replies of a round added up as they arrive.

    Args:
        strategy: Of which `at_once_because` knows no reason against it.
        examples: Of each client.
    """

    def __init__(self, strategy: Sampled, examples: Sequence[int]) -> None:
        layer = find(strategy, TypedBuffers)
        assert layer is not None
        self._strategy, self._layer, self._examples = strategy, layer, examples
        self._doubtful: set[int] = set()

    def aggregate(
        self,
        number: int,
        grid: KeepsOrder,
        asked: Sequence[Message],
        timeout_s: float,
    ) -> tuple[ArrayRecord | None, MetricRecord | None, RoundTally]:
        """Send the messages of a round and return what comes of the replies.

        Args:
            number: The round.
            grid: Reaches the clients.
            asked: The messages, in the order of partition ids.
            timeout_s: Longest time until all have answered, in seconds.
        """
        strategy, layer = self._strategy, self._layer
        clients = {strategy.roster.partition_of(m.metadata.dst_node_id) for m in asked}
        sure = clients - self._doubtful or clients
        total: float = sum(self._examples[k] for k in sure)
        try:
            while True:
                layer.total, tally = total, RoundTally(strategy.roster)
                replies = tally.of(grid.in_order(asked, timeout=timeout_s))
                try:
                    aggregate, metrics = strategy.aggregate_one_by_one(number, replies)
                    break
                except Unforeseen as unforeseen:
                    total, asked = unforeseen.weight, strategy.once_more()
        finally:
            layer.total = None
        self._doubtful = (self._doubtful - clients) | set(strategy.lost)
        return aggregate, metrics, tally


def one_by_one(
    config: Config, grid: Grid, strategy: Sampled, examples: Sequence[int]
) -> OneByOne | None:
    """Return what adds replies up as they arrive; None where they must all be there first."""
    if not isinstance(grid, KeepsOrder) or at_once_because(config, strategy):
        return None
    return OneByOne(strategy, examples)


def about_memory(config: Config, grid: Grid, strategy: Sampled, nbytes: int) -> list[str]:
    """Return a line about replies that are all kept, where that is much; else none.

    Args:
        config: The run.
        grid: Reaches the clients.
        strategy: With all that stands around it.
        nbytes: Of a model.
    """
    count = strategy.sampling.count(config.num_clients, train=True)
    reason = at_once_because(config, strategy)
    if not isinstance(grid, KeepsOrder) or not reason or count * nbytes < MUCH:
        return []
    return [f"the replies of {count} clients take {count * nbytes / 1e6:,.0f} MB: {reason}"]
