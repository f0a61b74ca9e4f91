"""How long `auto` plans, and how near it comes to the optimum.

Nothing is trained: the machines are those of `fleet`, as many as a row says, in the order in which
the fleet names them. Where a row has few devices the exhaustive planner stands beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import product
from statistics import median
from typing import Any

from fedsys.commands.bench import Chart
from fedsys.commands.bench.pipeline_virtual import CLASSES, SHAPE
from fedsys.config import Config, compose_text, parse
from fedsys.models.layers import LayeredModel
from fedsys.planning.options import machines_of
from fedsys.planning.planner import plan
from fedsys.planning.traces import network_of
from fedsys.planning.workload import Device, Workload, workload
from fedsys.training.federation import layered_model


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plan all combinations.

    Args:
        config: The fleet, and the size of a mini-batch.
        options: ``models``, ``networks``, ``devices`` (numbers), ``edges`` (numbers), ``workers``
            (sessions that each edge computes at a time; null: those of the fleet), ``codecs``
            (lists), ``examples`` of each device, ``repeats``, and ``exhaustive``: up to how many
            devices the optimum is searched for.

    Returns:
        ``rows``: for each combination the model's ``units``, milliseconds of planning by the clock
        (``ms``, the median, ``least_ms``, ``most_ms``), seconds of the round that the model
        predicts (``auto_s``, ``classic_s``), and where there are few devices ``exhaustive_s`` and
        ``over``, how many times that ``auto_s`` is; ``how`` the last of these planners searched.
        ``slowest_ms`` and ``worst_over``: the largest of each.

    Raises:
        ConfigError: The fleet names no machines.
    """
    rows = [
        _row(load, options, case)
        for name in options["models"]
        for load, case in _loads(config, options, str(name))
    ]
    return {
        "rows": rows,
        "slowest_ms": max(row["ms"] for row in rows),
        "worst_over": max((row["over"] for row in rows if row["over"] is not None), default=None),
        "repeats": int(options["repeats"]),
    }


def _loads(
    config: Config, options: Mapping[str, Any], model: str
) -> Iterator[tuple[Workload, dict[str, Any]]]:
    layers: LayeredModel = layered_model(parse(compose_text(f"model={model}")), SHAPE, CLASSES)
    machines = machines_of(config, layers)
    for network, codecs in product(options["networks"], options["codecs"]):
        link = network_of(parse(compose_text(f"network={network}")).network)
        for count, edges, workers in product(
            options["devices"], options["edges"], options["workers"]
        ):
            devices = [
                Device(
                    f"client {k}",
                    machines.devices[k % len(machines.devices)],
                    link,
                    int(options["examples"]),
                )
                for k in range(int(count))
            ]
            # One object for each kind: by it the planner sees which edge servers are alike
            kinds = [
                edge if workers is None else dataclasses.replace(edge, workers=int(workers))
                for edge in machines.edges
            ]
            servers = [kinds[k % len(kinds)] for k in range(int(edges))]
            load = workload(
                layers, devices, servers, config.client.batch_size, codecs=tuple(codecs)
            )
            yield (
                load,
                {
                    "model": model,
                    "units": len(layers),
                    "network": str(network),
                    "codecs": "+".join(codecs),
                    "devices": int(count),
                    "edges": int(edges),
                    "workers": max(edge.workers for edge in servers),
                },
            )


def _row(load: Workload, options: Mapping[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    plans = [plan(load) for _ in range(max(1, int(options["repeats"])))]
    took = sorted(1e3 * made.planned_s for made in plans)
    row: dict[str, Any] = {
        **case,
        "ms": median(took),
        "least_ms": took[0],
        "most_ms": took[-1],
        "auto_s": plans[0].seconds,
        "classic_s": plan(load, "classic").seconds,
        "exhaustive_s": None,
        "over": None,
        "how": plans[0].how,
    }
    if case["devices"] <= int(options["exhaustive"]):
        best = plan(load, "exhaustive")
        row |= {
            "exhaustive_s": best.seconds,
            "over": plans[0].seconds / best.seconds,
            "how": best.how,
        }
    return row


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the milliseconds of the largest numbers of devices, by model and edge servers."""
    most = max(row["devices"] for row in figures["rows"])
    rows = [row for row in figures["rows"] if row["devices"] == most]
    models = list(dict.fromkeys(row["model"] for row in rows))
    edges = sorted({row["edges"] for row in rows})

    def slowest(model: str, count: int) -> float:
        return max(float(r["ms"]) for r in rows if (r["model"], r["edges"]) == (model, count))

    return Chart(
        f"Planning for {most} devices: at most {figures['slowest_ms']:.0f} ms",
        "model",
        "milliseconds of the slowest case",
        models,
        {f"edge servers: {count}": [slowest(model, count) for model in models] for count in edges},
    )
