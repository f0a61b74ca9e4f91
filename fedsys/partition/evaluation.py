"""What one partition costs, part by part: the figures that people and the controller see.

`fedsys.partition.solvers` computes the same for all cuts at once; tests hold both to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedsys.partition.problem import RAW, Partition, Problem, taking_part


@dataclass(frozen=True)
class Portion:
    """What one host does for a request.

    Attributes:
        host: Index of the host.
        first: Its first unit.
        last: The unit behind its last.
        compute_s: Seconds of computing.
        messages_s: CPU seconds of what it sends and receives.
        wait_s: Seconds that a request waits for the host.
        memory_bytes: Weights and activations.
        sent_bytes: What it sends for a request, forward and back.
    """

    host: int
    first: int
    last: int
    compute_s: float
    messages_s: float
    wait_s: float
    memory_bytes: float
    sent_bytes: int

    @property
    def service_s(self) -> float:
        """Seconds of the host's processor."""
        return self.compute_s + self.messages_s


@dataclass(frozen=True)
class Transfer:
    """What goes from one host to another that takes part, and back.

    Attributes:
        first: Host that sends the tensor.
        last: Host that receives it.
        cut: Which tensor.
        codec: How it is written.
        up_bytes: Bytes of its frame.
        up_s: Seconds that it takes the link for.
        down_s: Seconds of the answer.
        latency_s: There and back.
        wait_s: Seconds that both wait for others on the link.
    """

    first: int
    last: int
    cut: int
    codec: str
    up_bytes: int
    up_s: float
    down_s: float
    latency_s: float
    wait_s: float


@dataclass(frozen=True)
class RequestCost:
    """What a request costs.

    Attributes:
        latency_s: From the input to the answer on the first host.
        bottleneck_s: Seconds of what is busy longest: its inverse is the most requests per second.
        sent_bytes: Bytes that all hosts send.
        energy_j: Of hosts whose power is known.
        portions: What hosts do.
        transfers: What is sent.
    """

    latency_s: float
    bottleneck_s: float
    sent_bytes: int
    energy_j: float
    portions: tuple[Portion, ...]
    transfers: tuple[Transfer, ...]

    def value(self, objective: str) -> float:
        """Return what is to be small: seconds, bytes or joules."""
        return {
            "latency": self.latency_s,
            "throughput": self.bottleneck_s,
            "bytes": float(self.sent_bytes),
            "energy": self.energy_j,
        }[objective]


def evaluate(problem: Problem, partition: Partition) -> RequestCost:
    """Return what a request costs when the model is divided like this; constraints do not count."""
    transfers = tuple(_transfers(problem, partition))
    portions = tuple(_portions(problem, partition, transfers))
    latency = sum(p.service_s + p.wait_s for p in portions)
    latency += sum(t.up_s + t.down_s + t.latency_s + t.wait_s for t in transfers)
    busy = [*(p.service_s for p in portions), *(s for t in transfers for s in (t.up_s, t.down_s))]
    energy = sum((problem.hosts[p.host].power_w or 0.0) * p.service_s for p in portions)
    energy += sum(
        (problem.hosts[t.first].radio_w + problem.hosts[t.last].radio_w) * (t.up_s + t.down_s)
        for t in transfers
    )
    sent = sum(p.sent_bytes for p in portions)
    return RequestCost(latency, max(busy), sent, energy, portions, transfers)


def _wait(problem: Problem, seconds: float) -> float:
    return float(problem.wait_s(np.array([seconds]))[0])


def _transfers(problem: Problem, partition: Partition) -> Iterator[Transfer]:
    bounds = (0, *partition.cuts, len(problem))
    for first, last in pairwise(taking_part(partition.cuts, len(problem))):
        cut, network = bounds[last], problem.path(first, last)
        codec = RAW if cut == 0 else partition.codecs[last - 1]
        nbytes = problem.bytes_at(cut, codec)
        up, down = 8 * nbytes / network.up_bits_s, 8 * problem.answer_bytes / network.down_bits_s
        wait = _wait(problem, up) + _wait(problem, down)
        yield Transfer(first, last, cut, codec, nbytes, up, down, 2 * network.latency_s, wait)


def _portions(
    problem: Problem, partition: Partition, transfers: tuple[Transfer, ...]
) -> Iterator[Portion]:
    answer = problem.answer_bytes
    for place, index in enumerate(taking_part(partition.cuts, len(problem))):
        host = problem.hosts[index]
        first, last = partition.units_of(index, len(problem))
        compute, message = host.costs.seconds(problem.rows, first, last)[0], host.costs.messaging
        came = transfers[place - 1] if place else None
        goes = transfers[place] if place < len(transfers) else None
        # each tensor or answer that comes or goes
        messages = message.seconds(came.up_bytes, came.codec) if came else 0.0
        messages += message.seconds(answer, RAW) if came else 0.0
        messages += message.seconds(goes.up_bytes, goes.codec) if goes else 0.0
        messages += message.seconds(answer, RAW) if goes else 0.0
        sent = (goes.up_bytes if goes else 0) + (answer if came else 0)
        wait = host.waiting_s + _wait(problem, compute + messages)
        memory = problem.memory_bytes(first, last)
        yield Portion(index, first, last, compute, messages, wait, memory, sent)
