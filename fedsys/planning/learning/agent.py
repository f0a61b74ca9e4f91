"""A trained agent: two small networks and what they were trained to see, in one safetensors file.

The file holds the weights as tensors and everything else as JSON in its metadata, with a checksum
over both; nothing is unpickled. Deciding needs NumPy alone, training needs the extra ``rl``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsys.errors import ConfigError
from fedsys.files import write_atomic
from fedsys.planning.learning.grouping import LowBandwidth
from fedsys.planning.learning.observing import Vector, share_of
from fedsys.planning.learning.view import View

FORMAT: Final = 1
"""Version of the file."""

Weights = Mapping[str, NDArray[np.float32]]


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
        weights = {name: np.ascontiguousarray(self.weights[name]) for name in sorted(self.weights)}
        told = {"view": dataclasses.asdict(self.view), "about": dict(self.about)}
        text = json.dumps(told, sort_keys=True)
        metadata = {"format": str(FORMAT), "agent": text, "sha256": _digest(text, weights)}
        write_atomic(path, save(weights, metadata))


def load(path: Path, groups: int | None = None) -> Agent:
    """Return the agent of a file.

    Args:
        path: The file.
        groups: How many groups it has to decide for; None: any.

    Raises:
        ConfigError: There is no such file, it is damaged, of another version, or for another
            number of groups.
    """
    way_out = "train one: leave policy.agent out"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError.of(
            "policy.agent", path, f"must be an agent's file ({error})", way_out
        ) from error
    if metadata.get("format") != str(FORMAT):
        raise ConfigError.of(
            "policy.agent", path,
            f"must be of version {FORMAT}, and is of {metadata.get('format', 'none')}", way_out,
        )  # fmt: skip
    text = metadata.get("agent", "")
    if metadata.get("sha256") != _digest(text, weights):
        raise ConfigError.of("policy.agent", path, "is damaged: its checksum is not that", way_out)
    told = json.loads(text)
    low = told["view"].pop("low")
    view = View(**told["view"], low=None if low is None else LowBandwidth(**low))
    if groups is not None and view.groups != groups:
        raise ConfigError.of(
            "policy.groups", groups,
            f"must be {view.groups}, for which {path} was trained", way_out,
        )  # fmt: skip
    return Agent(view, weights, told["about"])


def _digest(text: str, weights: Weights) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(weights):
        array = weights[name]
        digest.update(f"\0{name}\0{array.shape}\0".encode() + array.astype("<f4").tobytes())
    return digest.hexdigest()
