"""Training a model to answer without some of its units, and measuring how well it then does.

All exits are trained at once by the weighted sum of their losses (Teerapittayanon et al.,
"BranchyNet", ICPR 2016), and in a share of the mini-batches a run of units is left out, drawn by
the address of the step: ResiliNet's failout drops what one host computes (Yousefpour et al.,
"ResiliNet", IPSN 2020), stochastic depth single blocks (Huang et al., ECCV 2016). Which units one
host will compute is not known in training, so all runs up to a length are equally likely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsys.config.resilience import ResilienceConfig
from fedsys.models.exits import Run
from fedsys.models.resilient import ResilientModel
from fedsys.randomness import Address, drawn_for_rows
from fedsys.training import plain as training
from fedsys.training.tasks import loss_of


class _Scaled(torch.autograd.Function):
    """A tensor as it is; what leads back through it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


@dataclass(frozen=True)
class ExitLosses:
    """The loss of the final output, the weighted mean of those of the exits, and of adapters.

    With many exits the share of each in that mean is small, and small its step. So an exit may
    learn by a weight of its own while the backbone sees the mean (gradients are scaled where exits
    begin: Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019). And an
    adapter may learn in every mini-batch to make of what its unit gets what the unit makes of it
    (Romero et al., "FitNets", ICLR 2015): nothing of that leads back into the backbone.

    Attributes:
        weight: Of that mean.
        failures: Share of the mini-batches in which a run of units is left out.
        runs: Those that may be.
        head_weight: By which each exit itself learns; None: its share in the mean.
        match: Weight of how far adapters are from their units, relative to what units make.
    """

    weight: float
    failures: float
    runs: tuple[Run, ...]
    head_weight: float | None = None
    match: float = 0.0

    def __call__(
        self, model: nn.Module, x: Tensor, labels: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """Return the final scores ``(rows, classes)`` and `share` times the loss of the rows."""
        assert isinstance(model, ResilientModel)
        skipped = self.skipped(len(labels))
        own = self.weight / max(1, len(model.boundaries))
        step = own if self.head_weight is None else self.head_weight

        def outputs() -> tuple[dict[int, Tensor], Tensor | None]:
            there = model.tensors(x, skipped)
            if self.head_weight is None:
                found = model.scores_of(there)
            else:
                found = model.scores_of(there, lambda x: _Scaled.apply(x, own / step))
            return found, self._mismatch(model, there) if self.match else None

        found, mismatch = training.explained(model, outputs)
        final = found.pop(len(model.layers))
        loss = loss_of(final, labels, share)
        for scores in found.values():
            part = loss_of(scores, labels, share)
            shared = self.weight / len(found) if self.head_weight is None else step
            loss = loss + part * shared
        return final, loss if mismatch is None else loss + mismatch * (share * self.match)

    def _mismatch(self, model: ResilientModel, there: Mapping[int, Tensor]) -> Tensor | None:
        """Return the mean squared difference of adapters from units, over what units make.

        Where that is below 1 it does not count: a step would grow with its inverse, and adapters of
        units that make little (linear bottlenecks) would be thrown about, and all behind them.
        """
        total: Tensor | None = None
        for unit in model.adapted:
            if unit in there and unit + 1 in there:
                wanted = there[unit + 1].detach()
                made = model.adapters[str(unit)](there[unit].detach())
                size = wanted.square().mean().clamp_min(1.0)
                off = (made - wanted).square().mean() / size
                total = off if total is None else total + off
        return total

    def skipped(self, rows: int) -> Run | None:
        """Return the units that the step in work leaves out; the same for all of its pieces."""
        if not self.runs or not self.failures:
            return None

        def draw(address: Address, step: int, examples: int) -> Tensor:
            generator = address.numpy("failures", step)
            fails = generator.random() < self.failures
            run = int(generator.integers(len(self.runs)))
            return torch.full((examples,), run if fails else -1)

        drawn = int(drawn_for_rows("failures", draw)[0])
        return None if drawn < 0 else self.runs[drawn]


@contextmanager
def phase(
    model: nn.Module, resilience: ResilienceConfig, round_: int
) -> Iterator[training.Losses | None]:
    """Hold the backbone still in rounds that train exits alone; yield the losses of the round.

    Args:
        model: A `ResilientModel` if exits are trained; else anything.
        resilience: How they are.
        round_: The round, from 1.

    Yields:
        The losses; None for the plain one.
    """
    learns = resilience.training == "joint" or resilience.frozen(round_)
    if not learns or not isinstance(model, ResilientModel):
        yield None
        return
    runs = model.skips(resilience.longest)
    if resilience.match and resilience.frozen(round_):  # no other run has anything that learns
        runs = tuple(run for run in runs if model.steps(*run))
    losses = ExitLosses(
        resilience.exit_weight, resilience.failures, runs, resilience.head_weight, resilience.match
    )
    if not resilience.frozen(round_):
        yield losses
        return
    model.freeze(True)
    try:
        yield losses
    finally:
        model.freeze(False)  # the model serves other messages, too


# --------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class ExitScore:
    """What an exit does.

    Attributes:
        after: Units before it.
        accuracy: Share of right answers on the validation part.
        macs: Multiply-accumulates of its path for one image.
    """

    after: int
    accuracy: float
    macs: int


@dataclass(frozen=True)
class SkipScore:
    """What the model does without some units.

    Attributes:
        units: First one that is left out, and the one behind the last.
        accuracy: Share of right answers on the validation part.
        macs: Multiply-accumulates of its path for one image.
    """

    units: Run
    accuracy: float
    macs: int


@dataclass(frozen=True)
class PathScores:
    """What was measured of a model on one set of images.

    Attributes:
        accuracy: With all units.
        macs: With all units.
        exits: By boundary.
        skips: By their first unit.
        examples: Images.
    """

    accuracy: float
    macs: int
    exits: tuple[ExitScore, ...]
    skips: tuple[SkipScore, ...]
    examples: int

    def figures(self) -> dict[str, Any]:
        """Return exits and skips for the result of a run."""
        return {
            "exits": [vars(each) for each in self.exits],
            "skips": [vars(each) | {"units": list(each.units)} for each in self.skips],
        }


@torch.inference_mode()
def measure(model: ResilientModel, batches: training.Batches, longest: int) -> PathScores:
    """Measure every exit, and every skip up to a length; what paths share is computed once.

    Args:
        model: Put into evaluation.
        batches: Images and labels of a part that nothing was trained on.
        longest: Units of a skip at most.
    """
    was_training, device = model.training, training.device_of(model)
    model.eval()
    runs, units = model.skips(longest), len(model.layers)
    hits: dict[int | Run, int] = dict.fromkeys((*model.boundaries, units, *runs), 0)
    examples = 0
    for x, y in batches:
        z, labels = [x.to(device)], y.to(device)
        for unit in range(units):
            z.append(model.unit(unit, z[-1]))
        scores: dict[int | Run, Tensor] = {units: z[-1]}
        for boundary in model.boundaries:
            scores[boundary] = model.exits[str(boundary)](z[boundary])
        for first, last in runs:
            out = model.past(z[first], first, last)
            for unit in range(last, units):
                out = model.unit(unit, out)
            scores[first, last] = out
        for key, outputs in scores.items():
            hits[key] += int((outputs.argmax(1) == labels).sum())
        examples += len(y)
    model.train(was_training)
    share = {key: count / max(1, examples) for key, count in hits.items()}
    exits = [ExitScore(b, share[b], path_macs(model, b)) for b in model.boundaries]
    skips = [SkipScore(run, share[run], path_macs(model, run)) for run in runs]
    total = sum(unit.macs for unit in model.layers.units)
    return PathScores(share[units], total, tuple(exits), tuple(skips), examples)


def path_macs(model: ResilientModel, path: int | Run) -> int:
    """Return the multiply-accumulates of an exit's path, or of a skip's, for one image."""
    units = model.layers.units
    if isinstance(path, int):
        head = sum(m.in_features * m.out_features for m in model.exits[str(path)].modules()
                   if isinstance(m, nn.Linear))  # fmt: skip
        return sum(unit.macs for unit in units[:path]) + head
    first, last = path
    kept = sum(unit.macs for unit in (*units[:first], *units[last:]))
    return kept + sum(_adapter_macs(model, unit) for unit in model.steps(first, last))


def _adapter_macs(model: ResilientModel, unit: int) -> int:
    total, shape = 0, model.layers.units[unit].out_shape
    for module in model.adapters[str(unit)].modules():
        if isinstance(module, nn.Conv2d):
            total += module.in_channels * module.out_channels * shape[1] * shape[2]
        elif isinstance(module, nn.Linear):
            total += module.in_features * module.out_features
    return total
