"""Descriptors of this process, counted against the limit of the system before they are needed.

Whoever takes connections beyond it is deaf to everybody, health checks included.
"""

from __future__ import annotations

import os
import resource
from typing import Final

OTHERS: Final = 64
"""Descriptors kept for all else that a process opens."""

_FEWEST: Final = 8


def affordable(connections: int, *, each: int = 1, kept: int = 0) -> int:
    """Return how many of so many connections there are descriptors for, at least a few.

    The soft limit of the system is raised as far as it goes and is needed.

    Args:
        connections: How many are wanted.
        each: Descriptors that one takes.
        kept: Descriptors for others, besides those that are open and `OTHERS`.
    """
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else OTHERS
    others = opened + OTHERS + kept
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = each * connections + others
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(min(_FEWEST, connections), min(connections, (soft - others) // each))
