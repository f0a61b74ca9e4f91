"""A contextual bandit for each device: `policy=bandit`, which needs no profile of machines.

In the first round all devices train alone; that is their baseline. From then on each has the arm
(`fedsys.planning.arms`) with the least lower bound of its time, but

* who is expected to be ready before the fastest that the slowest device may hope for stays alone,
  or where it is: it would only crowd the edge;
* an arm is left only for one that saves `hysteresis` of the round, and more with every change, so
  that devices that share an edge come to rest;
* at each edge only a share of the devices changes in a round, the slowest first: each learns what
  the crowd costs before the others follow.

A device knows what it takes alone, and goes back to that if nothing else is faster. There is
nothing to draw: same observations, same decisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsys.config import Spec
from fedsys.config.building import build
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.arms import Arms, Guess, best_pieces, expected
from fedsys.planning.assignment import Assignment
from fedsys.planning.bandit_table import (
    BanditClient,
    BanditTable,
    Hoped,
    State,
    crowd_of,
    table_of,
    with_measurements,
)
from fedsys.planning.contention import Indices
from fedsys.planning.correction import kind_of
from fedsys.planning.leakage import without_limit
from fedsys.planning.resources import Observation
from fedsys.planning.workload import Array, Workload

Believed = Callable[[LayeredModel, Sequence[int]], Workload]

LEAST_PIECE: Final = 1e-3
"""What a piece takes over the baseline, at least, where a change of that is judged."""

LEAST: Final = 0.01
"""Share of the baseline below which no iteration is hoped to be."""


@dataclass(frozen=True)
class BanditOptions:
    """How a bandit learns and decides: the ``policy`` group of ``policy=bandit``.

    Attributes:
        kind: ``bandit``.
        codec: Codec at the cut, or several, of which the one with the fewest bytes is taken.
        micro_batches: Numbers of pieces that may be chosen; None: what batch and schedule allow.
        objective: As of planners.
        optimism: Standard deviations by which an arm may be better than expected.
        hysteresis: Share of a round that a change of arms must save.
        patience: Changes of a device after which it must save twice as much.
        movers: Share of the devices at an edge that may change in a round, but two at least.
        drift: Relative change of a measured rate from which on it is believed, and of the time of
            an arm from which on the device is believed to have changed.
        forget: Rounds alone after which a link is believed to be as configured.
        guess: What is believed before anything is measured.
    """

    kind: str = "bandit"
    codec: Any = "fp32"
    micro_batches: Any = None
    objective: str = "round"
    optimism: float = 1.0
    hysteresis: float = 0.02
    patience: int = 4
    movers: float = 0.25
    drift: float = 0.2
    forget: int = 5
    guess: Guess = field(default_factory=Guess)

    @classmethod
    def of(cls, spec: Spec) -> BanditOptions:
        """Return the options of a ``policy`` group.

        Raises:
            ConfigError: A key is unknown, or its value not usable.
        """
        made: BanditOptions = build(cls, without_limit(spec), "policy")
        for name, low, high in (
            ("optimism", 0.0, 10.0), ("hysteresis", 0.0, 1.0), ("patience", 1, 1000),
            ("movers", 0.0, 1.0), ("drift", 0.0, 1.0), ("forget", 1, 10**6),
        ):  # fmt: skip
            if not low <= getattr(made, name) <= high:
                rule = f"must be from {low:g} to {high:g}"
                raise ConfigError.of(f"policy.{name}", getattr(made, name), rule)
        guess = made.guess
        for name in ("mean", "spread"):
            if len(getattr(guess, name)) != 4:
                raise ConfigError.of(
                    f"policy.guess.{name}", list(getattr(guess, name)),
                    "must be four numbers: of device, link, edge and offloaded",
                )  # fmt: skip
        for name in ("own", "noise", "piece_spread"):
            if not 0 < getattr(guess, name) <= 10:
                raise ConfigError.of(
                    f"policy.guess.{name}", getattr(guess, name), "must be above 0, at most 10"
                )
        if min(guess.spread) <= 0 or not 0 <= guess.shared <= 1:
            raise ConfigError.of(
                "policy.guess", guess, "must have spreads above 0, and `shared` from 0 to 1"
            )
        return made


class Bandit:
    """Decides by what iterations took. It is a policy: state in, state out.

    Its state is a dict of plain values, by client: ``base``, seconds of its baseline; ``arms``, for
    each arm the rounds that count, means of time, transfers (over the baseline) and crowd, and the
    computing and pieces of the last one;
    ``rates`` and ``alone`` as in `fedsys.planning.measured_rates.Links`; ``choices``; ``moves``,
    how often it changed.

    Args:
        believed: The workload of some clients; costs of machines are not looked at.
        options: How it decides.
        most_bytes: The largest model that a device holds alone; above, all devices offload.
    """

    def __init__(
        self,
        believed: Believed,
        options: BanditOptions | None = None,
        *,
        most_bytes: int | None = None,
    ) -> None:
        self._believed, self._options = believed, options or BanditOptions()
        self._most_bytes, self._forced = most_bytes, False
        self._layers: LayeredModel | None = None
        self._clients: dict[int, BanditClient] = {}

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> State:
        """Return the state before the first round."""
        self._layers, self._clients = layers, {}
        load = self._met(list(nodes))
        self._arms = Arms.of(load, layers)
        self._load, self._edges = load, len(load.edges)
        most = self._most_bytes
        self._forced = most is not None and sum(load.state_bytes) > most
        if self._forced and len(self._arms.cuts) < 2:
            raise ConfigError.of(
                "model", "too large for a device",
                "must have a cut: between its units more than one tensor flows",
            )  # fmt: skip
        return {name: {} for name in ("base", "arms", "rates", "alone", "choices", "moves")}

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Learn from what was measured, and let who gains by it change."""
        clients = sorted(seen)
        if not clients:
            return state, {}
        if fresh := [client for client in clients if client not in self._clients]:
            self._met(fresh)
        o, before = self._options, table_of(state, clients, self._clients, self._arms)
        now = with_measurements(
            before, [seen[client] for client in clients], self._arms,
            crowd_of(before, self._arms, self._edges),
            drift=o.drift, forget=o.forget, edge=o.guess.mean[2],
        )  # fmt: skip
        hoped = self._hoped(now)
        arm = self._chosen(now, hoped)
        learned, known = (t.pieces_s(self._arms, o.guess) for t in (now, before))
        fresh = (arm != now.arm) | now.rates_changed(before)
        fresh |= np.abs(learned - known) > o.drift * np.maximum(known, LEAST_PIECE)
        after = self._assigned(now, arm, fresh, hoped, learned)
        chosen = {c: Assignment.of_list(after.choices[k]) for k, c in enumerate(clients)}
        return after.kept_in(state), chosen

    def reasons(self, state: State, clients: Sequence[int]) -> Mapping[int, str]:
        """Return for each client a sentence about what it does."""
        table = table_of(state, list(clients), self._clients, self._arms)
        hoped = self._hoped(table)
        return {client: self._reason(table, hoped, k) for k, client in enumerate(table.clients)}

    def _reason(self, table: BanditTable, hoped: Hoped, k: int) -> str:
        arm, whole = int(table.arm[k]), len(self._arms.cuts) - 1
        if table.base[k] <= 0:
            return "trains alone, to know what that takes"
        rounds, took = table.tried[k, arm, :2]
        there = "alone" if arm == whole else f"at cut {self._arms.cuts[arm]}"
        alone = f"{hoped.mean[k, whole]:.3g} s alone"
        if rounds > 0 and arm != whole:
            return f"an iteration {there} took {took * table.base[k]:.3g} s, and {alone}"
        if arm != whole:
            return f"tries cut {self._arms.cuts[arm]}: {hoped.mean[k, arm]:.3g} s expected, {alone}"
        best = int(hoped.low[k].argmin())
        if best == whole:
            return f"no cut is expected to be faster than {alone}"
        return f"{alone}; what cut {self._arms.cuts[best]} may save is not needed, or not enough"

    def _met(self, clients: list[int]) -> Workload:
        """Take down what is configured of clients that were not known."""
        if self._layers is None:
            raise ConfigError.of("policy", "bandit", "must be initialised first")
        load = self._believed(self._layers, clients)
        for client, device in zip(clients, load.devices, strict=True):
            self._clients[client] = BanditClient(
                (device.network.up_bits_s, device.network.down_bits_s),
                device.network.latency_s,
                load.iterations(device),
                kind_of(device.costs),
                client % len(load.edges),
            )
        return load

    def _hoped(self, table: BanditTable) -> Hoped:
        """Return the seconds of all arms that may be hoped for, and those that are expected."""
        o, arms = self._options, self._arms
        scale = np.where(table.base > 0, table.base, 1.0)[:, None]
        link = arms.link_s(table.rates, table.latency_s) / scale
        crowd = np.broadcast_to(crowd_of(table, arms, self._edges)[:, None], link.shape)
        mean, spread, weights = expected(
            arms, arms.contexts(link, crowd), table.tried, table.kind, o.guess
        )
        least = np.maximum(arms.least_s(table.rates) / scale, LEAST)
        mean, low = (np.maximum(s, least) for s in (mean, mean - o.optimism * spread))
        fixed = arms.exchange_s(table.rates, table.latency_s)
        steps = table.steps[:, None] * scale
        return Hoped(mean * scale, low * steps + fixed, mean * steps + fixed, weights)

    def _chosen(self, table: BanditTable, hoped: Hoped) -> Indices:
        """Return the arm of each device."""
        o, here, whole = self._options, np.arange(len(table.clients)), len(self._arms.cuts) - 1
        first = max(0, whole - 1) if self._forced else whole
        arm = np.where(table.arm < 0, first, table.arm)
        low = hoped.low.copy()
        if self._forced:
            low[:, whole] = np.inf
        now = hoped.round_s[here, arm]
        best = low.argmin(axis=1)
        target = float(low[here, best].max())
        home = (hoped.round_s[:, whole] <= target * (1 - o.hysteresis)) & (not self._forced)
        wanted = np.where(home, whole, np.where(now <= target * (1 + o.hysteresis), arm, best))
        enough = o.hysteresis * (1 + table.moves / o.patience) * now
        gains = home | (now - low[here, wanted] > enough)
        movers = np.flatnonzero((wanted != arm) & gains & (table.base > 0))
        room = np.maximum(2, np.ceil(o.movers * np.bincount(table.edge, minlength=self._edges)))
        arm = arm.copy()
        for k in movers[np.argsort(-now[movers], kind="stable")]:
            if room[table.edge[k]] > 0:
                room[table.edge[k]] -= 1
                arm[k] = wanted[k]
        return arm

    def _assigned(
        self,
        table: BanditTable,
        arm: Indices,
        fresh: NDArray[np.bool_],
        hoped: Hoped,
        piece: Array,
    ) -> BanditTable:
        """Return the table with the assignments of these arms; those that are not fresh stay."""
        choices, codec = list(table.choices), self._arms.codec
        whole = len(self._arms.cuts) - 1
        for k in np.flatnonzero(fresh & (arm == whole)):
            choices[k] = Assignment(self._arms.cuts[whole], micro_batches=1).to_list()
        away = np.flatnonzero(fresh & (arm != whole))
        counts = best_pieces(
            self._arms, arm[away], table.rates[away], table.latency_s[away],
            np.where(table.base > 0, table.base, 1.0)[away],
            np.maximum(hoped.weights[away, 2], 0.0), self._load, piece[away],
        )  # fmt: skip
        for k, count in zip(away, counts, strict=True):
            cut, edge = self._arms.cuts[arm[k]], int(table.edge[k])
            choices[k] = Assignment(cut, edge, codec, codec, count).to_list()
        moves = table.moves + ((arm != table.arm) & (table.arm >= 0))
        return dataclasses.replace(table, arm=arm, choices=choices, moves=moves)
