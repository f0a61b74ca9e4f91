"""The fleets of the benchmark on offloading: the paper's, and others with links that change.

A case has two sides: what a policy believes, which is a configuration as anybody could write it,
and the truth, a workload on the virtual clock. Where profiles are wrong, the seconds of each unit
are off by a factor of their own on each kind of device; links are always true, and are measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedsys.config import Config, FleetConfig, NetworkConfig, compose_text, parse
from fedsys.models.layers import LayeredModel
from fedsys.planning.costs import MachineCosts
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.planning.traces import random_walk, steps
from fedsys.planning.workload import Workload
from fedsys.randomness import Address
from fedsys.training.federation import layered_model

SHAPE: Final = (3, 32, 32)
CLASSES: Final = 10
THROTTLE: Final = (
    "network.trace_by=rounds",
    "network.trace={{generate: throttle, mbit_s: 5, first: {first}, length: {length}}}",
)
FIRST: Final = 0.5
"""Share of the rounds after which the first device is throttled."""


@dataclass(frozen=True)
class OffloadCase:
    """One fleet to decide for.

    Attributes:
        name: The scenario that it belongs to.
        config: The run as it is described to policies.
        layers: Its model.
        truth: Machines and networks as they are, with all that may be chosen.
        rounds: How many rounds are decided.
    """

    name: str
    config: Config
    layers: LayeredModel
    truth: Workload
    rounds: int


def cases(options: Mapping[str, Any], seed: int) -> Iterator[OffloadCase]:
    """Yield all cases, those of one scenario together.

    Args:
        options: ``models``, ``rounds``, ``fleets`` (drawn ones), ``fleet_rounds``, ``every``
            (rounds from one change of their links to the next), ``examples`` of each device.
        seed: Of the draws.
    """
    count, rounds = int(options["examples"]), int(options["rounds"])
    for model in options["models"]:
        yield of_run(f"paper {model}", _paper(str(model), ()), count, rounds)
    length = max(1, rounds // 10)
    throttled = [text.format(first=int(FIRST * rounds), length=length) for text in THROTTLE]
    for model in options["models"]:
        yield of_run(f"bandwidth {model}", _paper(str(model), throttled), count, rounds)
    for wrong in (False, True):
        for index in range(int(options["fleets"])):
            model = str(options["models"][index % len(options["models"])])
            yield _drawn(model, Address(seed, round=index), options, wrong=wrong)


def _paper(model: str, more: tuple[str, ...] | list[str]) -> Config:
    words = " ".join(f"'{word}'" for word in more)
    return parse(
        compose_text(
            f"model={model} fleet=pi_lab network=wifi_75 num_clients=5 client.batch_size=100 "
            f"client.epochs=1 schedule=pipelined {words}"
        )
    )


def of_run(name: str, config: Config, examples: int, rounds: int) -> OffloadCase:
    """Return the case of a run whose fleet file is right.

    Args:
        name: The scenario.
        config: The run.
        examples: Examples of each device.
        rounds: How many rounds are decided.
    """
    layers = layered_model(config, SHAPE, CLASSES)
    load = run_workload(config, layers, machines_of(config, layers), [examples], PlanOptions())
    return OffloadCase(name, config, layers, load, rounds)


# --------------------------------------------------------------------------------------------------
# Drawn fleets


def _drawn(model: str, address: Address, options: Mapping[str, Any], *, wrong: bool) -> OffloadCase:
    """Return a fleet of three to six devices of two or three kinds, whose links change."""
    random = address.numpy("fleet")
    config = _paper(model, ())
    known = config.fleet.machines
    rounds, every = int(options["fleet_rounds"]), float(options["every"])
    kinds = {f"kind{i}": _machine(known, random) for i in range(int(random.integers(2, 4)))}
    count = int(random.integers(3, 7))
    devices = tuple(f"kind{int(i)}" for i in random.integers(len(kinds), size=count))
    server = dict(known["edge_cpu"])
    server["macs_per_s"] *= float(np.exp(random.uniform(np.log(0.25), np.log(4.0))))
    links = tuple(
        _link(dataclasses.replace(address, client=k), rounds, every) for k in range(count)
    )
    fleet = FleetConfig(
        machines={**kinds, "server": server}, devices=devices, servers=("server",), links=links
    )
    drawn = dataclasses.replace(config, fleet=fleet, network=NetworkConfig(), num_clients=count)
    name = "wrong profiles" if wrong else "unseen fleets"
    case = of_run(name, drawn, int(options["examples"]), rounds)
    return dataclasses.replace(case, truth=mistaken(case.truth, address)) if wrong else case


def _machine(known: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
    like = dict(known[("pi3", "pi4", "jetson")[int(random.integers(3))]])
    like["macs_per_s"] *= float(np.exp(random.uniform(np.log(0.5), np.log(2.0))))
    return like


def _link(address: Address, rounds: int, every: float) -> NetworkConfig:
    """Return the link of a device, whose rates walk or jump from one round to another."""
    random = address.numpy("link")
    if address.client % 2:
        rows = steps(address, levels_mbit_s=(75.0, 40.0, 20.0, 10.0, 5.0), every=every,
                     length=float(rounds))  # fmt: skip
    else:
        rows = random_walk(address, low_mbit_s=4.0, high_mbit_s=100.0, every=every, change=0.6,
                           length=float(rounds))  # fmt: skip
    latency = float(np.exp(random.uniform(np.log(1.0), np.log(20.0))))
    return NetworkConfig(
        "drawn", "drawn", *rows[0][1:], latency, [list(row) for row in rows], "rounds"
    )


def mistaken(load: Workload, address: Address) -> Workload:
    """Return a workload whose devices take other times than believed.

    Each unit takes 0.5 to 2 times as long, in equal ratios, differently on each kind of device.
    """
    made: dict[int, MachineCosts] = {}
    for device in load.devices:
        if id(device.costs) not in made:
            random = address.numpy("units", len(made))
            factors = np.exp(random.uniform(np.log(0.5), np.log(2.0), load.units))
            made[id(device.costs)] = scaled(device.costs, factors)
    devices = tuple(dataclasses.replace(d, costs=made[id(d.costs)]) for d in load.devices)
    return dataclasses.replace(load, devices=devices)


def scaled(costs: MachineCosts, factors: np.ndarray[Any, np.dtype[np.float64]]) -> MachineCosts:
    """Return a machine each of whose units takes a factor of its own longer, ``(L,)``."""
    forward, backward = (
        tuple(tuple((np.array(row) * factors).tolist()) for row in table)
        for table in (costs.forward_s, costs.backward_s)
    )
    update = tuple((np.array(costs.update_s) * factors).tolist())
    return dataclasses.replace(costs, forward_s=forward, backward_s=backward, update_s=update)
