"""Waiting for what another thread or process is about to do: for a condition, never for a time."""

import time

LONG_S = 60.0
"""How long a machine with other work may take; nothing that works needs it."""


def came_true(true, seconds=LONG_S):
    """Wait for something to become true; return whether it did."""
    end, pause = time.monotonic() + seconds, 0.002
    while not true():
        if time.monotonic() > end:
            return bool(true())
        time.sleep(pause)
        pause = min(1.1 * pause, 0.05)  # what takes long is not to compete with its observer
    return True


def until(true, seconds=LONG_S):
    """Wait for something to become true, or fail; returns True."""
    assert came_true(true, seconds), f"did not come true in {seconds:g} s"
    return True
