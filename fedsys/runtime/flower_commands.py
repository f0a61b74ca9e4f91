"""The command lines of Flower's programs as they are started here: for a run, or from a bundle.

Each is for `fedsys.runtime.forks.fork`. Apps run in processes of executors (process isolation), so
that they outlive a SuperLink or SuperNode that is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUPERNODE = "fedsys.runtime.supernode"
EXECUTOR = "fedsys.runtime.executor"

POLL_S = "0.1"
"""Least seconds between two looks of an executor for work (`fedsys.runtime.executor`)."""


@dataclass(frozen=True)
class Tls:
    """Files of one end that is dialled.

    Attributes:
        ca: Certificate of the authority.
        certificate: Of this end.
        key: Of that certificate.
    """

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def within(cls, folder: Path) -> Tls:
        """Return the files that `fedsys.transport.security.Credentials.save` writes."""
        return cls(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")

    def options(self) -> list[str]:
        """Return the options of Flower's that name them."""
        return [
            "--ssl-ca-certfile", str(self.ca),
            "--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key),
        ]  # fmt: skip


def superlink(host: str, port: int, tls: Tls, secret: Path, database: Path) -> list[str]:
    """Return the command of a SuperLink that knows its nodes by their keys."""
    return [
        "flower-superlink", "--host", host, "--port", str(port), *tls.options(),
        "--enable-supernode-auth", *_isolated(secret), "--database", str(database),
    ]  # fmt: skip


def supernode(
    server: str,
    ca: Path,
    key: Path,
    address: tuple[str, int],
    secret: Path,
    about: str,
    tls: Sequence[str] = (),
) -> list[str]:
    """Return the command of a SuperNode.

    Args:
        server: ``host:port`` of its SuperLink.
        ca: Certificate of the authority of that.
        key: Its private key.
        address: Host and port at which its executor asks for work.
        secret: File with what that must know.
        about: Its node configuration.
        tls: Options for a certificate of its own; without, the executor speaks without TLS.
    """
    host, port = address
    return [
        SUPERNODE, "--superlink", server, "--root-certificates", str(ca),
        "--auth-supernode-private-key", str(key), "--host", host, "--port", str(port), *tls,
        *_isolated(secret), "--node-config", about,
    ]  # fmt: skip


def executor(address: str, secret: Path, ca: Path | None) -> list[str]:
    """Return the command of an executor; without a certificate it speaks without TLS."""
    trust = ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
    return [
        EXECUTOR, "--runtime-api-address", address, *trust,
        "--superexec-auth-secret-file", str(secret),
    ]  # fmt: skip


def _isolated(secret: Path) -> list[str]:
    return ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
