"""From the groups `hosts` and `partition` to a problem: indices, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsys.config import Config, NetworkConfig
from fedsys.config.partition import HostConfig
from fedsys.errors import ConfigError, did_you_mean
from fedsys.models.layers import LayeredModel
from fedsys.partition.problem import Constraints, Host, Problem, host_index
from fedsys.planning.hardware import machine_costs
from fedsys.planning.traces import network_of
from fedsys.transport.network import Network

_MB = 1e6


def problem_of(
    config: Config, layers: LayeredModel, input_shape: Sequence[int],
    described: LayeredModel | None = None,
) -> Problem:  # fmt: skip
    """Return what the configuration asks about a model.

    Args:
        config: Its ``hosts``, ``network`` and ``partition`` count.
        layers: The model.
        input_shape: Of an example, without the batch.
        described: The chain of units that hosts are given the costs of; None: `layers`.

    Raises:
        ConfigError: A host, a unit or a machine is not known, or there is not one link between
            each two neighbours.
    """
    hosts = hosts_of(config, described or layers)
    options = config.partition
    return Problem.of(
        layers,
        input_shape,
        hosts,
        networks_of(config),
        rows=options.batch,
        codecs=options.codecs,
        requests_per_s=options.requests_per_s,
        constraints=constraints_of(config, layers, hosts),
    )


def hosts_of(config: Config, layers: LayeredModel) -> tuple[Host, ...]:
    """Return the hosts with what they take for a model.

    Raises:
        ConfigError: There are fewer than two, two of one name, or a machine is not described.
    """
    listed = config.hosts.list
    names = [host.name for host in listed]
    if len(listed) < 2:
        rule, way_out = "must name at least two machines", "hosts=device_edge_cloud has three"
        raise ConfigError.of("hosts.list", names, rule, way_out)
    if len(set(names)) < len(names):
        raise ConfigError.of("hosts.list", names, "must have a name of its own for each host")
    return tuple(_host(config, layers, index) for index in range(len(listed)))


def _host(config: Config, layers: LayeredModel, index: int) -> Host:
    one, machines = config.hosts.list[index], config.hosts.machines
    path = f"hosts.list[{index}]"
    if one.machine not in machines:
        hint = did_you_mean(one.machine, machines)
        rule = f"must be one of hosts.machines: {', '.join(machines) or 'none'}"
        raise ConfigError.of(f"{path}.machine", one.machine, rule, hint)
    costs = machine_costs(f"hosts.machines.{one.machine}", machines[one.machine], layers)
    _check(path, one)
    memory = math.inf if one.memory_mb is None else one.memory_mb * _MB
    waiting = one.waiting_ms / 1e3
    return Host(one.name, costs, memory, one.power_w, one.radio_w, waiting)


def _check(path: str, one: HostConfig) -> None:
    for key in ("memory_mb", "power_w", "radio_w", "waiting_ms"):
        value = getattr(one, key)
        if value is not None and value < 0:
            raise ConfigError.of(f"{path}.{key}", value, "must not be negative")


def links_between(config: Config) -> tuple[NetworkConfig, ...]:
    """Return the networks between neighbours; ``network=``, where it is chosen, is the first."""
    links = list(config.hosts.links)
    if config.network.name != NetworkConfig().name:
        links[:1] = [config.network]
    return tuple(links)


def networks_of(config: Config) -> tuple[Network, ...]:
    """Return the networks between neighbours in bits and seconds, as they are at the beginning.

    Raises:
        ConfigError: A trace is not usable, or a rate is not above 0.
    """
    return tuple(network.at(0.0) for network in traced_networks_of(config))


def traced_networks_of(config: Config) -> tuple[Network, ...]:
    """Return the networks between neighbours in bits and seconds, with their traces.

    Raises:
        ConfigError: A trace is not usable, or a rate is not above 0.
    """
    return tuple(network_of(link, 0, "", config.seed) for link in links_between(config))


def constraints_of(config: Config, layers: LayeredModel, hosts: Sequence[Host]) -> Constraints:
    """Return what a partition must obey.

    Raises:
        ConfigError: A host or a unit is not known, or a value is not usable.
    """
    options, names = config.partition, [unit.name for unit in layers.units]
    must = {
        _unit(names, unit, "partition.must"): host_index(hosts, str(host), f"partition.must.{unit}")
        for unit, host in _flat(options.must or {})
    }
    must_not = {
        (_unit(names, unit, f"partition.must_not.{host}"), index)
        for host, units in (options.must_not or {}).items()
        for index in (host_index(hosts, host, "partition.must_not"),)
        for unit in _listed(f"partition.must_not.{host}", units)
    }
    upload = {
        host_index(hosts, host, "partition.upload_mb"): _positive(f"partition.upload_mb.{host}", mb)
        for host, mb in (options.upload_mb or {}).items()
    }
    limit = math.inf if options.time_limit_ms is None else options.time_limit_ms / 1e3
    return Constraints(must, frozenset(must_not), upload, limit)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names with dots and values: Hydra makes groups of names with dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unit(names: Sequence[str], name: str, path: str) -> int:
    if name not in names:
        rule = f"must be one of the units {', '.join(names)}"
        raise ConfigError.of(path, name, rule, did_you_mean(name, names))
    return names.index(name)


def _listed(path: str, value: object) -> list[str]:
    if not isinstance(value, list | tuple):
        raise ConfigError.of(path, value, "must be a list of units")
    return [str(item) for item in value]


def _positive(path: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigError.of(path, value, "must be megabytes, 0 or more")
    return float(value) * _MB
