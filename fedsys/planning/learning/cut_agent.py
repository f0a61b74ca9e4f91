"""An agent that scores cuts: one small network that is asked about each candidate by itself.

A candidate is a cut of a device, as `fedsys.planning.learning.outlook.candidates` describes it. The
same network scores all candidates of all devices, so an agent is tied to no model, number of cuts
or number of devices, and devices in another order get the same cuts. Training draws a cut by the
softmax of its scores; a run takes the highest. Deciding needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices
from fedsys.planning.learning import agent_files
from fedsys.planning.learning.agent_files import Weights
from fedsys.planning.learning.outlook import FEATURES, Features

GREED: Final = 20.0
"""How strongly an untrained agent prefers the cut that is expected to be fastest."""


@dataclass(frozen=True)
class CutAgent:
    """What scores cuts.

    Attributes:
        weights: ``score.I.weight`` and ``score.I.bias`` of each layer of the network that scores
            (ReLU between them), ``line``, which scores in proportion beside it, and ``value.…`` of
            the critic, which deciding does not need.
        about: Where it comes from: model, steps, seed, hyper-parameters.
    """

    weights: Weights
    about: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, seen: Features) -> NDArray[np.float32]:
        """Return the scores of candidates, ``(R, C, F + 1)`` to ``(R, C)``; -inf if not legal."""
        rows: NDArray[np.float32] = seen[..., :-1].reshape(-1, seen.shape[-1] - 1)
        x, layers = rows, sum(name.startswith("score.") for name in self.weights) // 2
        for i in range(layers):
            x = x @ self.weights[f"score.{i}.weight"].T + self.weights[f"score.{i}.bias"]
            if i + 1 < layers:
                np.maximum(x, 0.0, out=x)
        scores = (x + rows @ self.weights["line"].T).reshape(seen.shape[:2])
        return np.where(seen[..., -1] > 0, scores, -np.inf)

    def cuts(self, seen: Features) -> Indices:
        """Return the index of the cut of each device, ``(R,)``: that with the highest score."""
        best: Indices = self.scores(seen).argmax(axis=1)
        return best

    def save(self, path: Path) -> None:
        """Write the agent to a file."""
        told = {"features": list(FEATURES), "about": dict(self.about)}
        agent_files.write(path, agent_files.CUTS, told, self.weights)


def untrained(about: Mapping[str, Any] | None = None) -> CutAgent:
    """Return the agent that training begins with: it takes what is expected to be fastest.

    Of the networks it has the line alone, so it needs neither torch nor the extra ``rl``.

    Args:
        about: Kept with the agent.
    """
    none = np.zeros((1, len(FEATURES)), dtype=np.float32)
    weights = {"score.0.weight": none, "score.0.bias": np.zeros(1, dtype=np.float32)}
    return CutAgent({**weights, "line": greedy_line()}, {"steps": 0, **(about or {})})


def greedy_line() -> NDArray[np.float32]:
    """Return the line of an untrained agent, ``(1, F)``."""
    line = np.zeros((1, len(FEATURES)), dtype=np.float32)
    line[0, FEATURES.index("round over target")] = -GREED
    return line
