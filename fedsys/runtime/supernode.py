"""``python -m fedsys.runtime.supernode``: Flower's ``flower-supernode``, which asks for work often.

Takes the same arguments. A SuperNode asks its SuperLink for a message every three seconds, so a
round waits for up to three, and the begin of a run, where all nodes are asked who they are, too.
Nodes of a launched run are on the machine of their SuperLink and ask more often, by what
`INTERVAL` says in their environment. And it looks every half second whether its executor has left a
reply, which comes through this process: it is woken by that.

What is private in Flower and used here: the clock of the module that asks, and what keeps messages
and their parts. `tests/runtime/test_launch.py` fails when one of them changes.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

INTERVAL = "FEDSYS_SUPERNODE_POLL_S"
"""Variable with the seconds between two questions."""

KEEPERS = (
    ("flwr.supernode.nodestate.in_memory_nodestate.InMemoryNodeState", "store_message"),
    ("flwr.supercore.object_store.in_memory_object_store.InMemoryObjectStore", "put"),
)
"""What keeps messages, and their parts, that a SuperNode waits for."""

LEAST_S, MOST_S, PER_S = 0.5, 3.0, 10.0


def interval_s(num_nodes: int) -> float:
    """Return how long each of some nodes waits so that all together ask ten times in a second."""
    return min(max(LEAST_S, num_nodes / PER_S), MOST_S)


class Hasty:
    """The module `time`, in which nobody sleeps for long.

    Args:
        most_s: Longest sleep, in seconds.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._woken = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep, if not as long as asked, and not on when something was kept meanwhile."""
        self._woken.wait(min(seconds, self._most_s))
        self._woken.clear()

    def waking(self, keep: Callable[..., Any]) -> Callable[..., Any]:
        """Return what keeps something, and then wakes who sleeps."""

        @functools.wraps(keep)
        def kept(*args: Any, **kwargs: Any) -> Any:
            result = keep(*args, **kwargs)
            self._woken.set()
            return result

        return kept


def main() -> None:
    """Run the SuperNode."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    clock = Hasty(float(os.environ.get(INTERVAL, MOST_S)))
    vars(start_client_internal)["time"] = clock
    for place, method in KEEPERS:
        module, _, name = place.rpartition(".")
        keeper = getattr(importlib.import_module(module), name)
        setattr(keeper, method, clock.waking(getattr(keeper, method)))
    flower_supernode()


if __name__ == "__main__":
    main()
