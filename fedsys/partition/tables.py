"""The costs of all portions and transfers of a problem at once, as arrays for the solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsys.partition.problem import RAW, Array, Problem

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PortionCosts:
    """Costs that are added up, and the largest busy time, all of one shape.

    Attributes:
        latency: Seconds of a request.
        busy: Seconds of what is busy longest in it.
        sent: Bytes.
        energy: Joules.
    """

    latency: Array
    busy: Array
    sent: Array
    energy: Array

    def of(self, objective: str) -> Array:
        """Return what counts for an objective."""
        named = {"latency": self.latency, "throughput": self.busy}
        return named.get(objective, self.sent if objective == "bytes" else self.energy)


class Tables:
    """Costs by legal cut. K cuts are legal, 0 and L among them.

    Args:
        problem: What is to be divided.
        steady: Allow nothing that requests arrive at faster than it serves them, whatever the
            objective; else that is infinitely late, and no more.
    """

    def __init__(self, problem: Problem, *, steady: bool = False) -> None:
        self.problem, self.cuts, self._steady = problem, problem.cuts, steady
        self._at = np.array(problem.cuts)
        self._forward = self._at[None, :] >= self._at[:, None]
        self._allowed = [self._allowed_on(host) for host in range(len(problem.hosts))]
        self._compute = [self._computing(host) for host in range(len(problem.hosts))]
        self._bytes = {
            codec: np.array([problem.bytes_at(cut, codec) for cut in problem.cuts], float)
            for codec in self.codecs
        }
        self._usable = {
            codec: np.array([self._may_be(cut, codec) for cut in problem.cuts])
            for codec in self.codecs
        }
        self._known: dict[tuple[object, ...], PortionCosts] = {}

    @property
    def codecs(self) -> tuple[str, ...]:
        """Codecs that may be used; the input is always sent as it is."""
        given = self.problem.codecs
        return given if RAW in given else (RAW, *given)

    def _may_be(self, cut: int, codec: str) -> bool:
        """Return whether the tensor at a cut may be written like this."""
        return codec == RAW if cut == 0 else codec in self.problem.codecs

    def _messages(self, host: int, codec: str) -> Array:
        """Return the CPU seconds of a host for the tensor at each cut, ``(K,)``."""
        messaging = self.problem.hosts[host].costs.messaging
        return messaging.message_s + self._bytes[codec] * messaging.byte_s.get(codec, 0.0)

    def portion(self, host: int, came: str | None, goes: str | None) -> PortionCosts:
        """Return the costs of a host between two cuts, ``(K, K)``; infinite where not allowed.

        Args:
            host: Which.
            came: Codec of what it receives; None for the first host, which has the input.
            goes: Codec of what it sends on; None where it ends the model.
        """
        key = (host, came, goes)
        if key not in self._known:
            self._known[key] = self._portion(*key)
        return self._known[key]

    def _portion(self, host: int, came: str | None, goes: str | None) -> PortionCosts:
        problem, about = self.problem, self.problem.hosts[host]
        answer = about.costs.messaging.seconds(problem.answer_bytes, RAW)
        service = self._compute[host].copy()
        sent = np.zeros_like(service)
        if came is not None:
            service += self._messages(host, came)[:, None] + answer
            sent += problem.answer_bytes
        if goes is not None:
            service += self._messages(host, goes)[None, :] + answer
            sent += self._bytes[goes][None, :]
        usable = self._allowed[host]
        limit = problem.constraints.upload_bytes.get(host)
        if limit is not None:
            usable = usable & (sent <= limit)
        if goes is not None:
            usable = usable & self._usable[goes]
        latency = service + about.waiting_s
        if problem.requests_per_s:
            latency = latency + problem.wait_s(service)
            usable = usable & (np.isfinite(latency) | (not self._steady))
        energy = service * (about.power_w or 0.0)
        parts = (latency, service, sent, energy)
        return PortionCosts(*(np.where(usable, part, np.inf) for part in parts))

    def transfer(self, first: int, last: int, codec: str) -> PortionCosts:
        """Return the costs of what two hosts exchange at each cut, ``(K,)``."""
        problem, network = self.problem, self.problem.path(first, last)
        up = 8 * self._bytes[codec] / network.up_bits_s
        down = np.full_like(up, 8 * problem.answer_bytes / network.down_bits_s)
        latency = up + down + problem.wait_s(up) + problem.wait_s(down) + 2 * network.latency_s
        radio = problem.hosts[first].radio_w + problem.hosts[last].radio_w
        parts = (latency, np.maximum(up, down), np.zeros_like(up), radio * (up + down))
        keeps_up = np.isfinite(latency) | (not self._steady)
        return PortionCosts(*(np.where(keeps_up, part, np.inf) for part in parts))

    def _computing(self, host: int) -> Array:
        done = self.problem.forward_s(host)[self._at]
        seconds = done[None, :] - done[:, None]
        fixed = self.problem.hosts[host].costs.operation_s
        return np.where(self._at[None, :] > self._at[:, None], seconds + fixed, 0.0)

    def _allowed_on(self, host: int) -> Mask:
        problem, rules = self.problem, self.problem.constraints
        allowed = self._forward
        if rules.must or rules.must_not:
            refused = [
                rules.must.get(unit, host) != host or (unit, host) in rules.must_not
                for unit in range(len(problem))
            ]
            before = np.cumsum([False, *refused])[self._at]
            allowed = allowed & (before[None, :] == before[:, None])
        if math.isfinite(problem.hosts[host].memory_bytes):
            allowed = allowed & (self._memory <= problem.hosts[host].memory_bytes)
        return allowed

    @cached_property
    def _memory(self) -> Array:
        problem = self.problem
        weights = np.cumsum([0, *problem.state_bytes])[self._at].astype(float)
        held = np.array([c.elements * c.itemsize * problem.rows for c in problem.crossing], float)
        pair = held[:-1] + held[1:]
        count = len(self.cuts)
        peak = np.zeros((count, count))
        for j in range(1, count):  # the largest pair between two cuts, from that before
            inside = pair[self._at[j - 1] : self._at[j]].max()
            peak[:j, j] = np.maximum(peak[:j, j - 1], inside)
        whole: Array = np.maximum(weights[None, :] - weights[:, None], 0.0) + peak
        return whole
