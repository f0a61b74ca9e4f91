"""Who is there: the nodes that Flower sees, by the partition id that names them for good.

Flower's node ids are random and change with each run. Everything in fedsys that concerns a client
(its data, its draws, its place in a sum) goes by the partition id that the client tells when it
is asked.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsys.errors import RuntimeFailure

IDENTIFY = "query.identify"
"""Message type that asks a client who it is."""

IDENTITY = "identity"
"""Name of the record with the answer."""


class Roster:
    """Maps partition ids to node ids, asking only nodes that have not been seen before."""

    def __init__(self) -> None:
        self._partition_of: dict[int, int] = {}

    def refresh(self, grid: Grid, timeout_s: float = 60.0) -> dict[int, int]:
        """Return the node id of every partition that is connected now, in order of partition id.

        Raises:
            RuntimeFailure: Two nodes claim the same partition.
        """
        connected = list(grid.get_node_ids())
        unknown = [node for node in connected if node not in self._partition_of]
        questions = [Message(RecordDict(), node, IDENTIFY) for node in unknown]
        if questions:
            for reply in grid.send_and_receive(questions, timeout=timeout_s):
                if not reply.has_error():
                    answer = reply.content[IDENTITY]
                    assert isinstance(answer, ConfigRecord)
                    node = reply.metadata.src_node_id
                    self._partition_of[node] = int(str(answer["partition-id"]))
        present: dict[int, int] = {}
        for node in connected:
            partition = self._partition_of.get(node)
            if partition is None:
                continue
            if partition in present:
                raise RuntimeFailure(
                    f"nodes {present[partition]} and {node} both have partition-id {partition}; "
                    "give each node its own in --node-config"
                )
            present[partition] = node
        return dict(sorted(present.items()))

    def partition_of(self, node_id: int) -> int:
        """Return the partition id of a node that has answered before."""
        return self._partition_of[node_id]

    def names(self, present: Mapping[int, int]) -> str:
        """Return partition ids for a message to a person."""
        return ", ".join(str(partition) for partition in present) or "none"
