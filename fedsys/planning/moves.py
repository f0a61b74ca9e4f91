"""Devices that move between edge servers: where each begins a round, and what happens in it.

A mobility source says where devices are; whoever trains or plays a round follows it, and takes
down what became of each move::

    source.places(2, [0, 1], ["edge-0", "edge-1"])   # {0: 0, 1: 1}
    source.moves(2, [0, 1], ["edge-0", "edge-1"])    # (Move(client=0, round=2, at=0.5, edge=1),)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

How = Literal["announced", "foreseen", "unannounced"]

HOWS: Final[tuple[How, ...]] = ("announced", "foreseen", "unannounced")
"""How a device leaves: it says so as it goes; it says so some time before; it is simply gone."""


@dataclass(frozen=True, slots=True)
class Move:
    """A device goes from the edge server that it is at to another one.

    Attributes:
        client: Partition id of the device.
        round: The round, from 1.
        at: Share of the device's own mini-batches in the round that are done by then, in [0, 1].
        edge: Index of the edge server that it goes to.
        how: One of `HOWS`.
        notice: Share of the round between the first sign of a foreseen move and the move.
        piece: Micro-batches of the mini-batch in work that were sent by then.
        away_s: Seconds between the two edges in which it reaches neither.
        cut: The cut from there on; None: as before.
        why: In words, where it is no matter of places.
    """

    client: int
    round: int
    at: float
    edge: int
    how: How = "announced"
    notice: float = 0.1
    piece: int = 0
    away_s: float = 0.0
    cut: int | None = None
    why: str = ""

    def step(self, steps: int) -> int:
        """Return the mini-batches that are done when the device moves.

        >>> Move(client=0, round=1, at=0.5, edge=1).step(7)
        3

        Args:
            steps: Mini-batches of the device in the round.
        """
        return min(steps, max(0, int(self.at * steps)))

    def notice_step(self, steps: int) -> int:
        """Return the mini-batches that are done when a foreseen move shows for the first time."""
        return min(self.step(steps), max(0, int((self.at - self.notice) * steps)))


@dataclass(frozen=True, slots=True)
class Handover:
    """What became of a move.

    Attributes:
        client: Partition id of the device.
        round: The round, from 1.
        step: Mini-batches that were done on the source.
        source: Name of the edge server that it left.
        target: Name of the one where it went on.
        how: One of `HOWS`; or ``commanded``, by an operator or a policy; or ``restart``, if the
            round began anew there.
        pause_s: From the end of the last step on the source to the start of the first on the
            target.
        bytes: Bytes of the session's state that went between the edges in that time.
        precopied_bytes: Bytes that went before, while training went on.
        repeated_steps: Steps that were done again.
        parts_s: Seconds by part of the pause: ``freeze``, ``encode``, ``transfer``, ``restore``,
            ``reconnect``, ``away`` where it reached no edge server for a while, and ``recut`` where
            units changed sides. What edge servers do is measured there, and ``reconnect`` is what
            the device waited beside that, so that they make up the pause only if none is missing.
        began_s: When the pause began, in seconds since the device began its round.
        at: Share of the device's mini-batches that were done; None where it is not known, as of a
            round without mini-batches.
        predicted_pause_s: Pause on the virtual clock; None where the fleet names no machines.
        predicted_bytes: Likewise, bytes that go in the pause.
        why: In words, where it was no matter of places.
        good_again: Whether the link of which it left was good again at the end of the round.
    """

    client: int
    round: int
    step: int
    source: str
    target: str
    how: str
    pause_s: float = 0.0
    bytes: int = 0
    precopied_bytes: int = 0
    repeated_steps: int = 0
    parts_s: Mapping[str, float] = field(default_factory=dict)
    began_s: float = 0.0
    at: float | None = None
    predicted_pause_s: float | None = None
    predicted_bytes: int | None = None
    why: str = ""
    good_again: bool = True


class MobilitySource(Protocol):
    """Where devices are. Both methods give the same answer every time they are asked."""

    def places(
        self, round_: int, clients: Sequence[int], edges: Sequence[str]
    ) -> Mapping[int, int | None]:
        """Return where devices are when a round begins.

        Args:
            round_: The round, from 1.
            clients: Partition ids of those that take part.
            edges: Names of the edge servers.

        Returns:
            By client, the index of its edge server, or None if none is in reach. A client that is
            not there is wherever the policy wants it.
        """
        ...

    def moves(self, round_: int, clients: Sequence[int], edges: Sequence[str]) -> tuple[Move, ...]:
        """Return the moves of some clients in a round, those of each in their order."""
        ...


def to_text(values: Iterable[Move] | Iterable[Handover]) -> str:
    """Return moves, or what became of them, as a JSON list."""
    return json.dumps([dataclasses.asdict(value) for value in values])


def moves_of(text: str) -> tuple[Move, ...]:
    """Return the moves of a JSON list."""
    return tuple(Move(**values) for values in json.loads(text))


def handovers_of(text: str) -> tuple[Handover, ...]:
    """Return the handovers of a JSON list."""
    return tuple(Handover(**values) for values in json.loads(text))
