"""``fedsys host``: one host of a chain as a process of its own, until SIGTERM or Ctrl-C.

It needs no copy of a model: ``fedsys serve`` with ``hosts.list`` sends it the units that it is to
compute, over the same kind of link as tensors.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from fedsys import config as configuration
from fedsys.config import secret
from fedsys.config.partition import HostServerConfig
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.partition.host import HostLimits, HostServer, Spawned
from fedsys.partition.slowed import SlowedBuilder
from fedsys.partition.stage_rack import Builder
from fedsys.serving.chain_parts import StageBuilder
from fedsys.transport.security import Credentials

SWITCH_S = 0.0005
"""How long a thread of Python keeps others waiting: 5 ms, the default, is the time of an answer."""

_START_S = 300.0  # for a host process to be ready: a busy machine takes minutes to load PyTorch
_SPAWN_S = 110.0  # likewise, where a controller waits for the answer
_END_S = 10.0
_LOOK_S = 1.0  # whether the process that started this one is there


def job(tree: Any) -> Mapping[str, Any]:
    """Serve until the process is told to stop; chains that watch it leave it out before.

    Once it is ready, it prints its address; with ``json=true`` as an object ``{"ready": …}`` on a
    line of its own.

    Args:
        tree: The composed configuration (a DictConfig), of which ``host`` counts.

    Returns:
        What it did: ``computed`` requests, ``busy_s`` seconds.

    Raises:
        ConfigError: The address cannot be listened on, or is not protected.
        SecurityError: The credentials are missing or not valid.
    """
    config = configuration.parse(configuration.to_text(tree))
    sys.setswitchinterval(SWITCH_S)
    if config.host.threads is not None:
        torch.set_num_threads(config.host.threads)
    host = _server(config.host)
    about = {"name": host.name, "address": host.address, "pid": os.getpid()}
    if config.json:
        print(json.dumps({"ready": about}), flush=True)
    else:
        print(f"host {host.name} listens at {host.address}", flush=True)
    with suppress(KeyboardInterrupt):
        _wait(config.host.parent)
    with suppress(KeyboardInterrupt):  # a second signal ends it at once
        host.leave(config.host.drain_s)
    status = host.status()
    host.stop()
    return {"computed": status["computed"], "busy_s": status["busy_s"]}


def _wait(parent: int | None) -> None:
    """Wait for a signal, or for the end of the process that started this one."""
    never = threading.Event()
    while parent is None or os.getppid() == parent:
        never.wait(None if parent is None else _LOOK_S)


def _server(config: HostServerConfig) -> HostServer:
    token, credentials = secret.control_token(config, "host"), None
    if config.credentials is not None:
        credentials = Credentials.load(Path(config.credentials), role="both")
    else:
        check_unprotected("host", config.address, token)
    limits = HostLimits(int(config.memory_mb * 1e6), int(config.kept_mb * 1e6))
    builder: Builder = StageBuilder()
    if config.slower > 1:
        builder = SlowedBuilder(builder, config.slower)
    try:
        return HostServer(
            config.name,
            config.address,
            builder,
            credentials=credentials,
            control_token=token,
            controller=config.controller if credentials else "",
            limits=limits,
            spawn=lambda: _spawn(config, token),
        )
    except ConfigError as error:
        raise ConfigError(f"host.{error}") from error


def check_unprotected(group: str, address: str, token: str) -> None:
    """Refuse what would let anybody control a server.

    Args:
        group: Of the configuration.
        address: Where it would listen.
        token: What a controller must present.

    Raises:
        ConfigError: It would listen beyond loopback, or has no token.
    """
    host = urlsplit(address).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise ConfigError.of(
            f"{group}.credentials", None,
            f"must name a folder with ca.pem, cert.pem and key.pem, as {group}.address={address} "
            "can be reached from other machines",
            f"docs/deploy.md says how to make them; a {group}.address on 127.0.0.1 needs none",
        )  # fmt: skip
    if not token:
        raise ConfigError.of(
            f"{group}.control_token_file", None,
            "must name a file with a token where there are no certificates",
            f"or set {secret.VARIABLE}; fedsys serve wants the same, as hosts.control_token_file",
        )  # fmt: skip


def _spawn(config: HostServerConfig, token: str) -> Spawned:
    """Start a host like this one, at a free port of the same address."""
    kind, _, place = config.address.partition("://")
    address = f"{kind}://{place.rpartition(':')[0]}:0"
    given = [f"host.name={config.name}", f"host.address={address}"]
    given += [f"host.memory_mb={config.memory_mb}", f"host.kept_mb={config.kept_mb}"]
    given += [f"host.controller={config.controller}", f"host.slower={config.slower}"]
    if config.threads is not None:
        given.append(f"host.threads={config.threads}")
    if config.credentials is not None:
        given.append(f"host.credentials={Path(config.credentials).absolute()}")
    return start_host(given, token, _SPAWN_S)[1]


def start_host(given: Sequence[str], token: str, within_s: float = _START_S) -> tuple[int, Spawned]:
    """Start a host as another process of this machine; return its process id, and it.

    Args:
        given: Arguments of ``fedsys host``.
        token: That its controller presents.
        within_s: Longest time until it is ready, in seconds.

    Raises:
        RuntimeFailure: It is not ready in time, or ended before.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fedsys.main",
            "host",
            *given,
            f"host.parent={os.getpid()}",
            "json=true",
        ],
        env={**os.environ, secret.VARIABLE: token},
        stdout=subprocess.PIPE,
        text=True,
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(within_s, give_up)
    timer.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    timer.cancel()
    try:
        ready = json.loads(line)["ready"]["address"]
    except (ValueError, KeyError, TypeError) as error:
        _end(process)
        status = process.returncode
        why = f"ended with status {status} before it was ready"
        if late.is_set():
            why = f"was not ready within {within_s:g} s, as this machine is busy or it hangs"
        raise RuntimeFailure(f"fedsys host {' '.join(given)}: {why}") from error
    return process.pid, Spawned(str(ready), lambda: _end(process))


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
