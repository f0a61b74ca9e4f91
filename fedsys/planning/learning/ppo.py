"""Training of agents by proximal policy optimisation, with stable-baselines3 (extra ``rl``).

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, in the form of FedAdapt's code: an
actor and a critic of 64 and 32 units with tanh, a mean in (0, 1) by a sigmoid, a standard deviation
that is not learned and decays, and Monte Carlo returns. Two things differ from that code:
stable-baselines3 normalises advantages instead of returns, and actions lie in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsys.planning.learning.agent import Agent
from fedsys.planning.learning.extra import of_rl
from fedsys.planning.learning.observing import Vector
from fedsys.planning.learning.options import Hyper
from fedsys.planning.learning.view import View
from fedsys.randomness import seeded_default_generator

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
    with one_thread(), seeded_default_generator(seed % 2**32):
        model = _ppo(environments, hyper, seed)
        model.learn(hyper.steps, callback=_decaying(hyper, progress))
    made = {"steps": hyper.steps, "seed": seed, "hyper": dataclasses.asdict(hyper)}
    return Agent(view, _weights(model.policy), {**made, **(about or {})})


@dataclass(frozen=True)
class Step:
    """A step that was taken: what is learned from.

    Attributes:
        state: What was seen before.
        action: What was done, in [-1, 1], of each group.
        reward: What came of it.
        last: Whether it ended an episode.
    """

    state: Vector
    action: Vector
    reward: float
    last: bool


def improved(
    agent: Agent, steps: Sequence[Step], after: Vector, hyper: Hyper, std: float, seed: int
) -> Agent:
    """Return the agent after one update by steps that were taken by it.

    Args:
        agent: Took the steps.
        steps: In their order.
        after: What is seen after the last of them.
        hyper: Hyper-parameters.
        std: Standard deviation of the actions, as a share of the work.
        seed: Of the order in which steps are gone through.
    """
    of_rl("stable_baselines3")
    from fedsys.planning.learning.environment import Spaces  # of the extra ``rl``

    every = dataclasses.replace(
        hyper, every=len(steps), environments=1, batch=None, layers=hidden(agent.weights, "actor")
    )
    with one_thread(), seeded_default_generator(seed % 2**32):
        model = _ppo(Spaces(agent.view), every, seed)
        policy: Any = model.policy
        _load(policy, {**agent.weights, "log_std": np.full(agent.view.groups, math.log(2 * std))})
        _fill(model, policy, steps, after)
        update(model)
    return dataclasses.replace(agent, weights=_weights(policy))


def hidden(weights: Mapping[str, Any], network: str) -> tuple[int, ...]:
    """Return the hidden units of a network of an agent, whatever is configured for new ones."""
    count = sum(name.startswith(f"{network}.") for name in weights) // 2
    return tuple(len(weights[f"{network}.{i}.bias"]) for i in range(count - 1))


def _fill(model: Any, policy: Any, steps: Sequence[Step], after: Vector) -> None:
    """Put the steps where stable-baselines3 looks for what it learns from."""
    buffer, begins = model.rollout_buffer, True
    with torch.no_grad():
        for step in steps:
            state = torch.from_numpy(step.state[None])
            action = torch.from_numpy(step.action[None])
            value, likelihood, _ = policy.evaluate_actions(state, action)
            reward, start = np.array([step.reward]), np.array([begins])
            buffer.add(step.state[None], step.action[None], reward, start, value, likelihood)
            begins = step.last
        last = policy.predict_values(torch.from_numpy(after[None]))
        buffer.compute_returns_and_advantage(last, np.array([steps[-1].last]))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: bits depend on it, and so small a network is no faster with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ppo(environments: Any, hyper: Hyper, seed: int) -> Any:
    collected = hyper.every * hyper.environments
    return algorithm(
        _policy_class(), environments, hyper, seed,
        learning_rate=hyper.lr, batch_size=hyper.batch or collected,
        policy_kwargs={"net_arch": list(hyper.layers), "activation_fn": nn.Tanh},
    )  # fmt: skip


def algorithm(policy: type[Any], environments: Any, hyper: Hyper, seed: int, **given: Any) -> Any:
    """Return stable-baselines3's PPO.

    Args:
        policy: Class of actor and critic.
        environments: What it learns on.
        hyper: Hyper-parameters.
        seed: Of weights and actions.
        given: Arguments that `hyper` does not tell alone: learning rate, mini-batches, layers.
    """
    made = of_rl("stable_baselines3").PPO(
        policy,
        environments,
        n_steps=hyper.every,
        n_epochs=hyper.epochs,
        gamma=hyper.gamma,
        gae_lambda=hyper.gae_lambda,
        clip_range=hyper.clip,
        ent_coef=hyper.entropy,
        vf_coef=hyper.value,
        max_grad_norm=math.inf,
        seed=seed % 2**32,
        device="cpu",
        **given,
    )
    # what it takes where none is given writes nothing, but makes a folder for it
    made.set_logger(of_rl("stable_baselines3.common.logger").Logger(None, []))
    return made


def update(model: Any) -> None:
    """Learn from what lies in the buffer of a model."""
    model.train()


def before_rollouts(tell: Callable[[Any, int], None]) -> Any:
    """Return a callback of stable-baselines3.

    Args:
        tell: Called each time before rounds are collected, with the model and the steps so far.
    """
    callbacks = of_rl("stable_baselines3.common.callbacks")
    base: Any = callbacks.BaseCallback

    class Before(base):  # type: ignore[misc]  # of an extra: without types
        """Tells how far it is."""

        def _on_rollout_start(self) -> None:
            tell(self.model, self.num_timesteps)

        def _on_step(self) -> bool:
            return True

    return Before()


class _Mean(nn.Module):
    """tanh(x / 2): a sigmoid, in [-1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 2)


def _policy_class() -> type[Any]:
    policies = of_rl("stable_baselines3.common.policies")
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
    """Set the standard deviation before each update, and tell how far it is."""

    def before(model: Any, steps: int) -> None:
        update_number = steps // (hyper.every * hyper.environments)
        # Actions span twice what shares do
        model.policy.log_std.data.fill_(math.log(2.0 * hyper.std_at(update_number)))
        progress(steps, hyper.steps)

    return before_rollouts(before)


def _weights(policy: Any) -> dict[str, Any]:
    found = {"log_std": policy.log_std, **_parameters(policy)}
    return {key: value.detach().numpy().astype(np.float32).copy() for key, value in found.items()}


def _load(policy: Any, weights: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in {"log_std": policy.log_std, **_parameters(policy)}.items():
            parameter.copy_(torch.from_numpy(np.asarray(weights[name], dtype=np.float32)))


def _parameters(policy: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of both networks by the names that agents give them."""
    networks = policy.mlp_extractor
    found: dict[str, nn.Parameter] = {}
    for name, hidden, last in (
        ("actor", networks.policy_net, policy.action_net[0]),
        ("critic", networks.value_net, policy.value_net),
    ):
        linear = [m for m in hidden if isinstance(m, nn.Linear)]
        for i, layer in enumerate([*linear, last]):
            found |= {f"{name}.{i}.weight": layer.weight, f"{name}.{i}.bias": layer.bias}
    return found
