"""Links: ordered, reliable connections that carry frames, in one process or between machines.

`dial` and `serve` choose by address: ``memory://edge-a`` connects threads of one process,
``tcp://edge-a:9443`` and ``grpc://edge-a:9443`` connect processes and machines: TCP costs less,
gRPC passes what understands HTTP/2 only. All pass every frame through the same encoder, so what
works in one works in the others. `fedsys.transport.shaping` and `fedsys.transport.faulty` wrap a link.

What `send` promises, the same for all:

* It returns when the frame has been copied into the queue of this end; tensors may then change.
* It waits only while that queue holds `queue_bytes`, that is, while the network or the peer is
  slower than the sender: back-pressure. One frame is always admitted to an empty queue.
* It never waits for the peer's own sends. While it waits, this end goes on reading, up to
  `fedsys.transport.mailbox.RELAXED_FACTOR` times `queue_bytes`; so peers that both send first, any number
  of frames of any size, do not block each other. Beyond that both ends have sent that much without
  a single receive: the link fails and says so. Memory stays bounded in every case.

After `close` on either end, frames sent before it still arrive; then `recv` of the peer raises
LinkClosed. A peer that dies without closing is noticed the same way.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

from fedsys.errors import (
    ConfigError,
    FedsysError,
    FrameError,
    LinkClosed,
    LinkError,
    LinkRefused,
    RemoteError,
    SecurityError,
)
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.security import Credentials
from fedsys.transport.wire import DEFAULT_LIMITS, Assembler, Buffer, Frame, Limits, encode_parts

QUEUE_BYTES: Final = 256 << 20
"""Bytes that each direction of a link holds before `send` waits, unless told otherwise."""

_AFTER_CLOSE_S: Final = 5.0  # for handlers whose link was closed under them

_log = logging.getLogger(__name__)


class Link(Protocol):
    """One end of an ordered, reliable connection; both ends may send at any time.

    All methods may be called from any thread.
    """

    @property
    def peer(self) -> str:
        """Identity of the peer on the server side of a TLS link; else its address or empty."""
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame; never wait for the peer's sends.

        Raises:
            FrameError: The frame cannot be encoded or is over a limit.
            LinkError: The link has ended; as `recv`.
        """
        ...

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of one frame, as `encode_parts` gives them. For wrappers of links.

        Raises:
            LinkError: The link has ended; as `recv`.
        """
        ...

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame, waiting up to `timeout_s` seconds (None: without limit).

        Raises:
            LinkTimeout: Nothing arrived in time; the link is still good.
            LinkClosed: The peer closed the link or was lost, or this end was closed.
            RemoteError: The peer's handler failed; the message is its reason.
            FrameError: What arrived is not a valid frame; the link has ended.
        """
        ...

    def close(self) -> None:
        """End the link. May be called twice."""
        ...


class FailingLink(Link, Protocol):
    """A link whose end can be given a reason, which the peer gets as RemoteError."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive."""
        ...

    def fail(self, reason: str) -> None:
        """End the link; `recv` of the peer raises RemoteError with `reason`."""
        ...


Handler = Callable[[Link], None]


class Server(Protocol):
    """Accepts links and gives each to a handler in a thread of its own."""

    @property
    def address(self) -> str:
        """Address to dial, with the port that was chosen."""
        ...

    def stop(self, grace_s: float = 0.0) -> None:
        """Accept no more; give handlers `grace_s` seconds to finish, then end their links."""
        ...


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
        return _dial_memory(place, limits, queue_bytes)
    _require_tls(address, place, credentials, plain)
    if kind == "tcp":
        from fedsys.transport import tcp_link

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
        plain: Accept unprotected links from other hosts, for networks that are trusted.

    Raises:
        ConfigError: The address has another form, or is in use.
        SecurityError: TLS is required.
    """
    kind, place = _split(address)
    if kind == "memory":
        return _MemoryServer(place, handler, limits, queue_bytes, max_links)
    _require_tls(address, place, credentials, plain)
    if kind == "tcp":
        from fedsys.transport import tcp_link

        return tcp_link.TcpServer(place, handler, credentials, limits, queue_bytes, max_links)
    from fedsys.transport import grpc_link

    return grpc_link.GrpcServer(place, handler, credentials, limits, queue_bytes, max_links)


def _split(address: str) -> tuple[str, str]:
    kind, separator, place = address.partition("://")
    if not separator or not place or kind not in ("tcp", "grpc", "memory"):
        raise ConfigError.of(
            "address", address, "must be tcp://host:port, grpc://host:port or memory://name"
        )
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


class HandlerThreads:
    """Runs the handler of a server, one thread per link.

    Args:
        address: Of the server, for messages and names of threads.
        handler: Called with each link.
        max_links: Links at one time.
    """

    def __init__(self, address: str, handler: Handler, max_links: int) -> None:
        self._address, self._handler, self._max_links = address, handler, max_links
        self._running: dict[threading.Thread, FailingLink] = {}
        self._lock = threading.Lock()

    def start(self, link: FailingLink) -> None:
        """Give `link` to the handler in a new thread.

        Raises:
            LinkClosed: There are `max_links` already.
        """
        thread = threading.Thread(
            target=self._run, args=(link,), name=f"link of {self._address}", daemon=True
        )
        with self._lock:
            if len(self._running) >= self._max_links:
                raise LinkClosed(f"{self._address} is full: it has {self._max_links} links")
            self._running[thread] = link
        thread.start()

    def stop(self, grace_s: float) -> None:
        """Wait `grace_s` seconds for handlers to finish, then end their links and wait again."""
        with self._lock:
            running = dict(self._running)
        others = running.keys() - {threading.current_thread()}
        _join(others, grace_s)
        for link in running.values():
            link.close()
        _join(others, _AFTER_CLOSE_S)

    def _run(self, link: FailingLink) -> None:
        try:
            self._handler(link)
        except FedsysError as error:
            if not (isinstance(error, LinkClosed) and link.ended):  # the peer left: no failure
                link.fail(f"{type(error).__name__}: {error}".splitlines()[0][:500])
        except Exception as error:
            _log.exception("the handler of %s failed", self._address)
            link.fail(f"{type(error).__name__} in the handler; the log of that side says more")
        finally:
            link.close()
            with self._lock:
                del self._running[threading.current_thread()]


def _join(threads: Iterable[threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


# --------------------------------------------------------------------------------------------------
# Links between threads


class _MemoryLink:
    """One end. What is sent goes through the encoder, and is parsed under the peer's limits."""

    def __init__(
        self,
        peer: str,
        inbox: Mailbox[Frame],
        outbox: Mailbox[Frame],
        limits: tuple[Limits, Limits],
    ) -> None:
        self.peer = peer
        self._inbox, self._outbox = inbox, outbox
        self._limits, self._peer_limits = limits
        self._sending = threading.Lock()

    @property
    def ended(self) -> bool:
        return self._inbox.ended

    def send(self, frame: Frame) -> None:
        self.send_encoded(encode_parts(frame, self._limits))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        self._inbox.raise_if_ended()
        with self._sending:
            assembler = Assembler(self._peer_limits)
            try:
                fed = [assembler.feed(part) for part in parts]
                frame = fed[-1] if fed else None
                if frame is None:
                    raise FrameError(f"the frame ends after {assembler.received_bytes} bytes")
            except FrameError as error:
                self._outbox.end(error)
                return
            nbytes = assembler.received_bytes
            if not self._outbox.try_put(frame, nbytes):
                with self._inbox.relaxed():
                    self._outbox.put(frame, nbytes)

    def recv(self, timeout_s: float | None = None) -> Frame:
        return self._inbox.get(timeout_s)

    def fail(self, reason: str) -> None:
        self._end(RemoteError(reason))

    def close(self) -> None:
        self._end(LinkClosed("the peer closed the link"))

    def _end(self, reason_for_peer: LinkError) -> None:
        self._inbox.end(LinkClosed("the link was closed on this side"), discard=True)
        self._outbox.end(reason_for_peer)


class _MemoryServer:
    def __init__(
        self, name: str, handler: Handler, limits: Limits, queue_bytes: int, max_links: int
    ) -> None:
        self.address = f"memory://{name}"
        self._name, self._limits, self._queue_bytes = name, limits, queue_bytes
        self._handlers = HandlerThreads(self.address, handler, max_links)
        with _servers_lock:
            if name in _servers:
                raise ConfigError.of("address", self.address, "is in use", "choose another name")
            _servers[name] = self

    def connect(self, limits: Limits, queue_bytes: int) -> Link:
        up: Mailbox[Frame] = Mailbox(self._queue_bytes)
        down: Mailbox[Frame] = Mailbox(queue_bytes)
        self._handlers.start(_MemoryLink("", up, down, (self._limits, limits)))
        return _MemoryLink(self.address, down, up, (limits, self._limits))

    def stop(self, grace_s: float = 0.0) -> None:
        with _servers_lock:
            if _servers.get(self._name) is self:
                del _servers[self._name]
        self._handlers.stop(grace_s)


_servers: dict[str, _MemoryServer] = {}
_servers_lock = threading.Lock()


def _dial_memory(name: str, limits: Limits, queue_bytes: int) -> Link:
    with _servers_lock:
        server = _servers.get(name)
    if server is None:
        raise LinkRefused(f"memory://{name}: nobody serves this name in this process")
    return server.connect(limits, queue_bytes)
