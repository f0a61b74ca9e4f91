"""The chains on which hosts fail: a model, trained once, divided among so many hosts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.commands.own_chain import made_model
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.models.layers import layered
from fedsys.pruning.portfolio import PARENT, Portfolio

_MOST = 8  # hosts
_EXPERIMENT = "+experiment=chain_of_three"


@dataclass(frozen=True)
class BenchChain:
    """A chain on which hosts fail.

    Attributes:
        name: The model, and how many hosts there are.
        config: With a portfolio, hosts that are to be started, and cuts.
    """

    name: str
    config: Config


def chains_of(config: Config, options: Mapping[str, Any]) -> Iterator[BenchChain]:
    """Yield the chains that are asked for; a model that is not there is trained.

    Args:
        config: If it has a ``portfolio``, its hosts and cuts are the only chain.
        options: ``chains`` has a mapping for each: ``model``, ``hosts``, and ``train``, further
            choices of the training by key.

    Raises:
        ConfigError: A chain has too few or too many hosts.
    """
    if config.portfolio is not None:
        yield BenchChain(f"{len(config.hosts.list)} hosts", config)
        return
    given = [text for key, text in configuration.given().items() if _is_of_model(key)]
    for place, one in enumerate(options["chains"][: 1 if options["quick"] else None]):
        count, model = int(one["hosts"]), str(one["model"])
        if not 2 <= count <= _MOST:
            rule = f"must be from 2 to {_MOST}"
            raise ConfigError.of(f"bench.chains[{place}].hosts", count, rule)
        more = [f"{key}={value}" for key, value in dict(one.get("train", {})).items()]
        chosen = [_EXPERIMENT, f"model={model}", *more, *given]
        made = made_model(configuration.parse(configuration.compose_text(" ".join(chosen))), chosen)
        serving = replace(config.serving, exits=made.serving.exits)
        own = replace(config, portfolio=made.portfolio, serving=serving)
        yield BenchChain(f"{model} on {count} hosts", _divided(own, count))


def _is_of_model(key: str) -> bool:
    return key.split(".")[0] in ("data", "client", "num_clients", "rounds", "seed", "resilience")


def _divided(config: Config, count: int) -> Config:
    """Return the configuration with so many hosts of about equally many units each."""
    portfolio = Portfolio.load(Path(str(config.portfolio)))
    layers = layered(portfolio.module(PARENT), portfolio.about.input_shape)
    cuts = _near([len(layers) * place / count for place in range(1, count)], layers.cuts)
    first = config.hosts.list[0]
    names = ["device", *(f"edge{k}" for k in range(1, count - 1)), "cloud"]
    listed = tuple(replace(first, name=name, address="", start=True) for name in names)
    hosts, partition = replace(config.hosts, list=listed), replace(config.partition, cuts=cuts)
    return replace(config, hosts=hosts, partition=partition)


def _near(wanted: Sequence[float], legal: Sequence[int]) -> tuple[int, ...]:
    """Return for each wanted cut the nearest one that is possible and behind those before."""
    found: list[int] = []
    for place, want in enumerate(wanted):
        left = len(wanted) - place - 1
        free = [cut for cut in legal if not found or cut > found[-1]]
        free = free[: len(free) - left]
        found.append(min(free, key=lambda cut: abs(cut - want)))
    return tuple(found)
