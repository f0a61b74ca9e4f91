"""What an edge server does for devices: each speaks with its own session, and with no other."""

from __future__ import annotations

from fedsys.errors import LinkClosed, LinkError, SecurityError
from fedsys.offload.copies import Copies
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.edge_moves import EdgeMoves
from fedsys.offload.fencing import CopyPhase
from fedsys.offload.session import Session
from fedsys.offload.session_table import SessionTable
from fedsys.offload.snapshot import SessionSpec
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.security import same_token
from fedsys.transport.wire import Frame


class EdgeDevices:
    """Serves links of devices.

    Args:
        table: The sessions.
        faults: What strikes them.
        moves: Moves them between edge servers.
        copies: Which of them may train.
    """

    def __init__(
        self, table: SessionTable, faults: EdgeFaults, moves: EdgeMoves, copies: Copies
    ) -> None:
        self._table, self._faults = table, faults
        self._moves, self._copies = moves, copies

    def serve(self, link: AcceptedLink, hello: Frame) -> None:
        """Let a device train until its link ends.

        Raises:
            FedsysError: It may not, or sent what its session does not take.
        """
        welcome = self._moves.greet(link, hello, lambda spec: _check(spec, link, hello))
        if welcome is None:
            return
        session = welcome.session
        link.admit()
        self._table.attach(session.spec.id, link)
        if session.at_work():  # the device lost its link meanwhile; it is not to think us gone
            link.send(Frame("wait"))
        position = {"step": session.position(), "incarnation": session.incarnation}
        position["first"] = session.spec.first
        epoch = list(welcome.epoch)
        link.send(Frame("welcome", {**position, "epoch": epoch, **welcome.more}))
        while True:
            frame = link.recv()
            self._table.count("bytes_in", frame.encoded_bytes)
            if frame.kind == "done":
                link.send(Frame("done", {"step": session.steps}))
            elif frame.kind in ("moving", "foresee"):
                self._moves.asked(session.spec.id, frame)
            elif self._copies.may_train(session.spec.id, welcome.epoch):
                self._operate(link, session, frame)
            else:  # it is elsewhere; the device finds it there
                raise LinkClosed(f"session {session.spec.id} is no longer here")

    def say_whether_here(self, link: Link, probe: Frame) -> None:
        """Answer a device whose own link is silent; that link stays as it is.

        Raises:
            SecurityError: It may not ask.
        """
        session = self._known(link, probe)
        copy = self._copies.get(session.spec.id) if session else None
        if copy is None or copy.phase in (CopyPhase.GIVEN, CopyPhase.STAGED):
            session = None
        here = Frame("here", {"incarnation": session.incarnation}) if session else None
        if session is None and self._moves.is_coming(str(probe.meta.get("session", ""))):
            here = Frame("here", {"incarnation": "coming"})
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
        name = str(frame.meta.get("session", ""))
        session = self._table.get(name)
        if session is None:
            self._table.count("refused_unknown_session")
            return None
        _check(session.spec, link, frame)
        return session


def _check(spec: SessionSpec, link: Link, frame: Frame) -> None:
    """Check that who sent a frame may speak with a session.

    Raises:
        SecurityError: It may not.
    """
    if not same_token(str(frame.meta.get("token", "")), spec.token):
        raise SecurityError(f"session {spec.id}: the token is not that of this session")
    if spec.holder and link.peer != spec.holder:
        raise SecurityError(
            f"session {spec.id}: belongs to {spec.holder}, not to {link.peer or '?'}"
        )
