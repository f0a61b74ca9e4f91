"""Read the values of the `data` group, each with its one error message."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsys.errors import ConfigError, did_you_mean, is_number
from fedsys.files import user_cache

Spec = Mapping[str, Any]


def whole(spec: Spec, key: str, default: int, *, least: int = 1, group: str = "data") -> int:
    """Return an integer of at least `least`."""
    value = spec.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError.of(f"{group}.{key}", value, f"must be a whole number of at least {least}")
    return value


def fraction(spec: Spec, key: str, default: float, *, open_below: bool = False) -> float:
    """Return a number in [0, 1), or in (0, 1) when `open_below`."""
    value = spec.get(key, default)
    if not is_number(value) or not 0.0 <= value < 1.0 or (open_below and value == 0.0):
        low = "above 0" if open_below else "at least 0"
        raise ConfigError.of(f"data.{key}", value, f"must be a number {low} and below 1")
    return float(value)


def positive(spec: Spec, key: str, default: float, *, most: float, group: str) -> float:
    """Return a finite number above zero and at most `most`."""
    value = spec.get(key, default)
    if not is_number(value) or not math.isfinite(value) or not 0.0 < value <= most:
        raise ConfigError.of(f"{group}.{key}", value, f"must be above 0 and at most {most:g}")
    return float(value)


def choice(argument: str, value: object, known: Sequence[object]) -> str:
    """Return `value` if it is one of `known`."""
    if value not in known:
        names = [str(each) for each in known]
        hint = did_you_mean(str(value), names).rstrip()
        raise ConfigError.of(argument, value, f"must be one of {', '.join(names)}", hint)
    return str(value)


def shape(spec: Spec, key: str, default: Sequence[int]) -> tuple[int, int, int]:
    """Return ``(channels, height, width)``, three positive integers."""
    value = spec.get(key, default)
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != 3 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ConfigError.of(f"data.{key}", value, "must be [channels, height, width]")
    return numbers[0], numbers[1], numbers[2]


def brought(module: str, argument: str, value: object, extra: str = "datasets") -> Any:
    """Import a module that an extra brings.

    Args:
        module: Its name.
        argument: The option that needs it.
        value: Of that option.
        extra: Which one.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError.of(
            argument, value, f"needs {module} ({error})", f"pip install 'fedsys[{extra}]'"
        ) from error


def cache_folder(spec: Spec) -> Path:
    """Return the folder for what is derived or downloaded: `data.cache` or the user's cache."""
    named = spec.get("cache")
    if named:
        return Path(str(named)).expanduser()
    return user_cache()
