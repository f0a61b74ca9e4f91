"""Fleets that are misjudged, and rounds of a policy on them: no training, only the clock."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from fedsys.config import compose_text, parse
from fedsys.planning.misjudged import misjudged
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.planning.planner import plan
from fedsys.planning.resources import Observation
from fedsys.planning.virtual_clock import virtual_round
from fedsys.planning.workload import Device
from fedsys.training.federation import layered_model
from fedsys.transport.network import Network

MOST = 2_000  # turns that are played of a round


@functools.cache
def lab(model="vgg5", schedule="pipelined"):
    """Return the layers and the workload of FedAdapt's testbed."""
    config = parse(
        compose_text(
            f"policy=auto fleet=pi_lab network=wifi_75 model={model} num_clients=5 "
            f"client.batch_size=100 schedule={schedule}"
        )
    )
    layers = layered_model(config, (3, 32, 32), 10)
    options = PlanOptions(micro_batches=(1, 5, 20))
    return layers, run_workload(config, layers, machines_of(config, layers), [1000], options)


def drawn(load, seed, most_devices=4):
    """Return a random fleet as it is believed, and as it is."""
    random = np.random.default_rng(seed)
    ratio = lambda low, high: float(np.exp(random.uniform(np.log(low), np.log(high))))  # noqa: E731
    kinds = {d.costs.name: d.costs.slower(ratio(0.25, 4)) for d in load.devices}
    devices = []
    for k in range(int(random.integers(2, most_devices + 1))):
        rate = ratio(2e6, 100e6)
        network = Network(rate, rate, ratio(1e-3, 2e-2))
        devices.append(Device(f"d{k}", kinds[random.choice(sorted(kinds))], network, 1000))
    edges = (load.edges[0].slower(ratio(0.5, 4)),) * int(random.integers(1, 3))
    believed = dataclasses.replace(load, devices=tuple(devices), edges=edges)
    true = {id(c): misjudged(c, 2.0, seed) for c in (*kinds.values(), *edges)}
    truth = dataclasses.replace(
        believed,
        devices=tuple(dataclasses.replace(d, costs=true[id(d.costs)]) for d in devices),
        edges=tuple(true[id(e)] for e in edges),
    )
    return believed, truth


def of(load):
    """Return what a policy asks for the workload of some clients."""

    def believed(layers, clients):
        return dataclasses.replace(load, devices=tuple(load.devices[c] for c in clients))

    return believed


def rounds(policy, layers, truth, count, state=None, seen=None):
    """Yield seconds, choices, state and observations of each round that a policy decides."""
    nodes = range(len(truth.devices))
    state = policy.init(layers, nodes) if state is None else state
    seen = {n: Observation() for n in nodes} if seen is None else seen
    for _ in range(count):
        state, chosen = policy.plan(state, seen)
        choices = [chosen[n] for n in nodes]
        played = virtual_round(truth, choices, most=MOST)
        seen = {n: Observation(steps=1, **dataclasses.asdict(m)) for n, m in enumerate(played.seen)}
        yield played.seconds, choices, state, seen


def best_s(truth):
    """Return the seconds of a round as planned by who knows the truth."""
    return virtual_round(truth, plan(truth, "exhaustive").choices, most=MOST).seconds


def native_s(truth):
    """Return the seconds of a round with everything on the devices."""
    return virtual_round(truth, plan(truth, "classic").choices, most=MOST).seconds
