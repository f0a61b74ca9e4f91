"""FedAdapt's learning problem where cuts are scored, for one fleet or many, wherever it is played.

`DeviceRounds` is what both kinds of rounds are: those of fleets that are drawn
(`fedsys.planning.learning.fleets`), and truncated rounds of real clients
(`fedsys.planning.learning.client_rounds`). `CutEnvironment` is that as an environment of gymnasium,
`DeviceRows` as the steps of many environments, of which each device is one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices
from fedsys.planning.learning.extra import of_rl
from fedsys.planning.learning.outlook import FEATURES, Features
from fedsys.planning.learning.vector import Stepped
from fedsys.planning.workload import Array

gymnasium = of_rl("gymnasium")
Environment: Any = gymnasium.Env

MOST = 8.0
"""Largest number of what is seen."""


class DeviceRounds(Protocol):
    """Rounds in which each of R devices takes one of C cuts.

    Attributes:
        legal: Which cuts each device may take now, ``(R, C)``.
        seen: What is seen of the candidates, ``(R, C, F + 1)``.
    """

    legal: NDArray[np.bool_]
    seen: Features

    def begin(self, random: np.random.Generator) -> None:
        """Begin anew; all is drawn from there until the next time."""
        ...

    def step(self, cut: Indices) -> tuple[Array, NDArray[np.bool_]]:
        """Carry a round out; return what each device earns, and whether its fleet begins anew.

        Args:
            cut: Index of the cut of each device; one that is not legal is the whole model.
        """
        ...


class CutEnvironment(Environment):  # type: ignore[misc]  # of an extra: without types
    """Rounds as one environment: an action has a cut for each device; a reward is their mean.

    What is seen are the candidates of all devices, one after the other.

    Args:
        rounds: Carries steps out.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own name and type

    def __init__(self, rounds: DeviceRounds) -> None:
        self._rounds = rounds
        devices, cuts = rounds.legal.shape
        self.observation_space = _box((devices * cuts * (len(FEATURES) + 1),))
        self.action_space = gymnasium.spaces.MultiDiscrete([cuts] * devices)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Features, dict[str, Any]]:
        """Begin anew."""
        super().reset(seed=seed)
        self._rounds.begin(self.np_random)
        return self._seen(), {}

    def _seen(self) -> Features:
        return self._rounds.seen.ravel()

    def step(self, action: Indices) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Carry a round out; an episode is over with the fleet."""
        earned, over = self._rounds.step(np.asarray(action, dtype=np.int64))
        told = {"earned": earned.tolist()}
        return self._seen(), float(earned.mean()), False, bool(over.all()), told


class DeviceRows:
    """Rounds as one environment for each device.

    Args:
        rounds: Plays the rounds.
        seed: Of all that is drawn.
    """

    def __init__(self, rounds: DeviceRounds, seed: int) -> None:
        self._rounds, self._random = rounds, np.random.default_rng(seed)
        self.count, cuts = rounds.legal.shape
        self.spaces = _box((cuts, len(FEATURES) + 1)), gymnasium.spaces.Discrete(cuts)

    def begin(self) -> Features:
        """Begin anew everywhere."""
        self._rounds.begin(self._random)
        return self._rounds.seen

    def step(self, actions: Indices) -> Stepped:
        """Return what comes of the actions of a step."""
        earned, over = self._rounds.step(actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.count)]
        return self._rounds.seen, earned.astype(np.float32), over, infos


def _box(shape: tuple[int, ...]) -> Any:
    high = np.full(shape, MOST, dtype=np.float32)
    return gymnasium.spaces.Box(-high, high, dtype=np.float32)


class Nothing:
    """The space of one device's candidates, and nothing in them: for what was done elsewhere.

    Attributes:
        legal: Nothing is known of one device.
        seen: Likewise.
    """

    def __init__(self, cuts: int) -> None:
        self.legal = np.ones((1, cuts), dtype=bool)
        self.seen: Features = np.zeros((1, cuts, len(FEATURES) + 1), dtype=np.float32)

    def begin(self, random: np.random.Generator) -> None:
        """There is nothing to begin."""

    def step(self, cut: Indices) -> tuple[Array, NDArray[np.bool_]]:
        """End at once."""
        return np.zeros(1), np.ones(1, dtype=bool)
