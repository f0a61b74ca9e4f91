"""A trained agent that says shares of the work: two small networks and what they see.

Deciding needs NumPy alone, training needs the extra ``rl``. `load` reads agents of all kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import ConfigError
from fedsys.planning.learning import agent_files
from fedsys.planning.learning.agent_files import Weights
from fedsys.planning.learning.cut_agent import CutAgent
from fedsys.planning.learning.grouping import LowBandwidth
from fedsys.planning.learning.observing import Vector, share_of
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.outlook import FEATURES
from fedsys.planning.learning.view import View


@dataclass(frozen=True)
class Agent:
    """What decides on shares of the work.

    Attributes:
        view: How it sees devices.
        weights: ``actor.I.weight`` and ``actor.I.bias`` of each layer, ``critic.…`` likewise, and
            ``log_std``. Layers are tanh but the last, whose output x of the actor is the mean
            tanh(x / 2), which is 2 sigmoid(x) - 1, in [-1, 1].
        about: Where it comes from: model, steps, seed, hyper-parameters.
    """

    view: View
    weights: Weights
    about: Mapping[str, Any] = field(default_factory=dict)

    def shares(self, state: Vector) -> list[float]:
        """Return the share of the work that each group should keep on its devices: the mean."""
        return [share_of(float(value)) for value in self._means(state)]

    def shares_of_each(self, states: NDArray[np.float32], groups: Sequence[int]) -> list[float]:
        """Return the share that each device should keep.

        Args:
            states: A state for each device, ``(K, view.size)``.
            groups: Its group, ``(K,)``.
        """
        means = self._means(states)[np.arange(len(groups)), np.array(groups)]
        return [share_of(float(value)) for value in means]

    def _means(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        x: NDArray[np.float64] = states.astype(np.float64)
        layers = sum(name.startswith("actor.") for name in self.weights) // 2
        for i in range(layers):
            x = x @ self.weights[f"actor.{i}.weight"].T + self.weights[f"actor.{i}.bias"]
            x = np.tanh(x if i + 1 < layers else x / 2)
        return x

    def save(self, path: Path) -> None:
        """Write the agent to a file."""
        told = {"view": dataclasses.asdict(self.view), "about": dict(self.about)}
        agent_files.write(path, agent_files.SHARES, told, self.weights)


def load(path: Path, options: FedAdaptOptions | None = None) -> Agent | CutAgent:
    """Return the agent of a file.

    Args:
        path: The file.
        options: For what it has to decide; None: anything.

    Raises:
        ConfigError: There is no such file, it is damaged, of another version, or for another kind
            of action or number of groups.
    """
    version, told, weights = agent_files.read(path)
    says = agent_files.FORMATS[version]
    if options is not None and says != options.action:
        raise ConfigError.of(
            "policy.action", options.action,
            f"must be {says}, for which {path} was trained", agent_files.WAY_OUT,
        )  # fmt: skip
    if says == "cuts":
        if told["features"] != list(FEATURES):
            raise ConfigError.of(
                "policy.agent", path, "must see candidates as this version of fedsys does",
                agent_files.WAY_OUT,
            )  # fmt: skip
        return CutAgent(weights, told["about"])
    low = told["view"].pop("low")
    view = View(**told["view"], low=None if low is None else LowBandwidth(**low))
    if options is not None and view.groups != options.groups:
        raise ConfigError.of(
            "policy.groups", options.groups,
            f"must be {view.groups}, for which {path} was trained", agent_files.WAY_OUT,
        )  # fmt: skip
    return Agent(view, weights, told["about"])
