"""What pipelining gains with and without a promise to each example, on the virtual clock.

Machines are those of a fleet file, links those of a network file, and private work is charged as
planners do: what is compared is a model of time, which no other work on this machine disturbs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedsys.config import compose_text, parse
from fedsys.planning.assignment import Assignment
from fedsys.planning.options import machines_of, run_workload
from fedsys.planning.planner import evaluate, plan
from fedsys.planning.virtual_clock import virtual_round
from fedsys.planning.workload import Workload
from fedsys.training.federation import layered_model

DEVICES, EXAMPLES, SHAPE, CLASSES = 4, 2500, (3, 32, 32), 10


def gains(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each network of ``bench.networks`` what a round takes.

    Yields:
        ``classic_s`` and ``pipelined_s``: of a round; ``gain``: their ratio, ``private_gain``: that
        with a promise, ``kept``: the second over the first; ``norms_share``: of an iteration, the
        way of the norms there and back, where it is the largest.
    """
    for network in options["networks"]:
        found = {}
        for mechanism in ("none", "record"):
            load = _load(str(network), mechanism)
            found[mechanism] = _row(load)
        plain, private = found["none"], found["record"]
        yield {
            "network": network,
            "classic_s": plain["classic_s"],
            "pipelined_s": plain["pipelined_s"],
            "private_classic_s": private["classic_s"],
            "private_pipelined_s": private["pipelined_s"],
            "gain": plain["gain"],
            "private_gain": private["gain"],
            "kept": private["gain"] / plain["gain"],
            "norms_share": private["norms_share"],
        }


def _load(network: str, mechanism: str) -> Workload:
    config = parse(
        compose_text(
            f"fleet=pi_lab network={network} model=vgg5 model.norm=group policy=auto "
            f"schedule=pipelined num_clients={DEVICES} client.batch_size=100 privacy={mechanism}"
        )
    )
    layers = layered_model(config, SHAPE, CLASSES)
    return run_workload(config, layers, machines_of(config, layers), [EXAMPLES] * DEVICES)


def _row(load: Workload) -> dict[str, float]:
    classic = [Assignment(load.units)] * DEVICES
    chosen = plan(load).choices
    seconds = {name: virtual_round(load, choices).seconds
               for name, choices in (("classic", classic), ("pipelined", chosen))}  # fmt: skip
    iterations = evaluate(load, chosen).iteration_s
    shares = [
        load.norms_s(device) / iterations[k] if chosen[k].cut < load.units else 0.0
        for k, device in enumerate(load.devices)
    ]
    return {
        "classic_s": seconds["classic"],
        "pipelined_s": seconds["pipelined"],
        "gain": seconds["classic"] / seconds["pipelined"],
        "norms_share": max(shares),
    }
