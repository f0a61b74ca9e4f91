"""What the modules of a model are set to in training and in evaluation, where that is its own way.

``train()`` and ``eval()`` set ``training`` everywhere, but many models keep parts of themselves
apart: a frozen BatchNorm stays in evaluation because the model's own ``train()``, that of a part,
or a line of ``forward`` says so; others change a momentum with the mode. A traced half has neither
these methods nor that forward. `Modes` is what they did, by the paths of modules, and is applied
wherever a half is put into training or evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from fedsys.errors import ModelError
from fedsys.randomness import Address, drawing
from fedsys.transport.several import Inputs, arguments

Value = bool | int | float | str | None
Settings = Mapping[str, Mapping[str, Value]]
"""Plain attributes of modules, by the paths of these."""


def plain_attributes(module: nn.Module) -> dict[str, Value]:
    """Return the attributes of `module` itself that are numbers, texts or None."""
    return {
        name: value
        for name, value in vars(module).items()
        if value is None or isinstance(value, bool | int | float | str)
    }


def plain_state(model: nn.Module) -> dict[str, dict[str, Value]]:
    """Return the plain attributes of every module of `model`, by path."""
    return {
        path: plain_attributes(module)
        for path, module in model.named_modules(remove_duplicate=False)
    }


@dataclass(frozen=True, slots=True)
class Modes:
    """Attributes that ``train()`` and ``eval()`` of ``nn.Module`` would not set so.

    Attributes:
        training: What to set in training, by path of the module.
        evaluation: What to set in evaluation.
    """

    training: Settings = field(default_factory=dict)
    evaluation: Settings = field(default_factory=dict)

    @classmethod
    def of(cls, training: Settings, evaluation: Settings) -> Modes:
        """Return what is special in the attributes that modules had when they were called."""
        return cls(_special(training, evaluation, True), _special(evaluation, training, False))

    def __bool__(self) -> bool:
        return bool(self.training or self.evaluation)

    def apply(self, root: nn.Module, mode: bool) -> None:
        """Set the modules of `root`, whose ``train(mode)`` was just called; others are skipped."""
        special = self.training if mode else self.evaluation
        if not special:
            return
        for path, module in root.named_modules(remove_duplicate=False):
            for name, value in special.get(path, {}).items():
                setattr(module, name, value)


def _special(here: Settings, there: Settings, mode: bool) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = {}
    for path, attributes in here.items():
        other = there.get(path, attributes)
        own = {n: v for n, v in attributes.items() if n != "training" and other.get(n, v) != v}
        if attributes["training"] is not mode:
            own["training"] = attributes["training"]
        if own:
            found[path] = own
    return found


def observed(model: nn.Module, example: Inputs) -> Modes:
    """Return what the modules of `model` are set to when they are called, by running a copy.

    Where it does not run, what ``train()`` and ``eval()`` set is returned.

    Args:
        model: Left as it was; its buffers are copied, its parameters are not.
        example: A batch of inputs.
    """
    memo: dict[int, object] = {id(p): p for p in model.parameters()}
    memo |= {id(b): b.clone() for b in model.buffers()}
    trial = copy.deepcopy(model, memo)
    return Modes.of(_called(trial.train(), example), _called(trial.eval(), example))


def _called(model: nn.Module, example: Inputs) -> dict[str, dict[str, Value]]:
    """Return the attributes that modules have when they are called, and those of the others."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    seen = plain_state(model)

    def note(module: nn.Module, _: object) -> None:
        seen.update({path: plain_attributes(module) for path in paths[module]})

    hooks = [module.register_forward_pre_hook(note) for module in paths]
    try:
        with torch.no_grad(), drawing(Address(0), 0, len(example)):
            model(*arguments(model, example))
    except (RuntimeError, ValueError, ModelError):
        pass  # such as a BatchNorm that gets one value per channel: then the flags must do
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# --------------------------------------------------------------------------------------------------
# What cannot be followed: settings that depend on what happened before


def moved(before: Settings, after: Settings) -> Iterator[tuple[str, str]]:
    """Yield path and name of the attributes that are not what they were."""
    for path, attributes in after.items():
        for name, value in attributes.items():
            if before.get(path, {}).get(name, value) != value:
                yield path, name


def set_attributes(model: nn.Module, values: Settings) -> None:
    """Set attributes by path; what is not there is skipped."""
    modules = dict(model.named_modules())
    for path, attributes in values.items():
        for name, value in attributes.items():
            if path in modules:
                setattr(modules[path], name, value)
