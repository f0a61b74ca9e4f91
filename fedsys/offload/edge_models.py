"""Which models an edge server builds: those whose constructors its owner has named.

A controller sends the configuration of a run, in which ``_target_`` names what is called: any
function of any module, unless it is looked at first. Two things are asked of each: that its path
begins with a name of the list, before anything is imported, and that what it names is defined
there. The second keeps out what a module of the list has only imported itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsys.errors import SecurityError


def check_models(built: Any, allowed: Sequence[str], group: str = "model") -> None:
    """Check that a model, with all that is within it, may be built, or that a loss may be called.

    Args:
        built: The group ``model`` of a configuration, or parts of its group ``task``.
        allowed: Dotted prefixes: of packages, modules, or whole paths.
        group: Which of them, for messages.

    Raises:
        SecurityError: Names what may not be called, and how its owner would admit it.
    """
    for target in _targets(built):
        named = [prefix for prefix in allowed if _within(target, prefix)]
        if not named or not (target in named or any(_defined(target, one) for one in named)):
            raise SecurityError(
                f"{group}._target_={target}: this edge server builds what is of "
                f"{', '.join(allowed)} alone; if you trust it, start the server with "
                f"edge.models=[…,{target}]"
            )


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield str(value["_target_"])
        for inner in value.values():
            yield from _targets(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _targets(inner)


def _within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


def _defined(target: str, prefix: str) -> bool:
    """Return whether what a path names was defined within the prefix that admits it."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return True  # whoever builds it says what is missing
    return _within(str(getattr(found, "__module__", "")), prefix)
