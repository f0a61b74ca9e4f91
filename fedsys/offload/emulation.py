"""Machines slower than this one, in real time: who computes waits until they would be done.

An operation is done at once and for real; then its machine waits for the moment at which the
machine that it stands for would have finished (`fedsys.planning.costs.MachineCosts`). Moments
follow from moments, not from when a wait or the real work happened to end, so that what ends late
does not add
up: the next operation has its own moment to keep. What came late over a link is late. Loading
and the CPU time of messages are charged as well. With `fedsys.transport.shaping` for the links, a
run takes the time that it would take on the fleet that it names, as long as this machine is
faster, but for the exchange of models between rounds, which is not slowed down.

Without costs a pace waits for nothing and only says when operations began and ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from fedsys.config import Config, edge_names
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.offload.processors import Processors
from fedsys.offload.snapshot import SessionSpec
from fedsys.planning.costs import MachineCosts, crossings, frame_bytes
from fedsys.planning.hardware import Hardware, hardware

LATE_S: Final = 2e-3
"""How far real work may be behind without being called late."""

Clock = Callable[[], float]
Span = tuple[float, float]


class Pace:
    """When the operations of one machine begin and end. For one thread.

    Args:
        costs: What the machine takes that this one stands for; None: this one.
        clock: Seconds; that of the arrivals of frames.
        sleep: How to wait.

    Attributes:
        late_s: Seconds by which operations ended late for real, added up.
    """

    def __init__(
        self,
        costs: MachineCosts | None = None,
        *,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.costs, self.late_s = costs, 0.0
        self._clock, self._sleep = clock, sleep
        self._free_s = self._began_s = clock()
        self._debt_s = 0.0

    def now(self) -> float:
        """Return the moment at which the machine is."""
        return self.real() if self.costs is None else self._free_s

    def real(self) -> float:
        """Return what the clock says."""
        return self._clock()

    def begin(self, not_before_s: float = 0.0) -> Span:
        """Begin an operation that needs what arrived at `not_before_s`.

        Returns:
            The time until then in which something was loaded; empty if nothing was.
        """
        if self.costs is None:
            self._free_s = self._began_s = self._clock()
            return self._began_s, self._began_s
        idle = max(0.0, not_before_s - self._free_s)
        paid = min(self._debt_s, idle)
        self._debt_s -= paid
        loaded = self._free_s, self._free_s + paid
        self._free_s = self._began_s = max(self._free_s, not_before_s)
        return loaded

    def end(self, seconds: float = 0.0) -> Span:
        """Return when the operation began and ended, at its end.

        Args:
            seconds: What it takes on the machine that is stood for.
        """
        began, now = self._began_s, self._clock()
        self._free_s = now if self.costs is None else self._finish(began + seconds, now)
        self._began_s = self._free_s
        return began, self._free_s

    def owe(self, seconds: float) -> None:
        """Charge work that is done while nothing else is to do, or at the end of the step."""
        if self.costs is not None:
            self._debt_s += seconds

    def settle(self) -> Span:
        """Work off what is owed; without costs nothing is, and the span is empty."""
        if self.costs is None:
            now = self._clock()
            return now, now
        self.begin()
        owed, self._debt_s = self._debt_s, 0.0
        return self.end(owed)

    def _finish(self, due_s: float, now: float) -> float:
        if due_s > now:
            self._sleep(due_s - now)
        elif now - due_s > LATE_S:
            self.late_s += now - due_s
        return due_s


class Workers:
    """The processors of one edge server, which its sessions share in the order of their coming.

    Args:
        name: Name of the edge server.
        cores: Of this machine, on which they compute; None: those that this process may use.
        clock: Seconds; that of the arrivals of frames.
        sleep: How to wait.

    Attributes:
        processors: Those of this machine; the others are those of the machine it stands for.
    """

    def __init__(
        self,
        name: str,
        *,
        cores: int | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.processors = name, Processors(cores)
        self._clock, self._sleep = clock, sleep
        self._free_s: list[float] = []
        self._lock = threading.Lock()

    def take(self, at_s: float, seconds: float, count: int) -> Span:
        """Occupy the first of `count` processors that is free; return from when to when.

        Args:
            at_s: When the work is there.
            seconds: How long it takes.
            count: Processors of the server.
        """
        with self._lock:
            free = self._free_s
            free += [0.0] * (count - len(free))
            index = min(range(count), key=free.__getitem__)
            began = max(at_s, free[index])
            free[index] = began + seconds
            return began, began + seconds

    def wait_until(self, moment_s: float) -> float:
        """Wait for a moment; return it, or now if that is long past."""
        left = moment_s - self._clock()
        if left > 0:
            self._sleep(left)
        return moment_s if left > -LATE_S else moment_s - left


class SessionPace:
    """When the operations of one session begin and end. For one thread at a time.

    Args:
        workers: Of its edge server.
        costs: What the machine takes that this one stands for; None: this one.
        first: First unit on the edge.
        last: End of its units.
        down_bytes: Bytes of an answer for a number of examples.
        codecs: How what comes and what goes is written.
        clock: Seconds; that of the arrivals of frames.
    """

    def __init__(
        self,
        workers: Workers,
        costs: MachineCosts | None = None,
        *,
        first: int = 0,
        last: int = 0,
        down_bytes: Callable[[int], float] = lambda rows: 0.0,
        codecs: tuple[str, str] = ("fp32", "fp32"),
        clock: Clock = time.monotonic,
    ) -> None:
        self._workers, self._costs, self._clock = workers, costs, clock
        self._units, self._down_bytes, self._codecs = (first, last), down_bytes, codecs
        self._free_s = self._received_s = self._middle_s = 0.0
        self._span: Span = (0.0, 0.0)
        self._known: dict[int, tuple[float, float, float]] = {}  # by rows: both, and answering

    def begin(
        self, received_s: float, nbytes: int, rows: int, *, both: bool, forward: bool
    ) -> None:
        """Begin an operation.

        Args:
            received_s: When its frame was there.
            nbytes: Bytes of the frame.
            rows: Examples.
            both: Whether forward and backward are done at once.
            forward: Else: which of the two.
        """
        self._received_s = received_s
        if self._costs is None:
            self.served()
            return
        ahead, back, answer = self._seconds(rows)
        done = ahead if both or forward else 0.0
        seconds = done + (back if both or not forward else 0.0)
        messages = answer + self._costs.messaging.seconds(nbytes, self._codecs[0])
        at = max(received_s, self._free_s)
        self._span = self._workers.take(at, seconds + messages, self._costs.workers)
        self._middle_s = self._span[0] + done

    def served(self) -> None:
        """A processor is there: to wait for it was not yet work."""
        if self._costs is None:
            self._span = (self._clock(), 0.0)
            self._middle_s = self._span[0]

    def turn(self) -> None:
        """The forward is done, and the backward begins."""
        if self._costs is None:
            self._middle_s = self._clock()

    def end(self) -> list[int]:
        """Wait for the end of the operation.

        Returns:
            Microseconds at which it was received, began, turned, and ended.
        """
        began, ended = self._span
        if self._costs is None:
            ended = self._free_s = self._clock()
        else:
            self._free_s = ended
            ended = self._workers.wait_until(ended)
        stamps = (self._received_s or began, began, self._middle_s, ended)
        return [int(1e6 * stamp) for stamp in stamps]

    def update(self) -> None:
        """Wait as long as the optimizer takes; it has done its step."""
        if self._costs is not None:
            seconds = sum(self._costs.update_s[slice(*self._units)])
            _, self._free_s = self._workers.take(self._free_s, seconds, self._costs.workers)
            self._workers.wait_until(self._free_s)

    def _seconds(self, rows: int) -> tuple[float, float, float]:
        known = self._known.get(rows)
        if known is None:
            assert self._costs is not None
            ahead, back = self._costs.seconds(rows, *self._units)
            answer = self._costs.messaging.seconds(self._down_bytes(rows), self._codecs[1])
            known = self._known[rows] = ahead, back, answer
        return known


def session_pace(
    config: Config, layers: LayeredModel, spec: SessionSpec, workers: Workers
) -> SessionPace:
    """Return the pace of a session.

    Args:
        config: The run.
        layers: Its model.
        spec: The session.
        workers: Of the edge server that has it.
    """
    costs = edge_costs(config, layers, workers.name)
    if costs is None:
        return SessionPace(workers)
    enters = crossings(layers)[spec.first - 1] if spec.first else None
    return SessionPace(
        workers,
        costs,
        first=spec.first,
        last=spec.last,
        down_bytes=lambda rows: frame_bytes(enters, rows, spec.codec_down) if enters else 0.0,
        codecs=(spec.codec_up, spec.codec_down),
    )


def machines(config: Config, layers: LayeredModel) -> Hardware | None:
    """Return the machines that this run stands for; None if it stands for none.

    Raises:
        ConfigError: The fleet names no machines.
    """
    if not config.fleet.emulate:
        return None
    found = hardware(config, layers)
    if found is None:
        raise ConfigError.of(
            "fleet.emulate", True, "needs machines to stand for", "choose a fleet, as fleet=pi_lab"
        )
    return found


def device_costs(config: Config, layers: LayeredModel, partition: int) -> MachineCosts | None:
    """Return the costs of the machine that a device stands for."""
    found = machines(config, layers)
    return None if found is None else found.devices[partition % len(found.devices)]


def edge_costs(config: Config, layers: LayeredModel, name: str) -> MachineCosts | None:
    """Return the costs of the machine that an edge server stands for."""
    found = machines(config, layers)
    if found is None:
        return None
    names = edge_names(config)
    return found.edges[names.index(name) if name in names else 0]
