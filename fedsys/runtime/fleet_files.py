"""A fleet as one file, and what each bundle says.

::

    name: farm                                  # fleet.yaml
    server: {hosts: [superlink.example, 10.0.0.1]}
    edges:
      - {name: edge-a, hosts: [edge-a.example]}
    devices:                                    # or devices: 4
      - {data: /srv/images}
      - {}

Nothing heavy is imported here: a device's own process stays small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from fedsys.config.building import build
from fedsys.errors import ConfigError, first_line

CONTROLLER: Final = "server"
"""Name in the certificate of the server app."""

HOLDER: Final = "device-{client}"
"""Name in the certificate of the device with a partition id."""

AUTHORITY: Final = "authority"
SERVER: Final = "server"
NODE_KEY: Final = "node-key"
LOOPBACK: Final = ("localhost", "127.0.0.1")

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

T = TypeVar("T")


@dataclass(frozen=True)
class ServerMachine:
    """Where the SuperLink is.

    Attributes:
        hosts: Names and addresses at which it is dialled; devices are told the first.
        port: Where it listens, on all interfaces.
        folder: Where the bundle will lie on that machine; empty for where it is written.
    """

    hosts: tuple[str, ...]
    port: int = 8000
    folder: str = ""


@dataclass(frozen=True)
class EdgeMachine:
    """Where an edge server is.

    Attributes:
        name: As runs and logs call it.
        hosts: Names and addresses at which it is dialled; devices and server are told the first.
        port: Where it listens, on all interfaces.
    """

    name: str
    hosts: tuple[str, ...]
    port: int = 9443


@dataclass(frozen=True)
class DeviceMachine:
    """A device.

    Attributes:
        data: Folder of its own images there; empty for its part of the data of a run.
    """

    data: str = ""


@dataclass(frozen=True)
class FleetFile:
    """What ``fleet.yaml`` says.

    Attributes:
        server: The one server.
        devices: In the order of their partition ids.
        edges: For split training.
        name: Of the fleet.
        days: How long certificates are valid.
    """

    server: ServerMachine
    devices: tuple[DeviceMachine, ...]
    edges: tuple[EdgeMachine, ...] = ()
    name: str = "fleet"
    days: int = 365

    def __post_init__(self) -> None:
        for key, name in [("name", self.name), *(("edges.name", e.name) for e in self.edges)]:
            if not _NAME.fullmatch(name) or name in (AUTHORITY, SERVER) or "device" in name:
                rule = "must be of small letters, digits and -, and not the name of another part"
                raise ConfigError.of(key, name, rule, "for instance edge-a")
        names = [edge.name for edge in self.edges]
        if len(set(names)) < len(names):
            raise ConfigError.of("edges.name", ", ".join(names), "must differ from each other")
        places: list[tuple[str, ServerMachine | EdgeMachine]] = [("server", self.server)]
        places += [(edge.name, edge) for edge in self.edges]
        for key, place in places:
            if not place.hosts or not all(place.hosts):
                rule = "must name at least one host or address at which it is dialled"
                raise ConfigError.of(f"{key}.hosts", list(place.hosts), rule)
            if not 0 < place.port < 2**16:
                raise ConfigError.of(f"{key}.port", place.port, "must be a port, 1 to 65535")
        if not self.devices:
            raise ConfigError.of("devices", 0, "must be at least one")
        if self.days < 1:
            raise ConfigError.of("days", self.days, "must be at least 1")


@dataclass(frozen=True)
class DeviceBundle:
    """What ``device.yaml`` says; files are beside it.

    Attributes:
        name: As in its certificate; ends with the partition id.
        partition: The partition id.
        server: ``host:port`` of the SuperLink.
        data: Folder of its own images; empty for its part of the data of a run.
        poll_s: Seconds between two questions for work.
    """

    name: str
    partition: int
    server: str
    data: str = ""
    poll_s: float = 3.0


@dataclass(frozen=True)
class ServerBundle:
    """What ``server.yaml`` says; files are beside it.

    Attributes:
        name: Of the fleet.
        port: Of the SuperLink, on all interfaces.
    """

    name: str
    port: int


@dataclass(frozen=True)
class EdgeBundle:
    """What ``edge.yaml`` says; files are beside it.

    Attributes:
        name: Of the edge server.
        address: Where it listens.
    """

    name: str
    address: str


def read_fleet(file: Path) -> FleetFile:
    """Return what a fleet file says; ``devices: 4`` stands for four without data of their own.

    Raises:
        ConfigError: It cannot be read, or says something that is not usable.
    """
    values = _mapping(file, "fleet")
    if type(values.get("devices")) is int:
        values["devices"] = [{} for _ in range(values["devices"])]
    try:
        made: FleetFile = build(FleetFile, values, "")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return made


def read_bundle(folder: Path, kind: type[T]) -> tuple[T, Path]:
    """Return what the file of a bundle says, and the folder of the bundle.

    Args:
        folder: Of the bundle, or its file.
        kind: `DeviceBundle`, `ServerBundle` or `EdgeBundle`.

    Raises:
        ConfigError: It is not there, of another kind of machine, or damaged.
    """
    role = kind.__name__.removesuffix("Bundle").lower()
    file = folder / f"{role}.yaml" if folder.is_dir() else folder
    if not file.is_file():
        rule = f"must be a bundle of fedsys provision, with {role}.yaml"
        others = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
        raise ConfigError.of("bundle", folder, rule, f"there is {others[0]}" if others else "")
    try:
        made: T = build(kind, _mapping(file, "bundle"), "")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return made, file.parent.absolute()


def _mapping(file: Path, what: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError.of(what, file, f"cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError.of(what, file, "must hold keys and values")
    return values
