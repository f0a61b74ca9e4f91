"""What other processes and machines have to do with: ports, certificates, SuperLink, edges."""

from __future__ import annotations

import datetime as dt
import socket
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedsys.commands.doctor.checks import Check
from fedsys.config import Config, secret
from fedsys.errors import FedsysError

PORTS = {
    8000: "SuperLink",
    8080: "serve",
    9091: "SuperLink",
    9092: "SuperLink",
    9093: "SuperLink",
    9094: "SuperNode",
}
"""Default ports and who listens there."""

SWITCH = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
FLAG = "--disable-runtime-dependency-installation"
SOON = dt.timedelta(days=14)
TRIES = 5
PADDING = 2**20
"""Bytes that are sent to measure the rate of a connection."""


def ports() -> Check:
    """Check that the default ports are free; a run in one process needs none of them."""
    from fedsys.runtime.processes import is_free

    taken = [f"{port} ({who})" for port, who in PORTS.items() if not is_free("127.0.0.1", port)]
    if taken:
        told = f"in use: {', '.join(taken)}"
        return Check("ports", "warn", told, "stop what listens there, or choose other ports")
    return Check("ports", "ok", f"{', '.join(map(str, PORTS))} are free")


def certificates(config: Config) -> Iterator[Check]:
    """Check every certificate that the configuration names."""
    file = config.runtime.root_certificates
    if file is not None:
        yield certificate(Path(file).expanduser(), "runtime.root_certificates")
    from fedsys.transport.security import Credentials

    folders = {
        "link.credentials": config.link.credentials,
        "fleet.credentials": getattr(config.fleet, "credentials", None),
    }
    for key, folder in folders.items():
        if folder is None:
            continue
        try:
            Credentials.load(Path(folder), role="client")
        except FedsysError as error:
            yield Check.failed(key, error, "issue new ones")
        else:
            yield certificate(Path(folder) / "cert.pem", key)


def certificate(file: Path, key: str, now: dt.datetime | None = None) -> Check:
    """Check the validity of the first certificate in a PEM file."""
    from cryptography import x509

    now = now or dt.datetime.now(dt.UTC)
    try:
        found = x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        return Check(key, "fail", f"{file}: {error.strerror}", f"name another file with {key}=")
    except ValueError:
        told = f"{file} holds no certificate in PEM"
        return Check(key, "fail", told, f"name another file with {key}=")
    ends = found.not_valid_after_utc
    if now < found.not_valid_before_utc:
        told = f"{file} is valid from {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        return Check(key, "fail", told, "check the clock of this machine")
    if ends < now:
        told = f"{file} expired on {ends:%Y-%m-%d}"
        return Check(key, "fail", told, "issue a new certificate")
    if ends - now < SOON:
        told = f"{file} expires on {ends:%Y-%m-%d}"
        return Check(key, "warn", told, "issue a new certificate")
    return Check(key, "ok", f"{file} is valid until {ends:%Y-%m-%d}")


def superlink(config: Config) -> Check | None:
    """Check that the SuperLink answers, how fast, and at what rate it takes data."""
    if config.runtime.kind != "deployment" or config.runtime.launch:
        return None
    where = config.runtime.superlink
    if where is None:
        way_out = "runtime.superlink=HOST:PORT, or runtime.launch=true to start one here"
        return Check("superlink", "fail", "runtime=deployment names no SuperLink", way_out)
    from fedsys.runtime.control import SuperLinkAddress, SuperLinkClient

    try:
        runtime = config.runtime
        address = SuperLinkAddress.of(where, runtime.root_certificates, runtime.insecure)
        with SuperLinkClient(address) as control:
            control.ping()
            trips = [_timed(control.ping) for _ in range(TRIES)]
            padded = [_timed(lambda: control.ping(PADDING)) for _ in range(3)]
    except FedsysError as error:
        return Check.failed("superlink", error, "check runtime.superlink and its certificate")
    trip = statistics.median(trips)
    rate = PADDING / max(statistics.median(padded) - trip, 1e-6) / 1e6
    return Check(
        "superlink", "ok", f"{where} answers in {trip * 1e3:.1f} ms, takes {rate:.0f} MB/s"
    )


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def edges(config: Config) -> Iterator[Check]:
    """Check that the edge servers can be reached, how fast, and whether they compute alike."""
    if config.policy.get("kind", "none") == "none":
        return
    for edge in config.fleet.edges:
        found = reach(f"edge {edge.name}", edge.address)
        yield found
        if found.status == "ok":
            yield _computes_alike(config, edge.name, edge.address)


def _computes_alike(config: Config, name: str, address: str) -> Check:
    """Check that an edge server obeys this run, and that its sums have the bits of this machine."""
    from fedsys.identity import arithmetic, differences
    from fedsys.offload.edge_client import EdgeClient, Hooks
    from fedsys.offload.fleet_edges import ANSWER_S
    from fedsys.transport.addresses import dial
    from fedsys.transport.security import Credentials

    title, folder = f"edge {name}, bits", config.fleet.credentials or config.link.credentials
    idle = Hooks(
        lambda frame: None,
        lambda frame: False,
        lambda name, frame: None,
        lambda name: None,
        lambda name: False,
    )
    try:
        credentials = Credentials.load(Path(folder)) if folder else None
        link = dial(address, credentials=credentials, timeout_s=ANSWER_S, retry=False)
        edge = EdgeClient(name, link, secret.control_token(config.fleet, "fleet"), idle)
        edge.close()
    except FedsysError as error:
        return Check.failed(title, error, "check fleet.credentials and fleet.control_token_file")
    if apart := differences(edge.arithmetic):
        told = f"{apart}: results agree up to rounding, not to the bit"
        return Check(title, "warn", told, "install the same on both, on processors of one kind")
    return Check(title, "ok", f"as here: {', '.join(f'{k} {v}' for k, v in arithmetic().items())}")


def reach(name: str, address: str, timeout_s: float = 5.0) -> Check:
    """Check that somebody listens at ``[scheme://]host:port``."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    way_out = "start it with fedsys edge, and check address and firewall"
    if not host or not port.isdecimal():
        return Check(
            name, "fail", f"{address} is not host:port", "grpc://HOST:PORT or tcp://HOST:PORT"
        )
    trips = []
    try:
        for _ in range(TRIES):
            began = time.perf_counter()
            with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
                trips.append(time.perf_counter() - began)
    except OSError as error:
        return Check(name, "fail", f"{address}: {error.strerror or error}", way_out)
    return Check(name, "ok", f"{address} accepts in {statistics.median(trips) * 1e3:.1f} ms")


def left_behind(processes: Iterable[Any] | None = None) -> list[Check]:
    """Warn of a SuperLink, left by ``flwr run``, that installs all dependencies for each run.

    Args:
        processes: Of psutil; None for all of this machine.
    """
    import psutil

    found: list[Check] = []
    for process in psutil.process_iter() if processes is None else processes:
        try:
            command = process.cmdline()
            if not any(Path(part).name == "flower-superlink" for part in command[:3]):
                continue
            switched = FLAG in command or process.environ().get(SWITCH) == "1"
        except (psutil.Error, OSError):  # gone, or somebody else's
            continue
        if not switched:
            told = f"process {process.pid} installs torch anew for each run of flwr run"
            way_out = f"kill {process.pid}, then set {SWITCH}=1 for flwr run"
            found.append(Check("flower-superlink", "warn", told, way_out))
    return found
