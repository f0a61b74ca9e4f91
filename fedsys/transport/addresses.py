"""Links by address: ``memory://name``, ``tcp://host:port`` and ``grpc://host:port``."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fedsys.errors import ConfigError, SecurityError
from fedsys.transport import memory_link, tcp_link
from fedsys.transport.link import QUEUE_BYTES, Handler, Link, Server
from fedsys.transport.security import Credentials
from fedsys.transport.strangers import Strangers
from fedsys.transport.wire import DEFAULT_LIMITS, Limits


def dial(
    address: str,
    *,
    credentials: Credentials | None = None,
    limits: Limits = DEFAULT_LIMITS,
    queue_bytes: int = QUEUE_BYTES,
    timeout_s: float = 10.0,
    plain: bool = False,
    retry: bool = True,
) -> Link:
    """Connect to a server.

    Args:
        address: ``tcp://host:port``, ``grpc://host:port`` or ``memory://name``.
        credentials: For mutual TLS; needed between processes unless the host is loopback.
        limits: What this end accepts in a frame.
        queue_bytes: Bytes that each direction holds before `send` waits.
        timeout_s: How long to wait for a server in another process that does not answer yet.
        plain: Accept an unprotected link to another host, for networks that are trusted.
        retry: Whether such a server may come into being within `timeout_s`; else it is over when
            the first attempt fails.

    Raises:
        ConfigError: The address has another form.
        SecurityError: TLS is required, or one end does not accept the other's certificate.
        LinkRefused: Nobody serves the address.
        LinkClosed: It cannot be reached, or its server is full.
    """
    kind, place = _split(address)
    if kind == "memory":
        return memory_link.dial(place, limits, queue_bytes)
    _require_tls(address, place, credentials, plain)
    if kind == "tcp":
        return tcp_link.dial(place, credentials, limits, queue_bytes, timeout_s, retry)
    from fedsys.transport import grpc_link

    return grpc_link.dial(place, credentials, limits, queue_bytes, timeout_s, retry)


def serve(
    address: str,
    handler: Handler,
    *,
    credentials: Credentials | None = None,
    limits: Limits = DEFAULT_LIMITS,
    queue_bytes: int = QUEUE_BYTES,
    max_links: int = 256,
    strangers: Strangers | None = None,
    plain: bool = False,
) -> Server:
    """Accept links at `address` until the server is stopped.

    Each link is given to `handler` in a thread of its own and closed when that returns. If the
    handler raises, the peer gets a RemoteError: with the message of an error of fedsys, else only
    with the error's type, because other messages may tell what is none of the peer's business.

    Args:
        address: ``tcp://host:port`` or ``grpc://host:port`` (port 0: any that is free), or
            ``memory://name``.
        handler: Called with each accepted link.
        credentials: For mutual TLS; needed between processes unless the host is loopback.
        limits: What this end accepts in a frame.
        queue_bytes: Bytes that each direction of a link holds before `send` waits.
        max_links: Links at one time; further ones are refused.
        strangers: What links may cost, in TCP and gRPC, until the handler admits them; None: all
            are admitted at once, and as many may be on their way as there may be links.
        plain: Accept unprotected links from other hosts, for networks that are trusted.

    Raises:
        ConfigError: The address has another form, or is in use.
        SecurityError: TLS is required.
    """
    kind, place = _split(address)
    if kind == "memory":
        return memory_link.MemoryServer(place, handler, limits, queue_bytes, max_links)
    _require_tls(address, place, credentials, plain)
    if kind == "tcp":
        return tcp_link.TcpServer(
            place, handler, credentials, limits, queue_bytes, max_links, strangers
        )
    from fedsys.transport import grpc_link

    return grpc_link.GrpcServer(
        place, handler, credentials, limits, queue_bytes, max_links, strangers
    )


def _split(address: str) -> tuple[str, str]:
    kind, separator, place = address.partition("://")
    if not separator or not place or kind not in ("tcp", "grpc", "memory"):
        raise ConfigError.of(
            "address", address, "must be tcp://host:port, grpc://host:port or memory://name",
            "" if separator else f"did you mean tcp://{address}?",
        )  # fmt: skip
    if kind != "memory":
        try:
            parts = urlsplit(address)
            complete = bool(parts.hostname) and parts.port is not None and parts.netloc == place
        except ValueError:
            complete = False
        if not complete:
            raise ConfigError.of(
                "address", address, f"must name a host and a port, {kind}://host:port"
            )
    return kind, place


def _require_tls(address: str, place: str, credentials: Credentials | None, plain: bool) -> None:
    host = urlsplit(f"//{place}").hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if credentials is None and not loopback and not plain:
        raise SecurityError(
            f"address={address}: off loopback, links need mutual TLS; give credentials, or say "
            "plain=True on a network that you trust"
        )
