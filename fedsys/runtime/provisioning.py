"""A bundle for each machine of a fleet: what it needs, and nobody else's keys.

::

    FOLDER/
    ├── authority/           ca.pem, ca-key.pem: makes and renews the others; goes to no machine
    ├── server/              server.yaml  ca.pem cert.pem key.pem  executors.secret
    │   ├── link/            the certificate by which the server app controls edge servers
    │   ├── nodes/           device-0.pub …: who may join
    │   └── conf/experiment/ NAME.yaml: what a run on this fleet says
    ├── edge-a/              edge.yaml    ca.pem cert.pem key.pem
    └── device-0/            device.yaml  ca.pem cert.pem key.pem  node-key

Private keys are written with mode 0600 in folders of mode 0700. Provisioning again with a changed
file adds machines and renews certificates; keys of nodes, by which the SuperLink knows them, stay.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsys.files import write_atomic, write_new, writing
from fedsys.runtime.fleet_files import (
    AUTHORITY,
    CONTROLLER,
    HOLDER,
    LOOPBACK,
    NODE_KEY,
    SERVER,
    DeviceBundle,
    DeviceMachine,
    EdgeBundle,
    EdgeMachine,
    FleetFile,
    ServerBundle,
    ServerMachine,
)
from fedsys.runtime.supernode import interval_s
from fedsys.transport.security import Authority


def provision(fleet: FleetFile, folder: Path) -> dict[str, Path]:
    """Write or renew the bundles of a fleet.

    Returns:
        The folder of each machine, by name.

    Raises:
        RunError: A file cannot be written.
        SecurityError: The authority that is there is damaged.
    """
    with writing(folder):
        _private_folder(folder)
        if (folder / AUTHORITY).is_dir():
            authority = Authority.load(folder / AUTHORITY)
        else:
            _private_folder(folder / AUTHORITY)
            authority = Authority.create(fleet.name, days=3650)
            authority.save(folder / AUTHORITY)
        made = {SERVER: _server(fleet, authority, folder / SERVER)}
        for edge in fleet.edges:
            made[edge.name] = _edge(fleet, edge, authority, folder / edge.name)
        for partition, device in enumerate(fleet.devices):
            name = HOLDER.format(client=partition)
            made[name] = _device(fleet, partition, device, authority, folder / name)
            public = (made[name] / f"{NODE_KEY}.pub").read_bytes()
            write_atomic(folder / SERVER / "nodes" / f"{name}.pub", public)
    return made


def _server(fleet: FleetFile, authority: Authority, folder: Path) -> Path:
    inner = ("link", "nodes", "conf", "conf/experiment")
    for place in (folder, *(folder / name for name in inner)):
        _private_folder(place)
    hosts = dict.fromkeys((*fleet.server.hosts, *LOOPBACK))
    authority.issue("superlink", [*hosts], role="server", days=fleet.days).save(folder)
    authority.issue(CONTROLLER, days=fleet.days).save(folder / "link")
    secret = folder / "executors.secret"
    if not secret.exists():
        write_new(secret, secrets.token_hex(32).encode(), 0o600)
    _write_yaml(folder / "server.yaml", ServerBundle(fleet.name, fleet.server.port))
    there = Path(fleet.server.folder) if fleet.server.folder else folder.absolute()
    text = "# @package _global_\n" + yaml.safe_dump(run_on(fleet, there), sort_keys=False)
    write_atomic(folder / "conf/experiment" / f"{fleet.name}.yaml", text.encode())
    return folder


def run_on(fleet: FleetFile, server: Path) -> dict[str, Any]:
    """Return what the configuration of a run on a fleet says, as an experiment of ``conf/``.

    Args:
        fleet: The machines.
        server: Folder of the server's bundle there.
    """
    edges = [{"name": edge.name, "address": f"tcp://{_dialled(edge)}"} for edge in fleet.edges]
    split = {
        "fleet": {"credentials": str(server / "link"), "edges": edges},
        "link": {"holder": HOLDER},
    }
    return {
        "defaults": [{"override /runtime": "deployment"}],
        "num_clients": len(fleet.devices),
        "runtime": {
            "superlink": _dialled(fleet.server),
            "root_certificates": str(server / "ca.pem"),
        },
        **(split if edges else {}),
    }


def _edge(fleet: FleetFile, edge: EdgeMachine, authority: Authority, folder: Path) -> Path:
    _private_folder(folder)
    hosts = dict.fromkeys((*edge.hosts, *LOOPBACK))
    authority.issue(edge.name, [*hosts], role="both", days=fleet.days).save(folder)
    _write_yaml(folder / "edge.yaml", EdgeBundle(edge.name, f"tcp://0.0.0.0:{edge.port}"))
    return folder


def _device(
    fleet: FleetFile, partition: int, device: DeviceMachine, authority: Authority, folder: Path
) -> Path:
    _private_folder(folder)
    name = HOLDER.format(client=partition)
    authority.issue(name, days=fleet.days).save(folder)
    key, public = folder / NODE_KEY, folder / f"{NODE_KEY}.pub"
    if not public.exists():  # the last of both to be written
        key.unlink(missing_ok=True)
        write_atomic(public, write_node_key(key))
    poll_s = interval_s(len(fleet.devices))
    about = DeviceBundle(name, partition, _dialled(fleet.server), device.data, poll_s)
    _write_yaml(folder / "device.yaml", about)
    return folder


def _dialled(place: ServerMachine | EdgeMachine) -> str:
    host = place.hosts[0]
    return f"[{host}]:{place.port}" if ":" in host else f"{host}:{place.port}"


def _write_yaml(file: Path, value: Any) -> None:
    values: Mapping[str, Any] = dataclasses.asdict(value)
    write_atomic(file, yaml.safe_dump(dict(values), sort_keys=False).encode())


def _private_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def write_node_key(file: Path) -> bytes:
    """Write a new private key for a SuperNode and return its public key in PEM.

    Flower reads keys in OpenSSH's format and knows the curves of NIST.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(private)
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def public_keys(folder: Path) -> Sequence[tuple[str, bytes]]:
    """Return name and public key of each node that a server's bundle lets in."""
    return [(file.stem, file.read_bytes()) for file in sorted((folder / "nodes").glob("*.pub"))]
