"""Plain training and evaluation: the loops that everything else must equal.

One optimizer step works through the micro-batches of a mini-batch, adds their gradients up and
steps once. With one micro-batch it is the textbook loop. Offloaded, pipelined and migrated
training do the same operations in the same order on the same numbers, spread over machines; so
what can be done to parameters here (proximal term, clipping by the joint norm, schedules) is
written per parameter, in the order of names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fedsys.config import ClientConfig, LearningRate
from fedsys.errors import ConfigError, ModelError, did_you_mean
from fedsys.randomness import Address, drawing, rows

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Score:
    """Loss and hits over a number of examples.

    Attributes:
        loss: Mean cross-entropy per example, in nats.
        accuracy: Share of examples whose largest output is their label.
        examples: Number of examples.
        steps: Optimizer steps done; 0 for an evaluation.
    """

    loss: float
    accuracy: float
    examples: int
    steps: int = 0


def pieces(batch_size: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """Yield the rows ``[start, stop)`` of each micro-batch.

    Sizes differ by one at most, larger ones first; a mini-batch with fewer examples than
    `micro_batches` gives one example to each.

    >>> list(pieces(10, 4))
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    >>> list(pieces(2, 4))
    [(0, 1), (1, 2)]
    """
    count = min(batch_size, micro_batches)
    size, larger = divmod(batch_size, count)
    start = 0
    for i in range(count):
        stop = start + size + (i < larger)
        yield start, stop
        start = stop


def loss_of(outputs: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return `weight` times the mean cross-entropy of ``(rows, classes)`` outputs.

    With ``weight = rows / batch_size`` the losses of the micro-batches add up to the mean over
    the mini-batch, so their gradients add up to its gradient.
    """
    loss = F.cross_entropy(outputs, labels)
    return loss if weight == 1.0 else loss * weight


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

    Returns:
        The score over all examples, as seen in training (before each step).
    """
    device = device_of(model)
    model.train()
    named = dict(model.named_parameters())
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    examples = steps = 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        size = len(y)
        optimizer.zero_grad(set_to_none=True)
        with drawing(address, first_step + steps, size):
            for start, stop in pieces(size, micro_batches):
                with rows(start, stop):
                    whole = stop - start == size
                    outputs = model(x if whole else x[start:stop])
                    labels = y if whole else y[start:stop]
                    loss = loss_of(outputs, labels, (stop - start) / size)
                    loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
                loss_sum += loss.detach() * size
                hits += (outputs.detach().argmax(1) == labels).sum()
        if anchor is not None:
            anchor.add_to_gradients(named)
        if clip_norm is not None:
            clip_gradients(named, clip_norm, squared_norms(named))
        optimizer.step()
        examples += size
        steps += 1
    if not examples:
        return Score(math.nan, math.nan, 0)
    return Score(float(loss_sum) / examples, int(hits) / examples, examples, steps)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches) -> Score:
    """Return the score of `model` in evaluation mode; NaN for no examples."""
    device = device_of(model)
    was_training = model.training
    model.eval()
    loss_sum, hits, examples = 0.0, 0, 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        outputs = model(x)
        loss_sum += float(F.cross_entropy(outputs, y, reduction="sum"))
        hits += int((outputs.argmax(1) == y).sum())
        examples += len(y)
    model.train(was_training)
    if not examples:
        return Score(math.nan, math.nan, 0)
    return Score(loss_sum / examples, hits / examples, examples)


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


# --------------------------------------------------------------------------------------------------
# Optimizers and learning rates


def learning_rate(base: float, schedule: LearningRate, round_: int, rounds: int) -> float:
    """Return the learning rate of a round.

    Args:
        base: ``client.lr``.
        schedule: ``client.lr_schedule``.
        round_: The round, from 1.
        rounds: Rounds in all.
    """
    if round_ <= schedule.warmup:
        return base * round_ / (schedule.warmup + 1)
    if schedule.kind == "step":
        return base * schedule.gamma ** sum(round_ > m for m in schedule.milestones)
    if schedule.kind == "exponential":
        return base * float(schedule.gamma ** (round_ - 1))
    if schedule.kind == "cosine":
        progress = (round_ - 1 - schedule.warmup) / max(1, rounds - 1 - schedule.warmup)
        share = 0.5 * (1 + math.cos(math.pi * progress))
        return base * (schedule.final + (1 - schedule.final) * share)
    return base


def make_optimizer(
    parameters: Iterable[nn.Parameter], client: ClientConfig, lr: float
) -> Optimizer:
    """Return the optimizer that the configuration names.

    ``client.momentum`` and ``client.weight_decay`` are passed on where the optimizer has them.

    Raises:
        ConfigError: No such optimizer, or one of its arguments does not fit.
    """
    known: dict[str, Callable[..., Optimizer]] = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    kind = known.get(client.optimizer.lower())
    if kind is None or client.optimizer.lower() == "lbfgs":
        hint = did_you_mean(client.optimizer, known)
        raise ConfigError.of(
            "client.optimizer",
            client.optimizer,
            "must name an optimizer of torch.optim that works on single parameters",
            f"{hint}known are {', '.join(sorted(known.keys() - {'lbfgs'}))}",
        )
    accepted = inspect.signature(kind).parameters
    common = {"lr": lr, "momentum": client.momentum, "weight_decay": client.weight_decay}
    arguments: dict[str, Any] = {k: v for k, v in common.items() if k in accepted}
    try:
        return kind(list(parameters), **(arguments | client.optimizer_args))
    except (TypeError, ValueError) as error:
        raise ConfigError.of("client.optimizer_args", client.optimizer_args, str(error)) from error


def pack_optimizer(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``parameter|key``.

    Named by parameter, the state can be joined, split and moved with the layers it belongs to.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    packed: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is None:
                continue
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            packed[f"{names[id(parameter)]}|{key}"] = tensor.detach().clone()
    return packed


def unpack_optimizer(optimizer: Optimizer, model: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `pack_optimizer` returned for the same parameters.

    Raises:
        ModelError: The state belongs to a parameter that the model does not have.
    """
    named = dict(model.named_parameters())
    for full_name, tensor in packed.items():
        name, _, key = full_name.rpartition("|")
        if name not in named:
            raise ModelError(f"optimizer state {full_name}: the model has no parameter {name}")
        parameter = named[name]
        device = parameter.device if tensor.dim() else tensor.device
        optimizer.state[parameter][key] = tensor.to(device).clone()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU if there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


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
