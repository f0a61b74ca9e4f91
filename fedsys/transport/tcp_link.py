"""Links over TCP: how the ends reach, check and greet each other.

What passes between them then is in `fedsys.transport.tcp_stream`.

The end that dials says ``FSYS-LINK 0001`` and a line end; the other says the same if it takes the
link, or why not as a last word (`fedsys.transport.tcp_flows`). With credentials all of it is
inside of TLS 1.3, in which both ends show certificates; an end that finds the other without TLS
says so outside of it. Who greets otherwise, or not within `GREETING_S`, is sent away and holds
nothing. From its first moment until its link is admitted, a connection is that of a stranger
(`fedsys.transport.strangers`).
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final

from fedsys.errors import LinkClosed, LinkError, LinkRefused, SecurityError
from fedsys.transport.link import Handler, HandlerThreads, Link, kept_of
from fedsys.transport.security import Credentials, check
from fedsys.transport.strangers import Census, Stay, Strangers, WaitingRoom
from fedsys.transport.tcp_channel import (
    Channel,
    PlainChannel,
    TlsChannel,
    client_context,
    prepare,
    read_exactly,
    server_context,
    wait_and_read,
    write_all,
)
from fedsys.transport.tcp_flows import Last, is_last, last_word, read_last
from fedsys.transport.tcp_listening import Refusals, host_and_port, leave, listening, shut
from fedsys.transport.tcp_stream import LINGER_S, TcpLink
from fedsys.transport.wire import PREAMBLE_BYTES, Limits

GREETING: Final = b"FSYS-LINK 0001\r\n"
GREETING_S: Final = 10.0
"""How long a connection may take to greet, in seconds."""

_MAGIC: Final = GREETING[:10]
_TLS_BEGINS: Final = (b"\x16\x03", b"\x15\x03")  # a handshake, an alert
_RETRY_S: Final = 0.05
_ONE_AUTHORITY: Final = "both sides need certificates of one authority"

_log = logging.getLogger(__name__)


class _Final(Exception):
    """An error of a dial that another attempt would not mend."""

    def __init__(self, error: LinkError | SecurityError) -> None:
        super().__init__(str(error))
        self.error = error


# --------------------------------------------------------------------------------------------------
# The end that dials


def dial(
    place: str,
    credentials: Credentials | None,
    limits: Limits,
    queue_bytes: int,
    timeout_s: float,
    retry: bool = True,
) -> Link:
    """Connect to ``host:port``; see `fedsys.transport.addresses.dial`."""
    context = None
    if credentials is not None:
        check(credentials, role="client")
        context = client_context(credentials)
    deadline = time.monotonic() + timeout_s
    error: LinkError
    while True:
        try:
            channel = _connected(place, context, deadline)
            link = TcpLink(channel, f"tcp://{place}", limits, queue_bytes, linger=True)
            link.begin()
            return link
        except _Final as final:
            raise final.error from None
        except TimeoutError:
            error = LinkClosed(f"tcp://{place} does not answer within {timeout_s:g} s")
        except ConnectionRefusedError:
            error = LinkRefused(f"tcp://{place}: nobody listens there")
        except OSError as problem:
            told = problem.strerror or str(problem)
            error = LinkClosed(f"the link to tcp://{place} was lost: {told}")
        except LinkClosed as lost:
            error = LinkClosed(f"the link to tcp://{place} was lost: {lost}")
        if not retry or time.monotonic() + _RETRY_S > deadline:
            raise error
        time.sleep(_RETRY_S)
        if time.monotonic() >= deadline:  # on a busy machine; another attempt would only be late
            raise error


def _connected(place: str, context: ssl.SSLContext | None, deadline: float) -> Channel:
    host, port = host_and_port(place)
    connection = _connection(host, port, deadline)
    try:
        prepare(connection)
        channel: Channel = PlainChannel(connection)
        if context is not None:
            channel = tls = TlsChannel(connection, context, host)
            _shake_hands(tls, place, deadline)
        write_all(connection, b"".join(_sealed(channel, GREETING)), deadline)
        _check_answer(channel, place, deadline)
        return channel
    except BaseException:
        connection.close()
        raise


def _connection(host: str, port: int, deadline: float) -> socket.socket:
    """Return a socket that is connected to one of the addresses of a host.

    Raises:
        OSError: None of them accepts; TimeoutError after `deadline`.
    """
    problem: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in _resolved(host, port, deadline):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(left)
            connection.connect(address)
            return connection
        except OSError as error:
            problem = error
            connection.close()
    raise problem


def _resolved(host: str, port: int, deadline: float) -> list[Any]:
    """Return what `socket.getaddrinfo` does, which has no time limit of its own."""
    answers: SimpleQueue[list[Any] | OSError] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            answers.put(error)

    if host.replace(".", "").isdigit() or ":" in host or host == "localhost":
        ask()
    else:
        threading.Thread(target=ask, name=f"looks up {host}", daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _shake_hands(channel: TlsChannel, place: str, deadline: float) -> None:
    try:
        channel.shake_hands(b"", deadline)
    except ssl.SSLError as error:
        raise _Final(_unsafe(place, error)) from error


def _check_answer(channel: Channel, place: str, deadline: float) -> None:
    """Read the answer to the greeting.

    Raises:
        OSError: The connection is lost, or not in time.
        _Final: The other side does not take this link.
    """
    try:
        answer = read_exactly(channel, len(GREETING), deadline)
    except ssl.SSLError as error:  # TLS 1.3 tells a client last what is wrong with its certificate
        raise _Final(_unsafe(place, error)) from error
    if answer == GREETING:
        return
    if not answer:
        raise LinkClosed("the peer left before it answered")
    if not is_last(answer):
        raise _Final(_strange(place, answer))
    answer += read_exactly(channel, PREAMBLE_BYTES - len(GREETING), deadline)
    if len(answer) < PREAMBLE_BYTES:
        raise LinkClosed("the peer left in the middle of its answer")
    why, length = read_last(answer)
    text = read_exactly(channel, length, deadline).decode(errors="replace")
    raise _Final(SecurityError(text) if why == Last.SECURITY else LinkClosed(text))


def _strange(place: str, answer: bytes) -> LinkError | SecurityError:
    if answer[:2] in _TLS_BEGINS:
        return SecurityError(
            f"tcp://{place} wants TLS: {_ONE_AUTHORITY}; give credentials on this side too"
        )
    return LinkClosed(
        f"tcp://{place} does not serve the links of fedsys: it answers {answer[:16]!r}"
    )


def _unsafe(place: str, error: ssl.SSLError) -> SecurityError:
    """Translate why the ends could not agree on TLS."""
    text, way_out = (error.reason or str(error)).replace("_", " ").lower(), _ONE_AUTHORITY
    if isinstance(error, ssl.SSLCertVerificationError):
        text = error.verify_message
        if "mismatch" in text:
            way_out = f"the certificate of {place} must name that host; issue another"
    elif error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        text = "what answers there does not speak TLS"
        way_out = "start it with credentials, or give none here if the network is trusted"
    return SecurityError(f"tcp://{place}: {text}; {way_out}")


def _sealed(channel: Channel, data: bytes) -> list[memoryview]:
    return [part for batch in channel.sealed([data]) for part in batch]


# --------------------------------------------------------------------------------------------------
# The end that serves


class TcpServer:
    """Accepts links at ``host:port`` in one thread and greets each in one of its own.

    The arguments are those of `fedsys.transport.addresses.serve`.
    """

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
        self._limits, self._queue_bytes, self._strangers = limits, queue_bytes, strangers
        self._context: ssl.SSLContext | None = None
        if credentials is not None:
            check(credentials, role="server")
            self._context = server_context(credentials)
        self._listener = listening(place)
        port = self._listener.getsockname()[1]
        self.address = f"tcp://{place.rpartition(':')[0]}:{port}"
        self._room = WaitingRoom(strangers.places if strangers else max_links)
        self._handlers = HandlerThreads(
            self.address, handler, max_links, self._room, kept_of(max_links, strangers)
        )
        self._refusals = Refusals(self.address)
        self._links: set[TcpLink] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._alarm, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name=f"accepts {place}", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        poll = select.poll()
        for readable in (self._listener, self._alarm):
            poll.register(readable, select.POLLIN)
        while True:
            poll.poll()
            if self._stopped:
                return
            try:
                connection, where = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # no descriptors are left, or who came has gone again
                self._room.count("not_accepted")
                self._refusals.note("a peer", error)
                time.sleep(_RETRY_S)
                continue
            stay = self._room.enter(where[0], partial(shut, connection))
            if stay is None:
                connection.close()
                return
            where_text = f"{where[0]} port {where[1]}"
            threading.Thread(
                target=self._greet,
                args=(connection, where_text, stay),
                name=f"greets {where_text}",
                daemon=True,
            ).start()

    def _greet(self, connection: socket.socket, where: str, stay: Stay) -> None:
        taken = False
        try:
            prepare(connection)
            deadline = time.monotonic() + GREETING_S
            channel, peer = self._secured(connection, deadline)
            self._check_greeting(channel, deadline)
            self._open(channel, peer, stay)
            taken = True
        except (OSError, LinkError, SecurityError) as error:
            self._refusals.note(where, error)
            self._room.leave(stay, "slow" if isinstance(error, TimeoutError) else "refused")
            leave(connection)
        finally:
            if not taken:
                self._room.leave(stay)
                connection.close()

    def _secured(self, connection: socket.socket, deadline: float) -> tuple[Channel, str]:
        """Return the channel of a connection and the name of its peer.

        Raises:
            SecurityError: Only one end speaks TLS.
            OSError: The certificate is not accepted; the connection is lost; it takes too long.
        """
        memory = memoryview(bytearray(len(_MAGIC)))
        begun = wait_and_read(connection, memory, deadline, socket.MSG_PEEK)
        first = bytes(memory[:begun])
        if self._context is None:
            channel = PlainChannel(connection)
            if first[:2] in _TLS_BEGINS:
                text = f"{self.address} does not speak TLS; start it with credentials, or give none"
                self._refuse(channel, Last.SECURITY, text, SecurityError)
            return channel, ""
        if first == _MAGIC:
            text = f"{self.address} wants TLS: {_ONE_AUTHORITY}; give credentials on this side too"
            self._refuse(PlainChannel(connection), Last.SECURITY, text, SecurityError)
        tls = TlsChannel(connection, self._context, None)
        tls.shake_hands(b"", deadline)
        return tls, tls.peer

    def _check_greeting(self, channel: Channel, deadline: float) -> None:
        greeting = read_exactly(channel, len(GREETING), deadline)
        if greeting == GREETING:
            return
        if greeting.startswith(_MAGIC):
            text = (
                f"{self.address} speaks version {GREETING[10:14].decode()}, not "
                f"{greeting[10:14]!r}; install the same version of fedsys on both sides"
            )
            self._refuse(channel, Last.VERSION, text, LinkClosed)
        raise LinkClosed(f"it begins with {greeting[:16]!r}: no link of fedsys")

    def _open(self, channel: Channel, peer: str, stay: Stay) -> None:
        """Give the link to its handler, and say so to the peer before the handler sends."""
        link = TcpLink(
            channel,
            peer,
            self._limits,
            self._queue_bytes,
            linger=False,
            first=self._strangers.limits if self._strangers else None,
            admitted=partial(self._handlers.admit, stay),
            over=self._links.discard,
        )
        with link.sending:
            try:
                with self._lock:
                    if self._stopped:
                        raise LinkClosed(f"{self.address} has stopped")
                    self._links.add(link)
                if self._strangers is None:
                    link.admit()
            except LinkClosed as error:
                self._room.leave(stay)
                link.abandon()
                self._refuse(channel, Last.FULL, str(error), LinkClosed)
            self._handlers.start(link, stay)
            with contextlib.suppress(OSError):
                write_all(channel.socket, b"".join(_sealed(channel, GREETING)), 0.0)
        link.begin()

    def _refuse(
        self, channel: Channel, why: Last, text: str, error: type[LinkClosed | SecurityError]
    ) -> None:
        with contextlib.suppress(OSError):
            write_all(channel.socket, b"".join(_sealed(channel, last_word(why, text))), 0.0)
        raise error(text)

    def census(self) -> Census:
        """Return who is there; see `fedsys.transport.link.Server`."""
        return self._handlers.census()

    def stop(self, grace_s: float = 0.0) -> None:
        """Accept no more, and end; see `fedsys.transport.link.Server`."""
        with self._lock:
            first, self._stopped = not self._stopped, True
        self._room.close()
        if first:
            self._waker.send(b"!")
            self._thread.join()
            for one in (self._listener, self._alarm, self._waker):
                one.close()
        self._handlers.stop(grace_s)
        deadline = time.monotonic() + LINGER_S
        for link in list(self._links):
            link.wait_closed(max(0.0, deadline - time.monotonic()))
