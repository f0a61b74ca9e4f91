"""Hydra's seams: the groups in ``conf/``, names that have no file there, and its errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsys.config.secret import MASK, is_secret
from fedsys.errors import ConfigError, better_name, did_you_mean, first_line

CONF = Path(__file__).resolve().parents[2] / "conf"
"""The folder of the groups: the same place in the checkout, the wheel and the Flower bundle."""

RENAMED = {"prune": "variants"}
"""Groups by their former names, which command lines and files of before still use."""

EXPERIMENT = "experiment"
"""The group of which nothing is chosen by default: its files choose from the others."""

_ABSENT = object()


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a `ConfigError` of one or two lines."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


@contextmanager
def within_hydra() -> Iterator[None]:
    """Let Hydra be set up while a command uses it, and put back what was there."""
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer  # by now another instance


def renamed(override: str) -> str:
    """Return an override with the present name of its group."""
    match = re.match(r"([+~]*)(\w+)(?=[.=])", override)
    if match is None or match[2] not in RENAMED:
        return override
    return f"{match[1]}{RENAMED[match[2]]}{override[match.end() :]}"


def with_present_names(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of a run with the present names of its groups."""
    values = {key: value for key, value in tree.items() if key not in RENAMED}
    for former in tree.keys() & RENAMED.keys():
        present, own = RENAMED[former], tree[former]
        mapping = isinstance(own, dict)
        values[present] = {**values.get(present, {}), **own} if mapping else own
    return values


def _explain(error: BaseException) -> str:
    text = str(error)
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = match.groups()
        known = options_of(group)
        if not known:
            return f"{group}={name}: there is no group '{group}'; see --help for all of them"
        others = _torchvision_names() if group == "model" else set()
        return (
            f"{group}={name}: no such choice; {did_you_mean(name, [*known, *sorted(others)])}"
            f"known are {', '.join(known)}{' and the classifiers of torchvision' if others else ''}"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        groups = [p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_")]
        if key == EXPERIMENT:
            return (
                f"{key}: must be added to the others: +{key}=NAME, of {', '.join(options_of(key))}"
            )
        if choices := _choices_with(key):
            chosen = " or ".join(f"{key.partition('.')[0]}={name}" for name in choices)
            return f"{key}: no such option with what is chosen; {chosen} has it"
        known = [name for name in (*_keys(), *groups) if name != key]
        return f"{key}: no such option; {better_name(key, known)}see --help-all for all of them"
    return first_line(error)


def options_of(group: str) -> list[str]:
    """Return the names that can be chosen in a group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def _choices_with(key: str) -> list[str]:
    """Return the choices of a group that have the option `key`, such as ``policy.cut``."""
    import yaml

    group, *inner = key.split(".")
    found = []
    for name in options_of(group) if inner else ():
        text = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")
        node: Any = yaml.safe_load(text)
        for part in key.split(".") if "@package _global_" in text else inner:
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            found.append(name)
    return found


def _torchvision_names() -> set[str]:
    from fedsys.models.catalog import torchvision_names  # imports torchvision

    return set(torchvision_names())


def _keys() -> list[str]:
    """Return all options by their whole names: those of ``config.yaml`` and those of the groups."""
    import yaml

    keys: dict[str, None] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if key not in ("defaults", "hydra", "_target_"):
                keys[f"{prefix}{key}"] = None
                if isinstance(value, dict):
                    walk(value, f"{prefix}{key}.")

    for file in (CONF / "config.yaml", *sorted(CONF.glob("*/*.yaml"))):
        text = file.read_text(encoding="utf-8")
        top = file.parent == CONF or "@package _global_" in text
        walk(yaml.safe_load(text) or {}, "" if top else f"{file.parent.name}.")
    return list(keys)


@contextmanager
def known_models(overrides: Sequence[str]) -> Iterator[None]:
    """Make ``model=NAME`` work for torchvision's classifiers, which have no file in ``conf/``.

    A name without a file becomes a configuration whose constructor looks the name up when the
    model is built, so that torchvision is imported only then.
    """
    from hydra.core.config_store import ConfigStore

    names = [
        name
        for override in overrides
        if override.startswith("model=")
        for name in override.removeprefix("model=").split(",")
        if re.fullmatch(r"\w+", name) and not (CONF / "model" / f"{name}.yaml").exists()
    ]
    store = ConfigStore.instance()
    for name in _torchvision_names().intersection(names) if names else ():
        node = {
            "_target_": "fedsys.models.torchvision_classifier",
            "name": name,
            "norm": "batch",
            "init": None,
        }
        store.store(group="model", name=name, node=node, provider="torchvision")
    for override in overrides:
        if override.startswith("fleet=") and override.endswith((".yaml", ".yml")):
            _store_fleet(override.removeprefix("fleet="))
    yield


def _store_fleet(path: str) -> None:
    """Make ``fleet=PATH.yaml`` work: a file of the user's, over the defaults of ``fleet=local``."""
    import yaml
    from hydra.core.config_store import ConfigStore

    try:
        own = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError.of("fleet", path, f"cannot be read: {first_line(error)}") from error
    if not isinstance(own, dict):
        raise ConfigError.of("fleet", path, "must hold a mapping of keys to values")
    local = yaml.safe_load((CONF / "fleet" / "local.yaml").read_text(encoding="utf-8"))
    parts = [part for part in path.split("/") if part]
    ConfigStore.instance().store(
        group="/".join(["fleet", *parts[:-1]]), name=parts[-1], node={**local, **own},
        package="fleet", provider="file",
    )  # fmt: skip


_varying: tuple[str, ...] = ()
"""Keys and groups in which the runs of the sweep differ that goes on in this process."""


@contextmanager
def sweeping(overrides: Sequence[str]) -> Iterator[list[dict[str, str]]]:
    """Know what differs between the runs of a sweep, as long as it lasts.

    Args:
        overrides: The command line of the sweep.

    Yields:
        For each run, in order, its values by key or group; empty if there is no telling, because
        the sweep is another one than of lists and ranges.
    """
    global _varying
    runs = _runs_of(overrides)
    _varying = tuple(runs[0]) if runs else ()
    try:
        yield runs
    finally:
        _varying = ()


def _runs_of(overrides: Sequence[str]) -> list[dict[str, str]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        several = {
            override.key_or_group.replace("/", "."): list(override.sweep_string_iterator())
            for override in parsed
            if override.is_sweep_override()
        }
    except (HydraException, NotImplementedError):
        return []
    several = {k: [MASK] * len(v) if is_secret(k) else v for k, v in several.items()}
    combined = itertools.product(*several.values())
    return [dict(zip(several, map(str, values), strict=True)) for values in combined]


def varying() -> tuple[str, ...]:
    """Return the keys and groups in which the runs of the present sweep differ."""
    return _varying
