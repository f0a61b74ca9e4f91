"""States of sessions on their way to controllers: replicas in training, handovers at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from fedsys.errors import LinkClosed, SessionError
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.session_table import SessionTable
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")


def send_state(table: SessionTable, kind: str, spec: SessionSpec, snapshot: Snapshot) -> bool:
    """Send a snapshot to the controller of its session; return whether that could be done."""
    meta = {"session": spec.id, **snapshot.to_meta()}
    return table.tell(spec.id, Frame(kind, meta, snapshot.tensors()))


def hand_over(
    table: SessionTable, sessions: Sequence[EdgeSession], grace_s: float
) -> list[tuple[SessionSpec, Snapshot]]:
    """Freeze sessions at the end of their steps and send them to their controllers.

    Args:
        table: Has them; they are discarded from it.
        sessions: The sessions.
        grace_s: How long to wait for steps that are begun, all together.

    Returns:
        Those that no controller took.
    """
    deadline = time.monotonic() + grace_s
    left = []
    for session in sessions:
        snapshot = _frozen(session, deadline)
        if snapshot is None:
            continue
        table.discard(session.spec.id)
        if not send_state(table, "handover", session.spec, snapshot):
            left.append((session.spec, snapshot))
    return left


def _frozen(session: EdgeSession, deadline: float) -> Snapshot | None:
    """Freeze a session at the end of its step; return None if that does not come in time."""
    while True:
        try:
            return session.freeze()
        except LinkClosed as error:  # the process is gone that computed it
            _log.warning("%s", error)
            return None
        except SessionError as error:  # pieces of the step are on their way
            if time.monotonic() > deadline:
                _log.warning("%s", error)
                return None
        time.sleep(0.005)
