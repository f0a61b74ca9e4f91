"""Hydra's seams: the groups in ``conf/``, names that have no file there, and its errors."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedsys.config import reading
from fedsys.config.secret import MASK, is_secret
from fedsys.errors import ConfigError, better_name, did_you_mean, first_line, is_installed

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


def composed(overrides: Sequence[str]) -> DictConfig:
    """Return ``conf/config.yaml`` with overrides, as Hydra composes it.

    A process composes many runs that differ in a few values: what only chooses from the groups is
    composed once, and values are set in a copy of that, as Hydra sets them at its end.

    Raises:
        HydraException: There is no such choice or option, or it cannot have this value.
        OmegaConfBaseException: Likewise.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    choices, values = _divided(overrides)
    if values is None:
        return _by_hydra(CONF, overrides)
    tree = copy.deepcopy(_chosen(CONF, choices))
    try:
        for key, value in values:
            OmegaConf.update(tree, key, value, merge=True)
    except OmegaConfBaseException:  # Hydra says more about it
        return _by_hydra(CONF, overrides)
    return tree


def _divided(
    overrides: Sequence[str],
) -> tuple[tuple[str, ...], list[tuple[str, Any]] | None]:
    """Divide overrides into choices from groups, and new values of keys that there are.

    Returns:
        The choices, and the values in their order; None where there are others, or where a choice
        depends on more than its text.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    choices, values = list[str](), list[tuple[str, Any]]()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, text = override.key_or_group, str(override.input_line)
        if override.package is not None or override.is_sweep_override():
            return (), None
        if (CONF / key).is_dir() and not text.endswith((".yaml", ".yml")):
            choices.append(text)
        elif override.type is OverrideType.CHANGE and not override.is_hydra_override():
            values.append((key, override.value()))
        else:
            return (), None
    return tuple(choices), values


def _by_hydra(folder: Path, overrides: Sequence[str]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with within_hydra(), swiftly(()), initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", overrides=list(overrides))


_chosen = functools.lru_cache(maxsize=32)(_by_hydra)


def renamed(override: str) -> str:
    """Return an override with the present name of its group.

    Raises:
        ConfigError: The group is to be several choices that are no names, of which Hydra makes a
            TypeError.
    """
    match = re.match(r"([+~]*)(\w+)(?=[.=])", override)
    if match is None:
        return override
    group = RENAMED.get(match[2], match[2])
    several = re.fullmatch(r"=\[(.*)\]", override[match.end() :])
    if several and (CONF / group).is_dir():
        names = [name.strip() for name in several[1].split(",")]
        if not all(re.fullmatch(r"[A-Za-z_][\w./-]*", name) for name in names):
            rule = f"must be one of its choices: {', '.join(options_of(group))}"
            raise ConfigError.of(group, f"[{several[1]}]", rule)
    return f"{match[1]}{group}{override[match.end() :]}"


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
    if match := re.fullmatch(r"Error merging override \+*([^=]+)=(.*)", text):
        return _no_such_kind(match[1], match[2], error.__cause__)
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = match.groups()
        known = options_of(group)
        if not known:
            return f"{group}={name}: there is no group '{group}'; see --help for all of them"
        others = _torchvision_names() if group == "model" else set()
        more = " and the classifiers of torchvision" if group == "model" else ""
        more += "" if others or not more else ", with pip install 'fedsys[vision]'"
        return (
            f"{group}={name}: no such choice; {did_you_mean(name, [*known, *sorted(others)])}"
            f"known are {', '.join(known)}{more}"
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


def _no_such_kind(key: str, value: str, reason: BaseException | None) -> str:
    """Return what is wrong with a value of another kind than what stands in its place."""
    if getattr(reason, "object_type", None) is dict:
        return f"{key}={value}: must be a group of options; {key}.OPTION=VALUE sets one of them"
    if getattr(reason, "object_type", None) is list:
        return f"{key}={value}: must be a list"
    return f"{key}={value}: {first_line(reason) if reason else 'does not fit what is there'}"


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
    """Return the names of torchvision's classifiers; none where it is not installed."""
    if not is_installed("torchvision"):
        return set()
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


@contextmanager
def swiftly(overrides: Sequence[str], flags: Sequence[str] = ()) -> Iterator[None]:
    """Have Hydra's command read its files by the parser in C, and compose them once, in the block.

    Hydra composes all of a configuration just to see whether it asks for a sweep in ``hydra.mode``,
    and then once more. Where nobody could have set that, it is told at once that nobody has.

    What is private in Hydra and used here: what asks for the mode, and what reads a file.
    `tests/config/test_reading.py` fails when one of them changes.

    Args:
        overrides: The command line.
        flags: Its flags, of which one may name a folder with other settings of Hydra's.
    """
    from hydra._internal.core_plugins import file_config_source
    from hydra._internal.hydra import Hydra
    from hydra.core.plugins import Plugins

    Plugins.instance()  # looks for plugins, which executes their modules once more
    names = vars(file_config_source)
    outer_mode, outer_reader = Hydra.get_mode, names["OmegaConf"]
    names["OmegaConf"] = _ByParserInC(outer_reader)
    keys = [override.partition("=")[0] for override in overrides]
    if not flags and not any("hydra" in key or EXPERIMENT in key for key in keys):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode, names["OmegaConf"] = outer_mode, outer_reader  # type: ignore[method-assign]


class _ByParserInC:
    """`OmegaConf` to what reads a file for Hydra: the same trees, by another parser."""

    def __init__(self, outer: Any) -> None:
        self._outer = outer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outer, name)

    def load(self, file: TextIO) -> Any:
        """Return what a file says."""
        begin = file.tell()
        tree = reading.parsed(file.read())
        if isinstance(tree, dict):
            return self._outer.create(tree)
        file.seek(begin)
        return self._outer.load(file)


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
