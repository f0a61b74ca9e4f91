"""The copies of sessions on one edge server, with what is to be done when one changes its phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import TRAINS, Copy, CopyPhase, Epoch, may_train
from fedsys.offload.migration import Outcome, Say, on_train
from fedsys.offload.session_table import SessionTable

SETTLED_S = 120.0
"""How long a copy may be on its way until whoever waits for it looks elsewhere, in seconds."""


class Copies:
    """Copies by session. Methods may be called from any thread.

    Args:
        table: The sessions.

    Attributes:
        dropped: Called with the name of a session of which there is no copy any more.
        outlived: Called with the name of a session, and what is to be said to an edge server whose
            copy of it is not needed any more.
    """

    def __init__(self, table: SessionTable) -> None:
        self.dropped: Callable[[str], None] = lambda name: None
        self.outlived: Callable[[str, Say], None] = lambda name, say: None
        self._table, self._copies = table, dict[str, Copy]()
        self._told: dict[str, Mapping[str, Any]] = {}
        self._changed = threading.Condition(table.lock)

    def get(self, name: str) -> Copy | None:
        """Return a copy; None if there is none."""
        with self._table.lock:
            return self._copies.get(name) if self._table.get(name) else None

    def went(self, name: str, told: Mapping[str, Any]) -> None:
        """Take note of what a device is told of the move of its session, as often as it asks."""
        with self._table.lock:
            self._told[name] = told

    def told(self, name: str) -> Mapping[str, Any]:
        """Return what a device is told of the move of its session; empty where it did not move."""
        with self._table.lock:
            return self._told.get(name, {})

    def decide(self, name: str, rule: Callable[[Copy | None], Outcome]) -> tuple[Say, ...]:
        """Apply a rule of `fedsys.offload.migration` to a copy; return what is to be said."""
        with self._changed:
            before = self.get(name)
            after, said = rule(before)
            if after is None:
                self._forget(name, before)
            elif after is not before:
                self._put(name, before, after)
            return said

    def staged(
        self, session: EdgeSession, rule: Callable[[Copy | None], Outcome], hold: Callable[[], None]
    ) -> tuple[Say, ...]:
        """Take a session in if a rule has it; what is here of it is over then.

        Args:
            session: The session.
            rule: Of `fedsys.offload.migration`.
            hold: Takes it into the table.

        Raises:
            SessionError: There is no room for it.
        """
        name = session.spec.id
        with self._changed:
            before = self.get(name)
            after, said = rule(before)
            if after is not None and after is not before:
                if before is not None:
                    self._forget(name, before)
                hold()
                self._copies[name] = after
                self._changed.notify_all()
            return said

    def adopt(self, name: str, copy: Copy) -> None:
        """Have a copy of a session that the table has got."""
        with self._changed:
            self._copies[name] = copy
            self._changed.notify_all()

    def may_train(self, name: str, bound: Epoch) -> bool:
        """Return whether an operation may be done; waits while the copy is on its way."""
        deadline = time.monotonic() + SETTLED_S
        with self._changed:
            while (copy := self.get(name)) is not None and copy.phase is CopyPhase.FROZEN:
                if not self._changed.wait(deadline - time.monotonic()):
                    return False
            if not may_train(copy, bound):
                return False
            assert copy is not None
            self._copies[name], said = on_train(copy)
        for say in said:
            self.outlived(name, say)
        return True

    def settled(self, name: str) -> None:
        """Wait as long as a copy is on its way."""
        deadline = time.monotonic() + SETTLED_S
        with self._changed:
            while (copy := self.get(name)) is not None and copy.phase is CopyPhase.FROZEN:
                if not self._changed.wait(deadline - time.monotonic()):
                    return

    def forget(self, name: str) -> None:
        """Have a copy no more."""
        with self._changed:
            self._copies.pop(name, None)
            self._told.pop(name, None)
            self._changed.notify_all()
        self.dropped(name)

    def _put(self, name: str, before: Copy | None, after: Copy) -> None:
        session = self._table.get(name)
        stood = before is not None and before.phase not in TRAINS
        if session is not None and stood and after.phase in TRAINS:
            session.go_on()
        self._copies[name] = after
        self._changed.notify_all()

    def _forget(self, name: str, before: Copy | None) -> None:
        self._copies.pop(name, None)
        self._told.pop(name, None)
        if before is not None:
            self._table.release(name)
            self._changed.notify_all()
            self.dropped(name)
