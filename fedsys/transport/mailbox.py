"""A queue between threads that is bounded in bytes and knows why it ended.

Both directions of a link are mailboxes. The bound gives back-pressure; `relaxed` lifts it for as
long as this side waits in a send of its own, because a reader that stops then would let two peers
that both send first wait for each other for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeVar

from fedsys.errors import LinkClosed, LinkError, LinkTimeout

T = TypeVar("T")

RELAXED_FACTOR: Final = 8
"""How many times its bound a mailbox holds at most while it is relaxed."""

STALLED_S: Final = 5.0
"""How long a relaxed mailbox that holds so much waits for something to be taken, in seconds."""


class Mailbox(Generic[T]):
    """First in, first out; any number of threads on both sides.

    Args:
        limit_bytes: `put` waits while the mailbox holds something and the next item would make it
            hold more than this.
    """

    # Items pass through a queue of the interpreter, which wakes a waiting thread in half the time
    # of a condition; the condition only guards the number of bytes, and wakes only waiting `put`s.

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._items: SimpleQueue[tuple[T, int] | None] = SimpleQueue()  # None: the end
        self._held = self._relaxed = self._putting = self._takes = 0
        self._reason: LinkError | None = None
        self._discard = False
        self._freed = threading.Condition(threading.Lock())

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._reason is not None

    def raise_if_ended(self) -> None:
        """Raise the reason given to `end`, as a new error, if there is one."""
        if self._reason is not None:
            raise type(self._reason)(*self._reason.args)

    def try_put(self, item: T, nbytes: int) -> bool:
        """Add an item of `nbytes`, unless there is no room; return whether it was added.

        Raises:
            LinkError: The mailbox has ended; of the kind and text given to `end`.
        """
        with self._freed:
            self.raise_if_ended()
            if not self._has_room(nbytes):
                return False
            self._add(item, nbytes)
            return True

    def put(self, item: T, nbytes: int) -> None:
        """Add an item of `nbytes`, waiting until there is room.

        Raises:
            LinkClosed: It is relaxed to `RELAXED_FACTOR` times its bound, is full all the same, and
                nothing was taken for `STALLED_S`.
            LinkError: The mailbox has ended; of the kind and text given to `end`.
        """
        with self._freed:
            self._putting += 1
            try:
                while not self._admits(nbytes) and not self.ended:
                    self._wait()
            finally:
                self._putting -= 1
            self.raise_if_ended()
            self._add(item, nbytes)

    def _admits(self, nbytes: int) -> bool:
        most = RELAXED_FACTOR * self._limit
        return self._has_room(nbytes) or bool(self._relaxed and self._held + nbytes <= most)

    def _wait(self) -> None:
        """Wait until something has changed that may give room."""
        if not self._relaxed:
            self._freed.wait()
            return
        before = self._takes
        if not self._freed.wait_for(
            lambda: self._takes != before or not self._relaxed or self.ended, STALLED_S
        ):
            raise LinkClosed(
                f"both ends send and neither receives: {self._held} bytes wait here; "
                "receive between sends, or raise queue_bytes"
            )

    def get(self, timeout_s: float | None = None) -> T:
        """Take the oldest item, waiting up to `timeout_s` seconds (None: without limit).

        Raises:
            LinkTimeout: Nothing came in time.
            LinkError: All items were taken and the mailbox has ended, for the reason of `end`.
        """
        try:
            entry = self._items.get(timeout=None if timeout_s is None else max(timeout_s, 0.0))
        except Empty:
            raise LinkTimeout(f"nothing arrived within {timeout_s:g} s") from None
        return self._taken(entry)

    def poll(self) -> T | None:
        """Take the oldest item; return None if there is none.

        Raises:
            LinkError: All items were taken and the mailbox has ended, for the reason of `end`.
        """
        if self._items.empty():
            return None
        try:
            return self._taken(self._items.get_nowait())
        except Empty:
            return None

    def _taken(self, entry: tuple[T, int] | None) -> T:
        if entry is None or self._discard:
            self._items.put(None)  # for the next that asks
            self.raise_if_ended()
            raise LinkClosed("the link is closed")
        item, nbytes = entry
        with self._freed:
            self._held -= nbytes
            self._takes += 1
            if self._putting:
                self._freed.notify_all()
        return item

    def end(self, reason: LinkError, *, discard: bool = False) -> None:
        """Refuse further items; what is held can still be taken unless `discard`.

        The first reason counts.
        """
        with self._freed:
            self._reason = self._reason or reason
            self._discard = self._discard or discard
            if self._discard:
                with suppress(Empty):
                    while True:
                        self._items.get_nowait()
            self._items.put(None)
            self._freed.notify_all()

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Let `put` go beyond the bound for the length of the block."""
        with self._freed:
            self._relaxed += 1
            self._freed.notify_all()
        try:
            yield
        finally:
            with self._freed:
                self._relaxed -= 1

    def _has_room(self, nbytes: int) -> bool:
        return self._held == 0 or self._held + nbytes <= self._limit

    def _add(self, item: T, nbytes: int) -> None:
        self._held += nbytes
        self._items.put((item, nbytes))
