"""What a bandit knows of clients, as arrays, and how it follows from what they measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.arms import MOST, Arms, Guess
from fedsys.planning.contention import Indices
from fedsys.planning.measured_rates import after_round
from fedsys.planning.resources import Observation
from fedsys.planning.workload import Array

State = dict[str, Any]

MOST_ROUNDS: Final = 5.0
"""Rounds whose mean is kept of an arm: older ones fade."""

AFTER_A_CHANGE: Final = 0.1
"""Share that the arms of a device count for after one took another time than before."""


SHORTEST_S: Final = 1e-9
"""Seconds of an iteration above which it is believed to have been measured."""

COLUMNS: Final = 6
"""Numbers that are kept of an arm: rounds, time, transfers, crowd, computing, pieces."""


@dataclass(frozen=True)
class BanditClient:
    """What is known of a client without a profile."""

    rates: tuple[float, float]
    latency_s: float
    steps: int
    kind: str
    edge: int


@dataclass(frozen=True)
class Hoped:
    """What is expected of all arms.

    Attributes:
        mean: Seconds of an iteration, ``(K, C)``.
        low: Seconds of a round that may be hoped for.
        round_s: Seconds of a round that are expected.
        weights: Of contexts, ``(K, 4)``.
    """

    mean: Array
    low: Array
    round_s: Array
    weights: Array


@dataclass(frozen=True)
class BanditTable:
    """The state of K clients as arrays.

    Attributes:
        clients: Who.
        arm: Index of the arm of the last round; -1 before the first.
        choices: What was assigned, as lists.
        base: Seconds of the baseline; 0 if unknown.
        tried: What was seen of each arm, ``(K, C, 4)``.
        configured: Rates of the configuration, ``(K, 2)``.
        rates: Rates that are believed.
        alone: Rounds since a link was measured.
        moves: Changes of arms.
        latency_s: One way.
        steps: Iterations of a round.
        kind: Number of the kind.
        edge: Its edge server.
    """

    clients: list[int]
    arm: Indices
    choices: list[Any]
    base: Array
    tried: Array
    configured: Array
    rates: Array
    alone: Indices
    moves: Indices
    latency_s: Array
    steps: Array
    kind: Indices
    edge: Indices

    def rates_changed(self, before: BanditTable) -> NDArray[np.bool_]:
        """Return whose link is believed to be another one."""
        changed: NDArray[np.bool_] = (self.rates != before.rates).any(axis=1)
        return changed

    def kept_in(self, state: State) -> State:
        """Return a state with what is in the table."""
        columns = {
            "base": self.base, "arms": self.tried, "rates": self.rates, "alone": self.alone,
            "moves": self.moves,
        }  # fmt: skip
        after = {
            name: state[name] | dict(zip(self.clients, values.tolist(), strict=True))
            for name, values in columns.items()
        }
        return after | {
            "choices": state["choices"] | dict(zip(self.clients, self.choices, strict=True))
        }

    def pieces_s(self, arms: Arms, guess: Guess) -> Array:
        """Return what a forward or backward of a piece takes beside its work, ``(K,)``.

        It is over the baseline, and learned: a device that computes N pieces of a share of the work
        takes 2 N times that longer than its share says. Where N is large, that is told apart from a
        share that is off, of which nothing else is known.
        """
        rounds, computed, pieces = (self.tried[..., i] for i in (0, 4, 5))
        known = (rounds > 0) & (pieces > 0) & (computed > 0) & (arms.up_bits > 0)
        spread = np.square(guess.own * arms.device) + guess.noise**2
        weight = np.where(known, 2 * pieces / spread, 0.0)
        own = 1.0 / guess.piece_spread**2
        precision = own + (weight * 2 * pieces).sum(axis=1)
        mean = (own * guess.piece + (weight * (computed - arms.device)).sum(axis=1)) / precision
        pieces_s: Array = np.clip(mean, 0.0, 1.0)
        return pieces_s


def table_of(
    state: State, clients: list[int], known: Mapping[int, BanditClient], arms: Arms
) -> BanditTable:
    """Return the state of some clients as arrays."""
    own = [known[client] for client in clients]
    index = {cut: i for i, cut in enumerate(arms.cuts)}
    choices = [state["choices"].get(client) for client in clients]
    names: dict[str, int] = {}
    rates = [state["rates"].get(client) for client in clients]
    return BanditTable(
        clients,
        np.array([-1 if choice is None else index[choice[0]] for choice in choices]),
        choices,
        np.array([state["base"].get(client, 0.0) for client in clients]),
        _tried(state["arms"], clients, len(arms.cuts)),
        np.array([client.rates for client in own]),
        np.array([kept or client.rates for kept, client in zip(rates, own, strict=True)]),
        np.array([state["alone"].get(client, 0) for client in clients]),
        np.array([state["moves"].get(client, 0) for client in clients]),
        np.array([client.latency_s for client in own]),
        np.array([float(client.steps) for client in own]),
        np.array([names.setdefault(client.kind, len(names)) for client in own]),
        np.array([client.edge for client in own]),
    )


def _tried(kept: Mapping[int, Any], clients: Sequence[int], arms: int) -> Array:
    """Return what was seen of each arm, ``(K, C, COLUMNS)``; older states have fewer columns."""
    tried = np.zeros((len(clients), arms, COLUMNS))
    lines = [(k, kept[client]) for k, client in enumerate(clients) if client in kept]
    if lines:
        values = np.array([line for _, line in lines])
        tried[[k for k, _ in lines], :, : values.shape[2]] = values
    return tried


def crowd_of(table: BanditTable, arms: Arms, edges: int) -> Array:
    """Return how many devices are at the edge of each, itself included, ``(K,)``."""
    away = (table.arm >= 0) & (table.arm < len(arms.cuts) - 1)
    counts = np.bincount(table.edge[away], minlength=edges)
    crowd: Array = (counts[table.edge] + ~away).astype(float)
    return crowd


def with_measurements(
    table: BanditTable,
    seen: Sequence[Observation],
    arms: Arms,
    crowd: Array,
    *,
    drift: float,
    forget: int,
    edge: float,
) -> BanditTable:
    """Return the table with what was measured in the last round.

    Args:
        table: Before it.
        seen: What each measured.
        arms: The arms.
        crowd: How many devices were at the edge of each.
        drift: Relative change from which on a rate, or the time of an arm, is another one.
        forget: Rounds alone after which a link is believed to be as configured.
        edge: Seconds of an edge for the whole model, over the baseline, before more is known.
    """
    here, whole = np.arange(len(seen)), len(arms.cuts) - 1
    took = np.array([s.iteration_s or (s.seconds / s.steps if s.steps else 0.0) for s in seen])
    bit_s = np.array([(s.up_bit_s, s.down_bit_s) for s in seen])
    rates, alone = after_round(
        table.rates, table.configured, bit_s, table.alone, table.arm != whole,
        drift=drift, forget=forget,
    )  # fmt: skip
    measured, arm = (took > SHORTEST_S) & (table.arm >= 0), np.maximum(table.arm, 0)
    moved_s = arms.link_s(rates, table.latency_s)[here, arm]
    share = arms.device[arm]
    alone_s = np.maximum(took - moved_s, 0.1 * took) / (share + edge * (1.0 - share))
    base = np.where(measured & (table.base == 0), alone_s, table.base)
    scale = np.where(base > 0, base, 1.0)
    pieces = [float(choice[1]) if choice else 0.0 for choice in table.choices]
    computed = np.array([s.compute_s for s in seen]) / scale
    fresh = np.stack(
        [np.ones(len(seen)), took / scale, moved_s / scale, crowd, computed, pieces], axis=1
    )
    fresh[:, [1, 2, 4]] = np.minimum(fresh[:, [1, 2, 4]], MOST)
    tried = _noted(table.tried, arm, fresh, measured, drift)
    moves = np.where((rates != table.rates).any(axis=1), 0, table.moves)
    return dataclasses.replace(table, base=base, tried=tried, rates=rates, alone=alone, moves=moves)


def _noted(
    before: Array, arm: Indices, fresh: Array, measured: NDArray[np.bool_], drift: float
) -> Array:
    """Return what was seen of arms, with one more round: means, but of computing what was last."""
    tried, here = before.copy(), np.arange(len(arm))
    row = tried[here, arm]
    same = (row[:, 0] > 0) & (np.abs(fresh[:, 2] - row[:, 2]) <= drift * fresh[:, 1])
    jumped = measured & same & (np.abs(fresh[:, 1] - row[:, 1]) > drift * row[:, 1])
    tried[jumped, :, 0] *= AFTER_A_CHANGE
    row = tried[here, arm]
    count = np.minimum(row[:, 0], MOST_ROUNDS - 1) + 1
    updated = row + (fresh - row) / count[:, None]
    updated[:, 0], updated[:, 4:] = count, fresh[:, 4:]
    tried[here[measured], arm[measured]] = updated[measured]
    return tried
