"""Clients that ask again and again over connections that they keep: one process for all of them.

``python -m fedsys.commands.bench.serving_clients`` reads orders from standard input, one JSON
object a line (`Errand`), and answers each with one line: how long every request took, in
milliseconds, and how many were answered otherwise than by 200. A client asks as soon as it has its
answer. All sockets are served by one loop without frameworks, so that clients take next to nothing
of the processors that they share with what is measured.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PIECE = 1 << 18
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Errand:
    """What is to be asked.

    Attributes:
        port: On loopback.
        request: File with the bytes of a whole request.
        clients: Connections.
        seconds: For how long.
    """

    port: int
    request: str
    clients: int
    seconds: float


@dataclass
class Client:
    """One connection, and the answer that comes over it.

    Attributes:
        peer: The connection.
        since: When the request began to be sent, by `time.perf_counter`.
        got: What came of the answer, headers included.
        whole: How many bytes it has; -1 while its headers are not there.
    """

    peer: socket.socket
    since: float = 0.0
    got: bytearray = field(default_factory=bytearray)
    whole: int = -1

    def ask(self, request: bytes) -> None:
        """Send a whole request in one write."""
        self.got, self.whole, self.since = bytearray(), -1, time.perf_counter()
        self.peer.sendall(request)

    def take(self) -> bool:
        """Take what came; return whether the answer is complete."""
        data = self.peer.recv(_PIECE)
        if not data:
            raise ConnectionError("the server closed a connection")
        self.got += data
        if self.whole < 0:
            end = self.got.find(b"\r\n\r\n")
            if end < 0:
                return False
            self.whole = end + 4 + _length(bytes(self.got[:end]))
        return len(self.got) >= self.whole


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ConnectionError("an answer has no length")


def ask(order: Errand) -> tuple[list[float], int]:
    """Ask for a while; return the milliseconds of each request, and how many went wrong."""
    request = Path(order.request).read_bytes()
    peers = [socket.create_connection(("127.0.0.1", order.port)) for _ in range(order.clients)]
    took: list[float] = []
    wrong = 0
    with selectors.DefaultSelector() as ready:
        for peer in peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = Client(peer)
            ready.register(peer, selectors.EVENT_READ, client)
            client.ask(request)
        end = time.perf_counter() + order.seconds
        busy = len(peers)
        while busy:
            events = ready.select(_PATIENCE_S)
            if not events:
                raise TimeoutError(f"no answer within {_PATIENCE_S:g} s")
            for key, _ in events:
                client = key.data
                if client.take():
                    now = time.perf_counter()
                    took.append((now - client.since) * 1e3)
                    wrong += not client.got.startswith(b"HTTP/1.1 200")
                    if now < end:
                        client.ask(request)
                    else:
                        busy -= 1
    for peer in peers:
        peer.close()
    return took, wrong


def written(order: Errand) -> str:
    """Return an order as a line."""
    return json.dumps(asdict(order)) + "\n"


def main(lines: Sequence[str] | None = None) -> None:
    """Carry out the orders of standard input until it ends."""
    for line in sys.stdin if lines is None else lines:
        took, wrong = ask(Errand(**json.loads(line)))
        print(json.dumps([took, wrong]), flush=True)


if __name__ == "__main__":
    main()
