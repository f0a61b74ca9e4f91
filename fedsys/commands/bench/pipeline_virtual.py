"""Pipelined split training against classic federated learning, on the virtual clock.

PiPar reports up to 34.6 times less training time than classic federated learning (Zhang et al.,
JPDC 2024, abstract). What a ratio can be is decided by the machines: a device cannot be faster than
its own units before the earliest cut, nor than its uplink or its share of the edge. So each row has
the ratio, the most that these resources allow, and which of them decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

from fedsys.commands.bench import Chart
from fedsys.config import Config, compose_text, parse
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.hardware import machine_costs
from fedsys.planning.planner import plan
from fedsys.planning.resources import RESOURCES
from fedsys.planning.traces import network_of
from fedsys.planning.virtual_clock import virtual_round
from fedsys.planning.workload import Device, Menu, Workload, workload
from fedsys.training.federation import layered_model

DEFAULTS: Final[Mapping[str, Any]] = {
    "models": ["vgg5", "vgg11", "vgg16", "resnet18", "resnet50", "mobilenet_v3_large"],
    "networks": ["4g", "4g_plus", "wifi"],
    "machines": ["pi3", "pi4"],
    "servers": ["edge_cpu", "edge_gpu"],
    "codecs": ["fp32", "int8"],
    "devices": 4,
    "batch_size": 100,
    "examples": 2500,  # of each device: 10,000 images among four, as in PiPar's code
    "headline": 34.6,
}
SHAPE: Final = (3, 32, 32)
CLASSES: Final = 10
MOST_TURNS: Final = 3000  # played of a round; its other iterations take the mean of these


def run(_: Config | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plan and play all combinations.

    Args:
        options: Replaces entries of `DEFAULTS`; others are ignored.

    Returns:
        ``rows``: for each model, network, kind of device, edge server and codec the seconds of a
        round (``classic_s``, ``auto_s``, ``pipar_s``, ``splitfed_s``), their ``ratio``, that of
        iterations alone (``iteration_ratio``), the ``most`` that it can be, what decides that
        (``decided_by``), and the plan of the first device. ``most_ratio``: the largest ratio, with
        its row; ``above_headline``: rows above PiPar's 34.6.
    """
    chosen = {**DEFAULTS, **{k: v for k, v in options.items() if k in DEFAULTS and v is not None}}
    fleet = parse(compose_text("fleet=nominal")).fleet
    rows = []
    for name in chosen["models"]:
        layers = layered_model(parse(compose_text(f"model={name}")), SHAPE, CLASSES)
        costs = {
            machine: machine_costs(f"fleet.machines.{machine}", values, layers)
            for machine, values in fleet.machines.items()
        }
        for network in chosen["networks"]:
            link = network_of(parse(compose_text(f"network={network}")).network)
            for machine in chosen["machines"]:
                devices = [
                    Device(str(i), costs[machine], link, int(chosen["examples"]))
                    for i in range(int(chosen["devices"]))
                ]
                for server in chosen["servers"]:
                    for codec in chosen["codecs"]:
                        load = workload(
                            layers, devices, [costs[server]], int(chosen["batch_size"]),
                            codecs=[codec],
                        )  # fmt: skip
                        case = {"model": name, "network": network, "device": machine}
                        rows.append(case | {"edge": server, "codec": codec} | _row(load, layers))
    best = max(rows, key=lambda row: float(row["ratio"]))
    above = sum(row["ratio"] > chosen["headline"] for row in rows)
    return {
        "rows": rows,
        "headline": chosen["headline"],
        "most_ratio": best["ratio"],
        "most_ratio_of": " ".join(str(best[k]) for k in ("model", "network", "device", "edge")),
        "above_headline": above,
        "why": _why(rows, float(chosen["headline"])),
        "cases": len(rows),
    }


def _why(rows: Sequence[Mapping[str, Any]], headline: float) -> str:
    """Say in a sentence where the headline is exceeded and what keeps the others below."""
    above = [row for row in rows if row["ratio"] > headline]
    below: dict[str, int] = {}
    for row in rows:
        if row["ratio"] <= headline:
            below[row["decided_by"]] = below.get(row["decided_by"], 0) + 1
    least = min((row["classic_s"] / row["auto_s"] for row in above), default=0.0)
    where = ", ".join(sorted({f"{row['model']} on {row['device']}" for row in above})) or "nowhere"
    listed = ", ".join(f"{name}: {n}" for name, n in sorted(below.items(), key=lambda i: -i[1]))
    return (
        f"above {headline:g} in {len(above)} of {len(rows)} cases ({where}"
        f"{f'; least {least:.1f}' if above else ''}): weak devices, much work behind the first "
        f"cut, and a fast network or int8. Below it, what is busiest at the best cut: {listed}"
    )


def _row(load: Workload, layers: LayeredModel) -> dict[str, Any]:
    seconds, plans = {}, {}
    for method in ("classic", "splitfed", "pipar", "auto"):
        plans[method] = plan(load, method)
        seconds[f"{method}_s"] = virtual_round(load, plans[method].choices, most=MOST_TURNS).seconds
    choice = plans["auto"].choices[0]
    most, decided_by = most_possible(load, max(plans["classic"].iteration_s))
    whole = choice.cut == load.units
    return {
        **seconds,
        "ratio": seconds["classic_s"] / seconds["auto_s"],
        "iteration_ratio": max(plans["classic"].iteration_s) / max(plans["auto"].iteration_s),
        "most": most,
        "decided_by": decided_by,
        "cut": "all on the device" if whole else layers.units[choice.cut - 1].name,
        "micro_batches": choice.pieces,
        "device_share_at_first_cut": _share(layers),
    }


def _share(layers: LayeredModel) -> float:
    """Return the share of the work that no cut takes from the device."""
    first = layers.cuts[0] if layers.cuts else len(layers)
    whole = sum(unit.macs for unit in layers.units)
    return sum(unit.macs for unit in layers.units[:first]) / whole


def most_possible(load: Workload, classic_s: float) -> tuple[float, str]:
    """Return how many times faster than classic an iteration can be, and what decides that.

    No schedule is faster than the busiest of the four resources at the best cut, with all devices
    at one cut; fill, drain, latency and messages are left out.

    Args:
        load: What is trained, by devices of one kind on one edge server.
        classic_s: Seconds of an iteration on a device alone.
    """
    found: list[tuple[float, str]] = [(classic_s, "offloading does not pay")]
    device = load.devices[0]
    codec = load.codecs[0]
    for cut in load.cuts:
        s = Menu(load, [Assignment(cut, 0, codec, codec, 1)]).stages(device)
        forward, backward = device.costs.seconds(load.batch_size, 0, cut)
        edges = max(1.0, len(load.devices) / load.edges[0].workers)
        there = edges * sum(load.edges[0].seconds(load.batch_size, cut))
        busy = (forward + backward, float(s.up[0]), there, float(s.down[0]))
        found.append(max(zip(busy, RESOURCES.values(), strict=True), key=itemgetter(0)))
    best, name = min(found)
    return classic_s / best, name


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the ratios of all models at fp32, by network and kind of device, over one edge."""
    edge = figures["rows"][-1]["edge"]
    rows = [r for r in figures["rows"] if r["codec"] == "fp32" and r["edge"] == edge]
    labels = list(dict.fromkeys(str(row["model"]) for row in rows))
    kinds = list(dict.fromkeys((row["network"], row["device"]) for row in rows))
    series: dict[str, Sequence[float]] = {
        f"{network}, {device}": [
            next(
                (
                    row["ratio"]
                    for row in rows
                    if (row["model"], row["network"], row["device"]) == (label, network, device)
                ),
                float("nan"),
            )
            for label in labels
        ]
        for network, device in kinds
    }
    return Chart(
        f"Time of classic federated learning over ours (virtual, {edge}); PiPar reports up to 34.6",
        "model", "times faster", labels, series, log=True,
    )  # fmt: skip
