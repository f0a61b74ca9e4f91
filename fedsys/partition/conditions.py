"""What is so at run time: rates of links from what is sent over them, and how slow hosts are.

Nothing is sent over the links of tensors to measure. Every request that comes back tells for each
host how long it computed and for each link how long the tensor and its answer were on the way;
medians of the last ones, beside what was expected of the machine and the network, are the
conditions of the moment. A host that takes no part tells nothing so: there, and for memory, what it
says of its processors and its free memory counts (`Observer.noted`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, final

from fedsys.partition.pipeline import Passed
from fedsys.partition.problem import Partition, Problem, taking_part
from fedsys.transport.network import Network

LEAST_BYTES = 2048
"""Of a tensor that tells a rate: what smaller ones take is latency."""

_KEPT = 15  # requests whose medians count
_MOST_SLOWER = 10.0  # that a host is believed to be for what others take
_FASTEST = 1e11  # bits per second that are told apart from none


@dataclass(frozen=True)
class ChainConditions:
    """How hosts and links are now.

    Attributes:
        slower: For each host by how much it takes longer than its machine was said to.
        waiting_s: For each host how long a request waits there.
        up_bits_s: For each link between neighbours the rate away from the first host; None where
            nothing was sent that tells.
        others: For each host the share of its processors that others take; None: not known.
        room_bytes: For each host the memory that there is for units, with those that it holds;
            None: not known.
    """

    slower: tuple[float, ...]
    waiting_s: tuple[float, ...]
    up_bits_s: tuple[float | None, ...]
    others: tuple[float | None, ...] = ()
    room_bytes: tuple[float | None, ...] = ()


def under(problem: Problem, conditions: ChainConditions) -> Problem:
    """Return a problem as it is under some conditions."""
    room = conditions.room_bytes or (None,) * len(problem.hosts)
    hosts = tuple(
        dataclasses.replace(
            host, costs=host.costs.slower(slower), waiting_s=waiting,
            memory_bytes=host.memory_bytes if left is None else min(host.memory_bytes, left),
        )
        for host, slower, waiting, left in zip(
            problem.hosts, conditions.slower, conditions.waiting_s, room, strict=True
        )
    )  # fmt: skip
    networks = tuple(
        network if rate is None else Network(rate, network.down_bits_s, network.latency_s)
        for network, rate in zip(problem.networks, conditions.up_bits_s, strict=True)
    )
    return dataclasses.replace(problem, hosts=hosts, networks=networks)


def slower_beside(others: float) -> float:
    """Return by how much a host is slower of whose processors others take a share.

    What they leave is what there is: half of it makes twice as slow. At most `_MOST_SLOWER`.
    """
    return 1 / max(1 / _MOST_SLOWER, 1 - others)


@dataclass
class _Recent:
    """The last values of one host or link, and the number of the request of the last one."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    last: int = -(10**9)

    def middle(self, otherwise: float) -> float:
        return median(self.values) if self.values else otherwise


@final
class Observer:
    """Learns the conditions from requests that came back.

    Args:
        problem: What was expected of hosts and links. Their order and names are those of the
            requests.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._names = [host.name for host in problem.hosts]
        self._slower = [_Recent() for _ in problem.hosts]
        self._waiting = [_Recent() for _ in problem.hosts]
        self._rates = [_Recent() for _ in problem.networks]
        self._others: dict[int, float] = {}
        self._room: dict[int, float] = {}
        self._count = 0
        self._took: deque[float] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def seen(self, partition: Partition, passed: Passed, rows: int, took_s: float) -> None:
        """Take note of a request.

        Args:
            partition: Who computed what.
            passed: What the hosts told.
            rows: Examples of it.
            took_s: How long it took in all.
        """
        parts = {str(part["host"]): part for part in passed.parts}
        hosts = taking_part(partition.cuts, len(self._problem))
        working = [host for host in hosts if self._names[host] in parts]
        with self._lock:
            self._took.append(took_s)
            self._count += 1
            for place, host in enumerate(working):
                part = parts[self._names[host]]
                self._see_host(host, partition, part, rows)
                if place + 1 < len(working) and "link_s" in part:
                    self._see_link(host, working[place + 1], part["link_s"], part["bytes"])
            if working and working[0]:  # the input goes to a host that is not the first
                self._see_link(0, working[0], passed.link_s, passed.bytes)

    def _see_host(
        self, host: int, partition: Partition, part: Mapping[str, Any], rows: int
    ) -> None:
        first, last = partition.units_of(host, len(self._problem))
        expected = self._problem.hosts[host].costs.seconds(rows, first, last)[0]
        if expected > 0:
            self._slower[host].values.append(float(part["compute_s"]) / expected)
            self._slower[host].last = self._count
        self._waiting[host].values.append(float(part["queue_s"]))

    def _see_link(self, first: int, last: int, seconds: float, nbytes: int) -> None:
        network = self._problem.path(first, last)
        back = 2 * network.latency_s + 8 * self._problem.answer_bytes / network.down_bits_s
        if nbytes < LEAST_BYTES:
            return
        # where several links lie between, the slowest of them is believed to be as expected
        between = self._problem.networks[first:last]
        slowest = first + min(range(len(between)), key=lambda i: between[i].up_bits_s)
        rate = 8 * nbytes / max(seconds - back, 8 * nbytes / _FASTEST)
        self._rates[slowest].values.append(rate)

    def noted(self, host: int, others: float, room_bytes: float) -> None:
        """Take note of what a host says of itself.

        Args:
            host: Its index.
            others: Share of its processors that others take.
            room_bytes: Memory for units that is free there, or taken by those that it holds.
        """
        with self._lock:
            self._others[host], self._room[host] = others, room_bytes

    def forget(self) -> None:
        """Forget how long requests took: after a move they take another time."""
        with self._lock:
            self._took.clear()

    @property
    def took_s(self) -> float | None:
        """Median of the last requests since the last move; None if there are too few."""
        with self._lock:
            return median(self._took) if len(self._took) >= 3 else None

    def conditions(self) -> ChainConditions:
        """Return what the last requests tell; what was not used is as expected."""
        with self._lock:
            return ChainConditions(
                tuple(self._slower_now(host) for host in range(len(self._names))),
                tuple(recent.middle(0.0) for recent in self._waiting),
                tuple(_rate(recent) for recent in self._rates),
                tuple(self._others.get(host) for host in range(len(self._names))),
                tuple(self._room.get(host) for host in range(len(self._names))),
            )

    def _slower_now(self, host: int) -> float:
        """Return what requests told, or, where they have not passed of late, what the host says."""
        recent, others = self._slower[host], self._others.get(host)
        if others is not None and self._count - recent.last > _KEPT:
            return slower_beside(others)
        return max(0.01, recent.middle(1.0))


def _rate(recent: _Recent) -> float | None:
    return recent.middle(0.0) if recent.values else None


def told(conditions: ChainConditions, names: Sequence[str]) -> dict[str, Any]:
    """Return conditions as plain values, for people and records."""
    rates = [None if rate is None else rate / 1e6 for rate in conditions.up_bits_s]
    return {
        "slower": dict(zip(names, conditions.slower, strict=True)),
        "waiting_ms": {n: 1e3 * s for n, s in zip(names, conditions.waiting_s, strict=True)},
        "up_mbit_s": rates,
        "others": dict(zip(names, conditions.others, strict=False)),
        "room_mb": {
            name: None if room is None else room / 1e6
            for name, room in zip(names, conditions.room_bytes, strict=False)
        },
    }
