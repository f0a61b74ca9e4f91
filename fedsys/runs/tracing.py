"""What a device and its edge did in a round, moment by moment, as a trace and as sums.

A device notes its own operations, and each answer of its edge tells when that received, computed
and answered. Together they give four lanes: device, uplink, edge, downlink. A fifth one is that of
the thread which loads mini-batches; an emulated device is charged for loading in its own lane. A
transfer begins when it is sent, or when the one before it has arrived, and ends when it arrives, so
its latency is part of it.

The clock of an edge on another machine has another origin. If no transfer would then arrive before
it was sent, origins are taken to be one; otherwise the shortest transfers of both directions are
taken to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np

from fedsys.planning.resources import RESOURCES, Event, Measured
from fedsys.transport.messages import TraceRecord

LANES: Final = {**RESOURCES, "loader": "loader", "move": "moves"}
"""What an event may be on, and what people call it."""

NAMES: Final = ("load", "forward", "tail", "send", "wait", "backward", "update", "step", "transfer")
MOST_EVENTS: Final = 4000
"""Events of one device and round that are kept; those of its first mini-batches."""

_RECENT: Final = 256  # answers by which the clock of the edge is judged while a round goes on

_KINDS: Final = tuple(LANES)
_RECORD: Final = np.dtype(
    [
        ("lane", "u1"),
        ("name", "u1"),
        ("step", "<i4"),
        ("piece", "<i4"),
        ("start", "<f8"),
        ("end", "<f8"),
    ]
)


class _Answer(NamedTuple):
    """The way of one micro-batch over the edge, in the clocks of those who noted it."""

    step: int
    piece: int
    sent_s: float
    up_bytes: int
    arrived_s: float
    down_bytes: int
    told: tuple[int, ...]


class Recorder:
    """Notes what one device does in one round. For one thread."""

    def __init__(self) -> None:
        self._own: list[tuple[str, str, int, int, float, float]] = []
        self._answers: list[_Answer] = []
        self._ends: list[float] = []
        self._late_s = 0.0

    def note(
        self, name: str, step: int, piece: int, span: tuple[float, float], lane: str = "device"
    ) -> None:
        """Note an operation of the device, or of its loader.

        Args:
            name: One of `NAMES`.
            step: Index of the mini-batch.
            piece: Index of the micro-batch; -1 for none.
            span: Begin and end in seconds; nothing is noted if it is empty.
            lane: ``device`` or ``loader``.
        """
        if span[1] > span[0]:
            self._own.append((lane, name, step, piece, *span))

    def answer(
        self,
        step: int,
        piece: int,
        sent: tuple[float, int],
        arrived: tuple[float, int],
        told: object,
    ) -> None:
        """Note an answer of the edge.

        Args:
            step: Index of the mini-batch.
            piece: Index of the micro-batch.
            sent: When the operation was sent, and its bytes.
            arrived: When the answer arrived, and its bytes.
            told: What the edge says of itself: microseconds of its clock at which it received,
                began, ended the forward, and ended the backward.
        """
        if isinstance(told, list) and len(told) == 4 and all(type(n) is int for n in told):
            self._answers.append(_Answer(step, piece, *sent, *arrived, tuple(told)))

    def finished(self, moment_s: float, late_s: float = 0.0) -> None:
        """Note the end of a mini-batch.

        Args:
            moment_s: When it was.
            late_s: Seconds by which real work was behind the machine that is stood for, so far.
        """
        self._ends.append(moment_s)
        self._late_s = late_s

    def rate(self, step: int, latency_s: float = 0.0) -> float:
        """Return what the link carried in a mini-batch: bits per second of the slower way.

        Args:
            step: Index of the mini-batch.
            latency_s: What is known to be no part of the time of bits, one way.

        Returns:
            Infinite where nothing is known.
        """
        recent = self._answers[-_RECENT:]
        own, offset = [a for a in recent if a.step == step], _offset(recent)
        up = [(a.sent_s, a.told[0] / 1e6 - offset, a.up_bytes) for a in own]
        down = [(a.told[3] / 1e6 - offset, a.arrived_s, a.down_bytes) for a in own]
        slower = max(_bit_s(up, latency_s), _bit_s(down, latency_s))
        return 1 / slower if slower > 0 else math.inf

    def iterations(self) -> list[float]:
        """Return the seconds from each mini-batch to the next."""
        return [b - a for a, b in zip(self._ends, self._ends[1:], strict=False)]

    def events(self) -> list[Event]:
        """Return all events in the order of their begin."""
        offset = _offset(self._answers)
        found = [Event(*own) for own in self._own]
        up = down = 0.0
        for answer in sorted(self._answers, key=lambda a: a.told[0]):
            received, began, middle, ended = (n / 1e6 - offset for n in answer.told)
            place = answer.step, answer.piece
            found.append(Event("up", "transfer", *place, max(answer.sent_s, up), received))
            if middle > began:
                found.append(Event("edge", "forward", *place, began, middle))
            if ended > middle:
                found.append(Event("edge", "backward", *place, middle, ended))
            found.append(Event("down", "transfer", *place, max(ended, down), answer.arrived_s))
            up, down = received, answer.arrived_s
        return sorted((e for e in found if e.end_s > e.start_s), key=lambda e: (e.start_s, e.end_s))

    def sums(self, latency_s: float = 0.0) -> Measured:
        """Return what a mini-batch took.

        Args:
            latency_s: What is known to be no part of the time of bits, one way.
        """
        steps = max(1, len(self._ends))
        offset = _offset(self._answers)
        computed = sum(
            end - start
            for _, name, _, _, start, end in self._own
            if name not in ("wait", "send", "load")
        )
        edge = sum(answer.told[3] - answer.told[1] for answer in self._answers) / 1e6
        ways = [
            (a.sent_s, a.told[0] / 1e6 - offset, a.up_bytes, a.told[3] / 1e6 - offset, a.arrived_s,
             a.down_bytes) for a in self._answers
        ]  # fmt: skip
        return Measured(
            median(self.iterations()) if len(self._ends) > 1 else 0.0,
            computed / steps,
            edge / steps,
            _bit_s([(sent, received, n) for sent, received, n, *_ in ways], latency_s),
            _bit_s([(sent, received, n) for *_, sent, received, n in ways], latency_s),
        )

    def record(self) -> TraceRecord:
        """Return what a message says of it."""
        return TraceRecord(pack(self.events()[:MOST_EVENTS]), tuple(self._ends), self._late_s)


def _offset(answers: Iterable[_Answer]) -> float:
    """Return by how many seconds the edge's clock is ahead of the device's."""
    up = [a.told[0] / 1e6 - a.sent_s for a in answers]
    down = [a.arrived_s - a.told[3] / 1e6 for a in answers]
    if not up or (min(up) > -1e-3 and min(down) > -1e-3):
        return 0.0
    return (min(up) - min(down)) / 2


def _bit_s(ways: Sequence[tuple[float, float, int]], latency_s: float) -> float:
    """Return the seconds of a bit, from transfers ``(sent, received, bytes)`` in a row.

    Where a transfer waited for the one before it, the latency of both is the same and drops out.
    """
    queued, all_ = [], []
    free = -math.inf  # when the last bit of the one before was on its way
    for sent, received, nbytes in sorted(ways, key=lambda way: way[1]):
        left = received - latency_s
        if nbytes and left > max(sent, free):
            took = (left - max(sent, free)) / (8.0 * nbytes)
            all_.append(took)
            if sent < free:
                queued.append(took)
        free = left
    return median(queued or all_) if all_ else 0.0


def lanes_in(events: Iterable[Event]) -> list[str]:
    """Return the lanes that have events, in their order."""
    found = {event.lane for event in events}
    return [lane for lane in LANES.values() if lane in found]


def pack(events: Iterable[Event]) -> bytes:
    """Return events as bytes."""
    rows = [
        (_KINDS.index(e.kind), NAMES.index(e.name), e.step, e.piece, e.start_s, e.end_s)
        for e in events
    ]
    return np.array(rows, dtype=_RECORD).tobytes()


def unpack(data: bytes) -> list[Event]:
    """Return the events that `pack` wrote; of a damaged text, those that have a meaning."""
    whole = len(data) // _RECORD.itemsize * _RECORD.itemsize
    rows = np.frombuffer(data[:whole], dtype=_RECORD).tolist()
    return [
        Event(_KINDS[lane], NAMES[name], *rest)
        for lane, name, *rest in rows
        if lane < len(_KINDS) and name < len(NAMES)
    ]


def span_of(
    event: Event, name: str, category: str, place: tuple[int, int], origin_s: float, args: Any
) -> dict[str, Any]:
    """Return an event as traces have it: in microseconds, with whole nanoseconds.

    Both ends are rounded, not the length: an event that begins when another one ends would else
    overlap it by a digit, and Perfetto drops what overlaps within a thread.

    Args:
        event: The event.
        name: What is shown.
        category: Its kind.
        place: Numbers of process and thread.
        origin_s: When the trace begins.
        args: What is told of it on demand.
    """
    start, end = round(1e9 * (event.start_s - origin_s)), round(1e9 * (event.end_s - origin_s))
    pid, tid = place
    return {"name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid,
            "ts": start / 1000, "dur": (end - start) / 1000, "args": args}  # fmt: skip


def perfetto(devices: Mapping[str, Sequence[Event]], first: int = 1) -> dict[str, Any]:
    """Return the trace as Perfetto and ``chrome://tracing`` read it.

    Args:
        devices: Events by name of the device; each is a process with a thread for each lane.
        first: Number of the first process.
    """
    origin = min((e.start_s for events in devices.values() for e in events), default=0.0)
    made: list[dict[str, Any]] = []
    for pid, (device, events) in enumerate(devices.items(), start=first):
        made.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": device}})
        moves = any(event.kind == "move" for event in events)
        for tid, lane in enumerate(LANES.values(), start=1):
            if lane == LANES["move"] and not moves:
                continue
            named = {"ph": "M", "pid": pid, "tid": tid}
            made.append({**named, "name": "thread_name", "args": {"name": lane}})
            made.append({**named, "name": "thread_sort_index", "args": {"sort_index": tid}})
        for e in events:
            place, args = (pid, _KINDS.index(e.kind) + 1), {"mini-batch": e.step}
            made.append(span_of(e, e.title, e.lane, place, origin, args))
    return {"traceEvents": made, "displayTimeUnit": "ms"}
