"""Which runs promises at the cut can be made for: refused before data are used."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.config import Config
from fedsys.errors import ConfigError, ModelError
from fedsys.randomness import Address, drawing

_APART = 1e-4  # of an output, where other examples of its batch differ


def check_cut_run(config: Config) -> None:
    """Refuse what releases more of activations than their clipped and noised values.

    Raises:
        ConfigError: Names the option and the way out.
    """
    privacy, policy, rounds = config.privacy, config.policy, config.rounds
    training = policy.get("training")
    truncated = isinstance(training, dict) and training.get("where") == "clients"
    refused = (
        ("policy.kind", policy.get("kind"), policy.get("kind", "none") == "none",
         "leaves no cut at which noise could be added", "policy=fixed policy.cut=0.3"),
        ("policy.training.where", "clients", truncated,
         "has devices train truncated rounds, which are releases beside those of the budget",
         "policy.training.where=timeline"),
        ("strategy.fraction_evaluate", config.strategy.get("fraction_evaluate"),
         float(config.strategy.get("fraction_evaluate") or 0.0) > 0,
         "has devices send activations for scores, which are releases beside those of the budget",
         "0; rounds are judged on the validation part"),
        ("privacy.label_epsilon", privacy.label_epsilon,
         privacy.label_epsilon is not None and config.client.label_private,
         "is for labels that leave a device", "client.label_private=false"),
        ("privacy.label_epsilon", privacy.label_epsilon,
         privacy.label_epsilon is not None and privacy.secure and rounds > 1,
         "tells labels anew in each round where they are drawn by the operating system, which "
         "would spend it again", "privacy.secure=false, or rounds=1"),
    )  # fmt: skip
    for key, value, broken, rule, way_out in refused:
        if broken:
            raise ConfigError.of(key, value, f"with privacy=cut, {rule}", way_out)


def check_cut_model(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Refuse a model in which an activation depends on the other examples of its mini-batch.

    Clipping each by itself would bound nothing then: one example changes all activations.

    Args:
        model: As it is trained; it is copied and run on noise.
        input_shape: ``(C, H, W)`` of one example.

    Raises:
        ConfigError: It has BatchNorm.
        ModelError: Examples of a batch influence each other otherwise.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ConfigError.of(
                "model.norm", "batch",
                f"cannot be with privacy=cut: {name} ({type(module).__name__}) normalises by "
                "statistics of the whole mini-batch, so one example changes the activations of "
                "all", "model.norm=group",
            )  # fmt: skip
    own = copy.deepcopy(model).cpu().train()
    x = torch.randn((3, *input_shape), generator=Address(0).torch("check"))
    outputs = []
    for rows in ([0, 1], [0, 2]):
        with torch.no_grad(), drawing(Address(0), 0, 2):
            outputs.append(own(x[rows])[0])
    one, other = outputs
    if float((one - other).abs().max()) > _APART * max(1.0, float(one.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: what it makes of an example depends on the others of its "
            "mini-batch, so noise on its activation promises nothing; choose a model whose layers "
            "look at each example alone (model.norm=group)"
        )
