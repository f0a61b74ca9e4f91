"""An agent that goes on learning in a run: what it did, what came of it, and updates now and then.

Its actions are drawn around what it would do, by the seed of the run and the number of the round;
so the same run learns the same. All of it is a value, which travels through checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsys.planning.learning.agent import Agent
from fedsys.planning.learning.observing import REWARDS, Vector, action_of, in_vain, share_of
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.view import Times
from fedsys.randomness import Address

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Learning:
    """What an agent has learned in a run, and from what it will.

    Attributes:
        rounds: In which it acted.
        weights: Those that it has by now, as lists; empty: those that it came with.
        states: What it saw before each action since the last update, ``(N, view.size)``.
        actions: What it did, ``(N, groups)``.
        rewards: What came of each but the last.
        ends: Whether it ended an episode.
    """

    rounds: int = 0
    weights: Mapping[str, Any] = field(default_factory=dict)
    states: tuple[Numbers, ...] = ()
    actions: tuple[Numbers, ...] = ()
    rewards: tuple[float, ...] = ()
    ends: tuple[bool, ...] = ()

    def to_values(self) -> dict[str, Any]:
        """Return what differs from nothing, as plain values."""
        if self == Learning():
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def rewarded(self, base: Times, now: Times, reward: str) -> Learning:
        """Take note of what came of the last action."""
        if len(self.rewards) == len(self.actions):
            return self
        seconds, baseline = now.iteration_s.tolist(), base.iteration_s.tolist()
        earned = REWARDS[reward](seconds, baseline)
        ended = in_vain(seconds, baseline)
        return dataclasses.replace(self, rewards=(*self.rewards, earned), ends=(*self.ends, ended))

    def acting(self, agent: Agent) -> Agent:
        """Return the agent as it is by now."""
        if not self.weights:
            return agent
        weights = {name: np.array(w, dtype=np.float32) for name, w in self.weights.items()}
        return dataclasses.replace(agent, weights=weights)

    def acted(
        self, agent: Agent, state: Vector, std: float, seed: int
    ) -> tuple[Learning, list[float]]:
        """Draw what the agent does now; return also the share of the work of each group."""
        mean = np.array([action_of(share) for share in agent.shares(state)])
        random = Address(seed, round=self.rounds + 1).numpy("fedadapt")
        action = (mean + random.normal(0.0, 2.0 * std, len(mean))).astype(np.float32)
        acted = dataclasses.replace(
            self,
            rounds=self.rounds + 1,
            states=(*self.states, tuple(state.tolist())),
            actions=(*self.actions, tuple(action.tolist())),
        )
        return acted, [share_of(float(a)) for a in action]

    def updated(
        self, agent: Agent, after: Vector, options: FedAdaptOptions, seed: int
    ) -> tuple[Learning, Agent]:
        """Return what is known after an update, if enough was done since the last one."""
        if len(self.rewards) < options.learn_every:
            return self, agent
        from fedsys.planning.learning.ppo import Step, improved  # of the extra ``rl``

        taken = zip(self.states, self.actions, self.rewards, self.ends, strict=True)
        steps = [
            Step(np.array(state, dtype=np.float32), np.array(action, dtype=np.float32), earned, end)
            for state, action, earned, end in taken
        ]
        address = Address(seed, round=self.rounds)
        better = improved(
            agent, steps, after, options.ppo, options.learn_std, address.seed_for("fedadapt update")
        )
        kept = {name: array.tolist() for name, array in better.weights.items()}
        return Learning(self.rounds, kept), better
