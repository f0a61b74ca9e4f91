"""The two directions of a link over TCP: frames one after the other, and a last word.

After the frames comes a last word, 24 bytes and a text in UTF-8, unless the peer was lost::

    offset  bytes  field (little endian)
    0       4      magic "FEND"
    4       2      why: a number of `Last`
    6       2      T, length of the text
    8       16     0
    24      T      text
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final

from fedsys.errors import LinkClosed, LinkError, RemoteError
from fedsys.transport.buffers import after, chunks
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.tcp_channel import Channel
from fedsys.transport.wire import PREAMBLE_BYTES, Assembler, Buffer, Frame, Limits, declared_bytes

_LAST: Final = struct.Struct("<4sHH16x")
_LAST_MAGIC: Final = b"FEND"
_LAST_TEXT: Final = 1000  # bytes
_HEAD_BYTES: Final = 1 << 16  # taken at a time while the header of a frame is not known
_GATHERED: Final = 512  # buffers in one call; the least that systems take is 16, Linux takes 1024

# How long a sender waits for the system to take more before it copies the rest: not much longer
# than the copy would take.
_PATIENCE_S: Final = 5e-4
_COPY_S: Final = 0.5e-9  # for a byte


class Last(enum.IntEnum):
    """Why nothing more comes."""

    CLOSED = 0
    FAILED = 1
    FULL = 2
    VERSION = 3
    SECURITY = 4


def last_word(why: Last, text: str = "") -> bytes:
    """Return the bytes that end a direction."""
    told = text.encode()[:_LAST_TEXT]
    return _LAST.pack(_LAST_MAGIC, why, len(told)) + told


def is_last(data: Buffer) -> bool:
    """Whether bytes, 4 or more, begin a last word."""
    return data[:4] == _LAST_MAGIC


def read_last(data: Buffer) -> tuple[int, int]:
    """Return why nothing more comes, and the length of the text that follows the 24 bytes."""
    _, why, length = _LAST.unpack_from(data)
    return why, min(length, _LAST_TEXT)


# --------------------------------------------------------------------------------------------------
# Sending


class Outflow:
    """What this end sends: at once where the system takes it, else by a thread that waits.

    Args:
        channel: Where to.
        queue_bytes: How much waits at most before senders do.
        lost: The reason if it cannot be sent.
    """

    def __init__(self, channel: Channel, queue_bytes: int, lost: LinkError) -> None:
        self.lock = threading.Lock()
        self._channel, self._socket, self._lost = channel, channel.socket, lost
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLOUT)
        self._outbox: Mailbox[bytes] = Mailbox(queue_bytes)
        self._queued = self._written = 0  # pieces; each counted by one thread at a time
        self._torn = False  # whether a frame ends in its middle
        self._writer: threading.Thread | None = None
        self._last: list[memoryview] = []
        self._decided = threading.Event()

    def send(self, parts: Sequence[Buffer], inbox: Mailbox[Frame]) -> None:
        """Send the bytes of a frame; see `fedsys.transport.link.Link`."""
        with self.lock:
            self._outbox.raise_if_ended()
            self._torn = True
            deadline = 0.0
            for batch in self._channel.sealed(parts):
                rest = batch
                if self._queued == self._written:
                    deadline = deadline or _patience(parts)
                    rest = self._push(rest, deadline)
                for piece in chunks(rest):
                    self._enqueue(piece, inbox)
            self._torn = False

    def _push(self, rest: list[memoryview], deadline: float) -> list[memoryview]:
        """Give buffers to the system until it takes no more by the deadline; return the others."""
        try:
            while rest:
                try:
                    rest = after(rest, self._socket.sendmsg(rest[:_GATHERED]))
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._poll.poll(left * 1e3):
                        return rest
        except OSError:
            self._outbox.end(self._lost)
            self._outbox.raise_if_ended()
        return rest

    def _enqueue(self, piece: bytes, inbox: Mailbox[Frame]) -> None:
        self._queued += 1
        if self._writer is None:
            self._start_writer()
        if not self._outbox.try_put(piece, len(piece)):
            with inbox.relaxed():
                self._outbox.put(piece, len(piece))

    def _start_writer(self) -> None:
        self._writer = threading.Thread(target=self._write, name="writes to a link", daemon=True)
        self._writer.start()

    def end(self, reason: LinkError, last: bytes) -> None:
        """Take no more; say the last word after what was taken, then shut this direction."""
        self._outbox.end(reason)
        with self.lock:
            if last and not self._torn:
                with contextlib.suppress(OSError):
                    self._last = [part for batch in self._channel.sealed([last]) for part in batch]
            self._decided.set()
            if self._writer is None:
                with contextlib.suppress(LinkError):
                    self._last = self._push(self._last, 0.0)
                    if not self._last:
                        self._shut()
                        return
                    self._start_writer()

    def _write(self) -> None:
        try:
            with contextlib.suppress(LinkError):
                while True:
                    self._wait_and_push([memoryview(self._outbox.get())])
                    self._written += 1
            self._decided.wait()
            self._wait_and_push(self._last)
        except OSError:
            self._outbox.end(self._lost)
        self._shut()

    def _wait_and_push(self, rest: list[memoryview]) -> None:
        while rest:
            try:
                rest = after(rest, self._socket.sendmsg(rest))
            except BlockingIOError:
                self._poll.poll()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close_socket(self) -> None:
        """Close the socket once nobody uses it; whoever waits for it is woken."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._outbox.end(self._lost, discard=True)
        with self.lock:
            if self._writer is not None:
                self._decided.set()
                self._writer.join()
            self._socket.close()


def _patience(parts: Sequence[Buffer]) -> float:
    nbytes = sum(len(part) for part in parts)
    return time.monotonic() + _PATIENCE_S + _COPY_S * nbytes


# --------------------------------------------------------------------------------------------------
# Receiving


class Intake:
    """Cuts what a channel has into frames. For one thread at a time.

    Args:
        channel: Where from.
        limits: What is accepted in a frame; may be changed for those that begin later.
        lost: The reason if it ends without a last word.
    """

    def __init__(self, channel: Channel, limits: Limits, lost: LinkError) -> None:
        self._channel, self.limits, self._lost = channel, limits, lost
        self._head = memoryview(bytearray(_HEAD_BYTES))
        self._start = self._stop = 0  # of what was read and not used
        self._size = 0  # of the frame that is begun
        self._assembler: Assembler | None = None

    @property
    def ready(self) -> bool:
        """Whether there may be a frame although the socket has nothing."""
        return self._start < self._stop or self._channel.pending

    @property
    def missing(self) -> int:
        """Bytes of the frame in work that were not read; 0 before its header is there."""
        return 0 if self._assembler is None else len(self._assembler.vacant())

    def next(self) -> Frame | None:
        """Return the next frame, None if more bytes are needed than there are.

        Raises:
            FrameError: What there is is not a valid frame.
            LinkError: The peer has ended, or was lost.
        """
        while True:
            frame = self._from_head()
            while frame is None and self._assembler is not None:
                room = self._assembler.vacant()
                if not len(room):
                    break
                nbytes = self._read(room)
                if nbytes is None:
                    return None
                frame = self._assembler.filled(nbytes)
            if frame is not None:
                self._assembler = None
                return frame
            if self._start:
                rest = self._stop - self._start
                self._head[:rest] = self._head[self._start : self._stop]
                self._start, self._stop = 0, rest
            nbytes = self._read(self._head[self._stop :])
            if nbytes is None:
                return None
            self._stop += nbytes

    def drop(self) -> None:
        """Give up the memory of a frame that will not be completed."""
        self._assembler = None
        self._head, self._start, self._stop = memoryview(b""), 0, 0

    def _read(self, memory: memoryview) -> int | None:
        try:
            nbytes = self._channel.read_into(memory)
        except OSError as error:
            text = f"{self._lost}: {error.strerror or error}"
            raise LinkClosed(text) from error
        if nbytes == 0:
            raise type(self._lost)(*self._lost.args)
        return nbytes

    def _from_head(self) -> Frame | None:
        have = self._stop - self._start
        if not have or (self._assembler is None and have < PREAMBLE_BYTES):
            return None
        if self._assembler is None:
            begun = self._head[self._start :]
            if is_last(begun):
                self._say_last(begun[:have])
                return None
            self._assembler, self._size = Assembler(self.limits), declared_bytes(begun)
        take = min(have, self._size - self._assembler.received_bytes)
        data = self._head[self._start : self._start + take]
        self._start += take
        return self._assembler.feed(data)

    def _say_last(self, data: memoryview) -> None:
        """Raise what the peer's last word stands for, once it is complete."""
        why, length = read_last(data)
        if len(data) < PREAMBLE_BYTES + length:
            return
        if why == Last.FAILED:
            text = bytes(data[PREAMBLE_BYTES:][:length])
            raise RemoteError(text.decode(errors="replace"))
        raise LinkClosed("the peer closed the link")
