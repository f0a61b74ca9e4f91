"""A mobility source for tests: it says what it was told."""

import random
from dataclasses import dataclass

from fedsys.planning.moves import HOWS, Move


@dataclass(frozen=True)
class Listed:
    listed: tuple[Move, ...]

    def places(self, round_, clients, edges):
        return {}

    def moves(self, round_, clients, edges):
        return tuple(m for m in self.listed if m.round == round_ and m.client in clients)


def drawn(count, *, clients, rounds, edges, pieces=1, seed=0):
    """Return moves at any points of a run, there and back, in every way."""
    source, moves = random.Random(seed), []
    for index in range(count):
        at = source.randrange(8) / 8
        piece = source.randrange(pieces)
        how = HOWS[index % len(HOWS)]
        client, round_ = index % clients, 1 + index // clients % rounds
        moves.append(Move(client, round_, at, source.randrange(edges), how, 0.2, piece))
    return tuple(sorted(moves, key=lambda move: (move.round, move.at, move.piece)))
