"""Constructors that ``_target_`` names, called with keywords that were checked before."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from fedsys.config.building import build
from fedsys.config.values import Spec
from fedsys.errors import ConfigError, ModelError, did_you_mean, first_line


def call_target(spec: Spec, group: str, **given: Any) -> Any:
    """Call the constructor that ``spec["_target_"]`` names, with the other keys as keywords.

    Args:
        spec: A group; nested groups with a ``_target_`` of their own are built first.
        group: Name of the group, for error messages.
        **given: Further keywords, passed where the target has them; the group cannot set them.

    Raises:
        ConfigError: The target does not exist, a keyword is not one of its parameters or not of
            its type, or the target refuses its arguments.
    """
    target = locate(str(spec.get("_target_", "")), group)
    keywords = {
        str(k): call_target(v, f"{group}.{k}") if isinstance(v, Mapping) and "_target_" in v else v
        for k, v in spec.items()
        if k != "_target_"
    }
    for key in keywords.keys() & given:
        raise ConfigError.of(f"{group}.{key}", keywords[key], "must not be set: fedsys sets it")
    parameters = _parameters(target)
    if parameters is not None and not _takes_any(parameters):
        given = {key: value for key, value in given.items() if key in parameters}
    check_keywords(target, {**keywords, **given}, group)
    types_ = _simple_types(target)
    for key in keywords.keys() & types_:
        keywords[key] = build(types_[key], keywords[key], f"{group}.{key}")
    try:
        return target(**keywords, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{group}: {_name_of(target)} refuses its arguments: {error}") from error


def locate(path: str, group: str) -> Callable[..., Any]:
    """Return what a dotted path names; ConfigError names ``group._target_`` if there is nothing."""
    import hydra.utils

    try:
        target = hydra.utils.get_object(path)
    except (
        Exception
    ) as error:  # whatever the import of a user's module raises belongs to the message
        raise ConfigError.of(
            f"{group}._target_",
            path,
            f"cannot be imported ({first_line(error)})",
            "give the dotted path of a class or function",
        ) from error
    if not callable(target):
        raise ConfigError.of(f"{group}._target_", path, "must name a class or a function")
    return typing.cast(Callable[..., Any], target)


def check_keywords(target: Callable[..., Any], keywords: Spec, group: str) -> None:
    """Refuse keywords that `target` does not take, and missing ones, by name."""
    parameters = _parameters(target)
    if parameters is None:
        return
    if not _takes_any(parameters):
        for key in keywords:
            if key not in parameters:
                hint = did_you_mean(key, parameters)
                raise ConfigError(
                    f"{group}.{key}: {_name_of(target)} has no such parameter; "
                    f"{hint}it has {', '.join(parameters) or 'none'}"
                )
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
        )  # fmt: skip
        if needed and name not in keywords:
            raise ConfigError(f"{group}.{name}: {_name_of(target)} needs a value for it")


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some extension types have no signature; calling them decides
        return None


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _simple_types(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters that are annotated as a plain number, text or truth value."""
    constructor: Any = target
    try:
        hints = typing.get_type_hints(
            constructor.__init__ if inspect.isclass(target) else constructor
        )
    except (NameError, TypeError, AttributeError):  # written for a type checker only
        return {}
    return {name: kind for name, kind in hints.items() if kind in (bool, int, float, str)}


def _name_of(target: Callable[..., Any]) -> str:
    return str(getattr(target, "__name__", target))


def import_extra(name: str, extra: str = "export", who: str = "ONNX") -> Any:
    """Import a module of a package that an installation without extras may lack.

    Args:
        name: Of the module.
        extra: What the package is declared in.
        who: Needs it.

    Raises:
        ModelError: It is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"{who} needs the package {name}: install it by pip install 'fedsys[{extra}]'"
        ) from error
    keep_standard_error_open()
    return module


def keep_standard_error_open() -> None:
    """Let absl, which some packages bring, write to the standard error of the process.

    Its handler keeps what standard error was at its import, and closes that when logging is
    configured anew, as Hydra does: where standard error was redirected at that moment, by a test
    or a notebook, everyone's was closed.
    """
    absl = sys.modules.get("absl.logging")
    if absl is not None:
        absl.get_absl_handler().python_handler.stream = sys.__stderr__
