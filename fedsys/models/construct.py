"""From the `model` group of the configuration to a module: import, build, convert, load."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fedsys.errors import ConfigError, ModelError, did_you_mean
from fedsys.models.blocks import check_positive
from fedsys.models.norm import convert_norm
from fedsys.randomness import Address, key_modules, seeded_default_generator
from fedsys.transport.several import Shape, arguments, examples_of, is_several, said

_NOT_FOR_THE_CONSTRUCTOR = ("_target_", "norm", "init")
_DRAWS = (Tensor.normal_, Tensor.uniform_)


def build(spec: Mapping[str, Any], *, input_shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """Return the model of `spec` on the CPU, in training mode, its randomness keyed.

    The weights depend on `spec`, `input_shape`, `num_classes` and `seed` alone; the state of
    PyTorch's process-wide generator is the same afterwards.

    Args:
        spec: The `model` group: ``_target_`` is the dotted path of a callable that returns a
            module, ``norm`` one of batch, group and none (default batch), ``init`` a safetensors
            file to take all weights and buffers from, or None; the rest are keyword arguments of
            the callable. `input_shape` and `num_classes` are passed if it has arguments so named,
            `num_classes` also where ``**kwargs`` takes it on.
        input_shape: Channels, height and width of an image.
        num_classes: Number of outputs.
        seed: The `seed` of the run.

    Raises:
        ConfigError: For a target that cannot be imported or called with these arguments, for a
            value out of range, or an `init` file that does not exist.
        ModelError: For an `init` file that does not fit; names every difference.
    """
    _locate(str(spec.get("_target_", "")))  # a module that draws when it is imported does so here
    with seeded_default_generator(Address(seed).seed_for("init")):
        model = _construct(spec, input_shape, num_classes)
    init = spec.get("init")
    if init is not None:
        _load(model, Path(init))
    return model


def skeleton(spec: Mapping[str, Any], *, input_shape: Shape, num_classes: int) -> nn.Module:
    """Return the model of `spec` without values: its state lies on the ``meta`` device.

    Names, shapes and types are those of `build`. Fill it with ``load_state_dict(state,
    assign=True)``. Tensors that are not part of the state (buffers that are not persistent) have
    their values. Nothing is drawn, and no memory is taken except by constructors that compute with
    tensors; these run on the CPU first.

    Args:
        spec: As for `build`; ``init`` is ignored.
        input_shape: Channels, height and width of an image.
        num_classes: Number of outputs.

    Raises:
        ConfigError: As for `build`.
    """
    on_meta = _construct_on_meta(spec, input_shape, num_classes)
    if on_meta is not None and not _has_hidden_tensors(on_meta):
        return on_meta
    with seeded_default_generator(0):
        model = _construct(spec, input_shape, num_classes)
    state = model.state_dict(keep_vars=True)
    empty = {id(tensor): _empty(tensor) for tensor in state.values()}  # one for all who share it
    model.load_state_dict({name: empty[id(t)] for name, t in state.items()}, assign=True)
    return model


def _empty(tensor: Tensor) -> Tensor:
    made = tensor.detach().to("meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


class _WithoutInitialisation(TorchFunctionMode):
    """Skips what fills a tensor with initial values, which a tensor on ``meta`` has not.

    Apart from being idle, drawing normal values on ``meta`` imports a symbolic algebra system, and
    that takes a process seconds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _DRAWS:
            tensor = named["tensor"] if "tensor" in named else args[0]
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **named)


def _construct_on_meta(
    spec: Mapping[str, Any], input_shape: Shape, num_classes: int
) -> nn.Module | None:
    """Return the model with all tensors on ``meta``, or None where that cannot be done.

    A constructor that reads the value of a tensor fails on ``meta``, with a RuntimeError or with
    one of the errors that `_construct` takes for a wrong argument. Which it was, the CPU will tell.
    """
    try:
        with torch.device("meta"), _WithoutInitialisation():
            return _construct(spec, input_shape, num_classes)
    except (RuntimeError, ConfigError):
        return None


def _has_hidden_tensors(model: nn.Module) -> bool:
    """Whether `model` holds tensors that loading a state would not fill."""
    buffers = {name for name, _ in model.named_buffers()}
    attributes = (value for module in model.modules() for value in vars(module).values())
    return not buffers <= model.state_dict().keys() or any(
        isinstance(value, Tensor) for value in attributes
    )


def _way_out(target: str, input_shape: Shape) -> str:
    """Return what to do where a model for images is to take examples that are none."""
    image = len(input_shape) == 3 and not is_several(input_shape)
    if image or not target.startswith("fedsys.models."):
        return ""
    return (
        f"examples are {said(input_shape)}, no images: model=mlp takes numbers of any shape, "
        "model=gpt tokens, model=own a model of yours"
    )


def _construct(spec: Mapping[str, Any], input_shape: Shape, num_classes: int) -> nn.Module:
    check_positive("num_classes", num_classes)
    target = str(spec.get("_target_", ""))
    constructor = _locate(target)
    arguments = _arguments(target, constructor, spec, input_shape, num_classes)
    try:
        model = _called(constructor, arguments, num_classes)
    except (TypeError, ValueError) as error:
        named = [key for key in arguments if f"'{key}'" in str(error) and key in spec]
        argument = f"model.{named[0]}" if named else "model._target_"
        value = spec[named[0]] if named else target
        rule = f"must suit {target}, which says: {error}"
        raise ConfigError.of(argument, value, rule, _way_out(target, input_shape)) from error
    if not isinstance(model, nn.Module):
        raise ConfigError.of(
            "model._target_",
            target,
            f"must return a torch.nn.Module, and it returned a {type(model).__name__}",
        )
    _materialise(model, target, input_shape)
    return key_modules(convert_norm(model, spec.get("norm", "batch"))).train()


def _called(constructor: Callable[..., Any], arguments: Mapping[str, Any], num_classes: int) -> Any:
    """Call the constructor, also with the number of classes if it may take that on to another.

    torchvision's constructors, and timm's ``create_model``, have it in their ``**kwargs``; without
    it they make the 1,000 outputs of ImageNet.
    """
    known = inspect.signature(constructor).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    if not takes_any or "num_classes" in arguments:
        return constructor(**arguments)
    try:
        return constructor(**arguments, num_classes=num_classes)
    except TypeError as error:
        if "num_classes" not in str(error):
            raise
    return constructor(**arguments)  # whoever gets its arguments does not know this one


def _materialise(model: nn.Module, target: str, input_shape: Shape) -> None:
    """Give lazy layers (``nn.LazyLinear``, …) the sizes and values that images lead to."""
    if not _lazy(model):
        return
    try:
        with torch.no_grad():
            if is_several(input_shape):
                model.eval()(*arguments(model, examples_of(input_shape, 2)))
            else:
                model.eval()(torch.zeros((2, *input_shape)))
    except Exception as error:  # whatever the user's forward or torch raises on such inputs
        raise ConfigError.of(
            "model._target_",
            target,
            f"must accept images of shape {tuple(input_shape)}, from which its lazy layers take "
            f"their sizes, and its forward says: {error}",
        ) from error
    if left := _lazy(model):
        raise ConfigError.of(
            "model._target_",
            target,
            f"must call its lazy layers in forward, and leaves out {', '.join(left[:5])}",
            "give such layers their sizes, or leave them out",
        )


def _lazy(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that have no size yet."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]


def _locate(target: str) -> Callable[..., Any]:
    """Import the callable with the dotted path `target`."""
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError.of(
            "model._target_",
            repr(target),
            "must be the dotted path of a callable that returns a module",
            "for instance fedsys.models.vgg.vgg5",
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's file may fail in any way; each is named and kept as cause
        raise ConfigError.of(
            "model._target_",
            target,
            f"must be importable, and importing {module_name} failed: "
            f"{type(error).__name__}: {error}",
            "check the spelling, and that its folder is on PYTHONPATH",
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise ConfigError.of(
            "model._target_", target, f"must name a callable in {module_name}", hint.strip()
        )
    return found  # type: ignore[no-any-return]


def _arguments(
    target: str,
    constructor: Callable[..., Any],
    spec: Mapping[str, Any],
    input_shape: Shape,
    num_classes: int,
) -> dict[str, Any]:
    """Return the keyword arguments for `constructor`, every one of which it knows."""
    given = {str(k): v for k, v in spec.items() if k not in _NOT_FOR_THE_CONSTRUCTOR}
    known = inspect.signature(constructor).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for key, value in given.items():
        if key not in known and not takes_any:
            settable = [k for k in known if k not in ("input_shape", "num_classes")]
            hint = did_you_mean(key, settable) or f"it has {', '.join(settable) or 'none'}"
            raise ConfigError.of(
                f"model.{key}", value, f"must be an argument of {target}", hint.strip()
            )
    data = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    return {k: v for k, v in data.items() if k in known} | given


def _load(model: nn.Module, path: Path) -> None:
    """Copy the tensors of the safetensors file `path` into `model`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError.of("model.init", path, "must be a safetensors file that exists")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.init={path}: not a readable safetensors file: {error}") from error
    differences = _differences(model.state_dict(), state)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise ModelError(
            f"model.init={path}: does not fit the model, in {len(differences)} places:{lines}"
        )
    model.load_state_dict(state)


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return one line for each tensor that is missing, unexpected or of another kind."""
    lines = [f"{name}: missing, {_kind(wanted[name])}" for name in wanted if name not in found]
    lines += [f"{name}: unexpected, {_kind(found[name])}" for name in found if name not in wanted]
    for name in wanted:
        if name not in found:
            continue
        a, b = wanted[name], found[name]
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            lines.append(f"{name}: the model has {_kind(a)}, the file {_kind(b)}")
    return lines


def _kind(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"
