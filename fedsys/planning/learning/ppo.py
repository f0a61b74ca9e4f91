"""Training of agents by proximal policy optimisation, with stable-baselines3 (extra ``rl``).

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, in the form of FedAdapt's code: an
actor and a critic of 64 and 32 units with tanh, a mean in (0, 1) by a sigmoid, a standard deviation
that is not learned and decays, and Monte Carlo returns. Two things differ from that code:
stable-baselines3 normalises advantages instead of returns, and actions lie in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedsys.config.targets import import_extra
from fedsys.planning.learning.agent import Agent
from fedsys.planning.learning.options import Hyper
from fedsys.randomness import seeded_default_generator

if TYPE_CHECKING:
    from fedsys.planning.learning.view import View

WHO = "training an agent, in place of policy.agent=FILE,"

Progress = Callable[[int, int], None]
"""Told the steps that are done, and all."""


def train(
    environments: Any,
    view: View,
    hyper: Hyper,
    seed: int,
    *,
    progress: Progress = lambda done, all_: None,
    about: Mapping[str, Any] | None = None,
) -> Agent:
    """Return an agent that was trained from nothing.

    The same seed gives the same agent, whatever else the process draws.

    Args:
        environments: What it is trained on: a vector environment of stable-baselines3, or one
            environment of gymnasium.
        view: How the agent sees devices.
        hyper: Hyper-parameters.
        seed: Of weights and actions.
        progress: Told how far it is.
        about: Kept with the agent.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bits depend on it, and so small a network is no faster with two
    try:
        with seeded_default_generator(seed % 2**32):
            model = _ppo(environments, hyper, seed)
            model.learn(hyper.steps, callback=_decaying(hyper, progress))
    finally:
        torch.set_num_threads(threads)
    made = {"steps": hyper.steps, "seed": seed, "hyper": dataclasses.asdict(hyper)}
    return Agent(view, _weights(model.policy), {**made, **(about or {})})


def _ppo(environments: Any, hyper: Hyper, seed: int) -> Any:
    collected = hyper.every * hyper.environments
    return import_extra("stable_baselines3", "rl", WHO).PPO(
        _policy_class(),
        environments,
        learning_rate=hyper.lr,
        n_steps=hyper.every,
        batch_size=hyper.batch or collected,
        n_epochs=hyper.epochs,
        gamma=hyper.gamma,
        gae_lambda=hyper.gae_lambda,
        clip_range=hyper.clip,
        ent_coef=hyper.entropy,
        vf_coef=hyper.value,
        max_grad_norm=math.inf,
        policy_kwargs={"net_arch": list(hyper.layers), "activation_fn": nn.Tanh},
        seed=seed % 2**32,
        device="cpu",
    )


class _Mean(nn.Module):
    """tanh(x / 2): a sigmoid, in [-1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 2)


def _policy_class() -> type[Any]:
    policies = import_extra("stable_baselines3.common.policies", "rl", WHO)
    base: Any = policies.ActorCriticPolicy

    class Bounded(base):  # type: ignore[misc]  # of an extra: without types
        """An actor whose mean is bounded, and whose standard deviation is not learned."""

        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            made: Any = self
            made.action_net = nn.Sequential(made.action_net, _Mean())
            self.log_std.requires_grad_(False)
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer: Any = self.optimizer_class
            self.optimizer = optimizer(trained, lr=lr_schedule(1), **self.optimizer_kwargs)

    return Bounded


def _decaying(hyper: Hyper, progress: Progress) -> Any:
    callbacks = import_extra("stable_baselines3.common.callbacks", "rl", WHO)
    base: Any = callbacks.BaseCallback

    class Decaying(base):  # type: ignore[misc]  # of an extra: without types
        """Sets the standard deviation before each update, and tells how far it is."""

        def _on_rollout_start(self) -> None:
            update = self.num_timesteps // (hyper.every * hyper.environments)
            # Actions span twice what shares do
            policy: Any = self.model.policy
            policy.log_std.data.fill_(math.log(2.0 * hyper.std_at(update)))
            progress(self.num_timesteps, hyper.steps)

        def _on_step(self) -> bool:
            return True

    return Decaying()


def _weights(policy: Any) -> dict[str, Any]:
    found = {"log_std": policy.log_std}
    networks = policy.mlp_extractor
    for name, hidden, last in (
        ("actor", networks.policy_net, policy.action_net[0]),
        ("critic", networks.value_net, policy.value_net),
    ):
        linear = [m for m in hidden if isinstance(m, nn.Linear)]
        for i, layer in enumerate([*linear, last]):
            found |= {f"{name}.{i}.weight": layer.weight, f"{name}.{i}.bias": layer.bias}
    return {key: value.detach().numpy().astype(np.float32).copy() for key, value in found.items()}
