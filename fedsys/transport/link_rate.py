"""The rate of a link, measured by sending over it.

Whoever measures sends little and much, and asks for little and much; what little takes is the way
there and back, and is taken off: the shortest, as a machine that is held up now and then would make
links faster than they are. A quarter of the time is always left: a queue that lets much pass
at once would seem endlessly fast.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

LITTLE: Final = 1
"""Bytes of what is as good as nothing."""


@dataclass(frozen=True)
class LinkRate:
    """What a link carries.

    Attributes:
        up_bits_s: Bits per second to the other end.
        down_bits_s: Bits per second from it.
        latency_s: One way.
        nbytes: Bytes of tensors that were sent and received for it.
    """

    up_bits_s: float
    down_bits_s: float
    latency_s: float
    nbytes: int


def measure(link: Link, nbytes: int, repeats: int, timeout_s: float) -> LinkRate:
    """Measure the rate of a link.

    Args:
        link: At its other end somebody answers with `reply_to`.
        nbytes: Bytes of what is much.
        repeats: How often each is sent; medians count.
        timeout_s: Longest time for one answer.

    Raises:
        LinkError: There is none in time, or the link is lost.
    """
    little = torch.zeros(LITTLE, dtype=torch.uint8)
    much = torch.zeros(nbytes, dtype=torch.uint8)
    moved = 0

    def seconds(sent: torch.Tensor, asked: int, count: int) -> tuple[list[float], int]:
        """Return the seconds of each answer, and the bytes that came at least."""
        nonlocal moved
        found = []
        for _ in range(count):
            began = time.perf_counter()
            link.send(Frame("ask", {"reply": asked}, {"x": sent}))
            came = len(link.recv(timeout_s).tensors["x"])
            found.append((time.perf_counter() - began, came))
            moved += len(sent) + came
        return [took for took, _ in found], min(came for _, came in found)

    def rate(nbytes: int, all_took: list[float]) -> float:
        took = median(all_took)
        # Where much takes hardly longer than little, it is not known how much faster the link is
        return 8.0 * nbytes / max(took - min(back_and_forth), took / 4, 1e-12)

    back_and_forth, _ = seconds(little, LITTLE, max(repeats, 3))
    there, _ = seconds(much, LITTLE, repeats)
    back, came = seconds(little, nbytes, repeats)
    up, down = rate(nbytes, there), rate(came, back)
    return LinkRate(up, down, median(back_and_forth) / 2, moved)


def reply_to(frame: Frame, most: int) -> Frame | None:
    """Return the answer to a question of `measure`; None if the frame is none.

    Args:
        frame: What came.
        most: Bytes of an answer, whatever is asked for.
    """
    size = frame.meta.get("reply")
    if type(size) is not int:
        return None
    return Frame("reply", {}, {"x": torch.zeros(min(max(size, 1), most), dtype=torch.uint8)})
