"""Starts a launched SuperLink again, and what runs its server app, when they end.

A SuperLink has its runs and nodes from its database, but not the objects that were being pushed, so
that a reply may be lost with it: a round that goes on would have fewer clients than without the
fault. So the run begins anew from its last checkpoint, where `fedsys.runtime.deployment` submits it
again; its model is that of an undisturbed one. The executor takes its server app along in any case.
"""

from __future__ import annotations

from typing import Protocol

from fedsys.errors import RuntimeFailure
from fedsys.runtime.processes import Processes

SUPERLINK, EXECUTOR = "superlink", "superlink-executor"


class Restarted(RuntimeFailure):
    """What a run needs has ended and was started again; the run itself is over."""


class Starts(Protocol):
    """What starts them."""

    def start_superlink(self, processes: Processes) -> None:
        """Start the SuperLink with the state that it had."""

    def wait(self, processes: Processes) -> None:
        """Wait until it answers."""

    def start_executor(self, processes: Processes) -> None:
        """Start what runs the server app."""


class ServerSide:
    """Watches the SuperLink and the executor of the server app.

    Args:
        deployment: Starts them.
        processes: Where they are.
    """

    def __init__(self, deployment: Starts, processes: Processes) -> None:
        self._deployment, self._processes = deployment, processes

    def check(self) -> None:
        """Start again what has ended.

        Raises:
            Restarted: Something had; names it.
            RuntimeFailure: It does not start again.
        """
        ended = self._processes.ended()
        names = [name for name in (SUPERLINK, EXECUTOR) if name in ended]
        if not names:
            return
        # Its server app is to have ended before another one goes on in its folder.
        self._processes.stop([EXECUTOR, *names], at_once=True)
        if SUPERLINK in names:
            self._deployment.start_superlink(self._processes)
            self._deployment.wait(self._processes)
        self._deployment.start_executor(self._processes)
        why = " and ".join(f"{name} ended with status {ended[name]}" for name in names)
        raise Restarted(f"{why} and was started again")
