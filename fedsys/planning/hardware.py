"""The machines of a fleet file: what each takes for the model that is trained.

A fleet file names the machine of each device and edge server, and says what machines of that name
take: by the nominal rates of a class, or as ``fedsys profile`` measured it::

    machines:
      pi3: {macs_per_s: 1.0e9, source: nominal}
      bench: {model: vgg5, units: 5f0c…, rows: [1, 100], forward_s: […], …}
    devices: [pi3, bench]
    servers: [bench]

A profile holds for the units, the version of fedsys, the threads and the memory format that it was
measured with, and is refused for any others. The version of torch is that of the machine: it is
written down and not compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fedsys.config import ClientConfig, Config, NetworkConfig
from fedsys.errors import ConfigError, did_you_mean, is_number
from fedsys.identity import package_version
from fedsys.models.layers import LayeredModel
from fedsys.planning.costs import MachineClass, MachineCosts, Messaging
from fedsys.planning.misjudged import misjudged
from fedsys.planning.traces import network_of
from fedsys.transport.network import Network

PROFILE_KEYS = (
    *("rows", "forward_s", "backward_s", "update_s"),  # needed
    *("model", "units", "batch_size", "operation_s", "load_s", "message_s", "byte_s", "workers"),
    *("spread", "forward_spread", "backward_spread", "bytes_at_cuts", "names"),
    *("quota", "source", "fedsys", "torch", "threads", "memory_format", "kernels", "precision"),
)
NEEDED = 4


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machines of a run, for its model.

    Attributes:
        devices: Costs of each device.
        networks: Connection of each device.
        edges: Costs of each edge server.
    """

    devices: tuple[MachineCosts, ...]
    networks: tuple[Network, ...]
    edges: tuple[MachineCosts, ...]


def network_for(config: Config, partition: int) -> Network:
    """Return the network of a device of a run in bits and seconds, with its trace.

    Raises:
        ConfigError: The trace is not usable.
    """
    names = config.fleet.devices
    machine = names[partition % len(names)] if names else ""
    return network_of(link_of(config, partition), partition, machine, config.seed)


def links_of(config: Config) -> tuple[NetworkConfig, ...]:
    """Return the connections of the devices of a run, repeated if there are more devices.

    Planner, clock and emulation ask here. ``network=`` comes before the links of the fleet file, as
    what is said for a run comes before what is said of machines.
    """
    network = dataclasses.replace(config.network, emulate=False)
    return (config.network,) if network != NetworkConfig() else config.fleet.links or (network,)


def link_of(config: Config, partition: int) -> NetworkConfig:
    """Return the connection of one device."""
    links = links_of(config)
    return links[partition % len(links)]


def hardware(config: Config, layers: LayeredModel, *, believed: bool = False) -> Hardware | None:
    """Return the machines that ``fleet=`` names; None if it names no devices.

    Args:
        config: The run.
        layers: Its model.
        believed: Whether they are those that policies believe in (``fleet.believed`` and
            ``fleet.misjudged``) instead of those that they are.

    Raises:
        ConfigError: A machine is not described, or its description is not usable for this model.
    """
    fleet = config.fleet
    if not fleet.devices:
        return None
    for name in fleet.believed:
        if name not in fleet.machines:
            hint = did_you_mean(name, fleet.machines)
            raise ConfigError.of(
                f"fleet.believed.{name}", fleet.believed[name], "must be of one of fleet.machines",
                f"{hint}{', '.join(fleet.machines)}",
            )  # fmt: skip
    if not fleet.servers:
        raise ConfigError.of(
            "fleet.servers", [], "must name the machine of an edge server",
            f"one of {', '.join(fleet.machines)}",
        )  # fmt: skip
    costs: dict[str, MachineCosts] = {}

    def machines(group: str, names: Sequence[str], count: int) -> tuple[MachineCosts, ...]:
        for i, name in enumerate(names[:count]):
            if name not in costs:
                path = f"fleet.{group}[{i}]"
                costs[name] = _costs_of(config, layers, path, name, believed=believed)
        return tuple(costs[names[i % len(names)]] for i in range(count))

    return Hardware(
        machines("devices", fleet.devices, config.num_clients),
        tuple(network_for(config, k) for k in range(config.num_clients)),
        machines("servers", fleet.servers, len(fleet.edges) or config.num_edges),
    )


def _costs_of(
    config: Config, layers: LayeredModel, path: str, name: str, *, believed: bool
) -> MachineCosts:
    """Return the costs of a machine of the fleet that stands at a path."""
    fleet = config.fleet
    if name not in fleet.machines:
        hint = did_you_mean(name, fleet.machines)
        known = ", ".join(fleet.machines) or "none"
        raise ConfigError.of(path, name, "must be one of fleet.machines", f"{hint}{known}")
    group = "believed" if believed and name in fleet.believed else "machines"
    entry = fleet.believed[name] if group == "believed" else fleet.machines[name]
    made = machine_costs(f"fleet.{group}.{name}", entry, layers, config.client)
    if config.privacy.per_example:
        made = made.private()
    elif config.privacy.mechanism == "cut":
        noise = "secure" if config.privacy.secure else config.privacy.noise
        made = made.releasing(layers, noise)
    return misjudged(made, fleet.misjudged, config.seed) if believed else made


def machine_costs(
    path: str, values: object, layers: LayeredModel, client: ClientConfig | None = None
) -> MachineCosts:
    """Return what a machine takes for a model, from its entry in a fleet file.

    Args:
        path: Key of the entry, for messages.
        values: The entry: rates of a class, or a profile.
        layers: The model.
        client: How it is trained; None: as it was when it was profiled.

    Raises:
        ConfigError: A key is missing, unknown or not usable, or the profile is of other units, or
            was measured in another way.
    """
    if not isinstance(values, Mapping):
        raise ConfigError.of(path, values, "must be a group of keys", "give its macs_per_s")
    if "forward_s" not in values and "rows" not in values:
        return MachineClass.of(path, values).costs(layers)
    for key in values:
        if key not in PROFILE_KEYS:
            hint = did_you_mean(str(key), PROFILE_KEYS)
            raise ConfigError.of(f"{path}.{key}", values[key], "must be a key of a profile", hint)
    for key in PROFILE_KEYS[:NEEDED]:
        if key not in values:
            raise ConfigError.of(f"{path}.{key}", None, "must be given", "profile the machine anew")
    if client is not None:
        _check_made_for(path, values, client)
    _check_units(path, values, layers)
    return MachineCosts(
        path,
        tuple(_whole(f"{path}.rows", n) for n in _list(f"{path}.rows", values["rows"])),
        _table(f"{path}.forward_s", values["forward_s"]),
        _table(f"{path}.backward_s", values["backward_s"]),
        _numbers(f"{path}.update_s", values["update_s"]),
        _number(f"{path}.operation_s", values.get("operation_s", 0.0)),
        _number(f"{path}.load_s", values.get("load_s", 0.0)),
        Messaging(
            _number(f"{path}.message_s", values.get("message_s", 0.0)),
            {
                str(codec): _number(f"{path}.byte_s.{codec}", value)
                for codec, value in dict(values.get("byte_s", {})).items()
            },
        ),
        _whole(f"{path}.workers", values.get("workers", 1)),
    )


def _check_units(path: str, values: Mapping[str, Any], layers: LayeredModel) -> None:
    expected, found = units_sha256(layers), values.get("units")
    if found != expected:
        raise ConfigError.of(
            f"{path}.units", found,
            f"must be {expected}: it is a profile of another model or of another version of it "
            f"({values.get('model', 'unnamed')}, {len(values['update_s'])} units; "
            f"the model that is trained has {len(layers)})",
            "profile this one: fedsys profile with the same model= and data=",
        )  # fmt: skip


_ONCE = {"kernels": "plain", "precision": "fp32"}
"""What was so when profiles did not say it."""


def made_for(client: ClientConfig) -> dict[str, Any]:
    """Return what seconds depend on beside the machine and the model, as a profile notes it."""
    return {
        "fedsys": package_version("fedsys"),
        "threads": client.threads,
        "memory_format": client.memory_format,
        "kernels": client.kernels,
        "precision": client.precision,
    }


def _check_made_for(path: str, values: Mapping[str, Any], client: ClientConfig) -> None:
    for key, expected in made_for(client).items():
        found = values.get(key, _ONCE.get(key, expected))
        if found != expected:
            ours = key == "fedsys"
            whose = "the version in use" if ours else f"client.{key} of this run"
            raise ConfigError.of(
                f"{path}.{key}", found, f"must be {expected}, {whose}: costs differ between them",
                f"profile the machine anew{'' if ours else f', with client.{key}={expected}'}",
            )  # fmt: skip


def units_sha256(layers: LayeredModel) -> str:
    """Return the first 16 digits of a hash of all units: name, work, parameters, output, kinds."""
    nodes = {node.name: node for node in layers.graph.graph.nodes}
    units = [
        (u.name, u.macs, u.params, list(u.out_shape), [_kinds(layers, nodes[n]) for n in u.nodes])
        for u in layers.units
    ]
    return hashlib.sha256(json.dumps(units).encode()).hexdigest()[:16]


def _kinds(layers: LayeredModel, node: fx.Node) -> list[str]:
    """Return the kinds of all that computes at a node: norms of any kind have the same work."""
    if node.op == "call_module":
        module = layers.graph.get_submodule(str(node.target))
        return [type(inner).__name__ for inner in module.modules()]
    return [str(getattr(node.target, "__name__", node.target))]


# --------------------------------------------------------------------------------------------------
# Values of a profile


def _list(path: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError.of(path, value, "must be a list")
    return list(value)


def _number(path: str, value: object) -> float:
    if not is_number(value):
        raise ConfigError.of(path, value, "must be a number")
    return float(value)


def _whole(path: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError.of(path, value, "must be a whole number")
    return value


def _numbers(path: str, value: object) -> tuple[float, ...]:
    return tuple(_number(path, v) for v in _list(path, value))


def _table(path: str, value: object) -> tuple[tuple[float, ...], ...]:
    return tuple(_numbers(path, row) for row in _list(path, value))
