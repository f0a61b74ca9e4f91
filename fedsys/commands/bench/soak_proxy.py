"""A forwarder before an edge server, in a process of its own, which does to links what is asked.

Run as ``python -m fedsys.commands.bench.soak_proxy TARGET``; it prints the port at which it
listens, and takes one order per line of standard input: ``reset`` ends all connections at once,
with a reset to both sides; ``cut SECONDS`` lets nothing pass for so long, and then goes on.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time

_PIECE = 1 << 16


class Forwarder:
    """Forwards connections to one place.

    Args:
        target: Port on loopback.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._open_from = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """End all connections by a reset."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for one in (one for pair in pairs for one in pair):
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Whoever waits in another thread keeps the descriptor: shut it for him first.
                one.close()

    def cut(self, seconds: float) -> None:
        """Let nothing pass for so long."""
        self._open_from = time.monotonic() + seconds

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            self._wait()
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5.0)
            except OSError:  # the edge server is not there: neither is this one
                near.close()
                continue
            for one in (near, far):
                one.settimeout(0.2)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (near, far)
            with self._lock:
                self._pairs.add(pair)
            for here, there in (pair, pair[::-1]):
                threading.Thread(target=self._pump, args=(here, there, pair), daemon=True).start()

    def _wait(self) -> None:
        while (left := self._open_from - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _pump(
        self, here: socket.socket, there: socket.socket, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                try:
                    data = here.recv(_PIECE)
                except TimeoutError:
                    if pair not in self._pairs:
                        break
                    continue
                self._wait()
                if not data:
                    there.shutdown(socket.SHUT_WR)
                    return
                there.settimeout(30.0)
                there.sendall(data)
                there.settimeout(0.2)
        with self._lock:
            self._pairs.discard(pair)
        for one in pair:
            with contextlib.suppress(OSError):
                one.close()


def main() -> None:
    """Forward until standard input ends."""
    forwarder = Forwarder(int(sys.argv[1]))
    print(forwarder.port, flush=True)
    for line in sys.stdin:
        order, _, value = line.strip().partition(" ")
        if order == "reset":
            forwarder.reset()
        elif order == "cut":
            forwarder.cut(float(value))


if __name__ == "__main__":
    main()
