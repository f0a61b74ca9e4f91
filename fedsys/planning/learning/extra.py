"""What trains agents is of the extra ``rl``; without it, an error says what goes without."""

from __future__ import annotations

import importlib.util
from typing import Any, Final

from fedsys.config.targets import import_extra
from fedsys.errors import ModelError

PACKAGES: Final = ("gymnasium", "stable_baselines3")
"""Of the extra."""


def of_rl(name: str) -> Any:
    """Import a module of the extra ``rl``.

    Raises:
        ModelError: The extra is not installed; what goes without it is named.
    """
    try:
        return import_extra(name, "rl", "policy=fedadapt")
    except ModelError as error:
        raise _missing(name) from error


def check_rl() -> None:
    """Refuse to go on without the extra ``rl``, before anything is begun; imports nothing.

    Raises:
        ModelError: The extra is not installed; what goes without it is named.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def _missing(name: str) -> ModelError:
    return ModelError(
        f"policy=fedadapt: must have the extra rl, whose {name.partition('.')[0]} is missing, to "
        "train an agent or to go on with it: pip install 'fedsys[rl]'; without it, "
        "policy.ppo.updates=0 takes the agent that training begins with, and policy.agent=FILE "
        "one that was trained, both with policy.learn=false"
    )
