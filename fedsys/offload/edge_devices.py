"""What an edge server does for devices: each speaks with its own session, and with no other."""

from __future__ import annotations

from fedsys.errors import LinkClosed, LinkError, SecurityError, SessionError
from fedsys.offload.copies import Copies
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.edge_moves import EdgeMoves, Welcome
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import CopyPhase
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
        self._gone: set[str] = set()  # sessions whose device was told to be gone

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
        link.send(Frame("welcome", {**position, "epoch": epoch, **welcome.told()}))
        name, done = session.spec.id, False
        if self._was_gone(name):
            self._table.tell(name, Frame("back", {"session": name}))
        try:
            while True:
                frame = link.recv()
                self._table.count("bytes_in", frame.encoded_bytes)
                done = frame.kind == "done" and frame.meta.get("trip") is not True
                self._take(link, welcome, frame)
        finally:
            if self._table.detach(name, link) and not done:
                self._is_gone(name)
                self._table.tell(name, Frame("gone", {"session": name}))

    def _is_gone(self, name: str) -> None:
        """Take note that the device of a session is gone; those of sessions that ended are not."""
        with self._table.lock:
            self._gone = {n for n in self._gone if self._table.get(n)} | {name}

    def _was_gone(self, name: str) -> bool:
        """Return whether the device of a session was gone until now."""
        with self._table.lock:
            was = name in self._gone
            self._gone.discard(name)
            return was

    def _take(self, link: Link, welcome: Welcome, frame: Frame) -> None:
        """Do what a device says.

        Raises:
            FedsysError: It may not train here, or its session does not take it.
        """
        session = welcome.session
        if frame.kind == "done":
            said = {key: frame.meta[key] for key in ("piece",) if key in frame.meta}
            link.send(Frame("done", {"step": session.steps, **said}))
        elif frame.kind in ("moving", "foresee", "remain"):
            self._moves.asked(session.spec.id, frame)
        elif not self._copies.may_train(session.spec.id, welcome.epoch):
            raise LinkClosed(f"session {session.spec.id} is no longer here")
        elif (refused := self._too_large(session, frame)) is not None:
            link.send(refused)
        else:
            self._operate(link, session, frame)

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

    def _too_large(self, session: EdgeSession, frame: Frame) -> Frame | None:
        """Return the answer to a change of the cut for which there is no room; None: there is.

        The device keeps its cut then, and trains on.
        """
        first = frame.meta.get("first")
        if frame.kind != "recut" or not isinstance(first, int) or first >= session.spec.first:
            return None
        try:
            self._table.check_growth(sum(tensor.nbytes for tensor in frame.tensors.values()))
            return None
        except SessionError as error:
            self._table.count("refused_recut")
            return Frame("recut", {"step": session.steps, "refused": str(error)})

    def _operate(self, link: Link, session: EdgeSession, frame: Frame) -> None:
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

    def _known(self, link: Link, frame: Frame) -> EdgeSession | None:
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
