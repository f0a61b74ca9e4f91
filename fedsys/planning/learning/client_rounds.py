"""Truncated rounds of a run's own clients, in which an agent that scores cuts learns.

A step is what a round of the run would be: the cuts that devices take, with the courses that are
fastest there by what is known, and what they measure is known after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import Indices
from fedsys.planning.learning.informed import LEAST_S, informed
from fedsys.planning.learning.rewards import regret_reward
from fedsys.planning.learning.run_fleet import RunFleet, measured
from fedsys.planning.resources import Observation
from fedsys.planning.workload import Array

STEPS: Final = 100
"""Steps of an episode, as in the paper's code."""


class Clients(Protocol):
    """Those of a run, who train a few mini-batches when they are asked."""

    def begin(self) -> Sequence[int]:
        """Return the clients that are there, at the beginning of an episode."""
        ...

    def carry_out(self, assigned: Mapping[int, Assignment]) -> Mapping[int, Observation]:
        """Return what those that answer have seen, given what each client is to do."""
        ...


class ClientRounds:
    """Rounds of the clients of a run (`fedsys.planning.learning.device_rounds.DeviceRounds`).

    A client that is not there, or does not answer, earns nothing, and nothing is known of it.

    Args:
        fleet: The run's, of which nothing is believed.
        clients: Carry rounds out.
        count: How many clients there are in the run.

    Attributes:
        legal: Which cuts each device may take now, ``(R, C)``.
        seen: What is seen of the candidates, ``(R, C, F + 1)``.
    """

    def __init__(self, fleet: RunFleet, clients: Clients, count: int) -> None:
        self._fleet, self._clients, self._who = fleet, clients, list(range(count))
        self._setup, self._known = fleet.of(self._who)
        self._here, self._left = set(self._who), 0
        self._see()

    def begin(self, random: np.random.Generator) -> None:
        """Begin an episode with those that are there; there is nothing to draw."""
        self._here, self._left = set(self._clients.begin()), STEPS
        self._setup, self._known = self._fleet.of(self._who)
        self._see()
        self.step(np.full(len(self._who), self.legal.shape[1] - 1))

    def step(self, cut: Indices) -> tuple[Array, NDArray[np.bool_]]:
        """Carry a round out."""
        here = np.arange(len(cut))
        usual = np.where(self.legal[:, -1], self.legal.shape[1] - 1, 0)
        cut = np.where(self.legal[here, cut], cut, usual)
        course = self._look.outlook.course[here, cut]
        self._known = dataclasses.replace(self._known, cut=cut, course=course)
        made = self._fleet.assignments(self._who, cut, course)
        told = zip(self._who, made, strict=True)
        got = self._clients.carry_out({c: a for c, a in told if c in self._here})
        seen = measured(got, self._who)
        self._known, _ = informed(self._known, self._setup, seen)
        self._see()
        self._left -= 1
        over = np.full(len(cut), self._left <= 0)
        if over.all():
            self._left = STEPS
        return self._earned(seen.iteration_s), over

    def _see(self) -> None:
        self._look = self._fleet.look(self._setup, self._known)
        self.legal, self.seen = self._look.legal, self._look.seen

    def _earned(self, iteration_s: Array) -> Array:
        """Return what came of a round; who did not answer is as fast as the fastest."""
        answered = iteration_s > LEAST_S
        if not answered.any():
            return np.zeros(len(iteration_s))
        rows, look = self._setup.rows, self._look
        bits = self._setup.held_bits[np.arange(len(iteration_s)), self._known.cut]
        exchange = bits * (self._known.up_bit_s + self._known.down_bit_s)
        round_s = np.where(answered, iteration_s * rows.steps + exchange, 0.0)
        classic = np.full(len(round_s), look.outlook.round_s[:, -1].max())
        earned = regret_reward(rows.starts, rows.fleet, round_s, look.hoped.seconds, classic)
        return np.where(answered, earned, 0.0)
