"""Where the devices of a round begin, and where they go: what a mobility source says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedsys.config import EdgeAddress
from fedsys.planning.assignment import Assignment
from fedsys.planning.moves import MobilitySource, Move


@dataclass(frozen=True)
class Journeys:
    """The devices of one round on their ways.

    Attributes:
        places: By client, the index of the edge at which it begins; None where none is in reach.
        moves: By client, its moves in the round.
    """

    places: Mapping[int, int | None] = field(default_factory=dict)
    moves: Mapping[int, tuple[Move, ...]] = field(default_factory=dict)

    def placed(self, assigned: Mapping[int, Assignment]) -> dict[int, Assignment]:
        """Return assignments in which each device is at the edge where it is."""
        return {
            client: assignment
            if (edge := self.places.get(client)) is None
            else dataclasses.replace(assignment, edge=edge)
            for client, assignment in assigned.items()
        }


def journeys(
    source: MobilitySource | None,
    round_: int,
    clients: Sequence[int],
    edges: Sequence[EdgeAddress],
) -> Journeys:
    """Return the ways of the devices of a round; without a source they stay where they are put."""
    if source is None or not edges:
        return Journeys()
    names, ways = [edge.name for edge in edges], dict[int, tuple[Move, ...]]()
    for move in source.moves(round_, clients, names):
        ways[move.client] = (*ways.get(move.client, ()), move)
    return Journeys(source.places(round_, clients, names), ways)
