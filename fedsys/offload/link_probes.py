"""Devices that measure their link to an edge server although they have no session there.

A device that trains alone because its link is slow would else never see that it has become fast.
The server app announces it with a token, which is good for one link; the device presents that, and
sends and asks for a few bytes (`fedsys.transport.link_rate`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from fedsys.errors import FedsysError, SecurityError
from fedsys.transport.link import AcceptedLink, Link
from fedsys.transport.link_rate import LinkRate, measure, reply_to
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload")

MOST: Final = 1 << 20
"""Bytes of an answer, whatever a device asks for."""

QUESTIONS: Final = 64
"""Questions that are answered over one link."""

ANSWER_S: Final = 10.0
"""Seconds for which a device waits for an answer; a link on which it takes longer is slow."""

EXPECTED: Final = 4096
EXPECTED_S: Final = 900.0
"""Devices that are expected at a time, and for how long."""


class LinkProbes:
    """The edge server's end. Methods may be called from any thread.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._until: dict[str, float] = {}

    def expect(self, token: str) -> None:
        """Let a device measure that presents this token, once."""
        now = self._clock()
        with self._lock:
            self._until = {t: until for t, until in self._until.items() if until > now}
            if token and len(self._until) < EXPECTED:
                self._until[token] = now + EXPECTED_S

    def serve(self, link: AcceptedLink, first: Frame) -> None:
        """Answer a device that measures.

        Raises:
            SecurityError: It is not expected.
            LinkError: The link ended.
        """
        with self._lock:
            until = self._until.pop(str(first.meta.get("token", "")), 0.0)
        if self._clock() >= until:
            raise SecurityError("measure: no device with this token is expected")
        link.admit()
        link.send(Frame("welcome"))
        for _ in range(QUESTIONS):
            answer = reply_to(link.recv(), MOST)
            if answer is None:
                return
            link.send(answer)


def link_rate(
    edges: Sequence[str], token: str, nbytes: int, connect: Callable[[str], Link]
) -> LinkRate | None:
    """Return what the link of a device to the first edge server that answers carries.

    Args:
        edges: Addresses, one of which expects the device.
        token: What it presents.
        nbytes: Bytes that are sent each way.
        connect: Dials an address.

    Returns:
        None where no edge server answers.
    """
    for address in edges:
        try:
            link = connect(address)
            try:
                link.send(Frame("measure", {"token": token}))
                link.recv(ANSWER_S)
                return measure(link, nbytes, 1, ANSWER_S)
            finally:
                link.close()
        except FedsysError as error:
            _log.warning("%s: the link was not measured: %s", address, error)
    return None
