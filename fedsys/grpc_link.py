"""Links over gRPC: one bidirectional stream each, whose messages are pieces of encoded frames.

gRPC brings HTTP/2 flow control, keepalive and TLS; its methods take and give plain bytes here, so
there is no generated code. Three threads serve one end::

    caller of send ─▶ outbox ─▶ gRPC's writer ══▶ stream ══▶ reader ─▶ inbox ─▶ caller of recv

The reader takes messages off the stream whatever the callers do, so that two peers that both send
first do not block each other; both queues are bounded (see `fedsys.link`).

A frame is cut into messages of `PIECE_BYTES` to twice that: copying one piece overlaps with
sending the one before, which a single large message does not allow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from fedsys.errors import (
    ConfigError,
    LinkClosed,
    LinkError,
    LinkRefused,
    RemoteError,
    SecurityError,
)
from fedsys.link import Handler, HandlerThreads, Link, Server
from fedsys.mailbox import Mailbox
from fedsys.security import Credentials, check
from fedsys.wire import Assembler, Buffer, Frame, Limits, encode_parts

PIECE_BYTES: Final = 1 << 20

_SERVICE: Final = "fedsys.Link"
_METHOD: Final = "Connect"
_GREETING: Final = ("fedsys-link", "1")
_LINGER_S: Final = 5.0  # for frames under way when this end closes
_RETRY_S: Final = 0.05
_MESSAGE_LIMIT: Final = [("grpc.max_receive_message_length", 4 * PIECE_BYTES)]
_KEEPALIVE: Final = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_CLIENT_OPTIONS: Final = [
    *_MESSAGE_LIMIT,
    *_KEEPALIVE,
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each link
    ("grpc.enable_retries", 0),
]
_SERVER_OPTIONS: Final = [
    *_MESSAGE_LIMIT,
    *_KEEPALIVE,
    ("grpc.so_reuseport", 0),  # else a second server on the port would start, and take half
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


def pieces(parts: Sequence[Buffer], least: int = PIECE_BYTES) -> Iterator[bytes]:
    """Copy buffers, put one after the other, into equal pieces of `least` to 2 · `least` bytes.

    All that is shorter makes one piece.
    """
    total = sum(len(part) for part in parts)
    size = -(-total // max(1, total // least))
    held: list[memoryview] = []
    count = 0
    for part in parts:
        rest = memoryview(part)
        while count + len(rest) >= size:
            held.append(rest[: size - count])
            rest = rest[size - count :]
            yield b"".join(held)
            held, count = [], 0
        held.append(rest)
        count += len(rest)
    if count:
        yield b"".join(held)


class _Stream:
    """The part of a link that is the same on both ends: two mailboxes around a stream."""

    def __init__(self, limits: Limits, queue_bytes: int) -> None:
        self.limits = limits
        self.inbox: Mailbox[Frame] = Mailbox(queue_bytes)
        self.outbox: Mailbox[bytes] = Mailbox(queue_bytes)
        self.reason = ""  # of a failure, for the peer
        self._sending = threading.Lock()

    def send(self, parts: Sequence[Buffer]) -> None:
        self.inbox.raise_if_ended()
        with self._sending:
            for piece in pieces(parts):
                if not self.outbox.try_put(piece, len(piece)):
                    with self.inbox.relaxed():
                        self.outbox.put(piece, len(piece))

    def outgoing(self) -> Iterator[bytes]:
        """Yield what is to be sent until this end has closed and its outbox is empty."""
        while True:
            try:
                yield self.outbox.get()
            except LinkError:
                return

    def read(self, messages: Iterable[bytes]) -> None:
        """Take messages until the peer ends; leave the reason in the mailboxes."""
        assembler = Assembler(self.limits)
        for message in messages:
            if self.inbox.ended:
                continue  # closed on this side; the peer may be waiting to see its frames gone
            try:
                frame = assembler.feed(message)
                if frame is not None:
                    self.inbox.put(frame, assembler.received_bytes)
                    assembler = Assembler(self.limits)
            except LinkError as error:
                self.reason = f"{type(error).__name__}: {error}"
                self.end(error)

    def end(self, reason: LinkError, *, discard: bool = False) -> None:
        self.inbox.end(reason, discard=discard)
        self.outbox.end(reason)


def _closed_here() -> LinkClosed:
    return LinkClosed("the link was closed on this side")


def _closed_there() -> LinkClosed:
    return LinkClosed("the peer closed the link")


# --------------------------------------------------------------------------------------------------
# The end that dials


class _DialledLink:
    def __init__(self, place: str, credentials: Credentials | None, stream: _Stream) -> None:
        self.peer = f"grpc://{place}"
        self._stream = stream
        self._channel = _channel(place, credentials)
        method = self._channel.stream_stream(f"/{_SERVICE}/{_METHOD}")
        self._call = method(stream.outgoing())
        self.opened = threading.Event()
        self.accepted = False
        self._reader = threading.Thread(target=self._read, name=f"reads {place}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            self.accepted = _GREETING in [tuple(pair) for pair in self._call.initial_metadata()]
            if self.accepted:
                self.opened.set()
            self._stream.read(self._call)
            reason: LinkError = _closed_there()
        except grpc.RpcError as error:
            reason = _reason(self.peer, error)
        self._stream.end(reason)
        self.opened.set()
        self._channel.close()

    def send(self, frame: Frame) -> None:
        self._stream.send(encode_parts(frame, self._stream.limits))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        self._stream.send(parts)

    def recv(self, timeout_s: float | None = None) -> Frame:
        return self._stream.inbox.get(timeout_s)

    def close(self) -> None:
        self._stream.end(_closed_here(), discard=True)
        if threading.current_thread() is not self._reader:
            self._reader.join(_LINGER_S)
        self._call.cancel()

    def abandon(self, reason: LinkError) -> None:
        """End a link that was not accepted, without waiting for the peer."""
        self._stream.end(reason, discard=True)
        self._call.cancel()


def _channel(place: str, credentials: Credentials | None) -> Any:
    if credentials is None:
        return grpc.insecure_channel(place, options=_CLIENT_OPTIONS)
    tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)
    return grpc.secure_channel(place, tls, options=_CLIENT_OPTIONS)


def _reason(where: str, error: Any) -> LinkError:
    """Translate the status with which a stream ended."""
    code, details = error.code(), (error.details() or "").splitlines() or [""]
    match code:
        case grpc.StatusCode.ABORTED:
            return RemoteError(details[0])
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LinkClosed(f"{where} is full or refuses the message: {details[0]}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return LinkClosed(f"{where} serves gRPC, but not the links of fedsys")
        case _ if "connection refused" in details[0].lower():
            return LinkRefused(f"{where}: nobody listens there")
        case _:
            return LinkClosed(f"the link to {where} was lost: {details[0] or code.name}")


_TLS_WORDS: Final = ("ssl_error_ssl", "certificate", "verification")  # not: reset in the handshake


def dial(
    place: str,
    credentials: Credentials | None,
    limits: Limits,
    queue_bytes: int,
    timeout_s: float,
    retry: bool = True,
) -> Link:
    """Connect to ``host:port``; see `fedsys.link.dial`."""
    if credentials is not None:
        check(credentials, role="client")
    deadline = time.monotonic() + timeout_s
    while True:
        stream = _Stream(limits, queue_bytes)
        link = _DialledLink(place, credentials, stream)
        if link.opened.wait(max(deadline - time.monotonic(), 0.0)) and link.accepted:
            return link
        link.abandon(LinkClosed(f"grpc://{place} does not answer within {timeout_s:g} s"))
        try:
            stream.inbox.raise_if_ended()
        except LinkError as error:
            text = str(error)
            if any(word in text.lower() for word in _TLS_WORDS):
                raise SecurityError(
                    f"{text}; both sides need certificates of one authority"
                ) from None
            final = isinstance(error, RemoteError) or " is full" in text or " serves gRPC" in text
            if final or not retry or time.monotonic() + _RETRY_S > deadline:
                raise
        time.sleep(_RETRY_S)


# --------------------------------------------------------------------------------------------------
# The end that serves


class _AcceptedLink:
    def __init__(self, peer: str, stream: _Stream) -> None:
        self.peer = peer
        self._stream = stream

    @property
    def ended(self) -> bool:
        return self._stream.inbox.ended

    def send(self, frame: Frame) -> None:
        self._stream.send(encode_parts(frame, self._stream.limits))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        self._stream.send(parts)

    def recv(self, timeout_s: float | None = None) -> Frame:
        return self._stream.inbox.get(timeout_s)

    def fail(self, reason: str) -> None:
        self._stream.reason = self._stream.reason or reason
        self.close()

    def close(self) -> None:
        self._stream.end(_closed_here(), discard=True)


class _GrpcServer:
    def __init__(
        self,
        place: str,
        handler: Handler,
        credentials: Credentials | None,
        limits: Limits,
        queue_bytes: int,
        max_links: int,
    ) -> None:
        self._limits, self._queue_bytes = limits, queue_bytes
        self._handlers = HandlerThreads(f"grpc://{place}", handler, max_links)
        # gRPC occupies one thread for each stream, so as many as there may be links.
        self._server = grpc.server(
            ThreadPoolExecutor(max_links, thread_name_prefix=f"writes {place}"),
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=max_links,
        )
        method = grpc.stream_stream_rpc_method_handler(self._connect)
        service = grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method})
        self._server.add_generic_rpc_handlers((service,))
        self.address = f"grpc://{place.rpartition(':')[0]}:{self._bind(place, credentials)}"
        self._server.start()

    def _bind(self, place: str, credentials: Credentials | None) -> int:
        try:
            if credentials is None:
                port = self._server.add_insecure_port(place)
            else:
                check(credentials, role="server")
                tls = grpc.ssl_server_credentials(
                    [(credentials.key, credentials.certificate)],
                    root_certificates=credentials.ca,
                    require_client_auth=True,
                )
                port = self._server.add_secure_port(place, tls)
        except RuntimeError as error:
            raise ConfigError.of(
                "address", f"grpc://{place}", "cannot be served", "choose another port, or 0"
            ) from error
        return int(port)

    def _connect(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Serve one stream: what this generator yields is sent."""
        stream = _Stream(self._limits, self._queue_bytes)
        names = context.auth_context().get("x509_common_name", [b""])
        link = _AcceptedLink(names[0].decode(errors="replace"), stream)
        try:
            self._handlers.start(link)
        except LinkClosed as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        context.send_initial_metadata((_GREETING,))
        reader = threading.Thread(
            target=_read_accepted, args=(stream, messages), name="reads a link", daemon=True
        )
        reader.start()
        yield from stream.outgoing()
        if stream.reason:
            context.set_code(grpc.StatusCode.ABORTED)
            context.set_details(stream.reason)

    def stop(self, grace_s: float = 0.0) -> None:
        refused = self._server.stop(grace_s + _LINGER_S)
        self._handlers.stop(grace_s)
        refused.wait(_LINGER_S)


def _read_accepted(stream: _Stream, messages: Iterator[bytes]) -> None:
    try:
        stream.read(messages)
        stream.end(_closed_there())
    except grpc.RpcError:
        stream.end(LinkClosed("the link to the peer was lost"))


def serve(
    place: str,
    handler: Handler,
    credentials: Credentials | None,
    limits: Limits,
    queue_bytes: int,
    max_links: int,
) -> Server:
    """Accept links at ``host:port``; see `fedsys.link.serve`."""
    return _GrpcServer(place, handler, credentials, limits, queue_bytes, max_links)
