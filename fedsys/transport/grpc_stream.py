"""What both ends of a link over gRPC have in common: frames in pieces, and two mailboxes.

Handing a message from thread to thread costs more than anything else that is done to a small one.
So a small frame is parsed in the thread in which gRPC hands it out, as its deserializer, and put
into the inbox from there; and an accepted link sends a small frame in the thread that has it, as
long as nothing waits in its outbox and the network takes what it gets. (An end that dialled has
gRPC's own writer, which can only be handed to.)

A frame is cut into messages (`fedsys.transport.buffers`): copying one piece overlaps with sending
the one before, which a single large message does not allow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from fedsys.errors import LinkError
from fedsys.transport.buffers import chunks
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.wire import Assembler, Buffer, Frame, Limits

AT_ONCE_BYTES: Final = 128 << 10
"""Largest message that is worked on in the thread that has it."""

_QUICK_S: Final = 2e-3  # gRPC takes a message off that meets no resistance in a tenth of this
_LATE: Final = b"late"  # stands for a frame for which the inbox had no room


class Stream:
    """The part of a link that is the same on both ends: two mailboxes around a stream.

    Args:
        limits: Of frames in both directions.
        queue_bytes: Bytes that each direction holds before `send` waits.
        first: What is accepted until `accepts` is set to something else, for frames that begin
            later; None: `limits`.
    """

    def __init__(self, limits: Limits, queue_bytes: int, first: Limits | None = None) -> None:
        self.limits, self.accepts = limits, first or limits
        self.inbox: Mailbox[Frame] = Mailbox(queue_bytes)
        self.outbox: Mailbox[bytes] = Mailbox(queue_bytes)
        self.reason = ""  # of a failure, for the peer
        self.sent_away = ""  # why there is no place for the peer now; it may come again
        self.sender: Sender | None = None  # of an accepted link
        self.sending = threading.Lock()
        self._assembler: Assembler | None = None
        self._late: Frame | None = None

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of a frame; see `fedsys.transport.link.Link`."""
        self.inbox.raise_if_ended()
        with self.sending:
            if self.sender is not None and self.sender.send_now(parts, self.inbox):
                return
            for piece in chunks(parts):
                self._enqueue(piece)

    def _enqueue(self, piece: bytes) -> None:
        if self.sender is not None:
            self.sender.expect()
        try:
            if not self.outbox.try_put(piece, len(piece)):
                with self.inbox.relaxed():
                    self.outbox.put(piece, len(piece))
        except LinkError:
            if self.sender is not None:
                self.sender.done()
            raise

    def outgoing(self) -> Iterator[bytes]:
        """Yield what is to be sent until this end has closed and its outbox is empty."""
        while True:
            try:
                yield self.outbox.get()
            except LinkError:
                return

    def receive(self, message: bytes) -> bytes:
        """Take a small message as gRPC hands it out; return what is left to `read`.

        gRPC calls it, as its deserializer, in a thread that must not wait.
        """
        if len(message) > AT_ONCE_BYTES or self.inbox.ended:
            return message
        frame = self._feed(message)
        if frame is None:
            return b""
        try:
            if self.inbox.try_put(frame, frame.encoded_bytes):
                return b""
        except LinkError:
            return b""
        self._late = frame
        return _LATE

    def read(self, messages: Iterable[bytes]) -> None:
        """Take messages until the peer ends; leave the reason in the mailboxes."""
        for message in messages:
            if not message or self.inbox.ended:
                continue  # closed on this side; the peer may be waiting to see its frames gone
            frame = self._late if message is _LATE else self._feed(message)
            if frame is not None:
                try:
                    self.inbox.put(frame, frame.encoded_bytes)
                except LinkError as error:
                    self._fail(error)

    def _feed(self, message: bytes) -> Frame | None:
        self._assembler = assembler = self._assembler or Assembler(self.accepts)
        try:
            frame = assembler.feed(message)
        except LinkError as error:
            self._fail(error)
            return None
        if frame is not None:
            self._assembler = None
        return frame

    def _fail(self, error: LinkError) -> None:
        self.reason = f"{type(error).__name__}: {error}"
        self.end(error)

    def end(self, reason: LinkError, *, discard: bool = False) -> None:
        """End both directions for a reason; what has arrived can be read unless `discard`."""
        self.inbox.end(reason, discard=discard)
        self.outbox.end(reason)
        self._assembler = None
        if self.sender is not None:
            self.sender.end()


class Sender:
    """Sends the messages of an accepted link: where it can in the thread that has them.

    Args:
        push: Sends one message and returns when gRPC has taken it off; None ends the stream.
        stream: Whose outbox is sent where it cannot.
    """

    def __init__(self, push: Callable[[bytes | None], None], stream: Stream) -> None:
        self._push, self._stream = push, stream
        self._lock = threading.Lock()
        self._unsent = 0  # messages that were given and are not taken off yet
        self._ended = False
        self._quick = True
        self._writer: threading.Thread | None = None

    def send_now(self, parts: Sequence[Buffer], inbox: Mailbox[Frame]) -> bool:
        """Send a small frame if nothing waits before it; return whether that was done."""
        if sum(map(len, parts)) > AT_ONCE_BYTES:
            return False
        with self._lock:
            if self._unsent or self._ended or not self._quick:
                return False
            self._unsent = 1
        with inbox.relaxed():
            self._give(b"".join(parts))
        return True

    def expect(self) -> None:
        """Note that a message is put into the outbox."""
        with self._lock:
            self._unsent += 1
            if self._writer is None:
                self._writer = threading.Thread(
                    target=self._write, name="writes to a link", daemon=True
                )
                self._writer.start()

    def done(self) -> None:
        """Note that a message that was expected is sent, or will never be."""
        with self._lock:
            self._unsent -= 1
            over = self._ended and not self._unsent
        if over:
            self._push(None)

    def end(self) -> None:
        """End the stream once everything is sent."""
        with self._lock:
            over = not self._ended and not self._unsent
            self._ended = True
        if over:
            self._push(None)

    def _write(self) -> None:
        for message in self._stream.outgoing():
            self._give(message)

    def _give(self, message: bytes) -> None:
        began = time.perf_counter()
        self._push(message)
        # Where the network holds a sender up, frames are queued, as `Link.send` promises.
        self._quick = time.perf_counter() - began < _QUICK_S
        self.done()
