"""Frames between two processes of this machine that trust each other, over a pair of sockets.

Who calls waits. A payload is read into the memory of its tensors, and sent from it.
"""

from __future__ import annotations

import socket
from typing import Final, final

from fedsys.errors import LinkClosed
from fedsys.transport.buffers import after
from fedsys.transport.wire import PREAMBLE_BYTES, Assembler, Frame, Limits, encode_parts
from fedsys.transport.wire import declared_bytes as bytes_of

_LIMITS: Final = Limits(1 << 62, 1 << 62, 1 << 30, (1 << 32) - 1)
"""As much as the format can say: both ends are this program."""

_AT_ONCE: Final = 512  # buffers in one call of the system, which takes 1024
_HEADER_BYTES: Final = 1 << 14  # read at a time, as long as there is no memory for the payload
_BUFFER_BYTES: Final = 1 << 22  # wished for; the system gives what it allows


@final
class FramePipe:
    """One end. For one thread at a time.

    Args:
        connection: A connected stream socket, which is this object's from here on.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = connection

    def send(self, frame: Frame) -> None:
        """Send a frame; returns when the system has it.

        Raises:
            LinkClosed: The other end is gone.
            FrameError: It cannot be sent.
        """
        rest = [memoryview(part) for part in encode_parts(frame, _LIMITS)]
        try:
            while rest:
                rest = after(rest, self._socket.sendmsg(rest[:_AT_ONCE]))
        except OSError as error:
            raise LinkClosed("the process at the other end is gone") from error

    def recv(self) -> Frame:
        """Return the next frame.

        Raises:
            LinkClosed: The other end is gone.
            FrameError: What came is no frame.
        """
        try:
            return self._received()
        except OSError as error:
            raise LinkClosed("the process at the other end is gone") from error

    def close(self) -> None:
        """End it; the other end reads that nothing more comes."""
        self._socket.close()

    def _received(self) -> Frame:
        head = bytearray(PREAMBLE_BYTES)
        self._fill(memoryview(head))
        assembler, total = Assembler(_LIMITS), bytes_of(head)
        frame = assembler.feed(head)
        while frame is None:
            room = assembler.vacant()
            if len(room):
                frame = assembler.filled(self._fill(room))
            else:
                piece = bytearray(min(_HEADER_BYTES, total - assembler.received_bytes))
                frame = assembler.feed(memoryview(piece)[: self._some(memoryview(piece))])
        return frame

    def _fill(self, room: memoryview) -> int:
        filled = 0
        while filled < len(room):
            filled += self._some(room[filled:])
        return filled

    def _some(self, room: memoryview) -> int:
        count = self._socket.recv_into(room, 0, socket.MSG_WAITALL)
        if not count:
            raise LinkClosed("the process at the other end is gone")
        return count
