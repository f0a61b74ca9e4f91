"""What messages cost on a real link: CPU time of this machine, rates and latency of the way.

The other end is a process of its own, so that the CPU time of this process is that of one machine.
It is started here, or by ``fedsys profile profile.serve=grpc://HOST:PORT`` (or ``tcp://``) on the
edge's machine.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import torch

from fedsys.errors import LinkClosed, RuntimeFailure
from fedsys.planning.costs import Crossing, tensor_bytes
from fedsys.runtime.processes import wait_or_kill
from fedsys.transport import link_rate
from fedsys.transport.addresses import dial, serve
from fedsys.transport.codecs import CODECS, decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.security import Credentials
from fedsys.transport.wire import Frame

_SMALL: Final = Crossing(64, 8)
_ENDLESS_S: Final = 120.0
_PART: Final = 8  # of a mini-batch that is measured, too
_LEAST: Final = 3
_LONG_S: Final = 6.0
MOST: Final = 1 << 26
"""Bytes of an answer, whatever was asked for."""


@dataclass(frozen=True)
class LinkCosts:
    """Costs of messages.

    Attributes:
        message_s: CPU seconds of a message that is sent or received.
        byte_s: CPU seconds of each encoded byte, with encoding or decoding, by codec.
        up_bit_s: Bits per second to the other end.
        down_bit_s: Bits per second from it.
        latency_s: One way.
    """

    message_s: float
    byte_s: dict[str, float]
    up_bits_s: float
    down_bits_s: float
    latency_s: float

    def slower(self, factor: float) -> LinkCosts:
        """Return what messages cost where their processor time takes `factor` times as long."""
        byte_s = {codec: seconds * factor for codec, seconds in self.byte_s.items()}
        return replace(self, message_s=self.message_s * factor, byte_s=byte_s)


def answer(link: Link) -> None:
    """Answer each frame: with its own tensors, or with as many bytes as it asks for."""
    try:
        while True:
            frame = link.recv()
            same = Frame("reply", dict(frame.meta), dict(frame.tensors))
            link.send(link_rate.reply_to(frame, MOST) or same)
    except LinkClosed:
        return


def serve_for_ever(
    address: str, credentials: Credentials | None, tell: Callable[[str], None]
) -> None:
    """Be the other end until this process is interrupted."""
    server = serve(address, answer, credentials=credentials)
    try:
        tell(server.address)
        threading.Event().wait()
    finally:
        server.stop()


@contextmanager
def other_end(kind: str) -> Iterator[str]:
    """Start a process that answers on loopback, by ``grpc`` or ``tcp``; yield its address."""
    command = [sys.executable, "-m", "fedsys.commands.profile_link", kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeFailure(f"{' '.join(command)}: the process ended at once")
        yield address
    finally:
        process.stdin.close()
        wait_or_kill(process, 5)
        process.stdout.close()


def measure_link(
    address: str,
    crossing: Crossing,
    rows: int,
    repeats: int,
    credentials: Credentials | None = None,
) -> LinkCosts:
    """Measure messages with an activation of some examples, and the way they take.

    Args:
        address: Where `answer` is served.
        crossing: What crosses the cut.
        rows: Examples in a message.
        repeats: Messages of each kind.
        credentials: For mutual TLS.

    Raises:
        LinkError: Nobody answers, or the link is lost.
    """
    link = dial(address, credentials=credentials)
    try:
        shape = (rows, crossing.channels, max(1, crossing.elements // crossing.channels))
        large, small = torch.randn(shape), torch.randn(1, _SMALL.channels, 8)
        _costs(link, large, "int8", 1)  # warms up
        least = median(_costs(link, small, "fp32", 4 * repeats))
        part = max(1, rows // _PART)
        lines = {}
        for codec in CODECS:
            few, many = (tensor_bytes(crossing, n, codec) for n in (part, rows))
            seconds = median(_costs(link, large, codec, repeats))
            line = least, max(0.0, seconds - least) / many
            if part < rows:
                line = _line(few, median(_costs(link, large[:part], codec, repeats)), many, seconds)
            lines[codec] = line
        # a message has one fixed cost whatever its codec; the rest is charged to bytes at a piece
        message_s = max(least, median(fixed for fixed, _ in lines.values()))
        byte_s = {codec: slope for codec, (_, slope) in lines.items()}
        much = max(4 * large.numel(), 1 << 16)
        rate = link_rate.measure(link, much, repeats, _ENDLESS_S)
        return LinkCosts(message_s, byte_s, rate.up_bits_s, rate.down_bits_s, rate.latency_s)
    finally:
        link.close()


def _line(few: int, part_s: float, many: int, whole_s: float) -> tuple[float, float]:
    """Return the fixed cost of a message and that of a byte, by messages of two sizes.

    What arrives packet by packet is copied and decrypted anew in each message, so several small
    ones cost more than their bytes in a large one, and more than the smallest beside.

    >>> _line(1000, 3.0, 3000, 5.0)
    (2.0, 0.001)
    """
    slope = max(0.0, whole_s - part_s) / (many - few)
    return max(0.0, part_s - slope * few), slope


def _costs(link: Link, x: torch.Tensor, codec: str, repeats: int) -> list[float]:
    """Return the CPU seconds of one message each time: half of those there and back.

    Where the link is slow there are no more than `_LEAST` once `_LONG_S` seconds are over.
    """
    found: list[float] = []
    first = time.monotonic()
    while len(found) < repeats and (len(found) < _LEAST or time.monotonic() - first < _LONG_S):
        began = time.process_time()
        tensors, meta = encode_activation(x, codec)
        link.send(Frame("activation", meta, tensors))
        back = link.recv(_ENDLESS_S)
        decode_activation(back.tensors, back.meta)
        found.append((time.process_time() - began) / 2)
    return found


def _main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    server = serve(f"{arguments[1]}://127.0.0.1:0", answer)
    print(server.address, flush=True)
    sys.stdin.read()  # until the parent ends, however it ends
    server.stop()


if __name__ == "__main__":
    _main(sys.argv)
