"""Every classifier of torchvision, by its name there, for any size and number of channels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fedsys.errors import ConfigError, did_you_mean, need
from fedsys.models.blocks import Shape

_PLAIN_OUTPUT = ("googlenet", "inception_v3")
"""These return extra outputs in training unless told otherwise."""


@functools.cache
def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers, in alphabetical order."""
    need("torchvision", "a model of torchvision")
    from torchvision import models

    return sorted(models.list_models(module=models))


def torchvision_classifier(
    name: str, *, num_classes: int, input_shape: Shape, **kwargs: Any
) -> nn.Module:
    """Return torchvision's classifier `name` without pretrained weights.

    Differences from torchvision's default: the auxiliary outputs of GoogLeNet and Inception are
    off, so that training sees one tensor; the transformers of fixed size (ViT, MaxViT) are made for
    the size of the image; for images that do not have three channels the first convolution is
    replaced by one for that number, drawn from PyTorch's default distribution.

    Args:
        name: One of `torchvision_names`.
        num_classes: Number of outputs.
        input_shape: Channels, height and width.
        kwargs: Further arguments of torchvision's constructor, for instance ``width_mult``.

    Raises:
        ConfigError: For an unknown name, an image that is too small or of the wrong shape for the
            model, or an argument that its constructor refuses.
    """
    known = torchvision_names()
    from torchvision import models

    if name not in known:
        hint = did_you_mean(str(name), known) or f"it knows {', '.join(known)}"
        raise ConfigError.of(
            "model.name", name, "must be a classifier of torchvision", hint.strip()
        )
    channels, height, width = input_shape
    options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in _PLAIN_OUTPUT:
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        if height != width:
            raise _unfit(name, input_shape, "it takes square images only")
        options["image_size"] = height
    elif name.startswith("maxvit_"):
        options["input_size"] = (height, width)
    try:
        model: nn.Module = models.get_model(name, **(options | kwargs))
    except (AssertionError, ValueError) as error:
        raise _unfit(name, input_shape, str(error)) from error
    if channels != 3:
        _adapt_first_convolution(model, channels)
    if min(height, width) < min(max(w.meta["min_size"]) for w in models.get_model_weights(name)):
        _try_small_image(name, model, input_shape)
    return model


def _unfit(name: str, input_shape: Shape, reason: str) -> ConfigError:
    _, height, width = input_shape
    return ConfigError.of(
        "model.name",
        name,
        f"must suit images of {height}x{width} pixels, and it does not: {reason}",
        "choose another model, or another size of the images",
    )


def _try_small_image(name: str, model: nn.Module, input_shape: Shape) -> None:
    """Run `model` once on an image below torchvision's documented minimum.

    Some minima are only the sizes that the weights were trained on, so they alone refuse nothing.
    """
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    except RuntimeError as error:
        raise _unfit(name, input_shape, str(error)) from error
    model.train(training)


def _adapt_first_convolution(model: nn.Module, channels: int) -> None:
    name, first = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    adapted = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        stride=first.stride,  # type: ignore[arg-type]
        padding=first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, adapted)
