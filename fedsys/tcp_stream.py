"""One end of a link over TCP: frames one after the other, and a last word.

::

    caller of send ─▶ socket, as far as the system takes it at once
                  └─▶ outbox ─▶ writer ─▶ socket      what it does not take, copied
    caller of recv ◀─ socket                          while it waits: into the memory of the tensors
                  ◀─ inbox ◀─ reader ◀─ socket        while nobody is in recv

Handing a frame from thread to thread costs more than anything else that is done to a small one, so
the threads of the link work only where its promises (`fedsys.link`) need them: the writer while the
network is slower than the sender, the reader while the owner of the link does something else
(`fedsys.standby`). Measured on two busy cores, a round trip of 1 kB takes 240 µs, and 145 µs of
processor time at each end; with a reader that takes every frame, as it was first, 400 and 240.

After the frames comes a last word, 24 bytes and a text in UTF-8, unless the peer was lost::

    offset  bytes  field (little endian)
    0       4      magic "FEND"
    4       2      why: a number of `Last`
    6       2      T, length of the text
    8       16     0
    24      T      text

Who has said it shuts its direction and drops what still comes until the other does the same, so
that the connection is not reset while frames are under way.
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
from queue import SimpleQueue
from typing import Final

from fedsys import standby
from fedsys.errors import FrameError, LinkClosed, LinkError, LinkTimeout, RemoteError
from fedsys.mailbox import Mailbox
from fedsys.pieces import after, pieces
from fedsys.tcp_channel import SILENCE_S, Channel, Silence, drain
from fedsys.wire import PREAMBLE_BYTES, Assembler, Buffer, Frame, Limits, encode_parts, frame_bytes

LINGER_S: Final = 5.0
"""Longest time for frames under way when this end closes, in seconds."""

_LAST: Final = struct.Struct("<4sHH16x")
_LAST_MAGIC: Final = b"FEND"
_LAST_TEXT: Final = 1000  # bytes
_HEAD_BYTES: Final = 1 << 16  # taken at a time while the header of a frame is not known
_GATHERED: Final = 512  # buffers in one call; the least that systems take is 16, Linux takes 1024
_LOOK_S: Final = SILENCE_S / 4  # between two looks whether the peer still answers

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


class _Outflow:
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
        """Send the bytes of a frame; see `fedsys.link.Link`."""
        with self.lock:
            self._outbox.raise_if_ended()
            self._torn = True
            deadline = 0.0
            for batch in self._channel.sealed(parts):
                rest = batch
                if self._queued == self._written:
                    deadline = deadline or _patience(parts)
                    rest = self._push(rest, deadline)
                for piece in pieces(rest):
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


class _Intake:
    """Cuts what a channel has into frames. For one thread at a time.

    Args:
        channel: Where from.
        limits: What is accepted in a frame.
        lost: The reason if it ends without a last word.
    """

    def __init__(self, channel: Channel, limits: Limits, lost: LinkError) -> None:
        self._channel, self._limits, self._lost = channel, limits, lost
        self._head = memoryview(bytearray(_HEAD_BYTES))
        self._start = self._stop = 0  # of what was read and not used
        self._size = 0  # of the frame that is begun
        self._assembler: Assembler | None = None

    @property
    def ready(self) -> bool:
        """Whether there may be a frame although the socket has nothing."""
        return self._start < self._stop or self._channel.pending

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
            self._assembler, self._size = Assembler(self._limits), frame_bytes(begun)
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


# --------------------------------------------------------------------------------------------------
# Both


class TcpLink:
    """A link on a channel whose ends have greeted each other; see `fedsys.link.FailingLink`.

    Args:
        channel: The socket, prepared.
        peer: Who is at the other end.
        limits: What this end accepts in a frame.
        queue_bytes: Bytes that each direction holds before `send` waits.
        linger: Whether `close` waits until the peer has everything, up to `LINGER_S` seconds.
    """

    def __init__(
        self, channel: Channel, peer: str, limits: Limits, queue_bytes: int, *, linger: bool
    ) -> None:
        self.peer, self.watched = peer, False
        self._limits, self._linger, self._channel = limits, linger, channel
        lost = LinkClosed(f"the link to {peer or 'the peer'} was lost")
        self._inbox: Mailbox[Frame] = Mailbox(queue_bytes)
        self._outflow = _Outflow(channel, queue_bytes, lost)
        self._intake, self._lost = _Intake(channel, limits, lost), lost
        self._silence = Silence(channel.socket)
        self._alarm, self._waker = socket.socketpair()
        self._poll = select.poll()
        for readable in (channel.socket, self._alarm):
            self._poll.register(readable, select.POLLIN)
        self._role = threading.Lock()  # whoever holds it reads
        self._turns = self._seen = self._followers = 0
        self._state = threading.Lock()
        self._ending = False
        self._over = threading.Event()
        self._reader: threading.Thread | None = None
        self._summons: SimpleQueue[None] = SimpleQueue()

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive."""
        return self._inbox.ended

    @property
    def over(self) -> bool:
        """Whether it has given up its socket."""
        return self._over.is_set()

    @property
    def sending(self) -> threading.Lock:
        """Held while something is sent."""
        return self._outflow.lock

    def begin(self) -> None:
        """Start to read, also when nobody is in `recv`."""
        standby.watch(self)

    def send(self, frame: Frame) -> None:
        """Send a frame; see `fedsys.link.Link`."""
        self.send_encoded(encode_parts(frame, self._limits))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of a frame; see `fedsys.link.Link`."""
        self._inbox.raise_if_ended()
        self._outflow.send(parts, self._inbox)

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame; see `fedsys.link.Link`."""
        if not self._role.acquire(blocking=False):
            return self._follow(timeout_s)
        try:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            frame = self._inbox.poll() or self._lead(deadline) or self._inbox.poll()
        finally:
            self._leave()
        if frame is None:
            raise LinkTimeout(f"nothing arrived within {timeout_s:g} s")
        return frame

    def fail(self, reason: str) -> None:
        """End the link with a reason for the peer; see `fedsys.link.FailingLink`."""
        self._end(_closed_here(), last_word(Last.FAILED, reason), discard=True)

    def close(self) -> None:
        """End the link; see `fedsys.link.Link`."""
        self._end(_closed_here(), last_word(Last.CLOSED), discard=True)
        if self._linger and threading.current_thread() is not self._reader:
            self._over.wait(LINGER_S)

    def abandon(self) -> None:
        """Give up what a link holds besides its socket, if it never begins."""
        self._over.set()
        self._alarm.close()
        self._waker.close()

    def wait_closed(self, timeout_s: float) -> None:
        """Wait until a link that was closed has given up its socket."""
        self._over.wait(timeout_s)

    # --- who reads --------------------------------------------------------------------------------

    def _lead(self, deadline: float | None) -> Frame | None:
        """Read the next frame; return None at the deadline, or if the link ends instead."""
        ready = self._intake.ready
        while True:
            if not ready and not self._await_bytes(deadline):
                return None
            try:
                frame = self._intake.next()
            except FrameError as error:
                self._end(error, last_word(Last.FAILED, f"{type(error).__name__}: {error}"))
                return None
            except LinkError as error:
                self._end(error, b"")
                self._finish()
                return None
            if frame is not None or (deadline is not None and time.monotonic() >= deadline):
                return frame
            ready = False

    def _await_bytes(self, deadline: float | None) -> bool:
        """Wait until the socket can be read; return False at the deadline or if the link ends."""
        while not self._inbox.ended:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            if self._poll.poll(max(left, 0.0) * 1e3):
                return not self._inbox.ended
            if self._silence.lasts():
                self._end(LinkClosed(f"{self._lost}: it does not answer"), b"")
                self._finish()
            elif deadline is not None and time.monotonic() >= deadline:
                return False
        return False

    def _follow(self, timeout_s: float | None) -> Frame:
        """Wait for what another thread reads."""
        with self._state:
            self._followers += 1
        try:
            return self._inbox.get(timeout_s)
        finally:
            with self._state:
                self._followers -= 1

    def _leave(self) -> None:
        self._turns += 1
        self._role.release()
        if self._followers or self._inbox.ended:
            self.summon()
        elif not self.watched:
            standby.watch(self)

    def unattended(self) -> bool | None:
        """Return whether nobody reads, None if somebody did since the last call."""
        turns = self._turns
        if turns != self._seen:
            self._seen = turns
            return None
        return not self._role.locked() and not self._over.is_set()

    def summon(self) -> None:
        """Have the thread of this link read until somebody is in `recv`, and see it to its end."""
        with self._state:
            if self._over.is_set():
                return
            if self._reader is None:
                self._reader = threading.Thread(
                    target=self._stand_in, name=f"reads {self.peer or 'a link'}", daemon=True
                )
                self._reader.start()
        self._summons.put(None)

    def _stand_in(self) -> None:
        while not self._over.is_set():
            self._summons.get()
            if self._role.acquire(blocking=False):
                try:
                    self._read_on()
                finally:
                    self._leave()

    def _read_on(self) -> None:
        while not self._inbox.ended:
            frame = self._lead(None)
            if frame is None:
                break
            served = self._followers > 0
            try:
                self._inbox.put(frame, frame.encoded_bytes)
            except LinkError as error:
                self._end(error, last_word(Last.FAILED, f"{type(error).__name__}: {error}"))
                break
            if served:
                return
        if not self._over.is_set():
            drain(self._channel.socket, time.monotonic() + LINGER_S)
            self._finish()

    # --- the end ----------------------------------------------------------------------------------

    def _end(self, reason: LinkError, last: bytes, *, discard: bool = False) -> None:
        """End both directions; the first call decides why, and what the peer is told."""
        self._inbox.end(reason, discard=discard)
        with self._state:
            first, self._ending = not self._ending, True
        if not first:
            return
        self._outflow.end(reason, last)
        with self._state:
            if not self._over.is_set():
                self._waker.send(b"!")
        self.summon()

    def _finish(self) -> None:
        """Give the socket up. For who reads, after the end."""
        self._outflow.close_socket()
        with self._state:
            self._over.set()
            self._alarm.close()
            self._waker.close()
        self._summons.put(None)


def _closed_here() -> LinkClosed:
    return LinkClosed("the link was closed on this side")
