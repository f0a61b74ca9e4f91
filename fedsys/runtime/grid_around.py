"""What grids that wrap another one have in common: they pass on what they do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

Absent = Callable[[], Mapping[int, str]]
"""Says which nodes are not waited for any more, and why."""


@runtime_checkable
class LeavesOut(Protocol):
    """A grid that can be told while it waits that some nodes will not answer.

    Attributes:
        absent: Asked from time to time; an error with its reason stands for the reply of a node.
    """

    absent: Absent


def leave_out(grid: Grid, absent: Absent) -> None:
    """Have a grid not wait for nodes that are absent; nothing happens if it cannot be told."""
    while isinstance(grid, GridAround) and not isinstance(grid, LeavesOut):
        grid = grid.inner
    if isinstance(grid, LeavesOut):
        grid.absent = absent


class GridAround(Grid):
    """A grid around another one, to which it passes on everything.

    Wrappers override what they change and call `inner` there. A complete one::

        class Counting(GridAround):
            sent = 0

            def push_messages(self, messages):
                batch = list(messages)
                self.sent += len(batch)
                return self.inner.push_messages(batch)

    `send_and_receive` is passed on whole, past `push_messages` and `pull_messages` of the wrapper.

    Args:
        inner: The grid that it wraps.
    """

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self.inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message to a node; by itself, as Flower's grids warn of the same."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self.inner.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Pass on."""
        return self.inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        return self.inner.send_and_receive(messages, timeout=timeout)
