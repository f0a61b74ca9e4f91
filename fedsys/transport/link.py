"""Links: ordered, reliable connections that carry frames, in one process or between machines.

`dial` and `serve` choose by address: ``memory://edge-a`` connects threads of one process,
``tcp://edge-a:9443`` and ``grpc://edge-a:9443`` connect processes and machines: TCP costs less,
gRPC passes what understands HTTP/2 only. All pass every frame through the same encoder, so what
works in one works in the others. `fedsys.transport.shaping` and `fedsys.transport.faulty` wrap a
link.

What `send` promises, the same for all:

* It returns when the frame has been copied into the queue of this end; tensors may then change.
* It waits only while that queue holds `queue_bytes`, that is, while the network or the peer is
  slower than the sender: back-pressure. One frame is always admitted to an empty queue.
* It never waits for the peer's own sends. While it waits, this end goes on reading, up to
  `fedsys.transport.mailbox.RELAXED_FACTOR` times `queue_bytes`; so peers that both send first, any
  number of frames of any size, do not block each other. Beyond that both ends have sent that much
  without a single receive: the link fails and says so. Memory stays bounded in every case.

After `close` on either end, frames sent before it still arrive; then `recv` of the peer raises
LinkClosed. A peer that dies without closing is noticed the same way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from fedsys.errors import (
    FedsysError,
    LinkClosed,
)
from fedsys.transport.strangers import Census, Stay, Strangers, WaitingRoom
from fedsys.transport.wire import Buffer, Frame

QUEUE_BYTES: Final = 256 << 20
"""Bytes that each direction of a link holds before `send` waits, unless told otherwise."""

_KEPT: Final = 16  # places for vital links: those of controllers
_AFTER_CLOSE_S: Final = 5.0  # for handlers whose link was closed under them

_log = logging.getLogger(__name__)


class Link(Protocol):
    """One end of an ordered, reliable connection; both ends may send at any time.

    All methods may be called from any thread.
    """

    @property
    def peer(self) -> str:
        """Identity of the peer on the server side of a TLS link; else its address or empty."""
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame; never wait for the peer's sends.

        Raises:
            FrameError: The frame cannot be encoded or is over a limit.
            LinkError: The link has ended; as `recv`.
        """
        ...

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of one frame, as `encode_parts` gives them. For wrappers of links.

        Raises:
            LinkError: The link has ended; as `recv`.
        """
        ...

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame, waiting up to `timeout_s` seconds (None: without limit).

        Raises:
            LinkTimeout: Nothing arrived in time; the link is still good.
            LinkClosed: The peer closed the link or was lost, or this end was closed.
            RemoteError: The peer's handler failed; the message is its reason.
            FrameError: What arrived is not a valid frame; the link has ended.
        """
        ...

    def close(self) -> None:
        """End the link. May be called twice."""
        ...


class FailingLink(Link, Protocol):
    """A link whose end can be given a reason, which the peer gets as RemoteError."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive."""
        ...

    def fail(self, reason: str) -> None:
        """End the link; `recv` of the peer raises RemoteError with `reason`."""
        ...


class AcceptedLink(FailingLink, Protocol):
    """A link at the end that serves, which begins as that of a stranger."""

    def admit(self, *, vital: bool = False) -> None:
        """Say that the peer has shown who it is: its place and its frames are those of a friend.

        Where the server asks for nothing of that kind, it is so from the beginning.

        Args:
            vital: Whether it is one of those for whom the last places are kept.

        Raises:
            LinkClosed: There is no place left.
        """
        ...


Handler = Callable[[AcceptedLink], None]


class Admitted(Protocol):
    """Takes note that a link is admitted; see `AcceptedLink.admit`."""

    def __call__(self, *, vital: bool) -> None:
        """Give it a place, or raise."""
        ...


def kept_of(max_links: int, strangers: Strangers | None) -> int:
    """Return how many places are kept for vital links, where there are strangers at all."""
    return min(_KEPT, max_links // 4) if strangers else 0


class Server(Protocol):
    """Accepts links and gives each to a handler in a thread of its own."""

    @property
    def address(self) -> str:
        """Address to dial, with the port that was chosen."""
        ...

    def stop(self, grace_s: float = 0.0) -> None:
        """Accept no more; give handlers `grace_s` seconds to finish, then end their links."""
        ...

    def census(self) -> Census:
        """Return who is there."""
        ...


class HandlerThreads:
    """Runs the handler of a server, one thread per link.

    Args:
        address: Of the server, for messages and names of threads.
        handler: Called with each link.
        max_links: Links at one time, without those of strangers.
        room: Where strangers wait.
        kept: How many of `max_links` are for vital ones alone.
    """

    def __init__(
        self,
        address: str,
        handler: Handler,
        max_links: int,
        room: WaitingRoom | None = None,
        kept: int = 0,
    ) -> None:
        self._address, self._handler, self._max_links = address, handler, max_links
        self._room = WaitingRoom(max_links) if room is None else room
        self._running: dict[threading.Thread, AcceptedLink] = {}
        self._known, self._kept = 0, kept
        self._lock = threading.Lock()

    def census(self) -> Census:
        """Return who is there."""
        room = self._room
        return Census(self._known, self._max_links, len(room), room.places, room.ended)

    def admit(self, stay: Stay | None, *, vital: bool = False) -> None:
        """Count a link among those that are known.

        Args:
            stay: Its place among strangers, which it gives back; None if it never had one.
            vital: Whether it may have one of the places that are kept.

        Raises:
            LinkClosed: There are as many already as there may be.
        """
        with self._lock:
            if stay is not None and stay.admitted:
                return
            most = self._max_links - (0 if vital else self._kept)
            if self._known >= most:
                self._room.count("no_place")
                raise LinkClosed(f"{self._address} is full: it has {most} links")
            self._known += 1
            if stay is not None:
                stay.admitted = True
        if stay is not None:
            self._room.leave(stay)

    def start(self, link: AcceptedLink, stay: Stay | None = None) -> None:
        """Give `link` to the handler in a new thread.

        Args:
            link: Its end here.
            stay: Its place among strangers; None if it has been admitted.
        """
        thread = threading.Thread(
            target=self._run, args=(link, stay), name=f"link of {self._address}", daemon=True
        )
        with self._lock:  # whoever stops handlers waits for threads that have started alone
            thread.start()
            self._running[thread] = link

    def stop(self, grace_s: float) -> None:
        """Wait `grace_s` seconds for handlers to finish, then end their links and wait again."""
        with self._lock:
            running = dict(self._running)
        others = running.keys() - {threading.current_thread()}
        _join(others, grace_s)
        for link in running.values():
            link.close()
        _join(others, _AFTER_CLOSE_S)

    def _run(self, link: AcceptedLink, stay: Stay | None) -> None:
        try:
            self._handler(link)
        except FedsysError as error:
            if not (isinstance(error, LinkClosed) and link.ended):  # the peer left: no failure
                link.fail(f"{type(error).__name__}: {error}".splitlines()[0][:500])
        except Exception as error:
            _log.exception("the handler of %s failed", self._address)
            link.fail(f"{type(error).__name__} in the handler; the log of that side says more")
        finally:
            link.close()
            with self._lock:
                del self._running[threading.current_thread()]
                self._known -= stay is None or stay.admitted
            if stay is not None:
                self._room.leave(stay)


def _join(threads: Iterable[threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
