"""Models that are pruned without having been trained, for what depends on their shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn

from fedsys import config as configuration
from fedsys import models
from fedsys.randomness import Address


def built(name: str, seed: int) -> nn.Module:
    """Return a model for 3x32x32 images: of the project if it has it, else torchvision's."""
    file = configuration.CONF / "model" / f"{name}.yaml"
    if file.exists():
        spec: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    else:
        spec = {"_target_": "fedsys.models.torchvision_classifier", "name": name, "norm": "batch"}
    return models.build(spec, input_shape=(3, 32, 32), num_classes=10, seed=seed)


def as_trained(model: nn.Module, seed: int) -> nn.Module:
    """Give biases, and shifts and statistics of BatchNorm, values of both signs."""
    draw = Address(seed).torch("bench-prune")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=draw))
            elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                shape = module.bias.shape
                module.weight.copy_(0.5 + torch.rand(shape, generator=draw))
                module.bias.copy_(0.3 * torch.randn(shape, generator=draw))
                module.running_mean.copy_(0.3 * torch.randn(shape, generator=draw))
                assert module.running_var is not None
                module.running_var.copy_(0.5 + torch.rand(shape, generator=draw))
    return model.eval()
