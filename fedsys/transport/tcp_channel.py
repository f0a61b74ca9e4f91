"""Bytes over a TCP socket that never waits: as they are, or through TLS 1.3 with both ends checked.

TLS is computed in memory, apart from the socket. So a whole batch of records costs one call of the
system, and the lock that an SSL object of Python needs (two threads must not use it at once) is
never held while the network is slow.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Final, Protocol

from fedsys.errors import LinkClosed
from fedsys.transport.buffers import chunks
from fedsys.transport.security import Credentials, holder_of
from fedsys.transport.wire import Buffer

SILENCE_S: Final = 20
"""Seconds after which a peer that answers nothing is taken for lost."""

_KEEPALIVE: Final = {"TCP_KEEPIDLE": SILENCE_S // 2, "TCP_KEEPINTVL": SILENCE_S // 4,
                     "TCP_KEEPCNT": 2}  # fmt: skip
_SEALED_BYTES: Final = 1 << 18  # encrypted at a time, while the batch before is on its way
_CIPHER_BYTES: Final = 1 << 18  # taken from the socket at a time
_RECORD_BYTES: Final = (1 << 14) + 256  # of a record of TLS at most, beside its header
_TCP_INFO: Final = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
_INFO_BYTES: Final = 60  # of Linux's struct tcp_info, up to tcpi_last_ack_recv
_FILES_OF_MEMORY: Final = Path("/proc/self/fd")


def _grows_for_marks() -> bool:
    """Return whether the system makes room for what a mark waits for: Linux from 4.18 on.

    Before, a mark above the buffer's size is never reached, and nobody is woken.
    """
    if sys.platform != "linux":
        return False
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) >= (4, 18)


_MARKED: Final = _grows_for_marks()


class Channel(Protocol):
    """A connected socket, and what is done to the bytes that pass it."""

    socket: socket.socket

    @property
    def pending(self) -> bool:
        """Whether `read_into` has something although the socket may have nothing."""
        ...

    @property
    def held(self) -> int:
        """Bytes at most that were taken from the socket and not given on."""
        ...

    def sealed(self, parts: Sequence[Buffer]) -> Iterator[list[memoryview]]:
        """Yield batches of buffers to be put on the wire in this order. For one thread at a time.

        They are views of `parts` where nothing is done to the bytes.
        """
        ...

    def read_into(self, memory: memoryview) -> int | None:
        """Fill the beginning of `memory`; return the bytes, 0 at the end, None if nothing is there.

        Raises:
            OSError: The connection is lost, or what arrived is not what the peer sent.
        """
        ...


def prepare(connection: socket.socket) -> None:
    """Set up a socket: calls do not wait, small frames leave at once, silence is noticed.

    Buffers keep the sizes that the system chooses while the link is in use.
    """
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class LowWater:
    """Has the system wake a reader once there is much to read, if much is missing of a frame.

    A frame over a slow link arrives in packets; without this its reader is woken for each of them.
    The last bytes that are missing always wake it, and so do the end of the connection, an error,
    and a window that is full. Linux alone: elsewhere a mark above what the buffer holds would never
    be reached.

    Args:
        channel: Whose socket is waited for.
    """

    MOST: ClassVar[int] = 1 << 17
    """Bytes that are waited for at a time: more would be copied late, and hold the window up."""
    LEAST: ClassVar[int] = 1 << 14
    """Bytes below which each arrival may wake."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._mark = channel, 1

    def expect(self, missing: int) -> None:
        """Be woken once so many bytes can be read, or the most that is waited for.

        To be called before each wait, as the next frame may be a small one.

        Args:
            missing: Bytes of the frame in work that were not read; 0 if there is none.
        """
        # TLS may hold the beginning of a record whose bytes were counted as missing
        missing -= self._channel.held
        mark = min(missing, self.MOST) if _MARKED and missing >= self.LEAST else 1
        if mark != self._mark:
            self._channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._mark = mark


class Silence:
    """Tells whether the peer's system leaves unanswered what it was sent or asked.

    Keepalive alone does not see that: it rests while something is under way. TCP_USER_TIMEOUT does,
    but it also ends a link whose peer is there and only does not receive. Where Linux's TCP_INFO is
    missing, nothing is noticed.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._since: float | None = None

    def lasts(self) -> bool:
        """Whether it has lasted for about `SILENCE_S`. To be asked every few seconds.

        After a long time without room at the peer its system is asked only every minute or two.
        """
        now = time.monotonic()
        if self._unanswered_s() < SILENCE_S / 2:
            self._since = None
            return False
        # Seen once is not enough: a question of the moment may follow a long rest.
        self._since = self._since or now
        return now - self._since >= SILENCE_S / 2

    def _unanswered_s(self) -> float:
        if _TCP_INFO is None:
            return 0.0
        with contextlib.suppress(OSError):
            info = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES)
            if len(info) == _INFO_BYTES and (info[2] or info[3]):  # retransmits, probes
                return int.from_bytes(info[56:60], sys.byteorder) / 1e3
        return 0.0


class PlainChannel:
    """Bytes as they are."""

    pending, held = False, 0

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def sealed(self, parts: Sequence[Buffer]) -> Iterator[list[memoryview]]:
        """Yield all parts at once; see `Channel`."""
        yield [memoryview(part) for part in parts if len(part)]

    def read_into(self, memory: memoryview) -> int | None:
        """Read from the socket; see `Channel`."""
        try:
            return self.socket.recv_into(memory)
        except BlockingIOError:
            return None


class TlsChannel:
    """Bytes through TLS. The handshake is the caller's to complete before anything else.

    Args:
        connection: The socket, connected.
        context: Of `client_context` or `server_context`.
        host: What the server's certificate must name; None: this end is the server.
    """

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext, host: str | None
    ) -> None:
        self.socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=host is None, server_hostname=host
        )
        self._lock = threading.Lock()
        self._cipher = memoryview(bytearray(_CIPHER_BYTES))

    @property
    def pending(self) -> bool:
        """Whether bytes were taken from the socket and not given on."""
        return self._incoming.pending > 0 or self._tls.pending() > 0

    @property
    def held(self) -> int:
        """Bytes at most that were taken from the socket and not given on.

        OpenSSL takes the beginning of a record out of the buffer in which the socket's bytes are.
        """
        return self._incoming.pending + _RECORD_BYTES

    @property
    def peer(self) -> str:
        """Common name in the certificate of the other end; raises SecurityError if unreadable."""
        return holder_of(self._tls.getpeercert(binary_form=True) or b"")

    def sealed(self, parts: Sequence[Buffer]) -> Iterator[list[memoryview]]:
        """Yield what the parts are when encrypted; see `Channel`."""
        for piece in chunks(parts, _SEALED_BYTES):
            rest = memoryview(piece)
            with self._lock:
                while rest:
                    rest = rest[self._tls.write(rest) :]
                data = self._outgoing.read()
            yield [memoryview(data)]

    def read_into(self, memory: memoryview) -> int | None:
        """Decrypt what the socket has; see `Channel`."""
        while True:
            with self._lock:
                try:
                    return self._tls.read(len(memory), memory)  # type: ignore[arg-type, return-value]
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    return 0
            try:
                nbytes = self.socket.recv_into(self._cipher)
            except BlockingIOError:
                return None
            if nbytes == 0:
                return 0
            with self._lock:
                self._incoming.write(self._cipher[:nbytes])

    def shake_hands(self, first: bytes, deadline: float) -> None:
        """Complete the handshake.

        Args:
            first: What was read from the socket before.
            deadline: When it is too late, in seconds of `time.monotonic`.

        Raises:
            ssl.SSLError: One end does not accept the other, or the bytes are not TLS 1.3.
            LinkClosed: The peer is gone.
            OSError: The connection is lost; TimeoutError after `deadline`.
        """
        self._incoming.write(first)
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                pass
            finally:  # a refusal is said to the peer as well
                write_all(self.socket, self._outgoing.read(), deadline)
            nbytes = wait_and_read(self.socket, self._cipher, deadline)
            if nbytes == 0:
                raise LinkClosed("the peer left in the handshake")
            self._incoming.write(self._cipher[:nbytes])


# --------------------------------------------------------------------------------------------------
# Before a link begins: calls that wait, but not for ever


def wait(connection: socket.socket, event: int, deadline: float) -> None:
    """Wait until the socket can be read (POLLIN) or written (POLLOUT).

    Raises:
        TimeoutError: It is `deadline`, in seconds of `time.monotonic`.
    """
    poll = select.poll()
    poll.register(connection, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        raise TimeoutError("it took too long")


def write_all(connection: socket.socket, data: bytes, deadline: float) -> None:
    """Send bytes, waiting as far as needed.

    Raises:
        OSError: The connection is lost; TimeoutError after `deadline`.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[connection.send(rest) :]
        except BlockingIOError:
            wait(connection, select.POLLOUT, deadline)


def wait_and_read(
    connection: socket.socket, memory: memoryview, deadline: float, flags: int = 0
) -> int:
    """Read into `memory` what comes first; return the bytes, 0 at the end.

    Raises:
        OSError: The connection is lost; TimeoutError after `deadline`.
    """
    while True:
        try:
            return connection.recv_into(memory, 0, flags)
        except BlockingIOError:
            wait(connection, select.POLLIN, deadline)


def read_exactly(channel: Channel, nbytes: int, deadline: float) -> bytes:
    """Return `nbytes` bytes, fewer if the peer ends before.

    Raises:
        OSError: The connection is lost; TimeoutError after `deadline`.
    """
    memory = memoryview(bytearray(nbytes))
    filled = 0
    while filled < nbytes:
        got = channel.read_into(memory[filled:])
        if got == 0:
            break
        if got is None:
            wait(channel.socket, select.POLLIN, deadline)
        filled += got or 0
    return bytes(memory[:filled])


def drain(connection: socket.socket, deadline: float) -> None:
    """Read and drop what comes until the peer ends, so that closing does not reset the connection.

    A reset would take with it what was sent last.
    """
    dropped = memoryview(bytearray(1 << 16))
    with contextlib.suppress(OSError):
        while wait_and_read(connection, dropped, deadline):
            if time.monotonic() > deadline:
                return


# --------------------------------------------------------------------------------------------------
# Certificates


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """Return what an end that dials needs; it checks the name of the server's host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    return _mutual(context, credentials)


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """Return what an end that serves needs; it demands a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # links are not resumed
    return _mutual(context, credentials)


def _mutual(context: ssl.SSLContext, credentials: Credentials) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.ca.decode("ascii"))
    with _as_file(credentials.certificate + b"\n" + credentials.key) as path:
        context.load_cert_chain(path)
    return context


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Yield the name of a file that only this process can open, and that is on no disk on Linux.

    The standard library reads keys from files only.
    """
    if hasattr(os, "memfd_create") and _FILES_OF_MEMORY.exists():
        with os.fdopen(os.memfd_create("fedsys"), "wb") as file:
            file.write(data)
            file.flush()
            yield str(_FILES_OF_MEMORY / str(file.fileno()))
        return
    descriptor, name = tempfile.mkstemp()  # readable by its owner only
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield name
    finally:
        os.unlink(name)
