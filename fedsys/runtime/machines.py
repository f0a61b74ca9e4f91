"""A machine of a provisioned fleet: its Flower programs, kept running for ever.

::

    STATE/
    ├── node.log  executor.log       of a device; a server has superlink.log  executor.log
    ├── superlink.db                 of a server: runs and nodes outlive its processes
    ├── executors.secret             of a device: protects its two programs from others there
    └── home/                        Flower's own folder (FLWR_HOME)

A program that ends is started again, sooner after it ran for long, later after it ended at once: a
SuperLink refuses a node that died until it has noticed that, which takes it a minute. A SuperLink
that is away is dialled again by the SuperNode itself.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedsys.errors import RuntimeFailure
from fedsys.files import write_new, writing
from fedsys.runtime import QUIET, flower_commands, supernode
from fedsys.runtime.executor import CLIENTS_ONLY
from fedsys.runtime.fleet_files import NODE_KEY, DeviceBundle, ServerBundle
from fedsys.runtime.nursery import DEVICE
from fedsys.runtime.processes import Processes, free_ports

LOOK_S: Final = 0.1
"""Seconds between two looks at the programs before a machine is ready."""

CALM_S: Final = 1.0
"""The same later."""

WAITS_S: Final = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds before each further start of a program that ends soon after its start."""

LONG_S: Final = 60.0
"""Seconds after which a program counts as one that works."""

LOG_BYTES: Final = 8 << 20
"""Size at which a log begins anew: a device runs for years, and its card is small."""

CONNECTED: Final = "SuperNode ID: "
"""What Flower's SuperNode says when its SuperLink has let it in."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """A program of a machine.

    Attributes:
        name: Of its log.
        command: As for `fedsys.runtime.forks.fork`.
        env: Variables of its environment.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def device_programs(about: DeviceBundle, bundle: Path, state: Path) -> list[Program]:
    """Return the two programs of a device, and make what they share.

    Raises:
        RunError: `state` cannot be written to.
    """
    secret = state / "executors.secret"
    with writing(state):
        state.mkdir(parents=True, exist_ok=True)
        if not secret.exists():
            write_new(secret, secrets.token_hex(32).encode(), 0o600)
    node = f"partition-id={about.partition} credentials={json.dumps(str(bundle))}"
    node += f" data-root={json.dumps(about.data)}" if about.data else ""
    (port,) = free_ports(1)
    command = flower_commands.supernode(
        about.server, bundle / "ca.pem", bundle / NODE_KEY, ("127.0.0.1", port), secret, node
    )
    executor = flower_commands.executor(f"127.0.0.1:{port}", secret, None)
    return [
        Program("node", command, {supernode.INTERVAL: f"{about.poll_s:g}"}),
        Program("executor", executor, {CLIENTS_ONLY: "1"}),
    ]


def server_programs(about: ServerBundle, bundle: Path, state: Path) -> list[Program]:
    """Return the two programs of a server.

    Raises:
        RunError: `state` cannot be written to.
    """
    with writing(state):
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)  # tokens of sessions pass through the database
    secret, tls = bundle / "executors.secret", flower_commands.Tls.within(bundle)
    database = state / "superlink.db"
    link = flower_commands.superlink("0.0.0.0", about.port, tls, secret, database)
    executor = flower_commands.executor(f"127.0.0.1:{about.port}", secret, tls.ca)
    return [Program("superlink", link), Program("executor", executor)]


class KeptPrograms:
    """Programs that are started again whenever they end; a context manager, which ends them.

    Args:
        programs: In the order in which they are started.
        state: Folder of the machine.
        say: Told what ended.
        roles: Of `fedsys.runtime.nursery`: what is imported once for all of them.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        state: Path,
        say: Say,
        roles: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._programs = {program.name: program for program in programs}
        self._state, self._say, self._clock = state, say, clock
        self._processes = Processes(state, environment(state / "home"), roles=roles)
        self._begun: dict[str, float] = {}
        self._fast: dict[str, int] = {}
        self._due: dict[str, float] = {}

    def __enter__(self) -> KeptPrograms:
        self._processes.__enter__()
        for name in self._programs:
            self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.__exit__()

    def log(self, name: str) -> Path:
        """Return the file with what a program prints."""
        return self._state / f"{name}.log"

    def look(self) -> None:
        """Start again what has ended, when it is time for that; keep logs small.

        Raises:
            RuntimeFailure: Programs can be started no more.
        """
        now = self._clock()
        for name, status in self._processes.ended().items():
            if name not in self._due:
                wait = self._wait_s(name, now)
                self._due[name] = now + wait
                why = refusal(self.log(name)) or self._processes.last_words(name)
                self._say(f"{name} ended with status {status} ({why}); again in {wait:g} s")
            elif now >= self._due[name]:
                self._start(name)
        for name in self._programs:
            with suppress(OSError):
                if self.log(name).stat().st_size > LOG_BYTES:
                    os.truncate(self.log(name), 0)

    def _start(self, name: str) -> None:
        program = self._programs[name]
        self._due.pop(name, None)
        self._begun[name] = self._clock()
        self._processes.start(name, program.command, program.env, vital=False)

    def _wait_s(self, name: str, now: float) -> float:
        long = now - self._begun[name] >= LONG_S
        count = self._fast[name] = 0 if long else self._fast.get(name, -1) + 1
        return WAITS_S[min(count, len(WAITS_S) - 1)]


def refusal(log: Path) -> str:
    """Return what a SuperLink said last to a node that it does not let in; empty for nothing."""
    try:
        lines = log.read_text(errors="replace").splitlines()[-40:]
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.startswith("[code: ")), "")


def connected(log: Path) -> bool:
    """Return whether a SuperNode has said that it is let in."""
    try:
        return CONNECTED in log.read_text(errors="replace")
    except OSError:
        return False


def answers(port: int, ca: Path) -> bool:
    """Return whether a SuperLink of this machine answers.

    Args:
        port: Where it listens.
        ca: Certificate of its authority.
    """
    import httpx  # a device does without

    trust = ssl.create_default_context(cafile=str(ca))
    try:
        with httpx.Client(verify=trust, timeout=5.0, trust_env=False) as client:
            return client.get(f"https://127.0.0.1:{port}/health").is_success
    except httpx.HTTPError:
        return False


def keep(kept: KeptPrograms, ready: Callable[[], bool], told: Callable[[], None]) -> None:
    """Keep programs running until the process is interrupted.

    Args:
        kept: The programs.
        ready: Whether the machine does its work.
        told: Called once when it is.
    """
    waiting = True
    while True:
        kept.look()
        if waiting and ready():
            waiting = False
            told()
        time.sleep(LOOK_S if waiting else CALM_S)


def environment(home: Path) -> dict[str, str]:
    """Return the environment of the programs of a machine."""
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    return {
        **QUIET,
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": flower_commands.POLL_S,
        "PYTHONUNBUFFERED": "1",
    }


def for_ever(attempt: Callable[[], None], say: Say, sleep: Callable[[float], None]) -> None:
    """Do it again and again: what starts programs may itself be killed, by the kernel for instance.

    Args:
        attempt: Runs until it is interrupted, or raises what ended it.
        say: Told that.
        sleep: How to wait.
    """
    while True:
        try:
            attempt()
            return
        except RuntimeFailure as error:
            say(f"{error}; all is started again in {WAITS_S[-1]:g} s")
            sleep(WAITS_S[-1])


__all__ = [
    "DEVICE",
    "KeptPrograms",
    "Program",
    "answers",
    "connected",
    "device_programs",
    "environment",
    "for_ever",
    "keep",
    "server_programs",
]
