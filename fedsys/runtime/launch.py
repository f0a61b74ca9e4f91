"""A whole deployment on this machine for one run: SuperLink, SuperNodes and their executors.

::

    RUN/flower/
    ├── superlink.db       the SuperLink's state: killed and started again, it goes on with its run
    ├── superlink.log  superlink-executor.log  node-0.log  node-0-executor.log  edge-0.log  …
    ├── secrets/           certificates, node keys, the executors' secret; gone after the run
    └── home/              Flower's own folder (FLWR_HOME); gone after the run, also a killed one

Everything speaks TLS with certificates made for this run, listens on 127.0.0.1 only, and each
node is known to the SuperLink by its key. Apps run in processes of executors beside SuperLink and
SuperNodes (process isolation), so that the server app outlives its SuperLink.
"""

from __future__ import annotations

import os
import secrets
import shutil
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from fedsys.config import Config
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runs import startup as stages
from fedsys.runs.progress import Progress
from fedsys.runtime import flower_commands, supernode
from fedsys.runtime.control import SuperLinkAddress, SuperLinkClient
from fedsys.runtime.edge_processes import EdgeProcesses, credentials_of_device
from fedsys.runtime.processes import Processes, free_ports, is_free
from fedsys.runtime.provisioning import write_node_key
from fedsys.runtime.server_side import ServerSide
from fedsys.transport.security import Authority

HOST = "127.0.0.1"
START_S = 120.0
"""Longest time for the SuperLink to answer after its start, in seconds."""

RESTARTS = 6
"""How many times the processes of a device are started again."""

RESTART_S = 20.0
"""Seconds between two such starts: Flower refuses a node that died until it has noticed that, which
takes it a minute."""

PRIVATE = ("secrets", "home")
"""Folders that nobody needs after the run."""

Check = Callable[[], None]


@dataclass(frozen=True)
class Launched:
    """A deployment that runs.

    Attributes:
        address: Of its SuperLink.
        check: Raises if a process has ended that should not have.
        run_config: What its server app is to be told besides the configuration of the run.
    """

    address: SuperLinkAddress
    check: Check
    run_config: Mapping[str, str]


@contextmanager
def launched(config: Config, progress: Progress) -> Iterator[Launched]:
    """Start everything, yield what is to be known of it, and stop everything again.

    Raises:
        ConfigError: The port that the configuration names is in use.
        RuntimeFailure: A process did not start.
    """
    assert config.run.dir is not None
    folder = Path(config.run.dir) / "flower"
    port = _port(config.runtime.superlink)
    deployment = Deployment.prepare(folder, port, config.num_clients)
    try:
        progress.phase("starting a SuperLink")
        private = [folder / name for name in PRIVATE]
        with Processes(folder, environment(folder / "home"), private) as processes:
            stages.current().reached("imports")
            edges = EdgeProcesses(config, folder, processes, progress.note)
            deployment.start_superlink(processes)
            edges.start()
            deployment.wait(processes)
            stages.current().reached("superlink")
            nodes = f"{config.num_clients} SuperNode{'' if config.num_clients == 1 else 's'}"
            progress.phase(f"starting {nodes}")
            deployment.start_executor(processes)
            deployment.start_nodes(processes)
            stages.current().reached("nodes")
            if edges:
                progress.phase(f"starting {len(edges)} edge server{'s' if len(edges) > 1 else ''}")
                edges.wait()

            server = ServerSide(deployment, processes)
            devices = Devices(deployment, processes, progress.note)

            def check() -> None:
                server.check()
                devices.check()
                edges.check()

            yield Launched(deployment.address, check, edges.run_config())
    finally:
        _remove_private(folder)


def _remove_private(folder: Path) -> None:
    for name in PRIVATE:
        shutil.rmtree(folder / name, ignore_errors=True)


@dataclass(frozen=True)
class Deployment:
    """The commands of a deployment on this machine.

    Attributes:
        folder: Logs, database and secrets.
        address: Where the SuperLink will listen.
        node_keys: Public key of each node in PEM, by partition id.
        node_ports: Port of each node's own interface for its executor.
    """

    folder: Path
    address: SuperLinkAddress
    node_keys: tuple[bytes, ...]
    node_ports: tuple[int, ...]

    @classmethod
    def prepare(cls, folder: Path, port: int, num_nodes: int) -> Deployment:
        """Make the folder, certificates, keys and secrets, in place of those of a killed run."""
        private = folder / "secrets"
        _remove_private(folder)
        for file in folder.glob("superlink.db*"):  # its run would go on beside the new one
            file.unlink()
        private.mkdir(parents=True, mode=0o700)
        folder.chmod(0o700)  # tokens of sessions pass through the SuperLink's database
        authority = Authority.create("fedsys run", days=30)
        authority.issue("superlink", ["localhost", HOST], role="server", days=30).save(private)
        (private / "executors").write_text(secrets.token_hex(32))
        keys = tuple(write_node_key(private / f"node-{i}") for i in range(num_nodes))
        address = SuperLinkAddress(f"{HOST}:{port}", authority.certificate)
        return cls(folder, address, keys, tuple(free_ports(num_nodes)))

    def start_superlink(self, processes: Processes) -> None:
        """Start the SuperLink; also again, with the state that it had."""
        port = self.address.host_port.rpartition(":")[2]
        processes.start(
            "superlink",
            flower_commands.superlink(
                HOST, int(port), self._tls, self._secret("executors"), self.folder / "superlink.db"
            ),
            vital=False,
        )
        processes.preload()

    def wait(self, processes: Processes) -> None:
        """Wait until the SuperLink answers.

        Raises:
            RuntimeFailure: It ended, or took too long.
        """
        assert self.address.root_certificates is not None
        trust = ssl.create_default_context(cadata=self.address.root_certificates.decode("ascii"))
        deadline = time.monotonic() + START_S
        with httpx.Client(verify=trust) as client:
            while True:
                processes.check(["superlink"])
                try:
                    client.get(f"https://{self.address.host_port}/health").raise_for_status()
                    return
                except httpx.HTTPError as error:
                    if time.monotonic() > deadline:
                        raise RuntimeFailure(
                            f"superlink: no answer within {START_S:g} s ({error}); "
                            f"see {self.folder / 'superlink.log'}"
                        ) from error
                time.sleep(0.05)

    def start_executor(self, processes: Processes) -> None:
        """Start what runs the server app."""
        command = self._executor(self.address.host_port)
        processes.start("superlink-executor", command, vital=False)

    def start_nodes(self, processes: Processes) -> None:
        """Make the nodes known to the SuperLink and start them."""
        with SuperLinkClient(self.address) as control:
            for partition, key in enumerate(self.node_keys):
                control.register(key, f"partition-{partition}")
        for partition in range(len(self.node_keys)):
            self.start_node(processes, partition)

    def start_node(self, processes: Processes, partition: int, name: str = "") -> None:
        """Start the SuperNode of a partition, and what runs its client app.

        The run is to outlive both.

        Args:
            processes: Where it is started.
            partition: Its partition id.
            name: Of its key and its processes; by default that which `prepare` has made.
        """
        port, name = self.node_ports[partition], name or f"node-{partition}"
        processes.start(
            name,
            flower_commands.supernode(
                self.address.host_port, self._tls.ca, self._secret(name), (HOST, port),
                self._secret("executors"), self._node_config(partition), self._tls.options(),
            ),
            {supernode.INTERVAL: f"{supernode.interval_s(len(self.node_keys)):g}"},
            vital=False,
        )  # fmt: skip
        self.start_node_executor(processes, partition, name)

    def start_node_executor(self, processes: Processes, partition: int, name: str = "") -> None:
        """Start what runs the client app of a partition; arguments as for `start_node`."""
        name = name or f"node-{partition}"
        # A home for each: two processes that unpack one bundle at one place disturb each other.
        home = {"FLWR_HOME": str(self.folder / "home" / name)}
        command = self._executor(f"{HOST}:{self.node_ports[partition]}")
        processes.start(f"{name}-executor", command, home, vital=False)

    def _node_config(self, partition: int) -> str:
        about = f"partition-id={partition} num-partitions={len(self.node_keys)}"
        own = credentials_of_device(self.folder, partition)
        return f'{about} credentials="{own}"' if own.is_dir() else about

    def _executor(self, address: str) -> list[str]:
        return flower_commands.executor(address, self._secret("executors"), self._tls.ca)

    @property
    def _tls(self) -> flower_commands.Tls:
        return flower_commands.Tls.within(self.folder / "secrets")

    def _secret(self, name: str) -> Path:
        return self.folder / "secrets" / name


class Devices:
    """Starts the processes of devices again that end, and says so; the others go on meanwhile.

    What the device was at is answered for by Flower, which notices that nobody works on it: it is
    left out of that round.

    Args:
        deployment: Starts them.
        processes: Where they are.
        note: Told what ended, and what becomes of it.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        deployment: Deployment,
        processes: Processes,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deployment, self._processes, self._note = deployment, processes, note
        self._clock = clock
        self._restarts: Counter[int] = Counter()
        self._due: dict[int, float] = {}  # by device: when it may be started again

    def check(self) -> None:
        """Start again what has ended, as far as it is time for that."""
        ended, now = self._processes.ended(), self._clock()
        for partition in range(len(self._deployment.node_keys)):
            node, executor = f"node-{partition}", f"node-{partition}-executor"
            name = node if node in ended else executor
            if name in ended and now >= self._due.get(partition, now):
                self._due[partition] = now + RESTART_S
                self._restart(partition, name, ended[name])

    def _restart(self, partition: int, name: str, status: int) -> None:
        node, executor = f"node-{partition}", f"node-{partition}-executor"
        why = f"{name} ended with status {status}"
        self._restarts[partition] += 1
        if self._restarts[partition] > RESTARTS:
            self._processes.stop([node, executor], at_once=True)
            self._note(f"{why}; device {partition} is left out")
            return
        self._note(f"{why}; it is started again")
        if name == executor:
            self._processes.stop([executor], at_once=True)
            self._deployment.start_node_executor(self._processes, partition)
        else:
            self._processes.stop([node, executor], at_once=True)
            self._deployment.start_node(self._processes, partition)


def _port(superlink: str | None) -> int:
    """Return the port that the configuration names, or a free one."""
    if superlink is None:
        return free_ports(1)[0]
    host, _, port = superlink.rpartition(":")
    if host not in (HOST, "localhost") or not port.isdecimal():
        raise ConfigError.of(
            "runtime.superlink",
            superlink,
            f"must be {HOST}:port with runtime.launch=true",
            "null takes a free port",
        )
    if not is_free(HOST, int(port)):
        raise ConfigError.of(
            "runtime.superlink", superlink, "must not be in use", "null takes a free port"
        )
    return int(port)


def environment(home: Path) -> Mapping[str, str]:
    """Return the environment of the programs, with their own folder made at `home`."""
    home.mkdir(parents=True)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": flower_commands.POLL_S,
        "PYTHONUNBUFFERED": "1",
    }
