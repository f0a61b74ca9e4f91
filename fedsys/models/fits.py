"""Does a model fit the data? Asked once, on two examples, before anything is trained."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsys.errors import ConfigError, ModelError
from fedsys.randomness import check_keyed
from fedsys.transport.several import Inputs, Several, arguments, said, shape_of, takes

_OF_OTHERS = "make its layers for this shape, which its constructor is given as input_shape"
_OF_IMAGES = (
    f"{_OF_OTHERS}; or give the data the channels and the size that it takes (data.channels, "
    "data.size)"
)


def check_fits(model: nn.Module, example: Inputs, made: tuple[int, ...] | None) -> None:
    """Refuse a model that does not make one row of outputs of each example, or draws at random.

    The model is run in evaluation and in training, and left as it was but for what its own forward
    counts.

    Args:
        model: With values, on the device of `example`.
        example: A batch of two or more inputs, ``(rows, …)``.
        made: Shape that it must make of an example, ``(classes,)`` of classification; None: any.

    Raises:
        ConfigError: It takes other inputs or returns something else than ``(rows, *made)``
            floating-point numbers.
        ModelError: It draws from a process-wide generator.
    """
    name = type(model).__name__
    _check_arguments(model, name, len(example.tensors) if isinstance(example, Several) else 1)
    modes = {module: module.training for module in model.modules()}
    inputs = arguments(model, example)
    try:
        with torch.no_grad():
            _check_outputs(
                name, _tried(name, lambda: model.eval()(*inputs), example), made, len(example)
            )
    finally:
        for module, mode in modes.items():
            module.training = mode
    keyed = functools.partial(check_keyed, model, *inputs, rows=len(example))
    outputs = _tried(name, keyed, example)
    _check_outputs(name, outputs, made, len(example))


def _check_arguments(model: nn.Module, name: str, count: int) -> None:
    """Refuse a forward that needs more than the images, or than the tensors of an example."""
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    named = inspect.signature(model.forward).parameters.values()
    needed = [a.name for a in named if a.default is a.empty and a.kind not in variable]
    if count > 1:
        if needed[count if takes(type(model).forward, count) else 1 :]:
            raise ConfigError.of(
                "model", name, f"must take the {count} tensors of an example, as so many arguments "
                f"or as one tuple, and its forward takes ({', '.join(needed)})",
            )  # fmt: skip
    elif len(needed) > 1:
        raise ConfigError.of(
            "model",
            name,
            f"must take one tensor, a batch of images, and its forward takes ({', '.join(needed)})",
            f"give {', '.join(needed[1:])} a default, or make it in forward",
        )


def _tried(name: str, call: Callable[[], Any], example: Inputs) -> Any:
    try:
        return call()
    except ModelError:
        raise
    except Exception as error:  # whatever the user's forward or torch raises on such inputs
        shape, says = shape_of(example), str(error).strip().partition("\n")[0]
        what, way_out = f"images of shape {shape}", _OF_IMAGES
        if isinstance(example, Several):
            what, way_out = f"inputs {said(shape)}", _OF_OTHERS
        elif not example.is_floating_point():
            what = f"tokens of shape {shape}, here up to {int(example.max())}"
            way_out = f"{_OF_OTHERS}; embeddings need num_classes rows, and places for all tokens"
        elif example.dim() != 4:
            what, way_out = f"examples of shape {shape}", _OF_OTHERS
        raise ConfigError.of(
            "model", name,
            f"must accept {what}, and its forward says: {type(error).__name__}: {says}", way_out,
        ) from error  # fmt: skip


def _check_outputs(name: str, outputs: object, made: tuple[int, ...] | None, rows: int) -> None:
    rule = "must return one tensor of shape (batch, …)"
    if made is not None:
        rule = f"must return one tensor of shape (batch, {', '.join(map(str, made))})"
    rule += ", a number for each class or target" if made is not None and len(made) == 1 else ""
    if isinstance(outputs, Mapping):
        way_out = f"return one entry of it: it has {', '.join(map(str, outputs))}"
        raise ConfigError.of("model", name, f"{rule}, and it returns a dict", way_out)
    if isinstance(outputs, tuple | list):
        what = f"{rule}, and it returns a {type(outputs).__name__} of {len(outputs)}"
        way_out = "return its first element alone, and switch auxiliary outputs off"
        raise ConfigError.of("model", name, what, way_out)
    if not isinstance(outputs, Tensor):
        raise ConfigError.of("model", name, f"{rule}, and it returns a {type(outputs).__name__}")
    if made is None or len(made) > 1:
        fits = outputs.dim() and len(outputs) == rows
        if not fits or (made is not None and tuple(outputs.shape[1:]) != made):
            raise ConfigError.of(
                "model", name, f"{rule}, and it returns {tuple(outputs.shape)} of {rows} examples"
            )
    elif outputs.dim() != 2:
        what = f"{rule}, and it has {outputs.dim()} dimensions: {tuple(outputs.shape)}"
        way_out = "pool and flatten it: x.mean((2, 3)) or nn.Flatten()"
        raise ConfigError.of("model", name, what, way_out)
    elif outputs.shape[1] != made[0]:
        raise ConfigError.of(
            "model",
            name,
            f"{rule}, and it has {outputs.shape[1]} outputs",
            "let its constructor take num_classes, or give it under the name that it has there: "
            f"model.<argument>={made[0]}",
        )
    if not outputs.is_floating_point():
        what = f"{rule}, and it returns {outputs.dtype}"
        raise ConfigError.of("model", name, what, "return the logits, not the chosen class")
