"""What the device half of an iteration costs with fused kernels, beside torch's layers.

Two tables, measured in turns. ``units``: forward and backward of the units alone, in this process,
and how far the gradient of the first weight is from that of float64. ``devices``: the processor
time of a device's process for an iteration, with an edge server in another process, no waiting and
no shaped link.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.commands.bench.pipeline_cpu import device_cpu_s, front_of, once
from fedsys.commands.bench.rounds import edge_process
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.models.fused import built
from fedsys.training import plain as training

KINDS = (("plain", "contiguous"), ("plain", "channels_last"), ("fused", "contiguous"))
"""Kernels and memory formats that are compared."""

Key = tuple[str, str, int]


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure in turns.

    Args:
        config: Data, model and client.
        options: ``cut``, ``micro_batches`` (a list), ``codec``, ``turns`` of the units and
            ``rounds`` of the devices (0 for none), each of ``steps`` iterations.

    Returns:
        ``units`` and ``devices``: for each kind and number of pieces the median seconds, and what
        share they are of those of torch's layers, contiguous; by what the kernels were built.

    Raises:
        RuntimeFailure: There are no kernels here.
    """
    if built().library is None:
        raise RuntimeFailure(f"bench kernels: there are none to measure: {built().detail}")
    training.set_threads(config.client.threads)
    configs = {kind: _with(config, *kind) for kind in KINDS}
    pieces = [int(count) for count in options["micro_batches"]]
    return {
        "compiler": built().detail,
        "cut": int(options["cut"]),
        "codec": str(options["codec"]),
        "batch_size": config.client.batch_size,
        "threads": config.client.threads,
        "units": _rows(_units(configs, options, pieces)) if options["turns"] else [],
        "devices": _rows(_devices(configs, options, pieces)) if options["rounds"] else [],
        "gradient_errors": _errors(configs, int(options["cut"])),
    }


def _with(config: Config, kernels: str, memory_format: str) -> Config:
    client = {"kernels": kernels, "memory_format": memory_format}
    return configuration.parse(configuration.with_values(config.text, client=client))


def _rows(took: Mapping[Key, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for (kernels, memory_format, count), seconds in took.items():
        base = took["plain", "contiguous", count]
        shares = [a / b for a, b in zip(seconds, base, strict=True)]
        rows.append(
            {
                "kernels": kernels,
                "memory_format": memory_format,
                "micro_batches": count,
                "cpu_s": median(seconds),
                "of_plain": median(shares),
            }
        )
    return rows


def _units(
    configs: Mapping[tuple[str, str], Config], options: Mapping[str, Any], pieces: list[int]
) -> dict[Key, list[float]]:
    fronts = {kind: front_of(config, int(options["cut"])) for kind, config in configs.items()}
    found: dict[Key, list[float]] = {(*kind, count): [] for count in pieces for kind in KINDS}
    for turn in range(2 + int(options["turns"])):
        for kernels, memory_format, count in found:
            seconds = once(*fronts[kernels, memory_format], count)
            if turn >= 2:
                found[kernels, memory_format, count].append(seconds)
    return found


def _devices(
    configs: Mapping[tuple[str, str], Config], options: Mapping[str, Any], pieces: list[int]
) -> dict[Key, list[float]]:
    found: dict[Key, list[float]] = {(*kind, count): [] for count in pieces for kind in KINDS}
    steps, cut, codec = int(options["steps"]), int(options["cut"]), str(options["codec"])
    with edge_process() as edge:
        for turn in range(1 + int(options["rounds"])):  # the first one warms up
            for (kernels, memory_format, count), seconds in found.items():
                config = configs[kernels, memory_format]
                folder = Path(str(config.run.dir)) / f"{turn}-{kernels}-{memory_format}"
                told = device_cpu_s(config, edge, folder, cut, count, steps=steps, codec=codec)
                if turn:
                    seconds.append(told)
    return found


def _errors(configs: Mapping[tuple[str, str], Config], cut: int) -> list[dict[str, Any]]:
    """Return how far gradients of the first weight are from those of float64, over their norm."""
    rows = []
    for (kernels, memory_format), config in configs.items():
        gradients = []
        for exact in (False, True):
            front, x, gradient = front_of(config, cut)
            if exact:
                front, x, gradient = front.double(), x.double(), gradient.double()
            front(x).backward(gradient)
            gradients.append(next(front.parameters()).grad)
        got, true = (torch.as_tensor(each).double() for each in gradients)
        error = float((got - true).norm() / true.norm())
        rows.append({"kernels": kernels, "memory_format": memory_format, "error": error})
    return rows


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return processor time by kind and number of pieces."""
    rows = figures["devices"] or figures["units"]
    names = dict.fromkeys(f"{row['kernels']}, {row['memory_format']}" for row in rows)
    counts = dict.fromkeys(row["micro_batches"] for row in rows)
    return Chart(
        "Processor time of the device half of an iteration",
        "pieces of a mini-batch",
        "seconds",
        [str(count) for count in counts],
        {
            name: [
                row["cpu_s"] for row in rows
                if f"{row['kernels']}, {row['memory_format']}" == name
            ]
            for name in names
        },
    )  # fmt: skip
