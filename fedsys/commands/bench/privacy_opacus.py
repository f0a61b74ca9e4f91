"""Record-level training beside Opacus: gradients of one mini-batch, and models at equal epsilon.

Sums are compared where both are computed in float64, which says whether they are the same; and in
float32 as a share of what is added up, as rounding is: the norms of all clipped gradients together.
"""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys import data, models
from fedsys.commands.bench.leakage_mechanisms import fit_record
from fedsys.commands.bench.leakage_models import accuracy_of
from fedsys.commands.bench.split import peak_rise
from fedsys.config import Config
from fedsys.config.targets import import_extra
from fedsys.data import Dataset
from fedsys.privacy.accountant import cached_noise
from fedsys.privacy.budget import epoch_steps, sampling_rate
from fedsys.privacy.gradients import ExampleGradients
from fedsys.privacy.update import summed_backward
from fedsys.randomness import Address, drawing, rows
from fedsys.training import federation, optimizers

CLIP_NORM = 1.0


def _vgg5(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    spec = {"_target_": "fedsys.models.vgg.vgg5", "norm": "group"}
    model = models.build(spec, input_shape=(3, 32, 32), num_classes=10, seed=0)
    x = torch.randn((examples, 3, 32, 32), generator=Address(0).torch("bench"))
    return model, x, torch.arange(examples) % 10


Step = Callable[[], list[Tensor]]


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return what computes clipped sums by `fedsys.privacy`."""
    examples = ExampleGradients([model], CLIP_NORM)

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
        sgd, noise_multiplier=0.0, max_grad_norm=CLIP_NORM, expected_batch_size=len(y)
    )

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        F.cross_entropy(hooked(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in hooked.parameters()]

    return step


SIDES: Mapping[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {"ours": ours, "opacus": theirs}


def gradients(options: Mapping[str, Any], rise: Callable[[str, int], float]) -> dict[str, Any]:
    """Return a step of both, side by side.

    Args:
        options: ``batch_size`` and ``turns``.
        rise: Returns the bytes that a step of a side takes, of a batch size; in its own process.

    Returns:
        Seconds of a step and their ratio, MB and their ratio; ``difference`` of the clipped sums of
        a parameter in float64, relative to it; ``rounding``, also of Opacus: of all of them in
        float32, as a share of the norms that are added up.
    """
    model, x, y = _vgg5(int(options["batch_size"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' hooks warn of inputs without gradient
        steps = {name: make(copy.deepcopy(model), x, y) for name, make in SIDES.items()}
        exact = {
            name: make(copy.deepcopy(model).double(), x.double(), y)()
            for name, make in SIDES.items()
        }
        sums = {name: step() for name, step in steps.items()}
        took: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(int(options["turns"])):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                took[name].append(time.perf_counter() - began)
    rises = {name: rise(name, len(y)) / 1e6 for name in SIDES}
    ratios = [b / a for a, b in zip(took["ours"], took["opacus"], strict=True)]
    return {
        "step_s": median(took["ours"]),
        "opacus_step_s": median(took["opacus"]),
        "speed": median(ratios),
        "rise_mb": rises["ours"],
        "opacus_rise_mb": rises["opacus"],
        "memory": rises["ours"] / rises["opacus"],
        "difference": _difference(exact["ours"], exact["opacus"]),
        "rounding": _rounding(sums["ours"], exact["opacus"], len(y)),
        "opacus_rounding": _rounding(sums["opacus"], exact["opacus"], len(y)),
        "batch_size": len(y),
    }


def _difference(sums: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest distance of a parameter's sum from the exact one, relative to it."""
    pairs = zip(sums, exact, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _rounding(sums: list[Tensor], exact: list[Tensor], examples: int) -> float:
    """Return the distance of all sums as a share of `examples` clipped gradients."""
    squares = [float((a.double() - b).square().sum()) for a, b in zip(sums, exact, strict=True)]
    return float(np.sqrt(sum(squares))) / (CLIP_NORM * examples)


def rise(side: str, examples: int) -> int:
    """Return by how many bytes the resident size rises in a step of one side."""
    model, x, y = _vgg5(examples)
    step = SIDES[side](model, x, y)
    x[:2].sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peak_rise(step)


# --------------------------------------------------------------------------------------------------
# Models


def accuracies(
    config: Config, options: Mapping[str, Any], delta: float
) -> Iterator[dict[str, float]]:
    """Yield the accuracies of both for each epsilon and seed: one model on the whole training part.

    Ours is trained by the plain loop, whose bits split training is held to by tests. Both have the
    same noise multiplier, rate and number of steps; samples and noise are each one's own.
    """
    dataset = federation.federation(config).dataset
    epochs, clip_norm = int(options["alone_epochs"]), config.privacy.clip_norm
    for epsilon in options["epsilons"]:
        for seed in range(int(options["alone_seeds"])):
            own = dataclasses.replace(config, seed=config.seed + seed)
            claimed = float(epsilon), delta
            ours_ = fit_record(own, dataset, epochs, claimed, clip_norm)(dataset.train, 0)
            theirs_ = _fit_opacus(own, dataset, epochs, claimed)
            yield {
                "epsilon": float(epsilon),
                "seed": own.seed,
                "accuracy": accuracy_of(ours_, dataset.test, dataset),
                "opacus_accuracy": accuracy_of(theirs_, dataset.test, dataset),
            }


def _fit_opacus(
    config: Config, dataset: Dataset, epochs: int, claimed: tuple[float, float]
) -> nn.Module:
    opacus = import_extra("opacus", "privacy", "fedsys bench privacy")
    model, client, count = (
        federation.build_model(config, dataset),
        config.client,
        len(dataset.train),
    )
    rate = sampling_rate(count, client.batch_size)
    steps = epochs * epoch_steps(count, client.batch_size)
    hooked = opacus.GradSampleModule(model, loss_reduction="sum")
    optimizer = opacus.optimizers.DPOptimizer(
        optimizers.make_optimizer(hooked.parameters(), client, client.lr),
        noise_multiplier=cached_noise(*claimed, rate, steps, "pld"),
        max_grad_norm=config.privacy.clip_norm,
        expected_batch_size=rate * count,
        generator=torch.Generator().manual_seed(config.seed),
    )
    address, drawn = Address(config.seed, 0, 1), _poisson(config.seed, steps, count, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, (x, y) in enumerate(data.drawn_batches(dataset.train, drawn, dataset, address)):
            optimizer.zero_grad()
            with drawing(address, step, len(y)), rows(0, len(y)):
                F.cross_entropy(hooked(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    trained: nn.Module = hooked._module
    return trained.eval()


def _poisson(seed: int, steps: int, count: int, rate: float) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield np.flatnonzero(rng.random(count) < rate).astype(np.int64)
