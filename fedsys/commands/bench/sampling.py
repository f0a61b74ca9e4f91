"""What is looked at again and again while a benchmark does something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def sampled(look: Callable[[], T], every_s: float) -> Iterator[list[T]]:
    """Yield a list that gets what a function returns, again and again, while the block runs.

    Args:
        look: Called in a thread of its own; one that raises ends it.
        every_s: Seconds before the first call, and between two.
    """
    over, seen = threading.Event(), list[T]()

    def watch() -> None:
        while not over.wait(every_s):
            seen.append(look())

    thread = threading.Thread(target=watch, name="sampling", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
