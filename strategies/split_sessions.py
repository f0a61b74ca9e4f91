"""The sessions of a round: opened as messages go out, collected as replies come back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fedsys.errors import FedsysError, SessionError
from fedsys.offload.fleet import Fleet, Unreachable
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.planning.moves import Move, to_text
from fedsys.transport import records
from fedsys.transport.messages import (
    ASSIGNMENT,
    MOVES,
    PROBE,
    Itinerary,
    Place,
    Probe,
    written,
)
from fedsys.transport.security import new_token
from strategies.model_division import ModelDivision
from strategies.policies.policy import Assignment

_log = logging.getLogger("fedsys.offload")


@dataclass(frozen=True)
class Sent:
    """A device that trains with an edge in this round.

    Attributes:
        whole: The message as it was for a device that trains alone.
        assignment: What the policy said.
        spec: The session.
    """

    whole: RecordDict
    assignment: Assignment
    spec: SessionSpec


class SplitSessions:
    """Opens sessions at the edges of a fleet and sees that none stays open.

    Args:
        fleet: The edge servers.
        division: Divides the messages.
        restart: Whether rounds of devices that move begin anew.
    """

    def __init__(self, fleet: Fleet, division: ModelDivision, *, restart: bool = False) -> None:
        self._fleet, self._division, self._restart = fleet, division, restart
        self._sent: dict[int, Sent] = {}
        self._opened = self._worked = False  # in this phase; in one before
        self._names = {edge.for_devices: edge.name for edge in fleet.edges}

    def edge_name(self, address: str) -> str:
        """Return the name of the edge with an address for devices; else what was given."""
        return self._names.get(address, address)

    def first_edge(self, assignment: Assignment) -> str:
        """Return the name of the edge that is asked first."""
        edges = self._fleet.edges
        return edges[assignment.edge % len(edges)].name

    def open(
        self,
        message: Message,
        client: int,
        assignment: Assignment,
        round_: int,
        attempt: int = 0,
        moves: Sequence[Move] = (),
        armed: bool = True,
    ) -> None:
        """Open a session with the edge's half and leave the device's half in the message.

        Args:
            message: What the device is to be sent.
            client: The device.
            assignment: What the policy says.
            round_: The round.
            attempt: How many times it was begun before.
            moves: Of the device in the round.
            armed: Whether it leaves its link if that is poor before it was good.

        Raises:
            SessionError: No edge takes it.
            ConfigError: A label-private cut would leave no unit for the edge.
        """
        whole = message.content
        spec = self._division.spec(whole, client, assignment, round_, attempt)
        start = self._division.edge_half(whole, spec)
        name = self._fleet.open(spec, start, self.first_edge(assignment))
        content = self._division.device_half(whole, spec)
        place = Place(spec.last, spec.id, spec.token, tuple(self._fleet.device_addresses(name)))
        content[ASSIGNMENT] = ConfigRecord({**assignment.to_record(), **written(place)})
        if moves or not armed:
            addresses = tuple(edge.for_devices for edge in self._fleet.edges)
            itinerary = Itinerary(to_text(moves), addresses, self._restart, armed)
            content[MOVES] = ConfigRecord(written(itinerary))
        message.content = content
        self._sent[client] = Sent(whole, assignment, spec)
        self._opened = True

    def open_if_any(
        self,
        message: Message,
        client: int,
        assignment: Assignment,
        round_: int,
        moves: Sequence[Move] = (),
        armed: bool = True,
    ) -> bool:
        """Open a session if an edge is left, and return whether that was done.

        What is not told here is as `open` takes it.

        Raises:
            SessionError: The first sessions of a run are refused: there are too few edges for it,
                or too small ones. Later that is no reason to end.
        """
        try:
            self.open(message, client, assignment, round_, moves=moves, armed=armed)
        except SessionError as error:
            if not isinstance(error, Unreachable) and not self._worked:
                raise
            _log.warning("client %d: %s", client, error)
            return False
        return True

    def have_measured(self, message: Message, client: int, nbytes: int) -> None:
        """Ask a device that trains alone to measure its link, if an edge server expects that.

        Args:
            message: What it is sent.
            client: The device.
            nbytes: Bytes each way.
        """
        alive = self._fleet.alive
        if not alive or not nbytes:
            return
        name, token = alive[client % len(alive)], new_token()
        try:
            self._fleet.expect(name, token)
        except FedsysError as error:
            _log.warning("client %d does not measure its link: %s", client, error)
            return
        place = Probe(nbytes, token, tuple(self._fleet.device_addresses(name)[:1]))
        message.content = records.own_copy(message.content)
        message.content[PROBE] = ConfigRecord(written(place))

    def take(self, client: int) -> Sent | None:
        """Return what a client was sent, once; None if it trains alone."""
        return self._sent.pop(client, None)

    def collect(self, sent: Sent, steps: int, at: str = "") -> Snapshot:
        """Return the edge's half of a client.

        Args:
            sent: What the client was sent.
            steps: Steps that the device did.
            at: Address of the edge at which it ended, as devices reach it; empty: not known.

        Raises:
            FedsysError: No edge has it, or not at this step.
        """
        snapshot = self._fleet.collect(sent.spec.id, self.edge_name(at))
        if snapshot.step != steps:
            raise SessionError(f"{snapshot.step} steps on the edge, {steps} on the device")
        return snapshot

    def release(self, sent: Sent) -> None:
        """Close a session."""
        self._fleet.release(sent.spec.id)

    def end(self) -> None:
        """Close what is open still: sessions of clients that never answered."""
        for sent in self._sent.values():
            self.release(sent)
        self._sent = {}
        self._worked, self._opened = self._worked or self._opened, False

    def log_recoveries(self, round_: int) -> None:
        """Log what the fleet did about losses since the last call."""
        for recovery in self._fleet.recoveries():
            _log.warning(
                "round %d: session of client %d moved from %s to %s, from step %d",
                round_, recovery.client, recovery.source, recovery.target or "nowhere",
                recovery.step,
            )  # fmt: skip
