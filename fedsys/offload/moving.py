"""What moves sessions between edge servers, put together for one of them."""

from __future__ import annotations

from collections.abc import Callable

from fedsys.errors import SessionError
from fedsys.offload.bases import Bases
from fedsys.offload.copies import Copies
from fedsys.offload.edge_arrivals import Arrivals, Holdings
from fedsys.offload.edge_departures import Departures
from fedsys.offload.edge_faults import EdgeFaults
from fedsys.offload.edge_moves import EdgeMoves
from fedsys.offload.edge_session import EdgeSession
from fedsys.offload.fencing import Copy, Epoch
from fedsys.offload.migration import Say
from fedsys.offload.peers import Peers
from fedsys.offload.session_table import SessionTable
from fedsys.offload.shadows import Shadows
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame


class Moving:
    """Moves of one edge server, as its server apps see them.

    Args:
        name: Of the edge server.
        table: Its sessions.
        peers: The other edge servers.
        faults: What strikes sessions, and goes with them.
        make: Builds a session.

    Attributes:
        copies: Which sessions may train.
        moves: What devices and other edge servers speak with.
    """

    def __init__(
        self,
        name: str,
        table: SessionTable,
        peers: Peers,
        faults: EdgeFaults,
        make: Callable[[SessionSpec, Snapshot], EdgeSession],
    ) -> None:
        self.copies, self._bases = Copies(table), Bases()
        self._name, self._table, self._peers, self._faults = name, table, peers, faults
        self._shadows = Shadows(make, table.check_room_for)
        own = Holdings(name, table, self.copies, self._bases, self._shadows, peers, faults)
        self._arrivals = Arrivals(own, make)
        self._departures = Departures(own, self._arrivals)
        self.moves = EdgeMoves(own, self._arrivals, self._departures)
        self.copies.dropped, self.copies.outlived = self._dropped, self._outlived

    def tell(self, frame: Frame, controller: Link) -> None:
        """Take in which edge servers the fleet of a server app has.

        Raises:
            FrameError: It says something else.
        """
        self._arrivals.told(self._peers.tell(frame.meta).secret, controller)

    def left(self, controller: Link) -> None:
        """Take note that the link of a server app ended."""
        self._arrivals.left(controller)

    def command(self, frame: Frame) -> list[str]:
        """Begin to move sessions that a server app or an operator names; return their names.

        Raises:
            SessionError: There is no such session, or no such edge server.
        """
        wanted, client = frame.meta.get("session"), frame.meta.get("client")
        to, found = str(frame.meta.get("to", "")), list[str]()
        for name in self._table.names:
            session = self._table.get(name)
            if session is None or wanted not in (None, name):
                continue
            if client is not None and session.spec.client != client:
                continue
            group = self._peers.group(session.spec.fleet)
            if group is None or to not in group.edges or to == self._name:
                known = ", ".join(sorted(set(group.edges) - {self._name})) if group else "none"
                raise SessionError(f"{to!r:.40} is no other edge server of this run: {known}")
            found.append(name)
        if not found:
            raise SessionError(f"{self._name} has no such session")
        for name in found:
            self._departures.move(name, to)
        return found

    def make_room(self, spec: SessionSpec, epoch: Epoch) -> None:
        """Forget what is here of a session that is opened anew.

        Raises:
            SessionError: A later one is here.
        """
        self.moves.opened(spec, epoch)

    def opened(self, spec: SessionSpec, start: Snapshot, epoch: Epoch) -> None:
        """Have a session train that a server app opened."""
        self._bases.began(spec, start)
        self._shadows.forget(spec.id)
        self.copies.adopt(spec.id, Copy(epoch))

    def forget(self, session: str) -> None:
        """Forget a session that ended."""
        self.copies.forget(session)

    def _outlived(self, session: str, say: Say) -> None:
        if (held := self._table.get(session)) is not None:
            self._arrivals.tell(held, say)

    def _dropped(self, session: str) -> None:
        self._faults.forget(session)
        self._departures.withdraw(session)
        self._bases.forget(session)
        self._shadows.forget(session)

    def close(self) -> None:
        """End the links to other edge servers."""
        self._peers.close()
