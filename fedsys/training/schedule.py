"""The order in which a mini-batch is worked through, as an iterator that can be printed.

An operation is a name and the index of a micro-batch: ``forward`` computes an activation and sends
it, ``tail`` (label-private cuts only) takes what the edge made of it to a loss and sends that
gradient back, ``backward`` awaits the gradient of the activation and computes with it. Each order
does the backwards in the order of the pieces, so all of them give the same bits::

    >>> print(*sequential(2))
    ('forward', 0) ('backward', 0) ('forward', 1) ('backward', 1)
    >>> print(*pipelined(2))
    ('forward', 0) ('forward', 1) ('backward', 0) ('backward', 1)
    >>> print(*bounded(3, depth=2))
    ('forward', 0) ('forward', 1) ('backward', 0) ('forward', 2) ('backward', 1) ('backward', 2)
"""

from __future__ import annotations

from collections.abc import Iterator

Operation = tuple[str, int]


def sequential(micro_batches: int, *, tail: bool = False) -> Iterator[Operation]:
    """Finish one micro-batch before the next is begun: split learning as first described."""
    return bounded(micro_batches, depth=1, tail=tail)


def pipelined(micro_batches: int, *, tail: bool = False) -> Iterator[Operation]:
    """Do all forwards, then the backwards as gradients arrive (PiPar, section III).

    Zhang et al., "PiPar: Pipeline Parallelism for Collaborative Machine Learning", JPDC 2024.
    """
    return bounded(micro_batches, depth=micro_batches, tail=tail)


def bounded(micro_batches: int, *, depth: int, tail: bool = False) -> Iterator[Operation]:
    """Keep at most `depth` micro-batches in flight, so that a small device's memory suffices.

    Args:
        micro_batches: Number of pieces.
        depth: Activations that the device holds at one time, at least 1.
        tail: Whether the last units are on the device.
    """
    finish = ("tail", "backward") if tail else ("backward",)
    waiting: list[int] = []
    for piece in range(micro_batches):
        if len(waiting) == depth:
            first = waiting.pop(0)
            yield from ((name, first) for name in finish)
        yield "forward", piece
        waiting.append(piece)
    for name in finish:
        yield from ((name, piece) for piece in waiting)


def operations(kind: str, micro_batches: int, depth: int, *, tail: bool) -> Iterator[Operation]:
    """Return the schedule of a configuration's ``schedule`` group."""
    if kind == "sequential":
        return sequential(micro_batches, tail=tail)
    if kind == "pipelined":
        return pipelined(micro_batches, tail=tail)
    return bounded(micro_batches, depth=depth, tail=tail)


def micro_batch_bounds(batch_size: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """Yield the rows ``[start, stop)`` of each micro-batch.

    Sizes differ by one at most, larger ones first; a mini-batch with fewer examples than
    `micro_batches` gives one example to each, and one without examples nothing.

    >>> list(micro_batch_bounds(10, 4))
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    >>> list(micro_batch_bounds(2, 4))
    [(0, 1), (1, 2)]
    >>> list(micro_batch_bounds(0, 4))
    []
    """
    count = min(batch_size, micro_batches)
    if not count:
        return
    size, larger = divmod(batch_size, count)
    start = 0
    for i in range(count):
        stop = start + size + (i < larger)
        yield start, stop
        start = stop
