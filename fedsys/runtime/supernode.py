"""``python -m fedsys.runtime.supernode``: Flower's ``flower-supernode``, which asks for work often.

Takes the same arguments. A SuperNode asks its SuperLink for a message every three seconds, so a
round waits for up to three, and the begin of a run, where all nodes are asked who they are, too.
Nodes of a launched run are on the machine of their SuperLink and ask more often, by what
`INTERVAL` says in their environment.

What is private in Flower and used here: the clock of the module that asks.
`tests/runtime/test_launch.py` fails when it changes.
"""

from __future__ import annotations

import os
import time
from typing import Any

INTERVAL = "FEDSYS_SUPERNODE_POLL_S"
"""Variable with the seconds between two questions."""

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

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep, if not as long as asked."""
        time.sleep(min(seconds, self._most_s))


def main() -> None:
    """Run the SuperNode."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    vars(start_client_internal)["time"] = Hasty(float(os.environ.get(INTERVAL, MOST_S)))
    flower_supernode()


if __name__ == "__main__":
    main()
