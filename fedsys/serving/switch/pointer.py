"""A variant in memory with the requests in it, and the pointer that says which one answers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

from fedsys.errors import RuntimeFailure

Run = Callable[[Any], Any]
"""Images ``(batch, C, H, W)`` to outputs ``(batch, classes)``: tensors, or arrays for both."""


def without_gradients() -> AbstractContextManager[Any]:
    """Return PyTorch's inference mode if anything has brought PyTorch; what runs needs it then."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.inference_mode()


@final
class Active:
    """One variant in memory, and how many requests are in it.

    Args:
        name: Of the variant.
        run: Computes it.

    Attributes:
        name: Of the variant.
    """

    def __init__(self, name: str, run: Run) -> None:
        self.name, self._run = name, run
        self._inside, self._retired = 0, False
        self._change = threading.Condition()

    def run(self, images: Any) -> Any:
        """Return the outputs of the variant, without gradients."""
        with without_gradients():
            return self._run(images)

    def enter(self) -> bool:
        """Let a request in; False if the variant is on its way out."""
        with self._change:
            if self._retired:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        """End a request."""
        with self._change:
            self._inside -= 1
            self._change.notify_all()

    def retire(self) -> None:
        """Let nobody in any more."""
        with self._change:
            self._retired = True

    def drain(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; return whether that came true."""
        with self._change:
            return self._change.wait_for(lambda: self._inside == 0, timeout_s)


@final
class Pointer:
    """Which variant requests get; without one they wait.

    The pointer is a single attribute and is read without a lock, so changing it blocks nobody.

    Attributes:
        active: What answers; None while requests wait.
        closed: Whether nobody is let in any more.
    """

    def __init__(self) -> None:
        self.active: Active | None = None
        self._there = threading.Event()
        self.closed = False

    def enter(self) -> Active:
        """Let a request into what answers; wait for it where there is none.

        Raises:
            RuntimeFailure: It has been closed.
        """
        while True:
            active = self.active
            if active is not None and active.enter():
                return active
            if self.closed:
                raise RuntimeFailure("no variant answers any more: it has been closed")
            if active is None:
                self._there.wait()
            # A variant that lets nobody in has had its successor in the pointer since before.

    def put(self, active: Active) -> Active | None:
        """Change the pointer, then close the old variant; return it."""
        old, self.active = self.active, active
        self._there.set()
        if old is not None:
            old.retire()
        return old

    def take(self) -> Active | None:
        """Leave requests waiting; return the old variant."""
        old = self.active
        self._there.clear()
        self.active = None
        if old is not None:
            old.retire()
        return old

    def close(self) -> Active | None:
        """Let nobody in any more, those that wait included; return the old variant."""
        self.closed = True
        old = self.take()
        self._there.set()
        return old


@final
class Lease(AbstractContextManager[Active]):
    """Enters a variant beside the pointer; the one of the pointer if it is on its way out.

    Args:
        pointer: The pointer.
        spare: The variant beside it; None for none.
    """

    def __init__(self, pointer: Pointer, spare: Active | None) -> None:
        self._pointer, self._spare = pointer, spare

    def __enter__(self) -> Active:
        spare = self._spare
        self._active = spare if spare is not None and spare.enter() else self._pointer.enter()
        return self._active

    def __exit__(self, *raised: object) -> None:
        self._active.leave()
