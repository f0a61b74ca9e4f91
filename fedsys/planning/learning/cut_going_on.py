"""An agent that scores cuts and goes on learning in a run: what it did, and updates now and then.

Cuts are drawn by the softmax of the scores, by the seed of the run and the number of the round; so
the same run learns the same. All of it is a value, which travels through checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsys.planning.contention import Indices
from fedsys.planning.learning.cut_agent import CutAgent
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.rewards import regret_reward
from fedsys.planning.learning.run_fleet import Look
from fedsys.planning.workload import Array
from fedsys.randomness import Address


@dataclass(frozen=True)
class CutLearning:
    """What an agent has learned in a run, and from what it will.

    Attributes:
        rounds: In which it acted.
        weights: Those that it has by now, as lists; empty: those that it came with.
        clients: Who took part in each round since the last update.
        seen: The candidates of each of them, ``(R, C, F + 1)``.
        cuts: Which cut it took, by index.
        earned: What came of it, of all rounds but the last.
    """

    rounds: int = 0
    weights: Mapping[str, Any] = field(default_factory=dict)
    clients: tuple[tuple[int, ...], ...] = ()
    seen: tuple[Any, ...] = ()
    cuts: tuple[tuple[int, ...], ...] = ()
    earned: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CutLearning:
        """Return what `to_values` made plain values of."""
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        """Return all as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def rewarded(self, clients: Sequence[int], took_s: Array, look: Look) -> CutLearning:
        """Take note of what came of the last round; it is forgotten if others took part.

        Args:
            clients: Whose round it was.
            took_s: Seconds that each trained; 0 if that is not known.
            look: What is known after it.
        """
        if len(self.earned) == len(self.cuts):
            return self
        if self.clients[-1] != tuple(clients) or not (took_s > 0).all():
            kept = slice(0, -1)
            return dataclasses.replace(
                self, clients=self.clients[kept], seen=self.seen[kept], cuts=self.cuts[kept]
            )
        starts, alone = np.zeros(1, dtype=np.int64), look.outlook.round_s[:, -1]
        earned = regret_reward(
            starts, np.zeros(len(clients), dtype=np.int64), took_s, look.hoped.seconds,
            np.full(len(clients), alone.max()),
        )  # fmt: skip
        return dataclasses.replace(self, earned=(*self.earned, tuple(earned.tolist())))

    def acting(self, agent: CutAgent) -> CutAgent:
        """Return the agent as it is by now."""
        if not self.weights:
            return agent
        weights = {name: np.array(w, dtype=np.float32) for name, w in self.weights.items()}
        return dataclasses.replace(agent, weights=weights)

    def acted(
        self, agent: CutAgent, clients: Sequence[int], look: Look, seed: int
    ) -> tuple[CutLearning, Indices]:
        """Draw what devices do now; return also the index of the cut of each."""
        random = Address(seed, round=self.rounds + 1).numpy("fedadapt")
        # The highest of scores with Gumbel noise is a draw from their softmax
        noise = random.gumbel(size=look.legal.shape)
        cut: Indices = (agent.scores(look.seen) + noise).argmax(axis=1)
        acted = dataclasses.replace(
            self,
            rounds=self.rounds + 1,
            clients=(*self.clients, tuple(clients)),
            seen=(*self.seen, look.seen.tolist()),
            cuts=(*self.cuts, tuple(cut.tolist())),
        )
        return acted, cut

    def updated(
        self, agent: CutAgent, options: FedAdaptOptions, seed: int
    ) -> tuple[CutLearning, CutAgent]:
        """Return what is known after an update, if enough was done since the last one."""
        agent = self.acting(agent)
        if len(self.earned) < options.learn_every:
            return self, agent
        from fedsys.planning.learning.cut_ppo import Chosen, improved  # of the extra ``rl``

        taken = [
            Chosen(np.array(seen, dtype=np.float32), np.array(cut), np.array(earned))
            for seen, cut, earned in zip(self.seen, self.cuts, self.earned, strict=True)
        ]
        address = Address(seed, round=self.rounds)
        better = improved(agent, taken, options.ppo, address.seed_for("fedadapt update"))
        kept = {name: array.tolist() for name, array in better.weights.items()}
        return CutLearning(self.rounds, kept), better
