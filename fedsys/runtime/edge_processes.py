"""Edge servers as processes of a deployment on this machine: ``fedsys edge``, one for each.

::

    RUN/flower/
    ├── edge-0.log  edge-1.log  …      what they say
    └── secrets/links/                 certificates of edges, server app and devices

Each end of a link checks the other's certificate, an edge obeys the holder of the server app's
only, and a session belongs to the device for which it was opened. An edge that ends is not the end
of the run: the fleet goes on without it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from fedsys.config import Config, EdgeAddress, edge_names
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runtime.fleet_files import CONTROLLER, HOLDER
from fedsys.runtime.processes import Processes
from fedsys.transport.security import Authority

HOST: Final = "127.0.0.1"
START_S: Final = 120.0
"""Longest time for an edge server to be healthy after its start, in seconds."""

RUN_CONFIG_KEY: Final = "edges"
"""Key of the run config that tells the server app which edge servers were launched for it."""


def credentials_of_device(folder: Path, partition: int) -> Path:
    """Return where a deployment keeps the certificate of a device; there may be none."""
    return folder / "secrets" / "links" / HOLDER.format(client=partition)


def with_launched(config: Config, run_config: Mapping[str, Any]) -> Config:
    """Return the configuration of a run with the edge servers that were launched for it.

    They are not part of its text: when the run is continued, there are others.
    """
    told = str(run_config.get(RUN_CONFIG_KEY, ""))
    if not told:
        return config
    fields = json.loads(told)
    edges = tuple(EdgeAddress(**edge) for edge in fields["edges"])
    fleet = dataclasses.replace(config.fleet, edges=edges, credentials=fields["credentials"])
    link = dataclasses.replace(config.link, holder=HOLDER)
    return dataclasses.replace(config, fleet=fleet, link=link)


def check_reachable(config: Config, superlink: str) -> None:
    """Refuse a run on several machines whose edge servers would be threads of its server app.

    Raises:
        ConfigError: The SuperLink is on another machine, and no edge server is named.
    """
    host = superlink.rpartition(":")[0].strip("[]")
    if edge_names(config) and not config.fleet.edges and host not in (HOST, "localhost", "::1"):
        raise ConfigError.of(
            "fleet.edges", "[]", f"must name edge servers that the devices of {host} can reach",
            "docs/deploy.md says how to start some; policy=none trains without",
        )  # fmt: skip


class EdgeProcesses:
    """The edge servers of one launched run; none if its devices train alone or it names others.

    Args:
        config: The run.
        folder: Of the deployment: logs and secrets.
        processes: Starts and stops them.
        note: Told when one of them ends.
    """

    def __init__(
        self, config: Config, folder: Path, processes: Processes, note: Callable[[str], None]
    ) -> None:
        self._config, self._folder, self._processes, self._note = config, folder, processes, note
        self._names = [] if config.fleet.edges else edge_names(config)
        self._addresses: dict[str, str] = {}
        self._from: dict[str, int] = {}  # where in its log an edge begins, behind former starts
        self._gone: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def start(self) -> None:
        """Make certificates and start the processes, without waiting for them."""
        if not self._names:
            return
        authority = Authority.create("fedsys edges", days=30)
        links = self._folder / "secrets" / "links"
        for name in self._names:
            authority.issue(name, [HOST], role="both", days=30).save(links / name)
        authority.issue(CONTROLLER, days=30).save(links / CONTROLLER)
        for partition in range(self._config.num_clients):
            own = credentials_of_device(self._folder, partition)
            authority.issue(own.name, days=30).save(own)
        for name in self._names:
            log = self._log_of(name)
            self._from[name] = log.stat().st_size if log.exists() else 0
            self._processes.start(name, self._command(name, links / name), vital=False)

    def _command(self, name: str, credentials: Path) -> list[str]:
        edge = self._config.edge
        return [
            "fedsys", "edge", "json=true", f"edge.name={name}",
            f"edge.address={self._config.link.between_processes}://{HOST}:0", f"edge.http={HOST}:0",
            f"edge.credentials={json.dumps(str(credentials))}",
            f"edge.controller={CONTROLLER}", f"edge.device={edge.device}",
            "edge.models=null",  # the run is the user's own, and so is the edge server
            f"edge.max_sessions={edge.max_sessions}",
            f"edge.max_session_bytes={edge.max_session_bytes}",
            f"edge.max_frame_bytes={edge.max_frame_bytes}",
            f"edge.workers={'null' if edge.workers is None else edge.workers}",
            f"edge.faults={'true' if self._config.faults.list else 'false'}",
        ]  # fmt: skip

    def wait(self) -> None:
        """Wait until all of them are healthy.

        Raises:
            RuntimeFailure: One ended, or took too long.
        """
        deadline = time.monotonic() + START_S
        with httpx.Client() as client:
            for name in self._names:
                ready = self._ready(name, deadline, self._from[name])
                try:
                    client.get(f"{ready['http']}/health").raise_for_status()
                except httpx.HTTPError as error:
                    raise RuntimeFailure(f"{name} is not healthy: {error}") from error
                self._addresses[name] = str(ready["address"])

    def _log_of(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _ready(self, name: str, deadline: float, begin: int = 0) -> Mapping[str, Any]:
        """Return what an edge server says of itself once it serves, behind a byte of its log."""
        log = self._log_of(name)
        while True:
            text = log.read_bytes()[begin:].decode(errors="replace") if log.exists() else ""
            told = [line for line in text.split("\n")[:-1] if line.startswith('{"ready": ')]
            if told:
                ready: Mapping[str, Any] = json.loads(told[-1])["ready"]
                return ready
            self._processes.check([name])
            if time.monotonic() > deadline:
                raise RuntimeFailure(f"{name} did not start within {START_S:g} s; see {log}")
            time.sleep(0.02)

    def check(self) -> None:
        """Say which of them have ended since the last call."""
        for name in self._names:
            status = self._processes.status(name)
            if status is not None and name not in self._gone:
                self._gone.add(name)
                self._note(f"edge server {name} ended with status {status}")

    def run_config(self) -> dict[str, str]:
        """Return what the server app is told: where they are, for itself and for the devices."""
        if not self._addresses:
            return {}
        edges = [
            {"name": name, "address": address, "device_address": address}
            for name, address in self._addresses.items()
        ]
        credentials = self._folder / "secrets" / "links" / CONTROLLER
        return {RUN_CONFIG_KEY: json.dumps({"edges": edges, "credentials": str(credentials)})}
