"""Optimizers and learning rates: made by name, stepped cheaply, their state named by parameter."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsys.config import ClientConfig, LearningRate
from fedsys.errors import ConfigError, ModelError, did_you_mean


def spare_dynamo() -> None:
    """Keep the first optimizer of a process from importing torch's compiler.

    `Optimizer.add_param_group` and `zero_grad` are shielded from the compiler by a decorator that
    imports ``torch._dynamo`` on the first call: 2 to 3 seconds, in every client process of a
    deployment, for a compiler that nobody called. The decorator looks for a shielded function
    first; the plain one is put there. Were the decorator to change, this would have no effect.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad):
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and "torch._dynamo" not in sys.modules:
            plain.__dynamo_disable = plain


def state_share(client: ClientConfig) -> float:
    """Return the bytes of an optimizer's state for each byte of parameters, after a step.

    Raises:
        ConfigError: As in `make_optimizer`.
    """
    parameter = nn.Parameter(torch.zeros(32, 32))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer([parameter], client, 1e-3)
    step(optimizer)
    held = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.dim()]
    return sum(value.nbytes for value in held) / parameter.nbytes


def step(optimizer: Optimizer) -> None:
    """Do ``optimizer.step()`` without gradients, and without importing torch's compiler.

    The wrappers that torch puts around `step` serve the compiler, the profiler and step hooks.
    """
    with torch.no_grad():
        kind = type(optimizer)
        if kind not in _steps:
            _steps[kind] = inspect.unwrap(kind.step)
        _steps[kind](optimizer)


_steps: dict[Any, Callable[[Optimizer], object]] = {}


def forget_gradients(optimizer: Optimizer) -> None:
    """Do ``optimizer.zero_grad()``, past what torch puts around it for compiler and profiler."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@functools.cache
def _known() -> Mapping[str, type[Optimizer]]:
    """Return the optimizers of torch by name in small letters."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }


@functools.cache
def _accepted(name: str) -> frozenset[str]:
    """Return the names of the arguments of an optimizer."""
    return frozenset(inspect.signature(_known()[name]).parameters)


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
    kind: Callable[..., Optimizer] | None = _known().get(client.optimizer.lower())
    if kind is None or client.optimizer.lower() == "lbfgs":
        # lbfgs searches along lines through all parameters at once
        known = {name for name in _known() if name != "lbfgs"}
        hint = did_you_mean(client.optimizer, known)
        raise ConfigError.of(
            "client.optimizer",
            client.optimizer,
            "must name an optimizer of torch.optim that works on single parameters",
            f"{hint}known are {', '.join(sorted(known))}",
        )
    accepted = _accepted(client.optimizer.lower())
    spare_dynamo()
    common = {"lr": lr, "momentum": client.momentum, "weight_decay": client.weight_decay}
    arguments: dict[str, Any] = {k: v for k, v in common.items() if k in accepted}
    try:
        return kind(list(parameters), **(arguments | client.optimizer_args))
    except (TypeError, ValueError) as error:
        raise ConfigError.of("client.optimizer_args", client.optimizer_args, str(error)) from error


def pack_optimizer(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``parameter|key``.

    Named by parameter, the state can be joined, split and moved with the layers it belongs to.
    """
    names = {id(p): name for name, p in named.items()}
    packed: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is None:
                continue
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            packed[f"{names[id(parameter)]}|{key}"] = tensor.detach().clone()
    return packed


def unpack_optimizer(
    optimizer: Optimizer, named: Mapping[str, nn.Parameter], packed: Mapping[str, Tensor]
) -> None:
    """Give the optimizer the state that `pack_optimizer` returned for the same parameters.

    Args:
        optimizer: Receives the state.
        named: Its parameters by global name.
        packed: State by ``parameter|key``.

    Raises:
        ModelError: The state belongs to a parameter that is not there.
    """
    for full_name, tensor in packed.items():
        name, _, key = full_name.rpartition("|")
        if name not in named:
            raise ModelError(f"optimizer state {full_name}: there is no parameter {name}")
        parameter = named[name]
        device = parameter.device if tensor.dim() else tensor.device
        optimizer.state[parameter][key] = tensor.to(device).clone()
