"""The edge servers of a run: started as threads for it, or already there and connected to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedsys.config import Config, EdgeAddress, edge_names, secret
from fedsys.errors import ConfigError
from fedsys.faults import Faults
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import Fleet
from fedsys.training import plain as training
from fedsys.transport.security import Credentials, new_token


@contextmanager
def open_fleet(config: Config, faults: Faults | None = None) -> Iterator[Fleet | None]:
    """Return a handle on the edge servers that a run needs, for the length of a block.

    Args:
        config: The run.
        faults: What is to strike its edges and links.

    Yields:
        The fleet; None where everything stays on the devices.

    Raises:
        ConfigError: The kind of link does not fit the runtime.
        LinkError: An edge server does not answer.
    """
    if config.policy.get("kind", "none") == "none":
        yield None
        return
    links = config.fleet.between
    between = {"latency_ms": links.latency_ms}
    if links.mbit_s is not None:
        between["mbit_s"] = links.mbit_s
    shaped = between if config.network.emulate and any(between.values()) else None
    folder = config.fleet.credentials or config.link.credentials
    credentials = Credentials.load(Path(folder)) if folder else None
    if config.fleet.edges:
        with Fleet(
            config.fleet.edges,
            credentials=credentials,
            control_token=secret.control_token(config.fleet, "fleet"),
            faults=faults,
            between=shaped,
        ) as fleet:
            yield fleet
        return
    token, kind = new_token(), link_kind(config)
    with ExitStack() as stack:
        servers = [_start(config, kind, n, token, credentials) for n in edge_names(config)]
        for server in servers:
            stack.callback(server.stop, 0.0)
        here = [EdgeAddress(server.name, server.address) for server in servers]
        fleet = Fleet(
            here, credentials=credentials, control_token=token, faults=faults, between=shaped
        )
        yield stack.enter_context(fleet)


def _start(
    config: Config, kind: str, name: str, token: str, credentials: Credentials | None
) -> EdgeServer:
    # In memory, names are those of the process: a second run beside this one has its own.
    address = f"memory://{name}-{token[:8]}" if kind == "memory" else f"{kind}://127.0.0.1:0"
    device = training.pick_device(config.edge.device)
    return EdgeServer(
        name,
        address,
        control_token=token,
        device=device,
        credentials=credentials,
        crash=EdgeServer.kill,
    )


def link_kind(config: Config) -> str:
    """Return ``memory``, ``grpc`` or ``tcp``.

    Raises:
        ConfigError: Memory was asked for, and devices are in other processes.
    """
    local = config.runtime.kind == "local"
    if config.link.kind == "auto":
        return "memory" if local else config.link.between_processes
    if config.link.kind == "memory" and not local:
        raise ConfigError.of(
            "link.kind", "memory", f"cannot reach the processes of runtime={config.runtime.kind}",
            "use link=grpc or link=tcp",
        )  # fmt: skip
    return config.link.kind
