"""Training of agents that score cuts, by stable-baselines3's PPO (extra ``rl``).

Every device is an environment of its own to PPO, though the devices of a fleet share their rounds:
what a device did is judged by what it earned itself. Actor and critic see the candidates of one
device; the actor scores each by the same network, and the softmax over the legal ones is what an
action is drawn from. The critic sees the mean and the least of each feature over them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsys.planning.contention import Indices
from fedsys.planning.learning.cut_agent import CutAgent, greedy_line
from fedsys.planning.learning.device_rounds import DeviceRounds, DeviceRows, Nothing
from fedsys.planning.learning.extra import of_rl
from fedsys.planning.learning.options import Hyper
from fedsys.planning.learning.outlook import FEATURES, Features
from fedsys.planning.learning.ppo import (
    Progress,
    algorithm,
    before_rollouts,
    hidden,
    one_thread,
    update,
)
from fedsys.planning.learning.vector import VectorEnvironment
from fedsys.planning.workload import Array
from fedsys.randomness import seeded_default_generator

_NEVER = -1e9
"""Score of a cut that is not legal."""


def train(
    rounds: DeviceRounds,
    hyper: Hyper,
    seed: int,
    *,
    progress: Progress = lambda done, all_: None,
    about: Mapping[str, Any] | None = None,
) -> CutAgent:
    """Return an agent that was trained from nothing; the same for the same seed.

    Args:
        rounds: What it is trained on.
        hyper: Hyper-parameters; those of a Gaussian are not looked at.
        seed: Of weights and actions.
        progress: Told how far it is.
        about: Kept with the agent.
    """
    steps = hyper.updates * hyper.every * len(rounds.legal)
    with one_thread(), seeded_default_generator(seed % 2**32):
        model = _ppo(DeviceRows(rounds, seed), hyper, seed)
        model.learn(steps, callback=before_rollouts(lambda _, done: progress(done, steps)))
    made = {"steps": steps, "seed": seed, "hyper": dataclasses.asdict(hyper)}
    return CutAgent(_weights(model.policy), {**made, **(about or {})})


@dataclass(frozen=True)
class Chosen:
    """What devices did in a round, and what came of it: what is learned from.

    Attributes:
        seen: The candidates of each, ``(R, C, F + 1)``.
        cut: Index of the one that was taken, ``(R,)``.
        earned: What came of it, ``(R,)``.
    """

    seen: Features
    cut: Indices
    earned: Array


def improved(agent: CutAgent, taken: Sequence[Chosen], hyper: Hyper, seed: int) -> CutAgent:
    """Return the agent after one update by rounds that it has decided.

    Args:
        agent: Decided them.
        taken: The rounds.
        hyper: Hyper-parameters.
        seed: Of the order in which devices are gone through.
    """
    seen = np.concatenate([one.seen for one in taken])
    cut = np.concatenate([one.cut for one in taken])
    earned = np.concatenate([one.earned for one in taken]).astype(np.float32)
    layers = hidden(agent.weights, "score")
    every = dataclasses.replace(hyper, every=len(seen), batch=None, layers=layers)
    with one_thread(), seeded_default_generator(seed % 2**32):
        model = _ppo(DeviceRows(Nothing(seen.shape[1]), seed), every, seed)
        policy: Any = model.policy
        _set(policy.mlp_extractor, agent.weights)
        with torch.no_grad():
            states, actions = torch.from_numpy(seen), torch.from_numpy(cut)
            values, likelihoods, _ = policy.evaluate_actions(states, actions)
        begins, buffer = np.ones(1), model.rollout_buffer
        for i in range(len(seen)):
            buffer.add(
                seen[i : i + 1], cut[i : i + 1], earned[i : i + 1], begins,
                values[i], likelihoods[i],
            )  # fmt: skip
        buffer.compute_returns_and_advantage(values[-1:], begins)
        update(model)
    return dataclasses.replace(agent, weights=_weights(policy))


def _batch(wanted: int | None, all_: int) -> int:
    """Return the size of a mini-batch near to what is wanted, of which all are full."""
    count = max(1, round(all_ / (wanted or all_)))
    while all_ % count:
        count += 1
    return max(2, all_ // count)


def _ppo(rows: DeviceRows, hyper: Hyper, seed: int) -> Any:
    collected = hyper.every * rows.count
    return algorithm(
        _policy_class(), VectorEnvironment(rows), hyper, seed,
        learning_rate=lambda left: hyper.lr * max(left, 0.02),
        batch_size=_batch(hyper.batch, collected),
        policy_kwargs={"net_arch": list(hyper.layers)},
    )  # fmt: skip


def _stack(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i + 2 < len(sizes):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class _Networks(nn.Module):
    """Scores and value from candidates that were flattened, ``(B, C * (F + 1))``."""

    def __init__(self, cuts: int, hidden: list[int]) -> None:
        super().__init__()
        self._cuts, features = cuts, len(FEATURES)
        self.score = _stack([features, *hidden, 1])
        self.value = _stack([2 * features, *hidden, 1])
        self.line = nn.Linear(features, 1, bias=False)
        self.latent_dim_pi, self.latent_dim_vf = cuts, 1
        with torch.no_grad():
            for name in ("weight", "bias"):
                getattr(self.score[-1], name).mul_(0.1)
            self.line.weight.copy_(torch.from_numpy(greedy_line()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_actor(x), self.forward_critic(x)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.reshape(len(x), self._cuts, -1)
        return rows[..., :-1], rows[..., -1] > 0

    def forward_actor(self, x: torch.Tensor) -> torch.Tensor:
        rows, legal = self._split(x)
        scores = (self.score(rows) + self.line(rows))[..., 0]
        masked: torch.Tensor = scores.masked_fill(~legal, _NEVER)
        return masked

    def forward_critic(self, x: torch.Tensor) -> torch.Tensor:
        rows, legal = self._split(x)
        weight = legal[..., None].float()
        mean = (rows * weight).sum(1) / weight.sum(1)
        least = rows.masked_fill(~legal[..., None], math.inf).amin(1)
        value: torch.Tensor = self.value(torch.cat([mean, least], dim=1))
        return value


def _networks(cuts: int, hidden: list[int], weights: Mapping[str, Any]) -> _Networks:
    """Return the networks of an agent."""
    made = _Networks(cuts, hidden)
    _set(made, weights)
    return made


def _policy_class() -> type[Any]:
    policies = of_rl("stable_baselines3.common.policies")
    base: Any = policies.ActorCriticPolicy

    class Scoring(base):  # type: ignore[misc]  # of an extra: without types
        """One network scores all candidates of a device."""

        def _build(self, lr_schedule: Callable[[float], float]) -> None:
            made: Any = self
            made.mlp_extractor = _Networks(self.observation_space.shape[0], list(self.net_arch))
            made.action_net, made.value_net = nn.Identity(), nn.Identity()
            optimizer: Any = self.optimizer_class
            made.optimizer = optimizer(
                self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
            )

    return Scoring


def _weights(policy: Any) -> dict[str, Any]:
    return {
        name: value.detach().numpy().astype(np.float32).copy()
        for name, value in _parameters(policy.mlp_extractor).items()
    }


def _set(networks: _Networks, weights: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in _parameters(networks).items():
            parameter.copy_(torch.from_numpy(np.asarray(weights[name], dtype=np.float32)))


def _parameters(networks: _Networks) -> dict[str, torch.Tensor]:
    """Return the parameters of both networks by the names that agents give them."""
    found: dict[str, torch.Tensor] = {"line": networks.line.weight}
    for name in ("score", "value"):
        network = getattr(networks, name)
        for i, layer in enumerate(m for m in network if isinstance(m, nn.Linear)):
            found |= {f"{name}.{i}.weight": layer.weight, f"{name}.{i}.bias": layer.bias}
    return found
