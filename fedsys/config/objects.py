"""Objects of a Python session as parts of a configuration, which holds names alone.

What can be imported by a dotted path goes by that, and so anywhere. What cannot, a model that is
built or a function of a notebook, is kept here under a key, and goes nowhere but into this process.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedsys.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

_held: dict[str, Any] = {}
_numbers = itertools.count(1)

PREFIX = f"{__name__}."
"""Of targets that mean what is kept in this process."""


def target_of(value: Any, kind: str) -> dict[str, Any]:
    """Return the ``_target_``, with its arguments, that means an object.

    Args:
        value: A class or a function, or what one has made.
        kind: ``model``, ``dataset`` or ``function``: which of the functions below gives it back.
    """
    path = path_of(value)
    if path is not None:
        return {"_target_": path}
    for key, other in _held.items():
        if other is value:
            return {"_target_": f"{PREFIX}{kind}", "key": key}
    key = f"{type(value).__name__}-{next(_numbers)}"
    _held[key] = value
    return {"_target_": f"{PREFIX}{kind}", "key": key}


def path_of(value: Any) -> str | None:
    """Return by which dotted path another process can import a class or a function; None: by none.

    >>> path_of(Mapping), path_of(lambda: 0), path_of(3)
    ('collections.abc.Mapping', None, None)
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    if not name.isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return f"{module}.{name}" if found is value else None


def held_in(tree: Any) -> list[str]:
    """Return the keys of the objects of this process that a configuration needs."""
    found = []
    if isinstance(tree, Mapping):
        if str(tree.get("_target_", "")).startswith(PREFIX):
            found.append(str(tree.get("key")))
        for inner in tree.values():
            found += held_in(inner)
    return found


def _found(key: str) -> Any:
    if key not in _held:
        raise ConfigError(
            f"{key}: is an object of another Python process, which does not travel; give it again, "
            "or put its class or function into a module and name that"
        )
    return _held[key]


def model(
    key: str, input_shape: tuple[int, ...] | None = None, num_classes: int | None = None
) -> nn.Module:
    """Return a copy of a model that is kept, or what a class or function that is kept makes.

    Args:
        key: Under which it is kept.
        input_shape: Of an example, for a function that has this argument.
        num_classes: Likewise.

    Raises:
        ConfigError: It is of another process.
    """
    import torch

    value = _found(key)
    if isinstance(value, torch.nn.Module):
        # whoever asks for a model without values asks on ``meta``
        on_meta = torch.get_default_device().type == "meta"
        return copy.deepcopy(value, _without_values(value) if on_meta else None)
    known = inspect.signature(value).parameters
    given = {"input_shape": input_shape, "num_classes": num_classes}
    made = value(**{name: one for name, one in given.items() if name in known})
    return made  # type: ignore[no-any-return]  # what it is, is asked when it is used


def _without_values(value: nn.Module) -> dict[int, Any]:
    """Return what stands for the tensors of a module in a copy on ``meta``, by their ids.

    ``Module.to("meta")`` makes two parameters of one that two layers share, and a cut between them
    would train both.
    """
    import torch

    made: dict[int, Any] = {id(each): each.to("meta") for each in value.buffers()}
    for each in value.parameters():
        made[id(each)] = torch.nn.Parameter(each.detach().to("meta"), each.requires_grad)
    return made


def dataset(key: str) -> Any:
    """Return a data set that is kept, or what a class or function that is kept makes.

    Raises:
        ConfigError: It is of another process.
    """
    value = _found(key)
    return value() if callable(value) else value


def function(key: str) -> Any:
    """Return a loss or a metric that is kept.

    Raises:
        ConfigError: It is of another process.
    """
    return _found(key)
