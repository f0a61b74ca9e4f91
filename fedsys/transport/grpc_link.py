"""Links over gRPC: one bidirectional stream each, whose messages are pieces of encoded frames.

gRPC brings HTTP/2 flow control, keepalive and TLS; its methods take and give plain bytes here, so
there is no generated code. Two threads serve one end besides its callers::

    caller of send ─▶ outbox ─▶ writer ══▶ stream ══▶ reader ─▶ inbox ─▶ caller of recv

The reader takes messages off the stream whatever the callers do, so that two peers that both send
first do not block each other; both queues are bounded (see `fedsys.transport.link`). What both
ends have in common is in `fedsys.transport.grpc_stream`; here is how they are reached, protected
and ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from fedsys.transport.buffers import CHUNK_BYTES
from fedsys.transport.descriptors import affordable
from fedsys.transport.grpc_stream import Sender, Stream
from fedsys.transport.link import Admitted, Handler, HandlerThreads, Link, kept_of
from fedsys.transport.security import Credentials, check
from fedsys.transport.strangers import Census, Strangers, WaitingRoom
from fedsys.transport.wire import Buffer, Frame, Limits, encode_parts

_SERVICE: Final = "fedsys.Link"
_METHOD: Final = "Connect"
_GREETING: Final = ("fedsys-link", "1")
_LINGER_S: Final = 5.0  # for frames under way when this end closes
_RETRY_S: Final = 0.05
_MESSAGE_LIMIT: Final = [("grpc.max_receive_message_length", 2 * CHUNK_BYTES)]  # as pieces are cut
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
    # A connection that says nothing is kept for two minutes otherwise, and one that greets in
    # HTTP/2 and asks nothing for ever.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_concurrent_streams", 8),  # links have connections of their own
]
_SILENT: Final = 4096  # connections without a stream, if there are descriptors for them


def _closed_here() -> LinkClosed:
    return LinkClosed("the link was closed on this side")


def _closed_there() -> LinkClosed:
    return LinkClosed("the peer closed the link")


# --------------------------------------------------------------------------------------------------
# The end that dials


class _DialledLink:
    def __init__(self, place: str, credentials: Credentials | None, stream: Stream) -> None:
        self.peer = f"grpc://{place}"
        self._stream = stream
        self._channel = _channel(place, credentials)
        path = f"/{_SERVICE}/{_METHOD}"
        method = self._channel.stream_stream(path, response_deserializer=stream.receive)
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
    """Connect to ``host:port``; see `fedsys.transport.addresses.dial`."""
    if credentials is not None:
        check(credentials, role="client")
    deadline = time.monotonic() + timeout_s
    while True:
        stream = Stream(limits, queue_bytes)
        link = _DialledLink(place, credentials, stream)
        if link.opened.wait(max(deadline - time.monotonic(), 0.0)) and link.accepted:
            return link
        link.abandon(LinkClosed(f"grpc://{place} does not answer within {timeout_s:g} s"))
        try:
            stream.inbox.raise_if_ended()
        except LinkError as error:
            text = str(error)
            if any(word in text.lower() for word in _TLS_WORDS):
                way_out = "both sides need certificates of one authority"
                if "hostname verification" in text.lower():
                    way_out = f"the certificate of {place} must name that host; issue another"
                raise SecurityError(f"{text}; {way_out}") from None
            final = isinstance(error, RemoteError) or " is full" in text or " serves gRPC" in text
            if final or not retry or time.monotonic() + _RETRY_S > deadline:
                raise
        time.sleep(_RETRY_S)


# --------------------------------------------------------------------------------------------------
# The end that serves


class _AcceptedLink:
    def __init__(self, peer: str, stream: Stream, admitted: Admitted) -> None:
        self.peer = peer
        self._stream, self._admitted = stream, admitted

    def admit(self, *, vital: bool = False) -> None:
        self._admitted(vital=vital)
        self._stream.accepts = self._stream.limits

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


def _send_away(stream: Stream) -> None:
    stream.sent_away = "others came or the server stops, and who you are was not said"
    stream.end(_closed_here(), discard=True)


class _Method(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Gives each stream that is opened a deserializer of its own, which knows its stream."""

    def __init__(
        self, connect: Callable[..., None], limits: Limits, queue_bytes: int, first: Limits | None
    ) -> None:
        self._connect, self._first = connect, first
        self._limits, self._queue_bytes = limits, queue_bytes

    def service(self, details: Any) -> Any:
        if details.method != f"/{_SERVICE}/{_METHOD}":
            return None
        stream = Stream(self._limits, self._queue_bytes, self._first)
        connect = partial(self._connect, stream)
        # gRPC then passes a function that sends, to be called by whoever has something to send.
        connect.experimental_non_blocking = True  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(connect, request_deserializer=stream.receive)


class GrpcServer:
    """Accepts links at ``host:port``; the arguments: see `fedsys.transport.addresses.serve`."""

    def __init__(
        self,
        place: str,
        handler: Handler,
        credentials: Credentials | None,
        limits: Limits,
        queue_bytes: int,
        max_links: int,
        strangers: Strangers | None = None,
    ) -> None:
        self._open = strangers is None
        self._room = WaitingRoom(strangers.places if strangers else max_links)
        self._handlers = HandlerThreads(
            f"grpc://{place}", handler, max_links, self._room, kept_of(max_links, strangers)
        )
        first = strangers.limits if strangers else None
        # gRPC occupies one thread for each stream: of links, and of those who wait, twice as many
        # as have places, so that some can wait for one.
        streams = max_links + (2 * strangers.places if strangers else 0)
        connections = affordable(streams + _SILENT)
        self._server = grpc.server(
            ThreadPoolExecutor(streams, thread_name_prefix=f"reads {place}"),
            handlers=(_Method(self._connect, limits, queue_bytes, first),),
            options=[*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", connections)],
            maximum_concurrent_rpcs=streams,
        )
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

    def _connect(
        self,
        stream: Stream,
        messages: Iterator[bytes],
        context: Any,
        push: Callable[[bytes | None], None],
    ) -> None:
        """Read one stream until its end; others send."""
        names = context.auth_context().get("x509_common_name", [b""])
        address = str(context.peer()).rpartition(":")[0]
        stay = self._room.enter(address, partial(_send_away, stream))
        if stay is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it has stopped")
            return  # it raises, which is not said of it
        admitted = partial(self._handlers.admit, stay)
        link = _AcceptedLink(names[0].decode(errors="replace"), stream, admitted)

        def pushed(message: bytes | None) -> None:
            if message is None and stream.reason:
                context.set_code(grpc.StatusCode.ABORTED)
                context.set_details(stream.reason)
            elif message is None and stream.sent_away:
                context.set_code(grpc.StatusCode.UNAVAILABLE)  # a failure would be its last word
                context.set_details(stream.sent_away)
            push(message)

        stream.sender = Sender(pushed, stream)
        with stream.sending:  # nothing is sent before the greeting
            try:
                if self._open:
                    link.admit()
            except LinkClosed as error:
                self._room.leave(stay)
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            self._handlers.start(link, stay)
            context.send_initial_metadata((_GREETING,))
        try:
            stream.read(messages)
            stream.end(_closed_there())
        except grpc.RpcError:
            stream.end(LinkClosed("the link to the peer was lost"))

    def census(self) -> Census:
        """Return who is there; see `fedsys.transport.link.Server`."""
        return self._handlers.census()

    def stop(self, grace_s: float = 0.0) -> None:
        """Accept no more, and end; see `fedsys.transport.link.Server`."""
        self._room.close()
        refused = self._server.stop(grace_s + _LINGER_S)
        self._handlers.stop(grace_s)
        refused.wait(_LINGER_S)
