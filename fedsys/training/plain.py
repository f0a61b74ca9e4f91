"""Plain training and evaluation: the loops that everything else must equal.

One optimizer step works through the micro-batches of a mini-batch, adds their gradients up and
steps once. With one micro-batch it is the textbook loop. Offloaded, pipelined and migrated
training do the same operations in the same order on the same numbers, spread over machines; so
what can be done to parameters here (proximal term, clipping by the joint norm, schedules) is
written per parameter, in the order of names.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from traceback import walk_tb
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fedsys.errors import ConfigError, ModelError
from fedsys.randomness import Address, drawing, rows
from fedsys.training import optimizers
from fedsys.training.precision import autocast, for_loss
from fedsys.training.schedule import micro_batch_bounds
from fedsys.training.tasks import CLASSIFICATION, Loss, Task, loss_of
from fedsys.transport.several import Inputs, arguments

if TYPE_CHECKING:
    from fedsys.training.penalty import Penalty

T = TypeVar("T")

Batches = Iterable[tuple[Inputs, Tensor]]

Losses = Callable[[nn.Module, Inputs, Tensor, float], tuple[Tensor, Tensor]]
"""Makes scores, and `share` times their loss, of a model, inputs, labels and that share."""


@dataclass(frozen=True)
class Score:
    """Loss and hits over a number of examples.

    Attributes:
        loss: Mean per example; of classification the cross-entropy, in nats.
        accuracy: Mean of the task's metric over examples; of classification the share of those
            whose largest output is their label. A metric that is no mean is that of all examples of
            an evaluation, and NaN in training.
        examples: Number of examples.
        steps: Optimizer steps done; 0 for an evaluation.
    """

    loss: float
    accuracy: float
    examples: int
    steps: int = 0


def forward(model: nn.Module, x: Inputs, precision: str = "fp32") -> Tensor:
    """Return ``model(x)``, or what it makes of several inputs.

    Args:
        model: The whole, or a part.
        x: What enters it.
        precision: In which it computes, as ``client.precision``.

    Raises:
        ModelError: Names the BatchNorm that would have to take the variance of one value.
    """
    given = arguments(model, x)
    with autocast(precision, x):
        outputs: Tensor = explained(model, lambda: model(*given))
    return outputs


def explained(model: nn.Module, call: Callable[[], T]) -> T:
    """Return what `call` returns, which computes with `model`.

    Raises:
        ModelError: Names the BatchNorm that would have to take the variance of one value.
    """
    try:
        return call()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        names = {module: name for name, module in model.named_modules()}
        callers = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
        norm = next((m for m in callers if isinstance(m, _BatchNorm) and m in names), model)
        raise ModelError(
            f"{names[norm] or 'the model'} ({type(norm).__name__}): gets one value per channel, "
            "which has no variance, from a micro-batch of 1 example; raise "
            "client.batch_size or data.partition.min_examples, lower schedule.micro_batches, or "
            "choose model.norm=group"
        ) from error


def plain_losses(
    model: nn.Module, x: Inputs, labels: Tensor, share: float, loss: Loss = loss_of,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the scores of a model, and `share` times their loss."""
    outputs = for_loss(forward(model, x, precision), precision)
    return outputs, loss(outputs, labels, share)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    address: Address,
    *,
    first_step: int = 0,
    micro_batches: int = 1,
    clip_norm: float | None = None,
    anchor: Proximal | None = None,
    penalty: Penalty | None = None,
    losses: Losses | None = None,
    task: Task = CLASSIFICATION,
    precision: str = "fp32",
) -> Score:
    """Do one optimizer step for every mini-batch.

    Args:
        model: Trained in place, on the device of its parameters.
        optimizer: Over the parameters of `model`.
        batches: Pairs of inputs ``(batch, …)`` and labels ``(batch,)``.
        address: Seed, client and round, from which the model's draws follow.
        first_step: Index of the first mini-batch in the round.
        micro_batches: Pieces per mini-batch whose gradients are added up.
        clip_norm: Largest joint norm of the gradients; None for no clipping.
        anchor: FedProx's proximal term; None for none.
        penalty: On channels, so that they die; None for none.
        losses: What is made small; None: the loss of `task`.
        task: Tells the metric.
        precision: In which forwards and backwards compute, as ``client.precision``; not of
            `losses`.

    Returns:
        The score over all examples, as seen in training (before each step).

    Raises:
        ModelError: Names the BatchNorm that would have to take the variance of one value.
    """
    device = device_of(model)
    losses = losses or functools.partial(plain_losses, loss=task.loss, precision=precision)
    model.train()
    changed = anchor is not None or penalty is not None or clip_norm is not None
    named = dict(model.named_parameters()) if changed else {}  # a tenth of a tiny model's step
    tally, steps = RunningScore(task, device), 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        size = len(y)
        optimizers.forget_gradients(optimizer)
        with drawing(address, first_step + steps, size):
            for start, stop in micro_batch_bounds(size, micro_batches):
                with rows(start, stop):
                    whole = stop - start == size
                    labels = y if whole else y[start:stop]
                    inputs = x if whole else x[start:stop]
                    outputs, loss = losses(model, inputs, labels, (stop - start) / size)
                    if loss.requires_grad:  # else every parameter is frozen
                        loss.backward()  # type: ignore[no-untyped-call]  # no type in torch
                tally.add(outputs.detach(), labels, loss.detach(), size)
        if anchor is not None:
            anchor.add_to_gradients(named)
        if penalty is not None:
            penalty.add_to_gradients(named)
        if clip_norm is not None:
            clip_gradients(named, clip_norm, squared_norms(named))
        optimizers.step(optimizer)
        steps += 1
    return tally.score(steps)


class RunningScore:
    """Losses and metric of a round, added up in one go for many small mini-batches.

    Four operations for each mini-batch would be a tenth of a tiny model's step. The sums are those
    that adding at once gives, in the same order.

    Args:
        task: Tells the metric.
        device: Where outputs are.
    """

    MOST = 1 << 16
    """Outputs, in numbers, that are kept until they are looked at."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._hits = task, task.nothing(device)
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._held = self._examples = 0
        self._loss_sum = 0.0

    def add(self, outputs: Tensor, labels: Tensor, loss: Tensor, size: int) -> None:
        """Take in a piece: its outputs, and its share of the mean loss of `size` examples."""
        self._losses.append(loss)
        self._sizes.append(size)
        self._examples += len(labels)
        if not self._task.counts:  # sums of floats depend on how they are grouped
            self._hits += self._task.total(outputs, labels)
            outputs = labels = outputs[:0]
        self._waiting.append((outputs, labels))
        self._held += outputs.numel() + 1
        if self._held > self.MOST:
            self._look()

    def score(self, steps: int) -> Score:
        """Return the score over all examples; NaN for none."""
        if not self._examples:
            return Score(math.nan, math.nan, 0)
        self._look()
        n = self._examples
        return Score(self._loss_sum / n, self._hits.item() / n, n, steps)

    def _look(self) -> None:
        losses = torch.stack(self._losses)
        weighted = losses * torch.tensor(self._sizes, dtype=losses.dtype, device=losses.device)
        for value in weighted.tolist():
            self._loss_sum += value
        if self._task.counts:
            outputs, labels = zip(*self._waiting, strict=True)
            self._hits += self._task.total(torch.cat(outputs), torch.cat(labels))
        self._losses, self._sizes, self._waiting, self._held = [], [], [], 0


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, task: Task = CLASSIFICATION) -> Score:
    """Return the score of `model` in evaluation mode; NaN for no examples."""
    was_training = model.training
    model.eval()
    score = score_of(
        lambda x: model(*arguments(model, x)), batches, device_of(model), task
    )  # fmt: skip
    model.train(was_training)
    return score


@torch.inference_mode()
def score_of(
    outputs_of: Callable[[Inputs], Tensor],
    batches: Batches,
    device: torch.device,
    task: Task = CLASSIFICATION,
) -> Score:
    """Return the score of whatever computes outputs ``(batch, …)``; NaN for no examples.

    Args:
        outputs_of: Called with the inputs of each mini-batch, in order.
        batches: Pairs of inputs ``(batch, …)`` and labels ``(batch,)``.
        device: Where both are to be.
        task: Tells loss and metric.
    """
    loss_sum, examples = 0.0, 0
    hits: float = 0  # of whole numbers one of them
    kept: list[tuple[Tensor, Tensor]] = []
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        outputs = outputs_of(x)
        loss_sum += float(task.summed(outputs, y))
        if task.whole is None:
            hits += task.total(outputs, y).item()
        else:
            kept.append((outputs.cpu(), y.cpu()))
        examples += len(y)
    if not examples:
        return Score(math.nan, math.nan, 0)
    if task.whole is None:
        return Score(loss_sum / examples, hits / examples, examples)
    outputs, y = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return Score(loss_sum / examples, task.whole(outputs, y), examples)


# --------------------------------------------------------------------------------------------------
# What is done to gradients, per parameter


@dataclass(frozen=True)
class Proximal:
    """FedProx's proximal term mu/2 ‖w − w₀‖² (Li et al., MLSys 2020, equation 2), as a gradient.

    Attributes:
        mu: Weight of the term.
        start: The parameters at the start of the round, by name.
    """

    mu: float
    start: Mapping[str, Tensor]

    @classmethod
    def at(cls, model: nn.Module, mu: float) -> Proximal:
        """Anchor at the present parameters of `model`."""
        return cls(mu, {name: p.detach().clone() for name, p in model.named_parameters()})

    def add_to_gradients(self, named: Mapping[str, nn.Parameter]) -> None:
        """Add mu (w − w₀) to every gradient."""
        for name, p in named.items():
            if p.grad is not None:
                p.grad.add_(p.detach() - self.start[name], alpha=self.mu)


def squared_norms(named: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Return the squared L2 norm of each gradient, summed in float64."""
    return {
        name: float(p.grad.double().pow(2).sum()) for name, p in named.items() if p.grad is not None
    }


def clip_gradients(
    named: Mapping[str, nn.Parameter], clip_norm: float, norms: Mapping[str, float]
) -> float:
    """Scale all gradients so that their joint norm is at most `clip_norm`.

    Args:
        named: The parameters of this machine, by global name.
        clip_norm: The bound.
        norms: Squared norms by global name, of **all** parameters, wherever they are; added up
            in the order of names, so that every machine finds the same factor.

    Returns:
        The joint norm before clipping.
    """
    total = math.sqrt(sum(norms[name] for name in sorted(norms)))
    if total > clip_norm:
        for p in named.values():
            if p.grad is not None:
                p.grad.mul_(clip_norm / total)
    return total


def set_threads(threads: int) -> None:
    """Set the intra-op threads of this thread's operations: 1 and 2 threads give different bits."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU if there is none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def lay_out(module: nn.Module, memory_format: str) -> nn.Module:
    """Give the weights of `module` the layout of ``client.memory_format``, in place.

    A convolution computes, and writes its outputs, channels_last if its weight or its input is.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return module.to(memory_format=formats[memory_format])  # type: ignore[call-overload]


def pick_device(name: str) -> torch.device:
    """Return the device for ``client.device``: ``auto`` takes CUDA where there is one.

    Raises:
        ConfigError: ``cuda`` was asked for and is not available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError.of(
            "client.device", name, "no CUDA device is available", "use auto or cpu"
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")
