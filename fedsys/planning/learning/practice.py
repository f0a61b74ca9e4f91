"""Training of an agent for a run: on fleets that are drawn, or on the run's own clients."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fedsys.planning.assignment import Assignment
from fedsys.planning.learning.agent import Agent
from fedsys.planning.learning.client_rounds import ClientRounds, Clients
from fedsys.planning.learning.cut_agent import CutAgent, untrained
from fedsys.planning.learning.fleets import FleetRounds
from fedsys.planning.learning.knowing import table_of
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.run_fleet import RunFleet
from fedsys.planning.learning.scenarios import Scenario, drawn_fleet
from fedsys.planning.learning.view import Times
from fedsys.planning.resources import Observation
from fedsys.randomness import Address, default_generator_lent

if TYPE_CHECKING:
    from fedsys.planning.learning.environment import Rounds

Say = Callable[[str], None]

AnyAgent = Agent | CutAgent

_A = TypeVar("_A", Agent, CutAgent)


def trained(
    base: Scenario,
    options: FedAdaptOptions,
    seed: int,
    *,
    say: Say = lambda text: None,
    model: str = "",
) -> AnyAgent:
    """Return an agent that was trained on the timeline; the same for the same seed.

    Raises:
        ModelError: The extra ``rl`` is not installed.
    """
    about = {"model": model}
    if options.action == "cuts":
        count = options.ppo.environments
        table = table_of(base.load, base.shares, base.cuts)
        rounds = FleetRounds(table, count, options.training.draws)
        return _scoring(rounds, options, seed, say, about)
    from fedsys.planning.learning.deck import Deck, DeckEnvironments  # of the extra ``rl``
    from fedsys.planning.learning.vector import VectorEnvironment

    training = options.training
    random = Address(seed).numpy("agent")
    fleets = [
        scenario
        for _ in range(training.fleets)
        for scenario in drawn_fleet(base, random, training.moments, training.ranges)
    ]
    deck = Deck(
        fleets, options.view, reward=training.reward,
        progress=_progress(say, "timing fleets for the agent"),
    )  # fmt: skip
    dealt = DeckEnvironments(
        deck, options.ppo.environments, seed, moments=training.moments, change=training.change
    )
    return _sharing(VectorEnvironment(dealt), options, seed, say, about)


def trained_on(
    rounds: Rounds,
    options: FedAdaptOptions,
    seed: int,
    *,
    say: Say = lambda text: None,
    model: str = "",
) -> Agent:
    """Return an agent that says shares, trained on rounds that are carried out one after the other.

    Raises:
        ModelError: The extra ``rl`` is not installed.
    """
    from fedsys.planning.learning.environment import OffloadEnvironment  # of the extra ``rl``

    batch = min(options.ppo.batch or options.ppo.every, options.ppo.every)
    hyper = dataclasses.replace(options.ppo, environments=1, batch=batch)
    reward = options.training.reward
    environment = OffloadEnvironment(_LentRounds(rounds), options.view, reward=reward)
    alone = dataclasses.replace(options, ppo=hyper)
    return _sharing(environment, alone, seed, say, {"model": model, "where": "clients"})


def trained_on_clients(
    fleet: RunFleet,
    clients: Clients,
    count: int,
    options: FedAdaptOptions,
    seed: int,
    *,
    say: Say = lambda text: None,
    model: str = "",
) -> CutAgent:
    """Return an agent that scores cuts, trained in truncated rounds of a run's clients.

    Args:
        fleet: The run's.
        clients: Carry rounds out.
        count: How many clients there are.
        options: How it is trained.
        seed: Of the run.
        say: Told how far it is.
        model: Name of the model.

    Raises:
        ModelError: The extra ``rl`` is not installed.
        RuntimeFailure: No client answered.
    """
    rounds = ClientRounds(fleet, _LentClients(clients), count)
    return _scoring(rounds, options, seed, say, {"model": model, "where": "clients"})


def _scoring(
    rounds: Any, options: FedAdaptOptions, seed: int, say: Say, about: Mapping[str, Any]
) -> CutAgent:
    if options.ppo.updates == 0:
        return untrained(about)
    from fedsys.planning.learning import cut_ppo  # of the extra ``rl``

    return _timed(
        say,
        lambda told: cut_ppo.train(rounds, options.ppo, seed, progress=told, about=about),
    )


def _sharing(
    environments: Any, options: FedAdaptOptions, seed: int, say: Say, about: Mapping[str, Any]
) -> Agent:
    from fedsys.planning.learning import ppo  # of the extra ``rl``

    return _timed(
        say,
        lambda told: ppo.train(
            environments, options.view, options.ppo, seed, progress=told, about=about
        ),
    )


def _timed(say: Say, train: Callable[[Callable[[int, int], None]], _A]) -> _A:
    """Train an agent, and say how far it is and how long it took."""
    began = time.perf_counter(), time.process_time()
    made = train(_progress(say, "training the agent"))
    took, computed = time.perf_counter() - began[0], time.process_time() - began[1]
    steps = int(made.about["steps"])
    say(f"trained the agent: {steps:,} steps in {took:.0f} s ({computed:.0f} s of processors)")
    return made


class _LentRounds:
    """Rounds that work in other threads, which have torch to themselves meanwhile."""

    def __init__(self, inner: Rounds) -> None:
        self.shares, self._inner = inner.shares, inner

    def begin(self, random: np.random.Generator) -> Times:
        with _torch_lent():
            return self._inner.begin(random)

    def carry_out(self, picked: Sequence[int]) -> Times:
        with _torch_lent():
            return self._inner.carry_out(picked)


class _LentClients:
    """Clients that work in other threads, likewise."""

    def __init__(self, inner: Clients) -> None:
        self._inner = inner

    def begin(self) -> Sequence[int]:
        with _torch_lent():
            return self._inner.begin()

    def carry_out(self, assigned: Mapping[int, Assignment]) -> Mapping[int, Observation]:
        with _torch_lent():
            return self._inner.carry_out(assigned)


@contextmanager
def _torch_lent() -> Iterator[None]:
    threads = torch.get_num_threads()
    with default_generator_lent():
        try:
            yield
        finally:
            torch.set_num_threads(threads)  # clients set their own


def _progress(say: Say, what: str) -> Callable[[int, int], None]:
    """Return what tells how far something is, and how long it still takes, once a second."""
    began = last = time.perf_counter()

    def told(done: int, count: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if done and now - last >= 1.0:
            last = now
            left = (now - began) * (count - done) / done
            say(f"{what}: {done / count:.0%}, ETA {int(left) // 60}:{int(left) % 60:02}")

    return told
