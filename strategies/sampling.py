"""Partial participation: who trains in a round is a function of (seed, round).

Flower's strategies draw nodes from the process-wide generator, out of node ids that are random
themselves. `Sampled` draws partition ids instead, shows the inner strategy only the chosen nodes,
and puts messages and replies into the order of partition ids, so that sums are always made in the
same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.errors import ConfigError, RuntimeFailure, is_number
from fedsys.randomness import SERVER, Address
from fedsys.runtime.grids import ChosenNodes
from strategies.around import Around
from strategies.roster import Roster


@dataclass(frozen=True)
class Sampling:
    """How many clients take part.

    Attributes:
        fraction_train: Share of the clients that train in a round, in (0, 1].
        fraction_evaluate: Share that evaluates after it, in [0, 1].
        min_train_nodes: Lower bound on the number that trains.
        min_evaluate_nodes: Lower bound on the number that evaluates, unless the share is 0.
    """

    fraction_train: float = 1.0
    fraction_evaluate: float = 0.0
    min_train_nodes: int = 1
    min_evaluate_nodes: int = 1

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Sampling:
        """Take the keys of this class out of the ``strategy`` group and check them.

        Raises:
            ConfigError: A value is out of its range.
        """
        found = {name: spec.pop(name) for name in cls.__dataclass_fields__ if name in spec}
        for name, value in found.items():
            if name.startswith("fraction"):
                some = name == "fraction_train"
                if not is_number(value) or not 0 <= value <= 1 or (some and value == 0):
                    rule = f"must be in {'(0, 1]' if some else '[0, 1]'}"
                    raise ConfigError.of(f"strategy.{name}", value, rule)
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError.of(f"strategy.{name}", value, "must be a whole number above 0")
        return cls(**found)

    def count(self, available: int, *, train: bool) -> int:
        """Return how many of the available clients take part.

        >>> Sampling(fraction_train=0.29).count(100, train=True)
        29
        """
        fraction = self.fraction_train if train else self.fraction_evaluate
        if fraction == 0:
            return 0
        least = self.min_train_nodes if train else self.min_evaluate_nodes
        wanted = math.floor(available * fraction + 1e-9)  # 100 x 0.29 is 28.999…96
        return min(available, max(wanted, least, 1))


def choose(partitions: Sequence[int], count: int, address: Address, purpose: str) -> list[int]:
    """Draw `count` of the partition ids without replacement; sorted."""
    generator = address.numpy(purpose)
    chosen = generator.choice(len(partitions), size=count, replace=False)
    return sorted(partitions[int(i)] for i in chosen)


class Sampled(Around):
    """Chooses the clients of each round and keeps everything in the order of partition ids.

    Args:
        inner: Sees a grid with the chosen nodes only, and valid replies only.
        roster: Who is there.
        sampling: How many take part.
        seed: The ``seed`` of the run.

    Attributes:
        lost: After `aggregate_train`: why each client that was asked did not contribute.
    """

    def __init__(self, inner: Strategy, roster: Roster, sampling: Sampling, *, seed: int) -> None:
        super().__init__(inner)
        self.roster, self.sampling, self.seed = roster, sampling, seed
        self.lost: dict[int, str] = {}
        self._asked: dict[int, Message] = {}
        self._contents: dict[int, RecordDict] = {}
        self._lost_before: dict[int, str] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each client chosen for this round."""
        chosen = self._choose(server_round, grid, train=True)
        return self._asking(self.inner.configure_train(server_round, arrays, config, chosen))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Have the inner strategy aggregate what arrived, in the order of partition ids.

        Raises:
            RuntimeFailure: Not one client succeeded; with what the first of them said.
        """
        result = self.inner.aggregate_train(server_round, self._valid(replies, "train"))
        # Split training can lose a client after it answered: with the edge that has its other half.
        self.lost.update(getattr(self.inner, "lost", {}))
        return result

    def aggregate_one_by_one(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do the same with replies that come in the order of partition ids, each as it comes.

        Raises:
            RuntimeFailure: Not one client succeeded; with what the first of them said.
        """
        return self.inner.aggregate_train(server_round, self._passing(replies))

    def once_more(self) -> list[Message]:
        """Return messages as before to the clients that answered; the others stay lost."""
        self._lost_before = dict(self.lost)
        again = {
            partition: Message(
                self._contents[partition],
                message.metadata.dst_node_id,
                message.metadata.message_type,
                group_id=message.metadata.group_id,
            )
            for partition, message in self._asked.items()
            if partition not in self.lost
        }
        self._asked = again
        return list(again.values())

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each client chosen to evaluate; none when the share is 0."""
        if self.sampling.fraction_evaluate == 0:
            return []
        chosen = self._choose(server_round, grid, train=False)
        return self._asking(self.inner.configure_evaluate(server_round, arrays, config, chosen))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Have the inner strategy aggregate the evaluations, in the order of partition ids."""
        return self.inner.aggregate_evaluate(server_round, self._valid(replies, "evaluate"))

    def _choose(self, server_round: int, grid: Grid, *, train: bool) -> Grid:
        present = self.roster.refresh(grid)
        if not present:
            raise RuntimeFailure("no client is connected; start at least one node")
        count = self.sampling.count(len(present), train=train)
        purpose = "sample-train" if train else "sample-evaluate"
        chosen = choose(list(present), count, Address(self.seed, round=server_round), purpose)
        return ChosenNodes(grid, [present[partition] for partition in chosen])

    def _asking(self, messages: Iterable[Message]) -> list[Message]:
        """Return the messages in the order of partition ids, and remember whom they ask."""
        asked = {self.roster.partition_of(m.metadata.dst_node_id): m for m in messages}
        self._asked, self._lost_before = dict(sorted(asked.items())), {}
        self._contents = {partition: m.content for partition, m in self._asked.items()}
        return list(self._asked.values())

    def _valid(self, replies: Iterable[Message], phase: str) -> list[Message]:
        valid: dict[int, Message] = {}
        for partition, reply in self._taken(replies, phase):
            valid[partition] = reply
        return [valid[partition] for partition in sorted(valid)]

    def _passing(self, replies: Iterable[Message]) -> Iterator[Message]:
        return (reply for _, reply in self._taken(replies, "train"))

    def _taken(self, replies: Iterable[Message], phase: str) -> Iterator[tuple[int, Message]]:
        """Yield replies that are no errors, and settle at the end who is lost.

        Raises:
            RuntimeFailure: Not one client succeeded; with what the first of them said.
        """
        # An error reply may carry the id of the SuperLink instead of the node's, so who failed
        # follows from the message that is answered; the grid gave it its id when it was sent.
        asked = {m.metadata.message_id: partition for partition, m in self._asked.items()}
        valid: set[int] = set()
        reasons: dict[int, str] = {}
        for reply in replies:
            if reply.has_error():
                partition = asked.get(reply.metadata.reply_to_message_id, SERVER)
                reasons[partition] = reply.error.reason or f"error {reply.error.code}"
            else:
                partition = self.roster.partition_of(reply.metadata.src_node_id)
                valid.add(partition)
                yield partition, reply
        unnamed = reasons.get(SERVER, "no reply")
        lost = {p: reasons.get(p, unnamed) for p in self._asked if p not in valid}
        self.lost = self._lost_before | lost
        if not valid:
            first = reasons[min(reasons)] if reasons else "no reply at all"
            raise _failure(f"{phase}: none of {len(self._asked)} clients succeeded; {first}", first)


def _failure(text: str, reason: str) -> RuntimeFailure | ConfigError:
    return ConfigError(text) if reason.startswith("ConfigError") else RuntimeFailure(text)
