"""Rounds in which a policy decides and the virtual clock answers: nothing is trained.

A round is what `strategies.offload` does with a policy, without the training: it is asked for a
plan, the round is played on the true machines and networks, and what devices would have measured is
what the policy sees next. So a policy can be judged on fleets that it does not know, in
milliseconds for a round.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.resources import Observation
from fedsys.planning.virtual_clock import VirtualClock, VirtualRound
from fedsys.planning.workload import Workload


class Decides(Protocol):
    """What is asked for plans: an offloading policy."""

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> Any:
        """Return the state before the first round."""
        ...

    def plan(
        self, state: Any, seen: Mapping[int, Observation]
    ) -> tuple[Any, Mapping[int, Assignment]]:
        """Return the next state, and what each device in `seen` does."""
        ...


@dataclass(frozen=True)
class DecidedRound:
    """A round as a policy decided it.

    Attributes:
        number: The round, from 1.
        load: What was trained, with the true networks of the round.
        start_s: When it began on the virtual clock.
        choices: Of each device.
        played: The round.
        decide_s: Seconds that deciding took by the clock of this machine.
        state: The policy's, after it has decided.
    """

    number: int
    load: Workload
    start_s: float
    choices: tuple[Assignment, ...]
    played: VirtualRound
    decide_s: float
    state: Any


def decided_rounds(
    policy: Decides,
    layers: LayeredModel,
    truth: Workload,
    rounds: int,
    clock: VirtualClock | None = None,
) -> Iterator[DecidedRound]:
    """Yield rounds of a policy, device k being node k.

    Args:
        policy: Who decides, by what it believes of the fleet and what it sees.
        layers: The model.
        truth: The machines and networks as they are.
        rounds: How many.
        clock: Plays them.

    Raises:
        ConfigError: The policy lets raw inputs leave a device, which is not timed.
    """
    clock, now = clock or VirtualClock(), 0.0
    nodes = range(len(truth.devices))
    state = policy.init(layers, nodes)
    seen = dict.fromkeys(nodes, Observation())
    for number in range(1, rounds + 1):
        load = truth.at_round(number)
        began = time.perf_counter()
        state, chosen = policy.plan(state, seen)
        decide_s = time.perf_counter() - began
        choices = tuple(_settled(chosen[node], len(load.edges)) for node in nodes)
        played = clock.play(load, choices, now)
        yield DecidedRound(number, load, now, choices, played, decide_s, state)
        now += played.seconds
        seen = {node: _observed(load, node, played) for node in nodes}


def _settled(choice: Assignment, edges: int) -> Assignment:
    if choice.cut == 0:
        raise ConfigError.of(
            "policy.cut", 0, "must be at least 1 where time is modelled: raw inputs are not timed"
        )
    return dataclasses.replace(choice, edge=choice.edge % edges, micro_batches=choice.pieces)


def _observed(load: Workload, node: int, played: VirtualRound) -> Observation:
    measured = dataclasses.asdict(played.seen[node])
    steps = load.iterations(load.devices[node])
    return Observation(**measured, steps=steps, seconds=played.device_s[node])
