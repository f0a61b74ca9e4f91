"""Moves that a policy orders: a device goes on at another edge server where that shortens a round.

An edge server whose devices are done stands idle while another one is still busy. Of the device
that ends last, each other edge server is tried from some points of its round on; the virtual clock
plays that with all that the move costs, and the best one is ordered if it saves enough. That is
repeated for who ends last then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from fedsys.planning.assignment import Assignment
from fedsys.planning.moves import Move
from fedsys.planning.virtual_clock import MOST_TURNS, VirtualRound, Ways, virtual_round
from fedsys.planning.workload import Workload

SHARES: Final = (0.25, 0.5, 0.75)
"""Points of a device's round, as shares of its mini-batches, from which on a move is tried."""

NOTICE: Final = 0.1
"""Share of the round before a move in which the session is sent ahead."""

MOST_ORDERS: Final = 8
"""Moves that are ordered in a round at most."""


@dataclass(frozen=True)
class Order:
    """A move that a policy orders.

    Attributes:
        move: Its ``client`` is the index of the device in the workload.
        before_s: Seconds of the round without it.
        after_s: With it.
    """

    move: Move
    before_s: float
    after_s: float


def ordered(
    load: Workload,
    choices: Sequence[Assignment],
    free: Collection[int],
    round_: int,
    start_s: float = 0.0,
    *,
    hysteresis: float = 0.05,
    most: int = MOST_TURNS // 8,
) -> tuple[Order, ...]:
    """Return the moves that shorten a round, the one that was found first in front.

    Args:
        load: What is trained, with the links between edge servers.
        choices: How each device begins.
        free: Indices of the devices that may be ordered anywhere; each moves once at most.
        round_: The round.
        start_s: When it begins, in seconds of the traces of networks.
        hysteresis: Share of the round that a move must save.
        most: Turns that are played of a round.
    """
    found, ways = list[Order](), Ways()
    now = virtual_round(load, choices, start_s, most=most, ways=ways)
    while len(found) < MOST_ORDERS:
        last = max(range(len(choices)), key=now.device_s.__getitem__)
        moved = {order.move.client for order in found}
        if last not in free or last in moved or choices[last].cut == load.units:
            break
        tried = [
            _tried(
                load, choices, ways, Move(last, round_, at, edge, "foreseen", NOTICE), start_s, most
            )
            for edge in range(len(load.edges))
            if edge != choices[last].edge % len(load.edges)
            for at in SHARES
        ]
        best = min(tried, key=lambda one: one[1].seconds, default=None)
        if best is None or best[1].seconds > now.seconds * (1 - hysteresis):
            break
        ways, then = best
        found.append(Order(ways.moves[last][0], now.seconds, then.seconds))
        now = then
    return tuple(found)


def _tried(
    load: Workload,
    choices: Sequence[Assignment],
    ways: Ways,
    move: Move,
    start_s: float,
    most: int,
) -> tuple[Ways, VirtualRound]:
    """Return the ways with one move more, and the round."""
    more = Ways({**ways.moves, move.client: (move,)})
    return more, virtual_round(load, choices, start_s, most=most, ways=more)


def in_words(order: Order, edge: str) -> str:
    """Return why a move is ordered.

    >>> in_words(Order(Move(0, 1, 0.5, 1), 10.0, 8.0), "edge-1")
    'goes to edge-1 after 50% of its round, which takes 20% less then'
    """
    saved = 1 - order.after_s / order.before_s
    return (
        f"goes to {edge} after {order.move.at:.0%} of its round, which takes {saved:.0%} less then"
    )
