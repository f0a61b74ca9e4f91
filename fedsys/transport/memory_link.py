"""Links between threads of one process, and their server: through the encoder like all others."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fedsys.errors import ConfigError, FrameError, LinkClosed, LinkError, LinkRefused, RemoteError
from fedsys.transport.link import Handler, HandlerThreads, Link
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.strangers import Census
from fedsys.transport.wire import Assembler, Buffer, Frame, Limits, encode_parts


class MemoryLink:
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
        """Whether nothing more will arrive."""
        return self._inbox.ended

    def send(self, frame: Frame) -> None:
        """Send a frame; see `fedsys.transport.link.Link`."""
        self.send_encoded(encode_parts(frame, self._limits))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of a frame; see `fedsys.transport.link.Link`."""
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
        """Return the next frame; see `fedsys.transport.link.Link`."""
        return self._inbox.get(timeout_s)

    def admit(self, *, vital: bool = False) -> None:
        """Threads of one process know each other; see `fedsys.transport.link.AcceptedLink`."""

    def fail(self, reason: str) -> None:
        """End the link; the peer gets `reason`."""
        self._end(RemoteError(reason))

    def close(self) -> None:
        """End the link."""
        self._end(LinkClosed("the peer closed the link"))

    def _end(self, reason_for_peer: LinkError) -> None:
        self._inbox.end(LinkClosed("the link was closed on this side"), discard=True)
        self._outbox.end(reason_for_peer)


class MemoryServer:
    """Gives links to a handler, under a name of this process.

    Args:
        name: What is dialled, without ``memory://``.
        handler: Called with each link, in a thread of its own.
        limits: What this end accepts in a frame.
        queue_bytes: Bytes that each direction of a link holds before `send` waits.
        max_links: Links at one time; further ones are refused.

    Raises:
        ConfigError: The name is in use.
    """

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
        """Return the other end of a new link, with its own limits."""
        up: Mailbox[Frame] = Mailbox(self._queue_bytes)
        down: Mailbox[Frame] = Mailbox(queue_bytes)
        self._handlers.admit(None)
        self._handlers.start(MemoryLink("", up, down, (self._limits, limits)))
        return MemoryLink(self.address, down, up, (limits, self._limits))

    def census(self) -> Census:
        """Return who is there; see `fedsys.transport.link.Server`."""
        return self._handlers.census()

    def stop(self, grace_s: float = 0.0) -> None:
        """Accept no more; see `fedsys.transport.link.Server`."""
        with _servers_lock:
            if _servers.get(self._name) is self:
                del _servers[self._name]
        self._handlers.stop(grace_s)


_servers: dict[str, MemoryServer] = {}
_servers_lock = threading.Lock()


def dial(name: str, limits: Limits, queue_bytes: int) -> Link:
    """Connect to a server of this process.

    Raises:
        LinkRefused: Nobody serves the name.
    """
    with _servers_lock:
        server = _servers.get(name)
    if server is None:
        raise LinkRefused(f"memory://{name}: nobody serves this name in this process")
    return server.connect(limits, queue_bytes)
