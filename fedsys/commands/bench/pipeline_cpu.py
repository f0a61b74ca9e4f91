"""What a device computes beside its units: processor time of an iteration against the bare units.

One device trains with an edge server in another process, with no waiting and no shaped link, for
some cuts and numbers of micro-batches. Beside it stands the forward and backward of the same units
alone, on whole mini-batches and in as many pieces, in this process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from fedsys.commands.bench.rounds import EdgeProcess, watched_round
from fedsys.config import Config
from fedsys.randomness import Address, drawing, rows
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import layers_of
from fedsys.training.part import filled_stages, names_between
from fedsys.training.schedule import micro_batch_bounds


def measured(
    config: Config, options: Mapping[str, Any], edge: EdgeProcess, folder: Path
) -> list[dict[str, Any]]:
    """Return a row for each cut and number of micro-batches.

    Args:
        config: Data, model and client.
        options: ``cpu_cuts``, ``cpu_micro_batches``, ``cpu_steps``.
        edge: The edge server.
        folder: For the run folders.

    Returns:
        ``cut``, ``micro_batches``; seconds of an iteration ``device_cpu_s`` of the device's
        process, ``units_cpu_s`` of the units on whole mini-batches and ``units_pieces_cpu_s`` in
        pieces; ``ratio`` of the first to the second, and ``by_fewest``, the first to that with the
        fewest micro-batches.
    """
    found: list[dict[str, Any]] = []
    steps = int(options["cpu_steps"])
    if options["cpu_cuts"]:  # what is done once in a process belongs to no setting
        first = int(options["cpu_cuts"][0])
        device_cpu_s(config, edge, folder / "cpu-first", first, 1, steps=2)
    for cut in options["cpu_cuts"]:
        fewest = 0.0
        for count in options["cpu_micro_batches"]:
            device = device_cpu_s(config, edge, folder, int(cut), int(count), steps=steps)
            fewest = fewest or device
            whole = _units(config, int(cut), 1)
            found.append(
                {
                    "cut": cut,
                    "micro_batches": count,
                    "device_cpu_s": device,
                    "units_cpu_s": whole,
                    "units_pieces_cpu_s": _units(config, int(cut), int(count)),
                    "ratio": device / whole,
                    "by_fewest": device / fewest,
                }
            )
    return found


def device_cpu_s(
    config: Config,
    edge: EdgeProcess,
    folder: Path,
    cut: int,
    count: int,
    *,
    steps: int,
    codec: str = "fp32",
) -> float:
    """Return the processor time of a device's process for an iteration.

    Args:
        config: Data, model and client.
        edge: The edge server.
        folder: For the run folder.
        cut: First unit of the edge.
        count: Pieces of a mini-batch.
        steps: Iterations.
        codec: Of what crosses the cut.
    """
    size = config.client.batch_size
    part = 1.0 - float(config.data.get("validation", 0.0) or 0.0)
    key = "max_examples" if config.data.get("source") != "synthetic" else "examples"
    watch, _ = watched_round(
        config,
        edge,
        num_clients=1,
        run={"dir": str(folder / f"cpu-{cut}-{count}"), "plots": False},
        data={key: round(size * steps / part)},
        policy={"kind": "fixed", "cut": cut, "codec": codec, "micro_batches": count},
        schedule={"kind": "pipelined"},
    )
    return watch.device_cpu_s / max(1, watch.steps)


def _units(config: Config, cut: int, count: int, repeats: int = 15) -> float:
    """Return the median processor time of forward and backward of the first units."""
    training.set_threads(config.client.threads)
    front, x, gradient = front_of(config, cut)
    return median(once(front, x, gradient, count) for _ in range(repeats))


def front_of(config: Config, cut: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return the first units with a mini-batch of inputs and a gradient of what leaves them."""
    fed = federation.federation(config)
    layers = layers_of(config, fed.dataset)
    state = federation.build_model(config, fed.dataset).state_dict()
    bounds = [cut, len(layers)]
    own = {name: state[name] for name in names_between(layers, bounds)[0]}
    client, cpu = config.client, torch.device("cpu")
    (front,) = filled_stages(
        layers, bounds, [0], own, cpu, client.memory_format, kernels=client.kernels
    )
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn((client.batch_size, *fed.dataset.input_shape), generator=drawn)
    return front, x, torch.randn(front(x).shape, generator=drawn)


def once(front: nn.Module, x: torch.Tensor, gradient: torch.Tensor, count: int) -> float:
    """Return the processor time of one forward and backward, in a number of pieces."""
    front.zero_grad(set_to_none=True)
    began = time.thread_time()
    with drawing(Address(0, 0, 1), 0, len(x)):
        held = []
        for start, stop in micro_batch_bounds(len(x), count):
            with rows(start, stop):
                held.append((front(x[start:stop]), gradient[start:stop]))
        for z, g in held:
            z.backward(g)  # type: ignore[no-untyped-call]  # torch has no type for it
    return time.thread_time() - began
