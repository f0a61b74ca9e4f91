"""The source's end of a shadow: what a session is told goes on to where it will be, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from fedsys.errors import FedsysError
from fedsys.offload import mirroring
from fedsys.transport.wire import Frame

SETTLES_S = 5.0
"""How long a device that leaves waits for the shadow; then the difference goes, in seconds."""


class Mirror:
    """Sends the operations of one session on, in a thread of its own. For any threads.

    Args:
        ask: Sends a frame to the destination and returns the answer.
        about: What each frame says: session and token.
        difference: As `start`, until that is known.

    Attributes:
        sent: Bytes that the shadow has done.
    """

    def __init__(
        self, ask: Callable[[Frame], Frame], about: Mapping[str, Any], difference: int
    ) -> None:
        self._ask, self._about, self._difference = ask, dict(about), difference
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._done = 0
        self._begun = self._reached = -1  # the last mini-batch, and the shadow's when it began
        self._took_s = self._waited_s = 0.0
        self._over = False
        self.sent = 0

    def start(self, difference: int) -> None:
        """Begin to send; what was taken before goes first.

        Args:
            difference: Bytes that would go in the pause without it.
        """
        self._difference = difference
        name = f"mirrors {self._about['session']}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def take(self, operation: Frame) -> None:
        """Take an operation that the session does; never waits."""
        with self._changed:
            if self._over:
                return
            self._waiting.append(operation)
            if mirroring.keeps_up(_nbytes(operation), self._left(), self._difference):
                self._changed.notify_all()
            else:
                self._give_up()

    def let_catch_up(self, step: int) -> None:
        """Wait before a mini-batch begins until its shadow is near, or gains on the session.

        In all no longer than the difference would take, nor than a second.

        Args:
            step: The mini-batch; nothing is waited for if it has begun.
        """
        with self._changed:
            if step <= self._begun:
                return
            began = time.monotonic()
            until = began + mirroring.patience_s(
                self._difference, self.sent, self._took_s, self._waited_s
            )
            while not self._over:
                reached = self._reached_by(step)
                if mirroring.may_begin(step - reached, reached - self._reached):
                    break
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    break
            self._waited_s += time.monotonic() - began
            self._begun, self._reached = step, self._reached_by(step)

    def _reached_by(self, step: int) -> int:
        """Return the mini-batch that the shadow is at, where the session begins one."""
        return int(self._waiting[0].meta["step"]) if self._waiting else step

    def waiting(self) -> int:
        """Return the bytes of operations that the shadow has not done."""
        with self._changed:
            return self._left()

    def settled(self) -> int | None:
        """Wait until the shadow has done all; return how many that are, or None: it has not.

        It is not waited for where the difference is sooner there.
        """
        with self._changed:
            if not mirroring.pays(self._left(), self._difference):
                self._give_up()
            until = time.monotonic() + SETTLES_S
            while self._waiting and not self._over:
                if not self._changed.wait(until - time.monotonic()):
                    self._give_up()
            return None if self._over else self._done

    def end(self) -> None:
        """Send no more."""
        with self._changed:
            self._give_up()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._over:
                    self._changed.wait()
                if self._over:
                    return
                operation, number = self._waiting[0], self._done
            began = time.monotonic()
            try:
                self._ask(_mirrored(operation, number, self._about))
            except FedsysError:  # refused, or its edge server is gone: the difference goes instead
                self.end()
                return
            with self._changed:
                if self._waiting:
                    self._waiting.popleft()
                self._done += 1
                self._took_s += time.monotonic() - began
                self.sent += _nbytes(operation)
                self._changed.notify_all()

    def _left(self) -> int:
        return sum(map(_nbytes, self._waiting))

    def _give_up(self) -> None:
        self._over = True
        self._waiting.clear()
        self._changed.notify_all()


def _mirrored(operation: Frame, number: int, about: Mapping[str, Any]) -> Frame:
    told = [operation.kind, dict(operation.meta)]
    return Frame("mirror", {**about, "number": number, "operation": told}, operation.tensors)


def _nbytes(operation: Frame) -> int:
    return sum(tensor.nbytes for tensor in operation.tensors.values())
