"""FedAdapt's learning problem as a gymnasium environment, wherever its steps are carried out.

One step is a round in which each group of devices keeps the share of the work that the action asks
for, at the nearest legal cut. `Rounds` carries it out: real clients in truncated rounds, which
train a few iterations and exchange no weights. On the timeline `fedsys.planning.learning.deck`
deals many of these environments at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fedsys.planning.learning.extra import of_rl
from fedsys.planning.learning.observing import (
    MOST,
    REWARDS,
    Vector,
    in_vain,
    nearest,
    share_of,
)
from fedsys.planning.learning.view import Times, View

gymnasium = of_rl("gymnasium")
Environment: Any = gymnasium.Env


class Rounds(Protocol):
    """Carries the steps of an episode out.

    Attributes:
        shares: Device-side share of the work at each legal cut, ascending, the last one 1.
    """

    shares: tuple[float, ...]

    def begin(self, random: np.random.Generator) -> Times:
        """Begin an episode; return the times without offloading.

        Args:
            random: Where all is drawn from until the next episode.
        """
        ...

    def carry_out(self, picked: Sequence[int]) -> Times:
        """Return the times of a step in which each device is at a cut, by index.

        A device that did not answer has NaN seconds; one has.
        """
        ...


class OffloadEnvironment(Environment):  # type: ignore[misc]  # of an extra: without types
    """Episodes of offloading; see the module.

    Args:
        rounds: Carries steps out.
        view: How devices are seen.
        reward: What a step is worth, a name of `fedsys.planning.learning.observing.REWARDS`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own name and type

    def __init__(self, rounds: Rounds, view: View, *, reward: str = "log") -> None:
        self.observation_space, self.action_space = spaces_of(view)
        self._rounds, self._view, self._reward = rounds, view, REWARDS[reward]
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        """Measure a fleet without offloading, and return that as the first state."""
        super().reset(seed=seed)
        self._base = self._rounds.begin(self.np_random)
        count = len(self._base.iteration_s)
        self._labels, self._low = self._view.labels(self._base, self._base, [False] * count)
        self._steps = 0
        return self._view.state(self._base, self._base, self._labels, [1.0] * count), {}

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Carry a step out.

        Returns:
            The state, the reward, whether offloading was in vain (which ends the episode), whether
            the episode is over, and ``iteration_s`` and ``picked`` of each device.
        """
        shares = self._rounds.shares
        by_group = [nearest(shares, share_of(float(a))) for a in action]
        picked = [by_group[group] for group in self._labels]
        now = self._rounds.carry_out(picked)
        here = [k for k, seconds in enumerate(now.iteration_s) if np.isfinite(seconds)]
        present, before = now.of(here), self._base.of(here)
        seconds, base = present.iteration_s.tolist(), before.iteration_s.tolist()
        earned = self._reward(seconds, base)
        self._labels, self._low = self._view.labels(self._base, now, self._low)
        state = self._view.state(
            before, present, [self._labels[k] for k in here], [shares[picked[k]] for k in here]
        )
        self._steps += 1
        told = {"iteration_s": now.iteration_s.tolist(), "picked": picked}
        return state, earned, in_vain(seconds, base), self._steps >= self._view.episode, told


class Spaces(Environment):  # type: ignore[misc]  # of an extra: without types
    """The spaces of an agent and nothing in them: for what was done elsewhere."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own name

    def __init__(self, view: View) -> None:
        self.observation_space, self.action_space = spaces_of(view)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        """Return a state of zeros."""
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, dtype=np.float32), {}

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """End at once."""
        return self.reset()[0], 0.0, True, False, {}


def spaces_of(view: View) -> tuple[Any, Any]:
    """Return the spaces of states and of actions."""
    high = np.full(view.size, MOST if view.times == "log" else np.inf, dtype=np.float32)
    box = gymnasium.spaces.Box
    return box(-high, high, dtype=np.float32), box(-1.0, 1.0, (view.groups,), dtype=np.float32)
