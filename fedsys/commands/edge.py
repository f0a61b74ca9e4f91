"""``fedsys edge``: an edge server as a process of its own, until SIGTERM or Ctrl-C.

When it stops it hands its sessions back to the server apps that opened them. Those that nobody
takes are written to ``edge.state_dir`` and taken up again at the next start.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from fedsys import config as configuration
from fedsys.config import EdgeConfig, secret
from fedsys.errors import ConfigError, FedsysError, SessionError
from fedsys.offload import edge_store
from fedsys.offload.edge import EdgeServer
from fedsys.offload.edge_metrics import MetricsEndpoint
from fedsys.offload.processors import usable_cores
from fedsys.runtime.edge_workers import EdgeWorkers
from fedsys.runtime.fleet_files import EdgeBundle, read_bundle
from fedsys.training import plain as training
from fedsys.transport.addresses import dial
from fedsys.transport.security import Credentials
from fedsys.transport.wire import Frame

ASK_S = 10.0
"""How long an edge server may take to answer that is to hand sessions over, in seconds."""


def job(tree: Any) -> Mapping[str, Any]:
    """Serve sessions until the process is told to stop.

    Once it is ready, it prints its address; with ``json=true`` as an object ``{"ready": …}`` on a
    line of its own.

    Args:
        tree: The composed configuration (a DictConfig), of which ``edge`` counts.

    Returns:
        What it did: ``steps``, ``opened``, ``handed_back``, ``saved``, ``refused``. With
        ``edge.move``: the ``sessions`` that an edge server that runs began to hand over.

    Raises:
        ConfigError: An address cannot be listened on, or is not protected.
        SecurityError: The credentials are missing or not valid.
    """
    config = configuration.parse(configuration.to_text(tree))
    own = config.edge if config.edge.bundle is None else of_bundle(config.edge)
    if own.move is not None:
        return moved(own)
    folder = edge_store.checked_folder(own.state_dir)
    edge = _server(own)
    endpoint: MetricsEndpoint | None = None
    try:
        if own.http is not None:
            endpoint = MetricsEndpoint(edge, own.http)
        if folder is not None:
            _take_up(edge, folder)
        _say(edge, endpoint, as_json=config.json)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("handing sessions back", file=sys.stderr)
        return _wind_up(edge, folder)
    except BaseException:
        edge.kill()
        raise
    finally:
        if endpoint is not None:
            endpoint.close()


def of_bundle(config: EdgeConfig) -> EdgeConfig:
    """Return what an edge server of a provisioned fleet is.

    Raises:
        ConfigError: There is no such bundle, or it is another machine's.
    """
    about, folder = read_bundle(Path(str(config.bundle)), EdgeBundle)
    return dataclasses.replace(
        config, name=about.name, address=about.address, credentials=str(folder)
    )


def moved(config: EdgeConfig) -> Mapping[str, Any]:
    """Have the edge server at ``edge.address`` hand sessions to another one of their run.

    Devices learn where their sessions went, and go on there.

    Args:
        config: Whom to ask, as who, and ``move``.

    Returns:
        ``sessions``: the names of those that are being handed over.

    Raises:
        ConfigError: ``move`` says something else.
        FedsysError: The edge server cannot be reached, or refuses.
    """
    move = dict(config.move or {})
    if not isinstance(move.get("to"), str) or move.keys() - {"to", "client"}:
        raise ConfigError.of(
            "edge.move", move, "must name an edge server, and perhaps a client",
            "for instance edge.move='{client: 3, to: edge-1}'",
        )  # fmt: skip
    folder = config.credentials
    credentials = Credentials.load(Path(folder)) if folder else None
    link = dial(config.address, credentials=credentials, timeout_s=ASK_S, retry=False)
    try:
        link.send(Frame("control", {"token": secret.control_token(config, "edge")}))
        link.recv(ASK_S)
        link.send(Frame("move", move))
        answer = link.recv(ASK_S)
    finally:
        link.close()
    if answer.kind == "refused":
        raise SessionError(str(answer.meta.get("reason")))
    return {"sessions": list(answer.meta.get("sessions", ()))}


def _server(config: EdgeConfig) -> EdgeServer:
    credentials, token = None, secret.control_token(config, "edge")
    device = training.pick_device(config.device)
    count = _workers(config, device)
    if config.credentials is not None:
        credentials = Credentials.load(Path(config.credentials), role="server")
    else:
        _check_unprotected(config, token)
    workers = EdgeWorkers(count, config.name) if count > 1 else None
    try:
        return EdgeServer(
            config.name,
            config.address,
            credentials=credentials,
            control_token=token,
            controller=config.controller if credentials else "",
            device=device,
            limits=config,
            models=config.models,
            crash=_crash if config.faults else None,
            workers=workers,
        )
    except BaseException as error:
        if workers is not None:
            workers.close()
        if isinstance(error, ConfigError):
            raise ConfigError(f"edge.{error}") from error
        raise


def _workers(config: EdgeConfig, device: torch.device) -> int:
    """Return in how many processes sessions compute.

    Raises:
        ConfigError: They would compute on a GPU.
    """
    if device.type == "cpu":
        return usable_cores() if config.workers is None else config.workers
    if config.workers in (None, 1):
        return 1
    raise ConfigError.of(
        "edge.workers", config.workers,
        f"must be 1 on a GPU, which one process uses for all sessions (edge.device={config.device} "
        f"is {device})", "edge.workers=1, or edge.device=cpu",
    )  # fmt: skip


def _check_unprotected(config: EdgeConfig, token: str) -> None:
    """Refuse what would let anybody control the server.

    Raises:
        ConfigError: It would listen beyond loopback, or has no token.
    """
    host = urlsplit(config.address).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not config.address.startswith("memory://") and not loopback:
        raise ConfigError.of(
            "edge.credentials", None,
            f"must name a folder with ca.pem, cert.pem and key.pem, as edge.address="
            f"{config.address} can be reached from other machines",
            "docs/deploy.md says how to make them; an edge.address on 127.0.0.1 needs none",
        )  # fmt: skip
    if not token:
        raise ConfigError.of(
            "edge.control_token_file", None,
            "must name a file with a token where there are no certificates",
            f"or set {secret.VARIABLE}; the run wants the same, as fleet.control_token_file",
        )  # fmt: skip


def _crash(edge: EdgeServer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _take_up(edge: EdgeServer, folder: Path) -> None:
    for spec, snapshot in edge_store.take(folder):
        try:
            edge.adopt(spec, snapshot)
        except FedsysError as error:
            print(f"session {spec.id} is not taken up: {error}", file=sys.stderr)


def _say(edge: EdgeServer, endpoint: MetricsEndpoint | None, *, as_json: bool) -> None:
    http = endpoint.address if endpoint else None
    if as_json:
        ready = {"name": edge.name, "address": edge.address, "http": http, "pid": os.getpid()}
        print(json.dumps({"ready": ready}), flush=True)
        return
    print(f"edge server {edge.name} listens at {edge.address}", flush=True)
    if http:
        print(f"{http}/health and {http}/metrics tell how it is", flush=True)


def _wind_up(edge: EdgeServer, folder: Path | None) -> Mapping[str, Any]:
    held = len(edge.sessions)
    left = edge.stop()
    if folder is not None:
        for spec, snapshot in left:
            edge_store.keep(folder, spec, snapshot)
    elif left:
        print(f"{len(left)} sessions are lost; edge.state_dir would keep them", file=sys.stderr)
    counters = edge.counters
    return {
        "steps": counters["steps"],
        "opened": counters["opened"],
        "handed_back": held - len(left),
        "saved": len(left) if folder is not None else 0,
        "refused": sum(n for name, n in counters.items() if name.startswith("refused")),
    }
