"""What links that wrap another one have in common: they pass on what they do not change."""

from __future__ import annotations

from collections.abc import Sequence

from fedsys.transport.link import Link
from fedsys.transport.wire import Buffer, Frame, encode_parts


class LinkAround:
    """A link around another one, to which it passes on everything.

    Wrappers override what they change and call `inner` there; what is sent passes `send_encoded`
    in any case. A complete one::

        class Counting(LinkAround):
            sent = 0

            def send_encoded(self, parts):
                self.sent += 1
                self.inner.send_encoded(parts)

    Args:
        inner: The link that it wraps; closed with this one.
    """

    def __init__(self, inner: Link) -> None:
        self.inner = inner

    @property
    def peer(self) -> str:
        """Identity of the peer."""
        return self.inner.peer

    def send(self, frame: Frame) -> None:
        """Send a frame; see `fedsys.transport.link.Link`."""
        self.send_encoded(encode_parts(frame))

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of a frame; see `fedsys.transport.link.Link`."""
        self.inner.send_encoded(parts)

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame; see `fedsys.transport.link.Link`."""
        return self.inner.recv(timeout_s)

    def close(self) -> None:
        """Close the link that is wrapped."""
        self.inner.close()
