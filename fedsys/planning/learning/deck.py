"""Many fleets at once, all of their times known beforehand: the environment in which agents train.

A `Deck` holds, for each of some scenarios and each combination of cuts of the groups, what a step
earns and what is seen after it. So a step of hundreds of environments is a few look-ups in arrays,
some thousand times faster than timing each plan when it is asked for. `DeckEnvironments` deals them
as `fedsys.planning.learning.vector` asks for; it gives what as many `OffloadEnvironment` would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.learning.environment import spaces_of
from fedsys.planning.learning.observing import MOST
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.learning.vector import Stepped
from fedsys.planning.learning.view import Times, View
from fedsys.planning.workload import Array

MOST_PLANS: Final = 512
"""Combinations of cuts that are timed of a scenario; of more cuts some are left out."""


def spread(shares: Sequence[float], groups: int) -> list[int]:
    """Return the indices of the cuts that are trained on: so few that their combinations fit.

    Agents ask for shares of the work, so they need not have met every cut. The first and the last
    one stay, and those whose shares are nearest to even steps.
    """
    most = max(2, int(MOST_PLANS ** (1 / groups) + 1e-9))
    if len(shares) <= most:
        return list(range(len(shares)))
    steps = np.linspace(shares[0], shares[-1], most)
    values = np.array(shares)
    found = {int(np.abs(values - step).argmin()) for step in steps}
    return sorted(found | {0, len(shares) - 1})


class Deck:
    """What is earned and seen in S scenarios by each of P combinations of cuts of G groups.

    Args:
        scenarios: The scenarios.
        view: How devices are seen.
        reward: What a step is worth, a name of `fedsys.planning.learning.observing.REWARDS`.
        progress: Told how many scenarios are timed, and of how many.

    Attributes:
        shares: Shares of the work that may be chosen, ``(C,)``.
        states: What is seen after a step, ``(S, P, view.size)``.
        rewards: What it earns, ``(S, P)``.
        vain: Whether it ends an episode, ``(S, P)``.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        view: View,
        *,
        reward: str = "log",
        progress: Callable[[int, int], None] = lambda done, count: None,
    ) -> None:
        self.view = view
        kept = spread(scenarios[0].shares, view.groups)
        self.shares = np.array([scenarios[0].shares[i] for i in kept])
        self._cuts = np.array(kept)
        combinations = itertools.product(range(len(kept)), repeat=view.groups)
        self._plans = np.array(list(combinations))
        shape = (len(scenarios), len(self._plans))
        self.states = np.zeros((*shape, view.size), dtype=np.float32)
        self.rewards, self.vain = np.zeros(shape), np.zeros(shape, dtype=bool)
        for s, scenario in enumerate(scenarios):
            progress(s, len(scenarios))
            self._time(s, scenario, reward)

    def plan_of(self, actions: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the index of the combination that actions ask for, ``(N, G)`` to ``(N,)``."""
        wanted = (np.clip(actions, -1.0, 1.0).astype(np.float64) + 1.0) / 2.0
        away = np.abs(self.shares[None, None, ::-1] - wanted[..., None])
        nearest = len(self.shares) - 1 - away.argmin(axis=-1)  # of two equal ones the last
        base = len(self.shares) ** np.arange(self.view.groups - 1, -1, -1)
        found: NDArray[np.int64] = nearest @ base
        return found

    def _time(self, s: int, scenario: Scenario, reward: str) -> None:
        base = scenario.times(scenario.baseline_s)
        labels, _ = self.view.labels(base, base, [False] * len(base.iteration_s))
        by_plan = self._plans[:, list(labels)]
        picked = self._cuts[by_plan]
        seconds = scenario.iterations_s(picked)
        self.rewards[s] = _earned(seconds, base.iteration_s, reward)
        self.vain[s] = seconds.max(axis=1) >= base.iteration_s.max()
        shares = np.array(scenario.shares)[picked]
        self.states[s] = _states(self.view, base, labels, seconds, shares)


def _earned(seconds: Array, baseline_s: Array, reward: str) -> Array:
    """Return what P plans earn: `fedsys.planning.learning.observing.REWARDS`, all at once."""
    if reward == "saved":
        saved = np.where(
            seconds < baseline_s, 1.0 - seconds / baseline_s, baseline_s / seconds - 1.0
        )
        earned: Array = saved.mean(axis=1)
        return earned
    slowest = -_logs(seconds.max(axis=1), baseline_s.max())
    total: Array = slowest - 0.1 * _logs(seconds, baseline_s).mean(axis=1)
    return total


def _states(
    view: View, base: Times, labels: Sequence[int], seconds: Array, shares: Array
) -> NDArray[np.float32]:
    """Return the states after P plans, ``(P, view.size)``."""
    plans = np.arange(len(seconds))
    group = np.array(labels)
    alone = 1.0 if view.times == "seconds" else 0.0
    took, crossing = (np.full((len(seconds), view.groups), x) for x in (alone, 0.0))
    kept = np.ones_like(took)
    for g in range(view.groups):
        mine = np.flatnonzero(group == g)
        if not len(mine):
            continue
        slowest = mine[seconds[:, mine].argmax(axis=1)]
        baseline, now = base.iteration_s[slowest], seconds[plans, slowest]
        took[:, g] = now if view.times == "seconds" else _logs(now, baseline)
        kept[:, g] = shares[plans, slowest]
        across = base.crossing_s[slowest]
        crossing[:, g] = np.where(across > 0, _logs(np.where(across > 0, across, 1.0), baseline), 0)
    parts = [took, kept, crossing] if view.bandwidth else [took, kept]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _logs(seconds: Array, baseline_s: Array | float) -> Array:
    """Return logarithms of ratios to the baseline, within what is told apart."""
    logs: Array = np.clip(np.log10(seconds) - np.log10(baseline_s), -MOST, MOST)
    return logs


class DeckEnvironments:
    """Episodes on a deck, N at once.

    Args:
        deck: Scenarios; each `moments` in a row are one fleet with other links.
        count: Number of environments, N.
        seed: Of the draws.
        moments: As in `deck`.
        change: Probability that links change after a step.
    """

    def __init__(
        self, deck: Deck, count: int, seed: int, *, moments: int = 1, change: float = 0.0
    ) -> None:
        self.count, self.spaces = count, spaces_of(deck.view)
        self._deck, self._moments, self._change = deck, moments, change
        self._random = np.random.default_rng(seed)
        self._at, self._steps = np.zeros((2, count), dtype=np.int64)

    def begin(self) -> NDArray[np.float32]:
        """Begin an episode everywhere."""
        return self._begin(np.arange(self.count))

    def step(self, actions: NDArray[np.float32]) -> Stepped:
        """Return what comes of the actions of a step; who has ended an episode begins another."""
        deck = self._deck
        moved = np.flatnonzero(self._random.random(self.count) < self._change)
        fleet = self._at[moved] // self._moments * self._moments
        self._at[moved] = fleet + self._random.integers(self._moments, size=len(moved))
        plan = deck.plan_of(actions)
        states = deck.states[self._at, plan].copy()
        rewards = deck.rewards[self._at, plan].astype(np.float32)
        self._steps += 1
        late = self._steps >= deck.view.episode
        done = deck.vain[self._at, plan] | late
        infos: list[dict[str, Any]] = [{} for _ in range(self.count)]
        ended = np.flatnonzero(done)
        for i in ended:
            infos[i] = {
                "terminal_observation": states[i],
                "TimeLimit.truncated": bool(late[i] and not deck.vain[self._at[i], plan[i]]),
            }
        if len(ended):
            states[ended] = self._begin(ended)
        return states, rewards, done, infos

    def _begin(self, which: NDArray[np.int64]) -> NDArray[np.float32]:
        self._at[which] = self._random.integers(len(self._deck.states), size=len(which))
        self._steps[which] = 0
        first: NDArray[np.float32] = self._deck.states[self._at[which], -1]  # all on the devices
        return first
