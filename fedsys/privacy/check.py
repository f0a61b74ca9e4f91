"""Which runs and models a promise to each example can be made for: refused before data are used."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.config import Config
from fedsys.errors import ConfigError, ModelError
from fedsys.privacy.gradients import SHARED, ExampleGradients
from fedsys.privacy.update import summed_backward
from fedsys.randomness import Address, drawing

_TELLING: Final = ("snip", "grasp")
"""Scores that are taken on examples of the run."""

_APART: Final = 1e-4
"""What an output may differ by where other examples of its batch differ, relative to its size."""


def check_record_run(config: Config) -> None:
    """Refuse what releases more about examples than their clipped and noised gradients.

    Raises:
        ConfigError: Names the option and the way out.
    """
    refused = (
        ("client.clip_norm", config.client.clip_norm, config.client.clip_norm is not None,
         "clips mini-batches; each example is clipped by privacy.clip_norm", "leave it null"),
        ("client.frozen", True, config.client.frozen,
         "trains nothing, so there is nothing to promise", "privacy=none"),
        ("pruning.method", config.pruning.method, config.pruning.method in _TELLING,
         "scores weights on examples, which is a release without noise",
         "pruning=magnitude, or another that looks at weights only"),
        ("strategy.fraction_evaluate", config.strategy.get("fraction_evaluate"),
         float(config.strategy.get("fraction_evaluate") or 0.0) > 0,
         "has devices tell their scores on their examples, which is a release without noise",
         "0; rounds are judged on the validation part"),
        ("fleet.replicate_every", config.fleet.replicate_every,
         config.privacy.secure and config.fleet.replicate_every > 0,
         "lets a session begin again behind what its edge server has sent, with other noise: "
         "these steps would be released twice",
         "0 with privacy.secure=true"),
    )  # fmt: skip
    for key, value, broken, rule, way_out in refused:
        if broken:
            raise ConfigError.of(key, value, f"with privacy=record, {rule}", way_out)


def check_record_model(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Refuse a model in which the gradient of one example is not to be had, or not its own.

    The model is copied and run on noise.

    Args:
        model: As it is trained.
        input_shape: ``(C, H, W)`` of one example.

    Raises:
        ConfigError: It has BatchNorm, frozen or shared parameters.
        ModelError: A parameter has no gradient by example, or examples of a batch influence
            each other.
    """
    _check_parts(model)
    own = copy.deepcopy(model).cpu().train()
    x = torch.randn((3, *input_shape), generator=Address(0).torch("check"))
    _check_alone(own, x)
    examples = ExampleGradients([own], 1.0)
    with drawing(Address(0), 0, 2), examples.recording(0, 2):
        outputs = own(x[:2])
        summed_backward(outputs, torch.zeros(2, dtype=torch.int64))
    for name, squares in examples.unseen().items():
        raise ModelError(
            f"{name}: {squares}, so there is no gradient of one example; put it into a layer that "
            "is called as a module, or train without privacy=record"
        )
    examples.squares()


def _check_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        mixing = isinstance(module, _BatchNorm) or (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        )
        if mixing:
            raise ConfigError.of(
                "model.norm", "batch",
                f"cannot be with privacy=record: {name} ({type(module).__name__}) normalises by "
                "statistics of the whole mini-batch, so no example has a gradient of its own to "
                "be clipped, and running statistics are released without noise",
                "model.norm=group",
            )  # fmt: skip
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise ConfigError.of(
                "model", name, "is frozen, and privacy=record trains whole models",
                "train all parameters, or take it out of the model as a buffer",
            )  # fmt: skip
        if uses[id(parameter)] > 1:
            raise ConfigError.of("model", name, f"is shared by several modules, and {SHARED}")


def _check_alone(model: nn.Module, x: Tensor) -> None:
    """Compare what a model makes of one example in two batches, in training."""
    with torch.no_grad(), drawing(Address(0), 0, 2):
        one = model(x[[0, 1]])[0]
    with torch.no_grad(), drawing(Address(0), 0, 2):
        other = model(x[[0, 2]])[0]
    if float((one - other).abs().max()) > _APART * max(1.0, float(one.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: what it makes of an example depends on the others of its "
            "batch, so clipping gradients one by one promises nothing; choose a model whose layers "
            "look at each example alone (model.norm=group)"
        )
