"""What an edge server does for devices: each speaks with its own session, and with no other."""

from __future__ import annotations

from fedsys.errors import LinkClosed, LinkError, SecurityError
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.session import Session
from fedsys.offload.session_table import SessionTable
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.security import same_token
from fedsys.transport.wire import Frame


class EdgeDevices:
    """Serves links of devices.

    Args:
        table: The sessions.
        faults: What strikes them.
    """

    def __init__(self, table: SessionTable, faults: EdgeFaults) -> None:
        self._table, self._faults = table, faults

    def serve(self, link: AcceptedLink, hello: Frame) -> None:
        """Let a device train until its link ends.

        Raises:
            FedsysError: It may not, or sent what its session does not take.
        """
        session = self._known(link, hello)
        if session is None:
            link.send(Frame("unknown"))
            return
        link.admit()
        self._table.attach(session.spec.id, link)
        if session.at_work():  # the device lost its link meanwhile; it is not to think us gone
            link.send(Frame("wait"))
        position = {"step": session.position(), "incarnation": session.incarnation}
        link.send(Frame("welcome", position))
        while True:
            frame = link.recv()
            self._table.count("bytes_in", frame.encoded_bytes)
            if frame.kind == "done":
                link.send(Frame("done", {"step": session.steps}))
            else:
                self._operate(link, session, frame)

    def say_whether_here(self, link: Link, probe: Frame) -> None:
        """Answer a device whose own link is silent; that link stays as it is.

        Raises:
            SecurityError: It may not ask.
        """
        session = self._known(link, probe)
        here = Frame("here", {"incarnation": session.incarnation}) if session else None
        link.send(here or Frame("unknown"))

    def _operate(self, link: Link, session: Session, frame: Frame) -> None:
        before, name = session.steps, session.spec.id
        lost: LinkError | None = None
        self._faults.strike("before_compute", name, link, frame)
        try:
            for reply in session.handle(frame):
                try:
                    if lost is None:
                        self._faults.strike("after_compute", name, link, frame)
                        link.send(reply)
                except LinkError as error:  # the operation goes on; its reply is kept
                    lost = error
        except LinkClosed:  # it was frozen; the device finds it elsewhere
            link.close()
            raise
        self._table.count("steps", session.steps - before)
        if session.steps > before:
            self._faults.strike("after_step", name, link, frame)
        if lost is not None:
            raise lost

    def _known(self, link: Link, frame: Frame) -> Session | None:
        """Return the session that a frame names, if its sender may speak with it; None for none.

        Raises:
            SecurityError: It may not.
        """
        name, token = str(frame.meta.get("session", "")), str(frame.meta.get("token", ""))
        session = self._table.get(name)
        if session is None:
            self._table.count("refused_unknown_session")
            return None
        if not same_token(token, session.spec.token):
            raise SecurityError(f"session {name}: the token is not that of this session")
        if session.spec.holder and link.peer != session.spec.holder:
            raise SecurityError(
                f"session {name}: belongs to {session.spec.holder}, not to {link.peer or '?'}"
            )
        return session
