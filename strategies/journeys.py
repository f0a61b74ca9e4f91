"""Where the devices of a round begin, and where they go: what a mobility source says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedsys.config import EdgeAddress
from fedsys.planning.assignment import Assignment
from fedsys.planning.moves import MobilitySource, Move
from fedsys.planning.ordering import Order


@dataclass(frozen=True)
class Journeys:
    """The devices of one round on their ways.

    Attributes:
        places: By client, the index of the edge at which it begins; None where none is in reach.
        moves: By client, its moves in the round.
    """

    places: Mapping[int, int | None] = field(default_factory=dict)
    moves: Mapping[int, tuple[Move, ...]] = field(default_factory=dict)

    def placed(self, assigned: Mapping[int, Assignment], whole: int) -> dict[int, Assignment]:
        """Return assignments in which each device is at the edge where it is, or alone.

        Args:
            assigned: What the policy said.
            whole: The cut of a model that is all on the device.
        """
        made = dict(assigned)
        for client, edge in self.places.items():
            now = made[client]
            made[client] = dataclasses.replace(
                now, cut=whole if edge is None else now.cut, edge=now.edge if edge is None else edge
            )
        return made

    def with_orders(self, orders: Iterable[Order]) -> Journeys:
        """Return the journeys with the moves that a policy ordered."""
        more = {order.move.client: (order.move,) for order in orders}
        return dataclasses.replace(self, moves={**self.moves, **more})

    @property
    def unreached(self) -> list[int]:
        """Clients that have no edge server in reach."""
        return [client for client, edge in self.places.items() if edge is None]

    def at_once(self) -> Mapping[int, tuple[Move, ...]]:
        """Return the moves without the time between two edge servers, where time is not real."""
        return {
            client: tuple(dataclasses.replace(move, away_s=0.0) for move in moves)
            for client, moves in self.moves.items()
        }


def begun(
    source: MobilitySource | None,
    round_: int,
    clients: Sequence[int],
    edges: Sequence[EdgeAddress],
) -> Journeys:
    """Return where the devices of a round begin; without a source they stay where they are put."""
    if source is None or not edges:
        return Journeys()
    return Journeys(source.places(round_, clients, [edge.name for edge in edges]))


def gone_on(
    begin: Journeys,
    source: MobilitySource | None,
    round_: int,
    clients: Sequence[int],
    edges: Sequence[EdgeAddress],
) -> Journeys:
    """Return where the devices of a round go from where they begin.

    It is asked when it is settled how they train, since the times of moves depend on it.
    """
    if source is None or not edges:
        return begin
    ways: dict[int, tuple[Move, ...]] = {}
    for move in source.moves(round_, clients, [edge.name for edge in edges]):
        ways[move.client] = (*ways.get(move.client, ()), move)
    return dataclasses.replace(begin, moves=ways)
