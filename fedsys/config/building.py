"""From plain dicts and lists to values, by the types of their fields."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from fedsys.errors import ConfigError, did_you_mean, is_number


def build(kind: Any, value: Any, path: str) -> Any:
    """Convert `value` to the annotation `kind`, or raise a ConfigError that names `path`."""
    if kind is Any:
        return _frozen(value)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        fitting = [k for k in options if type(value) is k]
        return None if value is None else build((fitting or options)[0], value, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError.of(path, value, "must be a list", f"write {path}=[…]")
        each: Any = typing.get_args(kind)[0]
        return tuple(build(each, v, f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(origin or kind, type) and issubclass(origin or kind, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError.of(path, value, "must be a group of keys")
        return {str(k): v for k, v in value.items()}
    if kind is float and is_number(value):
        if not math.isfinite(value):
            raise ConfigError.of(path, value, "must be a finite number")
        return float(value)
    if kind is str and value is not None and not isinstance(value, dict | list):
        return str(value)
    if type(value) is not kind:
        raise ConfigError.of(path, value, f"must be of type {kind.__name__}")
    return value


def _frozen(value: Any) -> Any:
    """Return `value` with tuples for lists, and None for empty ones: one meaning, one value."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value)) or None
    return value


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the annotations of a dataclass, and the names of the fields that are configured."""
    names = frozenset(f.name for f in dataclasses.fields(kind)) - {"text"}
    return typing.get_type_hints(kind), names


def _build_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError.of(path, value, "must be a group of keys")
    hints, names = _fields(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in names:
            hint = did_you_mean(str(key), names)
            raise ConfigError(f"{prefix}{key}: no such option; {hint}see --help for all of them")
    built = {k: build(hints[k], v, prefix + str(k)) for k, v in value.items()}
    for spec in dataclasses.fields(kind):
        required = (
            spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        )
        if required and spec.name not in built:
            raise ConfigError(f"{prefix}{spec.name}: missing from the configuration")
    return kind(**built)
