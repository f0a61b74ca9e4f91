"""An agent for a run: read from a file, or trained on fleets that are drawn around the run's."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel, fractions
from fedsys.planning.costs import MachineClass, Messaging
from fedsys.planning.hardware import Hardware, hardware, network_for
from fedsys.planning.leakage import allowed_cuts
from fedsys.planning.learning.agent import Agent, load
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.scenarios import Scenario, drawn_fleet
from fedsys.planning.learning.view import Times
from fedsys.planning.options import PlanOptions, run_workload
from fedsys.randomness import Address, default_generator_lent
from fedsys.transport.network import Network

if TYPE_CHECKING:
    from fedsys.planning.learning.environment import Rounds

FILE: Final = "agent.safetensors"
"""Name of the agent in a run folder."""

Say = Callable[[str], None]

_DEVICE = MachineClass("device", 4e9, 2.0, 1e9, 1e-3, 2e-5, Messaging(5e-4, {"fp32": 8e-9}))
_EDGE = MachineClass("edge", 1e11, 2.0, 4e9, 2e-4, 0.0, Messaging(1e-4, {"fp32": 1e-9}), 4)
_LINK = Network(25e6, 25e6, 3e-3)


def scenario_of(
    config: Config, layers: LayeredModel, examples: Sequence[int], options: FedAdaptOptions
) -> Scenario:
    """Return the fleet of a run as its fleet file describes it, or machines as they often are.

    Raises:
        ConfigError: A cut is none of the model's.
    """
    machines = hardware(config, layers) or _often(config, layers)
    planning = PlanOptions(codec=options.codecs, micro_batches=_counts(options.micro_batches))
    load = run_workload(config, layers, machines, examples, planning)
    legal = legal_cuts(layers, options.cuts)
    cuts = [*allowed_cuts(config, layers, legal[:-1]), legal[-1]]
    done = fractions(layers)
    return Scenario(load, [done[cut - 1] for cut in cuts], cuts)


def legal_cuts(layers: LayeredModel, wanted: Sequence[int] | None = None) -> list[int]:
    """Return the cuts that an agent may choose, the whole model last.

    Args:
        layers: The model.
        wanted: FedAdapt's offloading points, as cuts; None: all cuts of the model.

    Raises:
        ConfigError: One is none of the model's.
    """
    for cut in wanted or ():
        if cut not in (*layers.cuts, len(layers)):
            known = ", ".join(map(str, (*layers.cuts, len(layers))))
            raise ConfigError.of("policy.cuts", cut, f"must be cuts of the model: {known}")
    return sorted({*(layers.cuts if wanted is None else wanted), len(layers)})


def _often(config: Config, layers: LayeredModel) -> Hardware:
    count = config.num_clients
    links = tuple(network_for(config, k) for k in range(count))
    known = tuple(link if math.isfinite(link.up_bits_s) else _LINK for link in links)
    edges = len(config.fleet.edges) or config.num_edges
    return Hardware((_DEVICE.costs(layers),) * count, known, (_EDGE.costs(layers),) * edges)


def _counts(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(str(value)),)


def agent_for(
    base: Scenario,
    options: FedAdaptOptions,
    seed: int,
    *,
    folder: Path | None = None,
    say: Say = lambda text: None,
    model: str = "",
) -> Agent:
    """Return the agent of a run.

    Args:
        base: Its fleet and model.
        options: Where the agent is from, or how it is trained.
        seed: Of the run.
        folder: Where a trained agent is kept; one that lies there is taken, as the run is resumed.
        say: Told how far the training is.
        model: Name of the model, kept with the agent.

    Raises:
        ConfigError: The file is no agent's or one of another kind, or none is given and the extra
            ``rl`` is not installed.
    """
    if (known := known_agent(options, folder)) is not None:
        return known
    made = trained(base, options, seed, say=say, model=model)
    if folder is not None:
        made.save(folder / FILE)
    return made


def known_agent(options: FedAdaptOptions, folder: Path | None = None) -> Agent | None:
    """Return the agent of a file, or one that lies in a run folder; None if none is there yet.

    Raises:
        ConfigError: The file is no agent's or one of another kind.
    """
    if options.agent:
        return load(Path(options.agent).expanduser(), options.groups)
    kept = None if folder is None else folder / FILE
    return load(kept, options.groups) if kept is not None and kept.is_file() else None


def trained(
    base: Scenario,
    options: FedAdaptOptions,
    seed: int,
    *,
    say: Say = lambda text: None,
    model: str = "",
) -> Agent:
    """Return an agent that was trained on the timeline; the same for the same seed.

    Raises:
        ModelError: The extra ``rl`` is not installed.
    """
    from fedsys.planning.learning import ppo  # of the extra ``rl``
    from fedsys.planning.learning.deck import Deck, DeckEnvironments

    began = time.perf_counter()
    training, hyper = options.training, options.ppo
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
    environments = DeckEnvironments(
        deck, hyper.environments, seed, moments=training.moments, change=training.change
    )
    made = ppo.train(
        environments, options.view, hyper, seed,
        progress=_progress(say, "training the agent"), about={"model": model},
    )  # fmt: skip
    say(f"trained the agent: {hyper.steps:,} steps in {time.perf_counter() - began:.0f} s")
    return made


def trained_on(
    rounds: Rounds,
    options: FedAdaptOptions,
    seed: int,
    *,
    say: Say = lambda text: None,
    model: str = "",
) -> Agent:
    """Return an agent that was trained on rounds which are carried out one after the other.

    Raises:
        ModelError: The extra ``rl`` is not installed.
    """
    from fedsys.planning.learning import ppo  # of the extra ``rl``
    from fedsys.planning.learning.environment import OffloadEnvironment

    began, every = time.perf_counter(), options.ppo.every
    batch = min(options.ppo.batch or every, every)
    hyper = dataclasses.replace(options.ppo, environments=1, batch=batch)
    lent, reward = _Lent(rounds), options.training.reward
    environment = OffloadEnvironment(lent, options.view, reward=reward)
    made = ppo.train(
        environment, options.view, hyper, seed,
        progress=_progress(say, "training the agent on the clients"),
        about={"model": model, "where": "clients"},
    )  # fmt: skip
    say(f"trained the agent: {hyper.steps:,} steps in {time.perf_counter() - began:.0f} s")
    return made


class _Lent:
    """Rounds that work in other threads, which have torch to themselves meanwhile."""

    def __init__(self, inner: Rounds) -> None:
        self.shares, self._inner = inner.shares, inner

    def begin(self, random: np.random.Generator) -> Times:
        with _torch_lent():
            return self._inner.begin(random)

    def carry_out(self, picked: Sequence[int]) -> Times:
        with _torch_lent():
            return self._inner.carry_out(picked)


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
