"""Moves that are told in shares of a round: onwards halfway (FedFly), or there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from fedsys.config import MobilityConfig
from fedsys.planning.moves import How, Move
from fedsys.randomness import Address


class Scripted:
    """A mobility source whose devices move at the same shares of every round, or every few rounds.

    Device i is at edge server i modulo their number at first. ``halfway`` takes it on to the next
    one with each move, ``commuters`` there and back.

    Args:
        mobility: The group.
        num_clients: Devices of the run.
        seed: Draws who moves, where a share of them does.

    Attributes:
        notes: What is to be said about it: nothing.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, mobility: MobilityConfig, num_clients: int, seed: int) -> None:
        self._mobility = mobility
        self._movers = movers(mobility, num_clients, seed)

    def places(
        self, round_: int, clients: Sequence[int], edges: Sequence[str]
    ) -> Mapping[int, int | None]:
        """Return where devices are when a round begins."""
        return {client: self._place(client, self._before(round_), len(edges)) for client in clients}

    def moves(self, round_: int, clients: Sequence[int], edges: Sequence[str]) -> tuple[Move, ...]:
        """Return the moves of some clients in a round, those of each in their order."""
        own, done = self._mobility, self._before(round_)
        if self._before(round_ + 1) == done:
            return ()
        return tuple(
            Move(
                client, round_, share, self._place(client, done + k, len(edges)),
                cast(How, own.how), own.notice, own.piece, own.away_s, own.cut,
            )
            for client in clients
            if client in self._movers
            for k, share in enumerate(own.at, start=1)
        )  # fmt: skip

    def _before(self, round_: int) -> int:
        """Return how often each device has moved before a round; they move in the first one."""
        return len(self._mobility.at) * math.ceil((round_ - 1) / self._mobility.every)

    def _place(self, client: int, moved: int, edges: int) -> int:
        if client not in self._movers:
            return client % edges
        return (client + (moved % 2 if self._mobility.kind == "commuters" else moved)) % edges


def movers(mobility: MobilityConfig, num_clients: int, seed: int) -> frozenset[int]:
    """Return the partition ids of the devices that move.

    Args:
        mobility: The group: ``devices``, and the ``share`` of these.
        num_clients: Devices of the run.
        seed: Of the run.
    """
    asked = sorted(set(mobility.devices)) or list(range(num_clients))
    count = math.ceil(mobility.share * len(asked))
    order = Address(seed).numpy("movers").permutation(len(asked)).tolist()
    return frozenset(asked[i] for i in order[:count])
