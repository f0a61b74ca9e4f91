"""Clients of the runtime ``local`` in processes, which share models with the server app by memory.

Threads share one interpreter, in which a small model's step spends most of its time; so two of
them are no faster than one. Worker processes are forked once, when the first messages are sent: by
then data and libraries are there, and a fork shares them. They stay until the run ends.

A message goes to a worker as a few bytes over a socket, and its reply comes back so; arrays stand
in shared memory (`fedsys.runtime.shared_memory`). What many messages have in common, such as the
global model, is written once. A worker has a few places for replies, and is given no message before
one is free, so memory does not grow with the number of clients. Replies are taken in the order of
messages, as those of threads are, and each client computes as in a thread: the bits are the same.

The client of a worker that was killed is given to a new one, once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any, Final, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedsys.runtime.grid_around import Absent
from fedsys.runtime.processes import end_with_parent
from fedsys.runtime.shared_memory import (
    Region,
    arrays_in,
    kept,
    packed,
    read,
    tell,
    unpacked,
)
from fedsys.training.pulse import pulse
from fedsys.transport import records
from fedsys.transport.messages import of_kind

SLOTS: Final = 4
"""Messages of one worker that are in work, or whose replies nobody has taken."""

QUICK_S: Final = 0.02
"""Seconds for a client below which a worker has the next message before it asks."""

LOOK_S: Final = 0.2
"""Longest wait for a worker, in seconds: so long Ctrl-C may take to be heard."""

Answer = Callable[[Message, RecordDict], Message]
"""Has the client app answer a message whose content is given beside it."""

_COMMON: Final = 0  # number of the region of what many messages share
_OWN: Final = 1  # that of what one message alone has


@dataclass
class _Slot:
    """Room for one message of a worker: what it alone holds, and its reply."""

    task: Region = field(default_factory=Region)
    reply: Region = field(default_factory=Region)


@dataclass
class _Worker:
    """One process, as the server app sees it.

    `tasks` are the messages that it has not answered, with round and slot of each.
    """

    pid: int
    wire: Connection
    slots: list[_Slot]
    free: list[int]
    tasks: deque[tuple[_Round, int, int]] = field(default_factory=deque)
    told: _Round | None = None
    began: float = 0.0


class _Round:
    """Messages that are sent together, and what came back.

    Args:
        messages: In the order in which they are begun and answered.
        ahead: Messages that may be begun before the reply of the first of them is taken.
        common: Gets the arrays that more than one message has.
    """

    def __init__(self, messages: Sequence[Message], ahead: int, common: Region) -> None:
        self.messages, self.ahead = messages, ahead
        self.contents = [message.content for message in messages]
        self.replies: dict[int, tuple[Message, _Worker | None, int]] = {}
        self.answered: set[int] = set()
        self.deaths: Counter[int] = Counter()
        self.begun = self.taken = 0
        self.again: deque[int] = deque()
        self.over = False
        self._told: dict[int, bytes] = {}
        distinct = {id(content): content for content in self.contents}
        self._uses = Counter(id(content) for content in self.contents)
        seen = Counter(key for content in distinct.values() for key in arrays_in([content]))
        shared = {
            key: array
            for content in distinct.values()
            for key, array in arrays_in([content]).items()
            if seen[key] > 1 or self._uses[id(content)] > 1
        }
        places = common.put(shared)
        self.places = {key: (_COMMON, place) for key, place in places.items()}

    def next(self) -> int | None:
        """Return the message that is to be begun; None: there is none, or not yet."""
        if self.over:
            return None
        if self.again:
            return self.again.popleft()
        if self.begun == len(self.messages) or self.begun >= self.taken + self.ahead:
            return None
        self.begun += 1
        return self.begun - 1

    def parcel(self, index: int, slot: _Slot) -> tuple[int, bytes]:
        """Return key and bytes of a message's content, whose own arrays go into a slot.

        With its key a worker keeps the content for other messages; 0: it is for this one alone.
        """
        content = self.contents[index]
        key = id(content)
        if key in self._told:
            return key, self._told[key]
        own = {k: a for k, a in arrays_in([content]).items() if k not in self.places}
        places = {k: (_OWN, place) for k, place in slot.task.put(own).items()}
        told = packed(tell(content, {**self.places, **places}))
        if own:
            return 0, told
        self._told[key] = told
        return key, told


class WorkerProcesses:
    """Answers messages in processes. For one thread.

    Args:
        answer: What a process does with a message, called in it.
        states: What each node keeps from message to message, by its id; changed here.
        workers: How many processes.
    """

    def __init__(
        self, answer: Answer, states: MutableMapping[int, RecordDict], workers: int
    ) -> None:
        self._answer, self._states, self._count = answer, states, workers
        self._common = Region()
        self._workers: list[_Worker] = []
        self._heard = selectors.DefaultSelector()
        self._took_s = 1.0

    def close(self) -> None:
        """End the processes at once; they hold nothing that is worth a wait."""
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        self._heard.close()
        self._common.close()

    def replies(
        self,
        messages: Sequence[Message],
        timeout: float | None,
        absent: Absent,
        ahead: int | None,
    ) -> Iterator[Message]:
        """Yield the replies in order, each when it is there; an error for what never will be.

        Args:
            messages: One for each node that is to work.
            timeout: Seconds; what is not answered then is answered for.
            absent: Tells which nodes are gone.
            ahead: Messages that may be begun before the reply of the first of them is taken. Then a
                reply is over memory that is written anew when the next one is taken. None: any
                number, and replies stay.
        """
        while len(self._workers) < self._count:
            self._workers.append(self._fork())
        stays = ahead is None
        round_ = _Round(messages, len(messages) if ahead is None else ahead, self._common)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            for index in range(len(messages)):
                while index not in round_.replies:
                    self._deal(round_)
                    late = deadline is not None and time.monotonic() > deadline
                    if not self._listen(stays) or late:
                        self._give_up(round_, timeout if late else None, absent())
                reply, worker, slot = round_.replies.pop(index)
                round_.taken = index + 1
                self._deal(round_)
                yield reply
                if worker is not None:
                    worker.free.append(slot)
        finally:
            round_.over = True
            for _, worker, slot in round_.replies.values():
                if worker is not None:
                    worker.free.append(slot)

    # --- messages to workers ----------------------------------------------------------------------

    def _deal(self, round_: _Round) -> None:
        """Give every worker a message, and one more where it would soon have to ask."""
        deepest = 2 if self._took_s < QUICK_S else 1
        for depth in range(1, deepest + 1):
            for worker in self._workers:
                if len(worker.tasks) < depth and worker.free:
                    if (index := round_.next()) is None:
                        return
                    self._give(worker, round_, index)

    def _give(self, worker: _Worker, round_: _Round, index: int) -> None:
        slot = worker.free.pop()
        message = round_.messages[index]
        key, told = round_.parcel(index, worker.slots[slot])
        about = message.metadata
        state = self._states.get(about.dst_node_id)
        task = [
            slot, about.dst_node_id, about.message_type, about.group_id, about.message_id,
            key, told, worker.told is not round_, _state_told(state),
        ]  # fmt: skip
        worker.told = round_
        if not worker.tasks:
            worker.began = time.monotonic()
        worker.tasks.append((round_, index, slot))
        with contextlib.suppress(OSError):  # it has ended: that is heard next
            worker.wire.send_bytes(packed(task))

    def _listen(self, stays: bool) -> bool:
        """Take in what workers have to say; return whether anything was said."""
        events = self._heard.select(LOOK_S)
        for key, _ in events:
            worker: _Worker = key.data
            try:
                said = unpacked(worker.wire.recv_bytes())
            except (EOFError, OSError):
                self._replace(worker)
            else:
                self._take_in(worker, said, stays)
        return bool(events)

    def _take_in(self, worker: _Worker, said: Sequence[Any], stays: bool) -> None:
        now = time.monotonic()
        self._took_s, worker.began = now - worker.began, now
        round_, index, slot = worker.tasks.popleft()
        if round_.over or index in round_.answered:
            worker.free.append(slot)
            return
        content, error, state = said
        message = round_.messages[index]
        if state is not None:
            self._states[message.metadata.dst_node_id] = _read_state(state)
        holder: _Worker | None = None
        if error is not None:
            reply = Message(Error(*error), reply_to=message)
        else:
            arrived = read(content, {_OWN: worker.slots[slot].reply})
            if not stays and of_kind(arrived, ArrayRecord):
                holder = worker
            reply = Message(kept(arrived) if stays else arrived, reply_to=message)
        if holder is None:
            worker.free.append(slot)
        _settle(round_, index, reply, holder, slot)

    # --- processes --------------------------------------------------------------------------------

    def _fork(self) -> _Worker:
        ours, theirs = Pipe()
        slots = [_Slot() for _ in range(SLOTS)]
        sys.stdout.flush()
        sys.stderr.flush()
        gc.disable()  # in the child, a collection would write into all memory that is shared
        try:
            with warnings.catch_warnings():  # the threads of this process hold nothing it needs
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        finally:
            gc.enable()
        if not pid:
            ours.close()
            _become(_Served(theirs, self._answer, self._states, self._common, slots))
        theirs.close()
        worker = _Worker(pid, ours, slots, list(range(SLOTS)))
        self._heard.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: _Worker) -> None:
        """Put a new process in the place of one that has ended, and give it what that had."""
        status = self._end(worker)
        others = list(worker.tasks)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        for place, (round_, index, slot) in enumerate(others):
            if round_.over or index in round_.answered:
                continue
            round_.deaths[index] += place == 0
            if round_.deaths[index] < 2:
                round_.again.append(index)
                continue
            reason = f"RuntimeFailure: its worker process {how}, twice"
            reply = _error(round_.messages[index], reason)
            _settle(round_, index, reply, None, slot)
        self._workers[self._workers.index(worker)] = self._fork()

    def _give_up(self, round_: _Round, late_s: float | None, gone: Mapping[int, str]) -> None:
        """Answer for nodes that are gone, and for all where time is over.

        A process that is at such a message is ended: it would be missing in the rounds after.
        """
        for index, message in enumerate(round_.messages):
            node = message.metadata.dst_node_id
            if index not in round_.answered and (node in gone or late_s is not None):
                reason = gone.get(node, f"no reply within {late_s or 0:g} s")
                _settle(round_, index, _error(message, reason), None, 0)
        round_.over = round_.over or late_s is not None
        for worker in list(self._workers):
            at, index, _ = worker.tasks[0] if worker.tasks else (None, 0, 0)
            if at is round_ and index in round_.answered:
                self._replace(worker)

    def _end(self, worker: _Worker) -> int:
        """End a process; return its status, below zero that of a signal. Its replies stay."""
        self._heard.unregister(worker.wire)
        worker.wire.close()
        ended, status = os.waitpid(worker.pid, os.WNOHANG)
        if not ended:
            os.kill(worker.pid, signal.SIGKILL)
            _, status = os.waitpid(worker.pid, 0)
        for slot in worker.slots:
            slot.task.close()
            slot.reply.close()
        return os.waitstatus_to_exitcode(status)


def _settle(round_: _Round, index: int, reply: Message, holder: _Worker | None, slot: int) -> None:
    round_.answered.add(index)
    round_.replies[index] = reply, holder, slot
    pulse().client_done()


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


# --------------------------------------------------------------------------------------------------
# In the process of a worker


@dataclass
class _Served:
    """What a worker has from the process that forked it."""

    wire: Connection
    answer: Answer
    states: MutableMapping[int, RecordDict]
    common: Region
    slots: Sequence[_Slot]


def _become(served: _Served) -> NoReturn:
    """Serve in this fork until the other process ends; never returns."""
    status = 1
    try:
        end_with_parent()
        gc.freeze()
        gc.enable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process hears it, and ends this
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # A thread of its own: the pools of OpenMP of the one that was forked have no threads here.
        thread = threading.Thread(target=_serve, args=(served,), name="client-worker")
        thread.start()
        thread.join()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # handlers of the process that was forked are not ours


def _serve(served: _Served) -> None:
    contents: dict[int, RecordDict] = {}
    while True:
        try:
            task = unpacked(served.wire.recv_bytes())
        except (EOFError, OSError):
            return
        slot, node, kind, group, number, key, told, fresh, state = task
        if fresh:
            contents.clear()
        regions = {_COMMON: served.common, _OWN: served.slots[slot].task}
        content = contents.get(key)
        if content is None:
            content = read(unpacked(told), regions)
            if key:
                contents[key] = content
        message = Message(content, node, kind, group_id=group)
        message.metadata.__dict__["_message_id"] = number
        served.states.pop(node, None)
        if state is not None:
            served.states[node] = _read_state(state)
        reply = served.answer(message, content)
        said = _said(reply, served.slots[slot].reply, served.states.get(node))
        try:
            served.wire.send_bytes(said)
        except OSError:
            return


def _said(reply: Message, region: Region, state: RecordDict | None) -> bytes:
    told_state = _state_told(state)
    if reply.has_error():
        return packed([None, [reply.error.code, reply.error.reason], told_state])
    content = reply.content
    try:
        places = region.put(arrays_in([content]))
        told = tell(content, {key: (_OWN, place) for key, place in places.items()})
        return packed([told, None, told_state])
    except Exception as error:  # whatever cannot be sent is this client's failure alone
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return packed([None, [code, f"{type(error).__name__}: {error}"], told_state])


def _state_told(state: RecordDict | None) -> Any:
    """Return what a node keeps, with its arrays as files; None for nothing."""
    if not state:
        return None
    told: list[Any] = []
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            told.append([name, {key: array.data for key, array in record.items()}])
        else:
            told.append([name, [type(record).__name__, dict(record)]])
    return told


def _read_state(told: Sequence[Any]) -> RecordDict:
    state = RecordDict()
    for name, values in told:
        if isinstance(values, dict):
            state[name] = ArrayRecord({k: records.array_of(data) for k, data in values.items()})
        else:
            kind = MetricRecord if values[0] == MetricRecord.__name__ else ConfigRecord
            state[name] = kind(values[1])
    return state
