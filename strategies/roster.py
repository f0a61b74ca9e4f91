"""Who is there: the nodes that Flower sees, by the partition id that names them for good.

Flower's node ids are random and change with each run. Everything in fedsys that concerns a client
(its data, its draws, its place in a sum) goes by the partition id that the client tells when it
is asked. Nodes come and go: a roster is asked anew in each round, and waits where Flower's own
strategies would wait for ever, for a limited time.

`fedsys train` says how many clients there are, and the run waits for as many nodes. Users of
Flower expect the opposite of ``flwr run``: there are as many clients as nodes, and every node is
used. Then the number follows from the nodes, and the clients are told (`gather`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.identity import differences
from fedsys.runtime.grids import AnnotatedGrid, AttentiveGrid
from fedsys.training import federation
from fedsys.transport.messages import FEDERATION, IDENTITY, Division, Identity, read, written

IDENTIFY = "query.identify"
"""Message type that asks a client who it is."""

ENGINE_S = 300.0
"""Seconds that Flower's simulation engine may take to add its nodes, while it starts Ray."""

POLL_S = 0.2
"""Seconds between two looks at who is connected, while nodes are missing."""

ANSWER_S = 120.0
"""Seconds that a connected node has to say who it is: a weak device imports torch for that."""


AGAIN_S = 30.0
"""Seconds after which a node that has not answered is asked again.

A SuperNode that is given a message of a run that has just ended sends the answer to its next one
only when it gets another: without a second question, it would never say who it is.
"""


@runtime_checkable
class KnowsPartitions(Protocol):
    """A grid that knows its nodes' partition ids, so that no node has to be asked."""

    def partition_ids(self) -> Mapping[int, int]:
        """Return the partition id of each node."""


@dataclass(frozen=True)
class Question:
    """A message that asks a node who it is.

    Attributes:
        node: The node.
        first: When it was asked for the first time, on the monotonic clock.
        last: When this message was sent.
    """

    node: int
    first: float
    last: float


class Roster:
    """Maps partition ids to node ids, asking only nodes that have not been seen before.

    Args:
        num_clients: Parts that the configured data are divided into; None for any number. A node
            with a partition id beyond them takes part only with data of its own.
        classes: Returns the classes of the run, which a node's own data must have.
        wait_s: How long to wait where nodes are missing, in seconds.
        say: Told what a person should know about nodes that do not take part.
    """

    def __init__(
        self,
        num_clients: int | None = None,
        classes: Callable[[], Sequence[str]] | None = None,
        *,
        wait_s: float = 0.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.num_clients, self.wait_s = num_clients, wait_s
        self._classes, self._say = classes, say
        self._nodes: dict[int, Identity] = {}
        self._refused: dict[int, str] = {}
        self._spare: dict[int, str] = {}
        self._told: set[int] = set()
        self._silent: dict[int, str] = {}
        self._asked: dict[str, Question] = {}

    def refresh(self, grid: Grid) -> dict[int, int]:
        """Return the node id of every partition that is connected now, in order of partition id.

        Of two nodes with one partition, that was seen last counts: the other is the same device
        before it was restarted, of which Flower does not know yet that it is gone. Where nobody is
        connected, waits until somebody is. A node that has just joined is asked who it is and not
        waited for: it takes part once it has answered.
        """
        self._silent.clear()  # whoever could not say who it is is asked again, once per round
        deadline = time.monotonic() + self.wait_s
        while not (present := self._look(grid)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for node_id in self._refused.keys() - self._told:
            self._told.add(node_id)
            self._say(self._refused[node_id])
        return {partition: nodes[-1] for partition, nodes in present.items()}

    def count(self, grid: Grid) -> int:
        """Return the number of partitions that are connected; at least one, after a wait.

        Raises:
            RuntimeFailure: Nobody is connected, or two nodes have one partition id.
        """
        deadline = time.monotonic() + self.wait_s
        while not (present := self._look(grid)) or self._asked:
            if self._is_over(deadline):
                break
            time.sleep(POLL_S)
        self._check_distinct(present)
        if not present:
            raise RuntimeFailure(
                f"no node is connected after {self.wait_s:g} s{self._reasons()}; "
                "start at least one SuperNode"
            )
        return len(present)

    def assemble(self, grid: Grid) -> dict[int, int]:
        """Wait until the first `num_clients` nodes are there and return all, as `refresh` does.

        Raises:
            RuntimeFailure: Too few nodes in time, two nodes with one partition id, or a node whose
                own data have other classes.
        """
        wanted = self.num_clients or 1
        deadline = time.monotonic() + self.wait_s
        while True:
            present = self._look(grid)
            self._check_distinct(present)
            if self._refused:
                raise RuntimeFailure(next(iter(self._refused.values())))
            if len(present) >= wanted:
                return {partition: nodes[-1] for partition, nodes in present.items()}
            if self._is_over(deadline):
                raise RuntimeFailure(
                    f"num_clients={wanted}: must be there as nodes, but after {self.wait_s:g} s "
                    f"there are {len(present)} (partition ids {_listed(present)})"
                    f"{self._reasons()}; start the others, lower num_clients, or raise "
                    "runtime.wait_s"
                )
            time.sleep(POLL_S)

    def partition_of(self, node_id: int) -> int:
        """Return the partition id of a node that has answered before."""
        return self._nodes[node_id].partition_id

    def _is_over(self, deadline: float) -> bool:
        now = time.monotonic()
        return now >= deadline and all(now >= q.first + ANSWER_S for q in self._asked.values())

    def _look(self, grid: Grid) -> dict[int, list[int]]:
        """Return the nodes of every partition, those seen first in front."""
        connected = set(grid.get_node_ids())
        self._learn(grid, connected)
        present: dict[int, list[int]] = {}
        wanted = connected - self._refused.keys() - self._spare.keys()
        for node_id, node in self._nodes.items():
            if node_id in wanted:
                present.setdefault(node.partition_id, []).append(node_id)
        return dict(sorted(present.items()))

    def _learn(self, grid: Grid, connected: set[int]) -> None:
        if isinstance(grid, KnowsPartitions):
            for node_id, partition in grid.partition_ids().items():
                if node_id not in self._nodes:
                    self._nodes[node_id] = Identity(partition)
            return
        now = time.monotonic()
        being_asked = {q.node: q for q in sorted(self._asked.values(), key=lambda q: q.last)}
        recently = {node for node, q in being_asked.items() if now < q.last + AGAIN_S}
        unknown = sorted(connected - self._nodes.keys() - self._silent.keys() - recently)
        if unknown:
            ids = grid.push_messages([Message(RecordDict(), node, IDENTIFY) for node in unknown])
            for message_id, node_id in zip(ids, unknown, strict=True):
                before = being_asked.get(node_id)
                first = before.first if before else now
                self._asked[message_id] = Question(node_id, first, now)
        for reply in grid.pull_messages(list(self._asked)) if self._asked else ():
            question = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if question is None:  # another answer of this node came with it
                continue
            node_id = question.node
            self._asked = {i: q for i, q in self._asked.items() if q.node != node_id}
            if reply.has_error():
                self._silent[node_id] = reply.error.reason or f"error {reply.error.code}"
                continue
            node = read(Identity, reply.content.config_records[IDENTITY])
            self._nodes[node_id] = node
            who = f"node {node_id} (partition-id {node.partition_id})"
            if apart := differences(_parsed(node.arithmetic)):
                self._say(f"{who} computes with {apart}: the same up to rounding, not to the bit")
            if reason := self._not_needed(node):
                self._spare[node_id] = f"{who} {reason}"
                self._say(self._spare[node_id])
            elif reason := self._other_classes(node):
                self._refused[node_id] = f"{who}: {reason}"

    def _not_needed(self, node: Identity) -> str:
        if node.data_root or self.num_clients is None or node.partition_id < self.num_clients:
            return ""
        return (
            f"does not take part: the data are divided among num_clients={self.num_clients}, "
            f"partition ids 0 to {self.num_clients - 1}"
        )

    def _other_classes(self, node: Identity) -> str:
        if not node.data_root or self._classes is None:
            return ""
        expected = tuple(self._classes())
        if node.classes == expected:
            return ""
        different = sorted({*(node.classes or ())} ^ {*expected})
        return (
            f"its own data in {node.data_root} must have the classes of the run; "
            f"in one of the two only: {', '.join(different)}"
        )

    def _check_distinct(self, present: Mapping[int, Sequence[int]]) -> None:
        for partition, nodes in present.items():
            if len(nodes) > 1:
                raise RuntimeFailure(
                    f"partition-id={partition}: must belong to one node, but nodes "
                    f"{' and '.join(map(str, nodes))} have it; give each node its own in "
                    "--node-config, or wait a minute if one of them was just restarted"
                )

    def _reasons(self) -> str:
        said = [f"node {node_id} says: {reason}" for node_id, reason in self._silent.items()]
        mute = sorted({question.node for question in self._asked.values()})
        said += [f"node {node_id} does not say who it is: see to its executor" for node_id in mute]
        return "".join(f"; {reason}" for reason in [*said, *self._spare.values()])


def _parsed(text: str) -> object:
    """Return what a node wrote as JSON; None for anything else."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _listed(partitions: Iterable[int]) -> str:
    return ", ".join(map(str, partitions)) or "none"


def gather(
    config: Config, grid: Grid, run_config: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[Config, Grid, Roster]:
    """Wait for the nodes that the run needs and settle how many clients there are.

    Args:
        config: The run as it was asked for.
        grid: Reaches the nodes.
        run_config: Says whether the run was submitted by fedsys or by a bare ``flwr run``.
        say: Told what a person should know.

    Returns:
        The run as it takes place, the grid for it, and who is there.

    Raises:
        RuntimeFailure: As `Roster.assemble`.
    """
    wait_s = config.runtime.wait_s
    if not run_config.get("hydra-config") and config.runtime.kind != "deployment":
        patience_s = wait_s if isinstance(grid, AttentiveGrid) else max(wait_s, ENGINE_S)
        count = Roster(wait_s=patience_s, say=say).count(grid)
        if count != config.num_clients:
            say(
                f"num_clients={config.num_clients} in the configuration, but {count} "
                f"{'node is' if count == 1 else 'nodes are'} connected: the data are divided among "
                f"{count}"
            )
            config = configuration.divided(config, count)
        grid = AnnotatedGrid(grid, FEDERATION, ConfigRecord(written(Division(count))))

    def classes() -> Sequence[str]:
        return federation.federation(config).dataset.classes

    roster = Roster(config.num_clients, classes, wait_s=wait_s, say=say)
    roster.assemble(grid)
    return config, grid, roster
