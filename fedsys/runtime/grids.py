"""Flower's grids as a server app wants them: prompt, and clear about who failed.

`attentive` wraps the grid of a deployment; those of the other runtimes need no wrapping.

What is private in Flower and used here: a message's metadata can be changed only from inside,
and the handlers that Flower calls at its exit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedsys.runtime.busy import asked_again
from fedsys.runtime.grid_around import Absent, GridAround
from fedsys.training.pulse import pulse
from fedsys.transport import packing

POLL_S = 0.2
"""Seconds between two looks for replies; Flower's own grid takes 3."""


NUDGE_S = 30.0
"""Seconds after which a node that has not replied gets another message.

A SuperNode of Flower 1.42 that was given a message of a run that had just ended is one reply behind
from then on: it sends a reply when it gets its next message. Without one, both sides would wait.
"""

NUDGE = "query.identify"
"""Type of that message, which every client app answers at once."""


def attentive(grid: Grid) -> Grid:
    """Return a grid that asks for replies often, if `grid` is that of a deployment."""
    if "flwr.superlink.grid" not in sys.modules:  # it takes seconds to import, and is not in use
        return grid
    from flwr.superlink.grid import HttpGrid

    return AttentiveGrid(grid) if isinstance(grid, HttpGrid) else grid


def before_exit(grid: Grid, handler: Callable[[], None]) -> None:
    """Have Flower call a handler before it ends this process, where it does that by itself.

    In a deployment, it ends the server app of a run that was stopped, and with that it is in such a
    hurry that no exception arrives.
    """
    if isinstance(grid, AttentiveGrid):
        from flwr.supercore.exit.exit_handler import add_exit_handler

        add_exit_handler(handler)


class AttentiveGrid(GridAround):
    """Looks for replies every `POLL_S` seconds, and names the node that an error is about.

    Contents travel packed (`fedsys.transport.packing`); the client app unpacks them and packs its
    reply.

    A node that does not reply is nudged (`NUDGE_S`), and a SuperLink that is too busy for a request
    is asked again (`fedsys.runtime.busy`).

    When a node is lost, the SuperLink answers in its place and under its own id; here such a reply
    carries the id of the node that was asked.

    Args:
        inner: The grid that it wraps.
    """

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner)
        self.absent: Absent = dict
        self._nudges: dict[str, int] = {}  # those that nobody has answered, with the node

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""
        return asked_again(lambda: list(self.inner.get_node_ids()))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages packed; afterwards they are as before, with the id that they were given."""
        batch = list(messages)
        contents = [message.content for message in batch]
        packed = {id(content): packing.pack(content) for content in contents}
        try:
            for message, content in zip(batch, contents, strict=True):
                message.content = packed[id(content)]
            return asked_again(lambda: list(self.inner.push_messages(batch)))
        finally:
            for message, content in zip(batch, contents, strict=True):
                message.content = content

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, unpacked."""
        wanted = list(message_ids)
        replies = asked_again(lambda: list(self.inner.pull_messages(wanted)))
        for reply in replies:
            if packing.is_packed(reply):
                reply.content = packing.unpack(reply.content)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that arrive within `timeout` seconds; all, without one."""
        batch = list(messages)
        self.push_messages(batch)
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in batch}
        messages_by_id = {m.metadata.message_id: m for m in batch}
        began = time.monotonic()
        deadline = None if timeout is None else began + timeout
        replies: list[Message] = []
        while asked:
            for reply in self.pull_messages([*asked, *self._nudges]):
                if self._nudges.pop(reply.metadata.reply_to_message_id, None) is not None:
                    continue
                node = asked.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    reply.metadata.__dict__["_src_node_id"] = node
                replies.append(reply)
                pulse().client_done()
            for number, reason in self._given_up(asked).items():
                del asked[number]
                error = Error(ErrorCode.NODE_UNAVAILABLE, reason)
                replies.append(Message(error, reply_to=messages_by_id[number]))
                pulse().client_done()
            if deadline is not None and time.monotonic() > deadline:
                break
            if asked and time.monotonic() > began + NUDGE_S:
                self._nudge(set(asked.values()) - set(self._nudges.values()))
            if asked:
                time.sleep(POLL_S)
        return replies

    def _given_up(self, asked: Mapping[str, int]) -> dict[str, str]:
        """Return why messages are not answered any more, of those to nodes that are absent."""
        absent = self.absent()
        return {number: absent[node] for number, node in asked.items() if node in absent}

    def _nudge(self, nodes: set[int]) -> None:
        """Send a message to nodes that have none to answer besides the one that is waited for."""
        if nodes:
            messages = [Message(RecordDict(), node, NUDGE) for node in sorted(nodes)]
            ids = self.push_messages(messages)
            self._nudges |= dict(zip(ids, sorted(nodes), strict=True))


class AnnotatedGrid(GridAround):
    """Adds one record to every message, for what all clients must know beside the run config.

    Args:
        inner: The grid that it wraps.
        name: Name of the record.
        record: The record.
    """

    def __init__(self, inner: Grid, name: str, record: ConfigRecord) -> None:
        super().__init__(inner)
        self._name, self._record = name, record

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages with the record."""
        return self.inner.push_messages(self._annotated(messages))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages with the record and return the replies."""
        return self.inner.send_and_receive(self._annotated(messages), timeout=timeout)

    def _annotated(self, messages: Iterable[Message]) -> list[Message]:
        batch = list(messages)
        for message in batch:
            message.content[self._name] = self._record
        return batch


class ChosenNodes(GridAround):
    """Shows some of the nodes of another grid.

    Args:
        inner: The grid that it wraps.
        nodes: Ids of those that it shows.
    """

    def __init__(self, inner: Grid, nodes: Sequence[int]) -> None:
        super().__init__(inner)
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Return the chosen nodes."""
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the chosen nodes."""
        return Grid.get_nodes(self)  # made of their ids
