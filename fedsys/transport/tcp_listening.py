"""The socket that a server of links listens at, and connections that are sent away from it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Final
from urllib.parse import urlsplit

from fedsys.errors import ConfigError
from fedsys.transport.tcp_channel import drain

_REFUSAL_S: Final = 1.0  # for a peer that is refused to read why
_QUIET_S: Final = 1.0  # between two lines of the log about connections that were refused
_BACKLOG: Final = 1024

_log = logging.getLogger("fedsys.transport.tcp_link")


def host_and_port(place: str) -> tuple[str, int]:
    """Return the parts of ``host:port``."""
    parts = urlsplit(f"//{place}")
    return parts.hostname or "", parts.port or 0


class Refusals:
    """Logs the connections that were refused, at most one line in `_QUIET_S` seconds."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._unsaid, self._said_s = 0, -_QUIET_S
        self._lock = threading.Lock()

    def note(self, where: str, error: Exception) -> None:
        """Log it, or count it for the next line."""
        with self._lock:
            now = time.monotonic()
            if now - self._said_s < _QUIET_S:
                self._unsaid += 1
                return
            more = f", and {self._unsaid} more before" if self._unsaid else ""
            self._unsaid, self._said_s = 0, now
        _log.warning("%s refused %s%s: %s", self._address, where, more, error)


def listening(place: str) -> socket.socket:
    """Return a socket that listens at ``host:port``.

    Raises:
        ConfigError: It cannot be listened on.
    """
    host, port = host_and_port(place)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            (str(address[0]), port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        raise ConfigError.of(
            "address",
            f"tcp://{place}",
            f"cannot be served ({error.strerror or error})",
            "choose another port, or 0",
        ) from error
    listener.setblocking(False)
    return listener


def shut(connection: socket.socket) -> None:
    """End both directions; whoever waits for the connection is woken."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def leave(connection: socket.socket) -> None:
    """Let the peer read why it was refused."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    drain(connection, time.monotonic() + _REFUSAL_S)
