"""What privacy by example costs, beside training without it and beside Opacus.

Each cell is a run in a process of its own: classic training or pipelined split training, without a
promise or with one to each example at some epsilon. Gradients of one mini-batch are computed in
turns by `fedsys.privacy` and by the hooks of Opacus, on the same VGG-5 with GroupNorm, and the
memory of each in a process of its own: how far its resident size rises in one step.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys import config as configuration
from fedsys import models, runtime
from fedsys.commands.bench import Chart
from fedsys.commands.bench.split import peak_rise
from fedsys.config import Config
from fedsys.config.targets import import_extra
from fedsys.errors import RuntimeFailure
from fedsys.privacy.accountant import Releases, epsilon
from fedsys.privacy.gradients import ExampleGradients
from fedsys.privacy.update import summed_backward
from fedsys.randomness import Address
from fedsys.runs.folder import RunFolder
from fedsys.training import plain as training

DELTA = 1e-5
GRID = ((1.0, 0.01, 1000), (0.8, 0.2, 100), (2.0, 0.05, 500), (4.0, 1.0, 20))
"""Noise, rate and releases that accountants are compared on."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure cells, gradients and accountants.

    Args:
        config: Data, model, clients and rounds of the cells.
        options: Those of ``conf/bench/privacy.yaml``.

    Returns:
        ``cells``: method, mechanism, epsilon of the budget, accuracy on the test part, seconds of
        an iteration, peak resident size in MB (10^6 bytes), and what was spent. ``gradients``: a
        step beside Opacus', ratio of times and of memory, and the largest relative difference of
        a parameter's clipped sum. ``accountants``: epsilons by name.

    Raises:
        RuntimeFailure: A process failed.
        ModelError: Opacus or dp-accounting is not installed.
    """
    training.set_threads(config.client.threads)
    return {
        "gradients": _gradients(config, options),
        "accountants": list(_accountants()),
        "cells": list(_cells(config, options)),
    }


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the accuracies of the cells as a chart."""
    cells = figures["cells"]
    labels = list(dict.fromkeys(_promise(cell) for cell in cells))
    series = {
        method: [
            next(c["accuracy"] for c in cells if (c["method"], _promise(c)) == (method, label))
            for label in labels
        ]
        for method in dict.fromkeys(cell["method"] for cell in cells)
    }
    return Chart("Accuracy by epsilon", "promise", "accuracy on the test part", labels, series)


def _promise(cell: Mapping[str, Any]) -> str:
    return f"{cell['mechanism']} {cell['epsilon']:g}" if cell["epsilon"] else cell["mechanism"]


# --------------------------------------------------------------------------------------------------
# Runs


def _cells(config: Config, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cut, pieces = options["cut"], int(options["micro_batches"])
    methods: dict[str, dict[str, Any]] = {
        "classic": {"policy": {"kind": "none"}},
        "pipelined": {
            "policy": {"kind": "fixed", "cut": cut, "codec": "fp32", "micro_batches": None},
            "schedule": {"kind": "pipelined", "micro_batches": pieces},
        },
    }
    promises: list[tuple[str, float | None]] = [("none", None)]
    promises += [("record", float(budget)) for budget in options["epsilons"]]
    for method, how in methods.items():
        for mechanism, budget in promises:
            privacy = {"mechanism": mechanism, **({"epsilon": budget} if budget else {})}
            found = [
                _cell(config, {**how, "privacy": privacy, "seed": config.seed + seed})
                for seed in range(int(options["seeds"]))
            ]
            means = {key: fmean(f[key] for f in found) for key in found[0]}
            yield {"method": method, "mechanism": mechanism, "epsilon": budget, **means}


def _cell(config: Config, values: Mapping[str, Any]) -> dict[str, float]:
    """Carry a run out in a process of its own."""
    text = configuration.with_values(
        config.text, **values, json=False, bench={}, resume=None,
        run={"dir": f"{config.run.dir}/{time.monotonic_ns()}", "plots": False, "oracle": False},
    )  # fmt: skip
    found: dict[str, float] = _in_process("run", text)
    return found


def _in_process(what: str, text: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "fedsys.commands.bench.privacy", what],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word of it"]
        raise RuntimeFailure(f"a process of the benchmark failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _carried_out(text: str) -> dict[str, float]:
    config = configuration.parse(text)
    peak = peak_rise(lambda: runtime.run(config))
    folder = RunFolder.open(Path(str(config.run.dir)))
    result, rows = folder.info["result"], folder.rounds()
    taken = [float(row["seconds_train"]) / float(row["steps"]) for row in rows[1:] or rows]
    return {
        "accuracy": float(result["accuracy"]),
        "iteration_s": median(taken),
        "peak_mb": peak / 1e6,
        "spent_epsilon": float(result.get("epsilon", 0.0)),
    }


# --------------------------------------------------------------------------------------------------
# Gradients


def _vgg5(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    spec = {"_target_": "fedsys.models.vgg.vgg5", "norm": "group"}
    model = models.build(spec, input_shape=(3, 32, 32), num_classes=10, seed=0)
    x = torch.randn((examples, 3, 32, 32), generator=Address(0).torch("bench"))
    return model, x, torch.arange(examples) % 10


Step = Callable[[], list[Tensor]]


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return what computes clipped sums by `fedsys.privacy`."""
    examples = ExampleGradients([model], 1.0)

    def step() -> list[Tensor]:
        examples.begin()
        with examples.recording(0, len(y)):
            summed_backward(model(x), y)
        examples.finish(examples.squares())
        return [p.grad for p in model.parameters() if p.grad is not None]

    return step


def theirs(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return what computes clipped sums by the hooks of Opacus."""
    opacus = import_extra("opacus", "privacy", "fedsys bench privacy")
    hooked = opacus.GradSampleModule(model, loss_reduction="sum")
    sgd = torch.optim.SGD(hooked.parameters(), 0.0)
    optimizer = opacus.optimizers.DPOptimizer(
        sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=len(y)
    )

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        F.cross_entropy(hooked(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in hooked.parameters()]

    return step


SIDES: Mapping[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {"ours": ours, "opacus": theirs}


def _gradients(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    model, x, y = _vgg5(int(options["batch_size"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' hooks warn of inputs without gradient
        steps = {name: make(copy.deepcopy(model), x, y) for name, make in SIDES.items()}
        exact = theirs(copy.deepcopy(model).double(), x.double(), y)()
        sums = {name: step() for name, step in steps.items()}
        took: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(int(options["turns"])):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                took[name].append(time.perf_counter() - began)
    rises = {name: _in_process(name, str(len(y))) / 1e6 for name in SIDES}
    ratios = [b / a for a, b in zip(took["ours"], took["opacus"], strict=True)]
    return {
        "step_s": median(took["ours"]),
        "opacus_step_s": median(took["opacus"]),
        "speed": median(ratios),
        "rise_mb": rises["ours"],
        "opacus_rise_mb": rises["opacus"],
        "memory": rises["ours"] / rises["opacus"],
        "difference": _apart(sums["ours"], exact),
        "opacus_difference": _apart(sums["opacus"], exact),
        "batch_size": len(y),
    }


def _apart(sums: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest distance of a parameter's sum from that in float64, relative to it."""
    pairs = zip(sums, exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _rise(side: str, examples: int) -> int:
    model, x, y = _vgg5(examples)
    step = SIDES[side](model, x, y)
    x[:2].sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peak_rise(step)


# --------------------------------------------------------------------------------------------------
# Accountants


def _accountants() -> Iterator[dict[str, float]]:
    library = import_extra("dp_accounting", "privacy", "fedsys bench privacy")
    pld = import_extra("dp_accounting.pld", "privacy", "fedsys bench privacy")
    for noise, rate, count in GRID:
        event = library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise))
        reference = pld.PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE)
        reference.compose(event, count)
        releases = [Releases(noise, rate, count)]
        found = {name: epsilon(releases, DELTA, name) for name in ("pld", "rdp", "prv")}
        yield {
            "noise": noise, "rate": rate, "count": count,
            **found, "dp_accounting_pld": float(reference.get_epsilon(DELTA)),
        }  # fmt: skip


if __name__ == "__main__":
    told = sys.argv[1]
    if told == "run":
        print(json.dumps(_carried_out(sys.stdin.read())))
    else:
        print(json.dumps(_rise(told, int(sys.stdin.read()))))
