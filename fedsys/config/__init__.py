"""Configuration: from Hydra's YAML to typed values. The only package that knows OmegaConf.

A run is described by one YAML text, composed from the groups in ``conf/`` and the overrides of
the command line. The text travels as it is to every app of the run (Flower's run config holds
flat values only), where `parse` turns it into a frozen `Config` once per process. Below this
package there are only typed values and plain dicts.

`_target_` entries name constructors by dotted path, as everywhere in Hydra; they are the user's
own configuration and run with the user's rights.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fedsys import faults
from fedsys.config import mobility, reading, rules, secret, writing
from fedsys.config.building import build
from fedsys.config.composing import (
    CONF,
    composed,
    known_models,
    options_of,
    renamed,
    sweeping,
    swiftly,
    translated_errors,
    varying,
    with_present_names,
)
from fedsys.config.effect import without_effect
from fedsys.config.mobility import EdgePlace, MobilityConfig
from fedsys.config.targets import call_target, check_keywords, locate
from fedsys.config.values import (
    BETWEEN_PROCESSES,
    Apps,
    CheckpointConfig,
    ClientConfig,
    Config,
    EdgeAddress,
    EdgeConfig,
    FaultsConfig,
    FleetConfig,
    LearningRate,
    LinkConfig,
    NetworkConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    Spec,
    VariantsConfig,
)
from fedsys.errors import ConfigError, first_line

__all__ = [
    "BETWEEN_PROCESSES",
    "CONF",
    "Apps",
    "CheckpointConfig",
    "ClientConfig",
    "Config",
    "EdgeAddress",
    "EdgeConfig",
    "EdgePlace",
    "FaultsConfig",
    "FleetConfig",
    "LearningRate",
    "LinkConfig",
    "MobilityConfig",
    "NetworkConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "Spec",
    "VariantsConfig",
    "as_given",
    "call_target",
    "check_keywords",
    "compose_text",
    "divided",
    "edge_names",
    "from_run_config",
    "given",
    "given_keys",
    "known_models",
    "locate",
    "options_of",
    "parse",
    "plain",
    "public_text",
    "renamed",
    "sweeping",
    "swiftly",
    "to_text",
    "translated_errors",
    "varying",
    "with_present_names",
    "with_values",
    "without_effect",
]


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Config:
    """Turn the YAML text of a run into a checked `Config`; once per process and text.

    Raises:
        ConfigError: Names the key, its value, the rule and the way out.
    """
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = reading.read(text)
    # OmegaConf asserts that a text is a mapping or a list.
    except (OmegaConfBaseException, yaml.YAMLError, AssertionError) as error:
        raise ConfigError(f"configuration: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError("configuration: must be a mapping of keys to values")
    tree.pop("hydra", None)
    config = typing.cast(Config, build(Config, with_present_names(tree), ""))
    config = dataclasses.replace(config, text=_without_tokens(text, tree))
    rules.check(config)
    edges = edge_names(config)
    mobility.check(
        config.mobility,
        config.fleet.places,
        edges=edges,
        num_clients=config.num_clients,
        micro_batches=config.schedule.micro_batches,
    )
    planned = faults.check(
        config.faults.list,
        rounds=config.rounds,
        num_clients=config.num_clients,
        edges=edges,
    )
    return dataclasses.replace(config, faults=FaultsConfig(planned))


def _without_tokens(text: str, tree: Mapping[Any, Any]) -> str:
    """Return a text that may be written and sent; as it is, if there is nothing to be masked."""
    masked = secret.without_tokens(tree)
    return text if masked == tree else to_text(masked)


def edge_names(config: Config) -> list[str]:
    """Return the names of the edge servers of a run; none if it needs none."""
    if config.policy.get("kind", "none") == "none":
        return []
    return [e.name for e in config.fleet.edges] or [f"edge-{i}" for i in range(config.num_edges)]


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """Return the configuration that a Flower app finds in its run config.

    ``hydra-config`` holds the composed YAML when ``fedsys train`` started the run; for a bare
    ``flwr run``, ``overrides`` holds Hydra overrides and the groups are composed here.
    """
    text = str(run_config.get("hydra-config", ""))
    return parse(text or compose_text(str(run_config.get("overrides", ""))))


@functools.lru_cache(maxsize=8)
def compose_text(overrides: str) -> str:
    """Compose ``conf/config.yaml`` with overrides in shell syntax; return resolved YAML."""
    arguments = [renamed(override) for override in shlex.split(overrides)]
    with translated_errors(), known_models(arguments):
        return to_text(composed(arguments))


def to_text(tree: Any) -> str:
    """Return the resolved YAML of a composed configuration, or of plain dicts and lists."""
    values: Any = reading.copied(tree)
    if values is None:
        from omegaconf import OmegaConf

        with translated_errors():
            made = tree if OmegaConf.is_config(tree) else OmegaConf.create(tree)
            values = OmegaConf.to_container(made, resolve=True, enum_to_str=True)
    if isinstance(values, dict):
        _make_absolute(values)
    return writing.written(values)


def _make_absolute(values: dict[Any, Any]) -> None:
    """Make the paths of traces absolute: whoever reads the text has another working directory."""
    fleet, moving = values.get("fleet"), values.get("mobility")
    links = fleet.get("links") if isinstance(fleet, dict) else None
    for link in (values.get("network"), *(links or ())):
        if isinstance(link, dict) and link.get("trace"):
            link["trace"] = _absolute(link["trace"])
    if isinstance(moving, dict) and moving.get("file"):
        moving["file"] = _absolute(str(moving["file"]))


def _absolute(trace: Any) -> Any:
    """Return a trace with absolute paths."""
    if isinstance(trace, str):
        return str(Path(trace).expanduser().absolute())
    if isinstance(trace, list):
        return [_absolute(inner) for inner in trace]
    if isinstance(trace, dict) and "generate" not in trace:
        return {key: _absolute(inner) for key, inner in trace.items()}
    return trace


def plain(tree: Any) -> dict[str, Any]:
    """Return a composed configuration as resolved plain dicts and lists."""
    from omegaconf import OmegaConf

    with translated_errors():
        return typing.cast(
            dict[str, Any], OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        )


def with_values(text: str, **values: Any) -> str:
    """Return the YAML of a run with other values for some of its top-level keys."""
    tree = reading.parsed(text)
    merged = reading.merged(tree, values)
    if merged is not None:
        return to_text(merged)
    from omegaconf import OmegaConf

    return to_text(OmegaConf.merge(OmegaConf.create(tree), OmegaConf.create(values)))


def public_text(text: str) -> str:
    """Return the YAML of a run without its secrets; as it is, if there are none."""
    with translated_errors():
        tree = reading.read(text)
    masked = secret.public(tree)
    return text if masked == tree else to_text(masked)


def divided(config: Config, num_clients: int) -> Config:
    """Return the configuration of the same run among another number of clients."""
    return parse(_divided_text(config.text, num_clients))


@functools.lru_cache(maxsize=8)
def _divided_text(text: str, num_clients: int) -> str:
    return with_values(text, num_clients=num_clients)


_told: ContextVar[Sequence[str] | None] = ContextVar("told", default=None)


@contextmanager
def as_given(overrides: Sequence[str]) -> Iterator[None]:
    """Take overrides for what the command line says, in the block: a job is called from Python."""
    token = _told.set(tuple(overrides))
    try:
        yield
    finally:
        _told.reset(token)


def given_keys() -> list[str]:
    """Return the keys and groups that the command line of this job names, with dots."""
    return list(given())


def given() -> dict[str, str]:
    """Return what the command line of this job says, by key or group with dots."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if (told := _told.get()) is not None:
        texts = list(told)
    elif HydraConfig.initialized():
        texts = list(HydraConfig.get().overrides.task)
    else:  # a job that was called by its function
        return {}
    parsed = OverridesParser.create().parse_overrides(texts)
    return {
        override.key_or_group.replace("/", "."): text
        for override, text in zip(parsed, texts, strict=True)
    }
