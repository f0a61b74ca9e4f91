"""One end of a link over TCP: who sends, who reads, and how it ends.

::

    caller of send ─▶ socket, as far as the system takes it at once
                  └─▶ outbox ─▶ writer ─▶ socket      what it does not take, copied
    caller of recv ◀─ socket                          while it waits: into the memory of the tensors
                  ◀─ inbox ◀─ reader ◀─ socket        while nobody is in recv

Handing a frame from thread to thread costs more than anything else that is done to a small one, so
the threads of the link work only where its promises (`fedsys.transport.link`) need them: the
writer while the network is slower than the sender, the reader while the owner of the link does
something else (`fedsys.transport.tcp_standby`). Measured on two busy cores, a round trip of 1 kB
takes 240 µs, and 145 µs of processor time at each end; with a reader that takes every frame, as it
was first, 400 and 240.

Who has said its last word (`fedsys.transport.tcp_flows`) shuts its direction and drops what still
comes until the other does the same, so that the connection is not reset while frames are under way.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Final

from fedsys.errors import FrameError, LinkClosed, LinkError, LinkTimeout
from fedsys.transport import tcp_standby as standby
from fedsys.transport.link import Admitted
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.tcp_channel import SILENCE_S, Channel, LowWater, Silence, drain
from fedsys.transport.tcp_flows import Intake, Last, Outflow, last_word
from fedsys.transport.wire import Buffer, Frame, Limits, encode_parts

LINGER_S: Final = 5.0
"""Longest time for frames under way when this end closes, in seconds."""

_LOOK_S: Final = SILENCE_S / 4  # between two looks whether the peer still answers


class TcpLink:
    """A `fedsys.transport.link.FailingLink` on a channel whose ends have greeted each other.

    Args:
        channel: The socket, prepared.
        peer: Who is at the other end.
        limits: What this end accepts in a frame.
        queue_bytes: Bytes that each direction holds before `send` waits.
        linger: Whether `close` waits until the peer has everything, up to `LINGER_S` seconds.
        first: What this end accepts until the peer is admitted.
        admitted: Called when the peer is to be admitted.
        over: Called with the link when it has given up its socket.
    """

    def __init__(
        self,
        channel: Channel,
        peer: str,
        limits: Limits,
        queue_bytes: int,
        *,
        linger: bool,
        first: Limits | None = None,
        admitted: Admitted = lambda *, vital: None,
        over: Callable[[TcpLink], None] = lambda link: None,
    ) -> None:
        self.peer, self.watched = peer, False
        self._limits, self._linger, self._channel = limits, linger, channel
        lost = LinkClosed(f"the link to {peer or 'the peer'} was lost")
        self._inbox: Mailbox[Frame] = Mailbox(queue_bytes)
        self._outflow = Outflow(channel, queue_bytes, lost)
        self._intake, self._lost = Intake(channel, first or limits, lost), lost
        self._admitted, self._forget = admitted, over
        self._silence, self._low_water = Silence(channel.socket), LowWater(channel)
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
        """Send a frame; see `fedsys.transport.link.Link`."""
        self.send_encoded(encode_parts(frame, self._limits))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of a frame; see `fedsys.transport.link.Link`."""
        self._inbox.raise_if_ended()
        self._outflow.send(parts, self._inbox)

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame; see `fedsys.transport.link.Link`."""
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

    def admit(self, *, vital: bool = False) -> None:
        """Take the peer for a friend; see `fedsys.transport.link.AcceptedLink`."""
        self._admitted(vital=vital)
        self._intake.limits = self._limits

    def fail(self, reason: str) -> None:
        """End the link with a reason for the peer; see `fedsys.transport.link.FailingLink`."""
        self._end(_closed_here(), last_word(Last.FAILED, reason), discard=True)

    def close(self) -> None:
        """End the link; see `fedsys.transport.link.Link`."""
        self._end(_closed_here(), last_word(Last.CLOSED), discard=True)
        if self._linger and threading.current_thread() is not self._reader:
            self._over.wait(LINGER_S)

    def abandon(self) -> None:
        """Give up what a link holds besides its socket, if it never begins."""
        self._over.set()
        self._alarm.close()
        self._waker.close()
        self._forget(self)

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
        with contextlib.suppress(OSError):  # a socket that was given up: the wait says so
            self._low_water.expect(self._intake.missing)
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
            self._intake.drop()
            with contextlib.suppress(OSError):
                self._low_water.expect(0)
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
        self._forget(self)


def _closed_here() -> LinkClosed:
    return LinkClosed("the link was closed on this side")
