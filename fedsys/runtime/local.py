"""The runtime ``local``: everything in this process, clients are threads behind a grid.

What is private in Flower and used here: `TaskIdentity` (a message cannot be built without one) and
the id inside a message's metadata (Flower's own grids set it when a message is pushed).
`tests/runtime/test_local.py` fails when either changes.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsys.config import Config, secret
from fedsys.errors import ConfigError
from fedsys.runs import startup as stages
from fedsys.runtime.apps import load_apps, load_together
from fedsys.runtime.grid_around import Absent
from fedsys.training import plain as training
from fedsys.training.pulse import pulse
from fedsys.training.together import check_config
from fedsys.transport import records
from fedsys.transport.messages import PARTITION_ID

if TYPE_CHECKING:
    from fedsys.runtime.worker_processes import WorkerProcesses

FIRST_NODE_ID = SUPERLINK_NODE_ID + 1

AHEAD = 8
"""Replies that may be there before the one that is taken next, where they are taken in order."""

CLOSE_S = 2.0
"""How long a grid that is closed waits for messages in work, in seconds."""

ClientFunction = Callable[[Message, Context], Message]

Together = Callable[[Sequence[Message], Sequence[Context]], Sequence[Message] | None]
"""Answers messages at once; None where each is to be answered alone."""


def identify_process(run_id: int = 1) -> None:
    """Give this process the identity that Flower asks for when a message is built."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


class LocalGrid(Grid):
    """Flower's grid in one process: messages are handed to threads, nothing is serialised.

    Node ids are the partition ids, counted from `FIRST_NODE_ID`. Each client gets records of its
    own over shared, sealed arrays, so what one writes into its message no other client sees.
    Replies come in the order of the messages.

    Args:
        client_app: Called as Flower calls it, with a message and the node's context.
        num_nodes: Number of virtual nodes.
        workers: Messages that are worked on at the same time.
        run_config: The run config that each context holds.
        processes: Whether workers are processes; else threads.
        together: Answers many messages at once; None: each is answered alone.
        at_once: How many messages that is at most.
    """

    def __init__(
        self,
        client_app: ClientFunction,
        num_nodes: int,
        *,
        workers: int = 1,
        run_config: UserConfig | None = None,
        processes: bool = False,
        together: Together | None = None,
        at_once: int = 1,
    ) -> None:
        identify_process()
        self._app, self._together, self._at_once = client_app, together, at_once
        self.absent: Absent = dict
        self._nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + num_nodes)
        self._run_config = run_config or {}
        self._states: dict[int, RecordDict] = {}
        self._next_id = 0
        self._parked: dict[str, Message] = {}
        self._phase: _Phase | None = None
        self._jobs: queue.SimpleQueue[_Phase | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(0 if processes else workers):
            self._add_worker()
        self._workers, self._processes = workers, _processes(self, workers) if processes else None

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; threads that are at a message get `CLOSE_S` seconds for it."""
        if self._processes is not None:
            self._processes.close()
        if self._phase is not None:
            self._phase.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- what Flower asks of a grid ---------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run in this process."""

    @property
    def run(self) -> Run:
        """Return a run whose only meaningful value is its id."""
        return Run.create_empty(TaskIdentity.run_id)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, in the order of their partition ids."""
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return all nodes."""
        return [NodeInfo(node_id=node_id) for node_id in self._nodes]

    def partition_ids(self) -> Mapping[int, int]:
        """Return the partition id of each node, so that nobody has to be asked for it."""
        return {node_id: node_id - FIRST_NODE_ID for node_id in self._nodes}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the messages worked on; the replies wait until they are pulled."""
        batch = list(messages)
        replies = self.send_and_receive(batch)
        self._parked.update({m.metadata.message_id: r for m, r in zip(batch, replies, strict=True)})
        return [m.metadata.message_id for m in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages, each once."""
        return [self._parked.pop(i) for i in message_ids if i in self._parked]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return one reply per message, in order; an error reply for what failed or took too long.

        Args:
            messages: One for each node that is to work.
            timeout: Seconds; what is still in work then is answered for by an error, and its own
                reply is dropped when it comes.
        """
        return list(self._replies(messages, timeout, ahead=None))

    def in_order(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the same replies one by one; nobody works far ahead of those that were taken.

        So there are never more than `AHEAD` and one for each worker, whatever the number of
        messages. Messages that nobody has begun are dropped when the iterator is closed.
        """
        return self._replies(messages, timeout, ahead=AHEAD + self._workers * self._at_once)

    def _replies(
        self, messages: Iterable[Message], timeout: float | None, ahead: int | None
    ) -> Iterator[Message]:
        batch = list(messages)
        for message in batch:
            self._next_id += 1
            message.metadata.__dict__["_message_id"] = str(self._next_id)
        if self._processes is not None:
            return self._processes.replies(batch, timeout, self.absent, ahead)
        phase = self._phase = _Phase(batch, ahead, self._stand_in)
        for _ in self._threads[: len(batch)]:
            self._jobs.put(phase)
        return phase.replies(timeout, self.absent)

    # --- the threads ------------------------------------------------------------------------------

    def _add_worker(self) -> None:
        name = f"client-worker-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stand_in(self, phase: _Phase) -> None:
        """Have another thread do what one would that is at a message nobody waits for any more."""
        self._add_worker()
        self._jobs.put(phase)

    def _work(self) -> None:
        while (phase := self._jobs.get()) is not None:
            for first in phase:
                taken = [first, *phase.more(self._at_once - 1)]
                answers = self._answers([(message, content) for _, message, content in taken])
                new = [phase.done(i, reply) for (i, *_), reply in zip(taken, answers, strict=True)]
                if not all(new):
                    return  # another thread has taken the place of this one

    def _answers(self, asked: Sequence[tuple[Message, RecordDict]]) -> Sequence[Message]:
        """Answer messages at once where that is possible, else one after the other."""
        if self._together is not None and len(asked) > 1:
            for message, content in asked:
                message.content = records.own_copy(content)
            messages = [message for message, _ in asked]
            replies = self._together(messages, [self._context(message) for message in messages])
            if replies is not None:
                return replies
        return [self._answer(message, content) for message, content in asked]

    def _context(self, message: Message) -> Context:
        node_id = message.metadata.dst_node_id
        partition_id = node_id - FIRST_NODE_ID
        return Context(
            run_id=TaskIdentity.run_id,
            node_id=node_id,
            node_config={PARTITION_ID: partition_id, "num-partitions": len(self._nodes)},
            state=self._states.get(node_id) or RecordDict(),
            run_config=self._run_config,
        )

    def _answer(self, message: Message, content: RecordDict) -> Message:
        context, node_id = self._context(message), message.metadata.dst_node_id
        message.content = records.own_copy(content)
        try:
            reply = self._app(message, context)
        except (Exception, SystemExit) as error:  # ends its part of the round, not the run
            return _error_reply(message, f"{type(error).__name__}: {error}")
        if not isinstance(reply, Message):
            return _error_reply(message, f"TypeError: the client app returned {reply!r}")
        if context.state:
            self._states[node_id] = context.state
        return reply


def _processes(grid: LocalGrid, workers: int) -> WorkerProcesses:
    from fedsys.runtime.worker_processes import WorkerProcesses

    return WorkerProcesses(grid._answer, grid._states, workers)


def _error_reply(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class _Phase:
    """Messages of one phase, taken one by one by the workers, and the replies to them.

    Args:
        messages: In the order in which they are begun and answered.
        ahead: Messages that may be begun before the reply of the first of them is taken; None for
            any number.
        abandoned: Called with the phase for each message that a worker is at and that is answered
            for without it.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        ahead: int | None = None,
        abandoned: Callable[[_Phase], None] = lambda phase: None,
    ) -> None:
        self._messages, self._abandoned = messages, abandoned
        self._replies: dict[int, Message] = {}  # that nobody has taken
        self._answered = [False] * len(messages)
        self._begun = self._taken = 0
        self._ahead = len(messages) if ahead is None else ahead
        self._cancelled = False
        self._changed = threading.Condition()
        self._sealed: dict[int, RecordDict] = {}
        for message in messages:  # messages to many nodes share one content: seal it once
            key = id(message.content)
            if key not in self._sealed:
                self._sealed[key] = records.sealed(message.content)

    def __iter__(self) -> _Phase:
        return self

    def __next__(self) -> tuple[int, Message, RecordDict]:
        with self._changed:
            self._changed.wait_for(self._may_begin)
            while self._begun < len(self._messages) and self._answered[self._begun]:
                self._begun += 1  # somebody answered for it
            if self._cancelled or self._begun == len(self._messages):
                raise StopIteration
            index = self._begun
            self._begun += 1
        message = self._messages[index]
        return index, message, self._sealed[id(message.content)]

    def more(self, count: int) -> list[tuple[int, Message, RecordDict]]:
        """Return up to so many of the messages that may be begun now."""
        found: list[tuple[int, Message, RecordDict]] = []
        with self._changed:  # its lock can be taken again by who has it
            while len(found) < count and self._begun < len(self._messages) and self._may_begin():
                if (taken := next(self, None)) is None:
                    break
                found.append(taken)
        return found

    def _may_begin(self) -> bool:
        over = self._cancelled or self._begun == len(self._messages)
        return over or self._begun < self._taken + self._ahead

    def done(self, index: int, reply: Message) -> bool:
        """Take a reply in; return whether it is the first one to its message."""
        with self._changed:
            if self._answered[index]:
                return False
            self._answered[index], self._replies[index] = True, reply
            pulse().client_done()
            if index == self._taken:
                self._changed.notify_all()
            return True

    def _given_up(self, index: int, reason: str) -> None:
        """Answer for a message whose own reply is not waited for any more."""
        begun = index < self._begun
        if self.done(index, _error_reply(self._messages[index], reason)) and begun:
            self._abandoned(self)

    def cancel(self) -> None:
        """See to it that nobody begins what is left."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def replies(self, timeout: float | None, absent: Absent = dict) -> Iterator[Message]:
        """Yield the replies in order, each when it is there; an error for what never will be."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            for index in range(len(self._messages)):
                while not self._wait_for(index):
                    self._give_up(timeout, deadline, absent())
                if deadline is not None and time.monotonic() > deadline:
                    self._give_up(timeout, deadline, {})
                yield self._take(index)
        finally:
            self.cancel()

    def _wait_for(self, index: int) -> bool:
        with self._changed:  # short waits, so that Ctrl-C is heard at once
            return self._changed.wait_for(lambda: index in self._replies, 0.2)

    def _take(self, index: int) -> Message:
        with self._changed:
            self._taken = index + 1
            if self._begun < len(self._messages):
                self._changed.notify_all()
            return self._replies.pop(index)

    def _give_up(
        self, timeout: float | None, deadline: float | None, gone: Mapping[int, str]
    ) -> None:
        """Answer for nodes that are gone, and for all where time is over."""
        late = deadline is not None and time.monotonic() > deadline
        if late:
            self.cancel()
        for i, message in enumerate(self._messages):
            node = message.metadata.dst_node_id
            if node in gone or late:
                self._given_up(i, gone.get(node, f"no reply within {timeout or 0:g} s"))


def run_local(config: Config) -> None:
    """Run the server app in this thread, and its clients in worker threads or processes.

    Raises:
        ConfigError: Processes are asked for where there can be none.
    """
    check_pool(config)
    check_config(config)
    apps = load_apps(config)
    stages.current().reached("imports")
    play_local(config, *apps)


def check_pool(config: Config) -> None:
    """Refuse workers that are processes where they cannot be, or would train something else.

    Raises:
        ConfigError: Names the reason and the way out.
    """
    if config.runtime.pool != "processes":
        return
    reason = ""
    if not hasattr(os, "memfd_create"):
        reason = "needs memory without a name, which only Linux has"
    elif config.policy.get("kind", "none") != "none":
        reason = "trains whole models only: edge servers are threads of this process"
    elif training.pick_device(config.client.device).type != "cpu":
        reason = "cannot use CUDA, which a forked process has lost; client.device=cpu does without"
    if reason:
        raise ConfigError.of("runtime.pool", "processes", reason, "runtime.pool=threads")


def play_local(config: Config, server_app: ServerApp, client_app: ClientFunction) -> None:
    """Do the same with the two apps given."""
    run_config: UserConfig = {"hydra-config": config.text}
    workers = config.runtime.workers or max(1, (os.cpu_count() or 1) // config.client.threads)
    with LocalGrid(
        client_app,
        config.num_clients,
        workers=min(workers, config.num_clients),
        run_config=run_config,
        processes=config.runtime.pool == "processes",
        together=load_together(config),
        at_once=config.runtime.batched_clients,
    ) as grid:
        context = Context(
            run_id=TaskIdentity.run_id,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=run_config,
        )
        with secret.handed_on(config.fleet.control_token):
            server_app(grid, context)
