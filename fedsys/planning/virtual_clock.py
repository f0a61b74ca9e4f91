"""The virtual clock: the time that a round would take on the fleet and network of a run.

Every device works through its real number of mini-batches, the smaller one at the end of an epoch
included, on links that follow their traces; `fedsys.planning.timeline.play` decides when what
happens. The clock depends on the configuration alone, not on the machine, its load, or the number
of workers. Every device first receives its part of the model and returns it at the end, over its
network; a round that is emulated in real time takes no time for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedsys.planning.assignment import Assignment
from fedsys.planning.handing_over import moving_job
from fedsys.planning.jobs import Job
from fedsys.planning.moves import Move
from fedsys.planning.planner import evaluate
from fedsys.planning.resources import RESOURCES, Measured
from fedsys.planning.timeline import Timeline, play
from fedsys.planning.workload import Workload, job_of, mini_batches

MOST_TURNS = 40_000
"""Turns that are played of a round; of a longer one a share of the iterations is."""


@dataclass(frozen=True)
class Ways:
    """Where devices go in a round, by their index in the workload.

    Attributes:
        moves: Moves and gaps of each that has some, in their order.
        waits_s: Seconds for which some wait before they begin.
        anew: Whether rounds begin anew at each edge server that a device comes to.
    """

    moves: Mapping[int, tuple[Move, ...]] = field(default_factory=dict)
    waits_s: Mapping[int, float] = field(default_factory=dict)
    anew: bool = False

    def followed(self, load: Workload, k: int, choice: Assignment, job: Job) -> Job:
        """Return what a device does if it goes its way."""
        if k in self.waits_s:
            job = dataclasses.replace(job, start_s=job.start_s + self.waits_s[k])
        if k not in self.moves:
            return job
        return moving_job(load, load.devices[k], choice, self.moves[k], job, anew=self.anew)


STILL: Final = Ways()
"""Nobody moves."""


@dataclass(frozen=True)
class VirtualRound:
    """A round on the virtual clock.

    Attributes:
        seconds: Until the last device has returned its part of the model.
        device_s: Seconds of each device.
        idle: Share of the time in which resources do nothing, mean by kind (`RESOURCES`).
        seen: What each device would have measured.
        timeline: The events that were played.
        paused_s: Seconds in which each device stood still because it moved, or was out of reach.
    """

    seconds: float
    device_s: tuple[float, ...]
    idle: dict[str, float]
    seen: tuple[Measured, ...]
    timeline: Timeline
    paused_s: tuple[float, ...] = ()


def virtual_round(
    load: Workload,
    choices: Sequence[Assignment],
    start_s: float = 0.0,
    *,
    most: int = MOST_TURNS,
    ways: Ways = STILL,
) -> VirtualRound:
    """Play a round.

    Args:
        load: What is trained.
        choices: How each device does it.
        start_s: When the round begins, in seconds of the traces of networks.
        most: Turns that are played; of a longer round, as many of the first iterations of each
            device as fit into it, the others taking the mean time of these.
        ways: Where devices go in the round.
    """
    whole = [
        ways.followed(load, k, choice, job_of(load, device, choice, start_s=start_s))
        for k, (device, choice) in enumerate(zip(load.devices, choices, strict=True))
    ]
    share = min(1.0, most / sum(_turns_of(job) for job in whole))
    jobs = [_shortened(job, share) for job in whole]
    workers = [edge.workers for edge in load.edges]
    timeline = play(jobs, workers)
    device_s = []
    paused = _paused(timeline, len(jobs))
    for k, (job, full) in enumerate(zip(jobs, whole, strict=True)):
        took = timeline.ends_s[k] - start_s
        fixed = ways.waits_s.get(k, 0.0) + paused[k] + _exchange(load, k, job)
        fixed = fixed if job.iterations < full.iterations else 0.0
        device_s.append(fixed + (took - fixed) * full.iterations / job.iterations)
    seen = _seen(load, jobs, timeline, paused)
    still = tuple(paused[k] + ways.waits_s.get(k, 0.0) for k in range(len(jobs)))
    idle = _idle(load, timeline)
    return VirtualRound(max(device_s), tuple(device_s), idle, seen, timeline, still)


def _turns_of(job: Job) -> int:
    return sum((stop - start) * len(leg.turns) for leg, start, stop in job.legs())


def _paused(timeline: Timeline, jobs: int) -> list[float]:
    """Return the seconds in which each device stood still because it moved."""
    seconds = [0.0] * jobs
    for move in timeline.moves:
        seconds[move.job] += move.pause_s
    return seconds


class VirtualClock:
    """Plays rounds, and those that are like an earlier one not again.

    Args:
        most: Turns that are played of a round, as in `virtual_round`.
    """

    _KEPT = 512

    def __init__(self, most: int = MOST_TURNS) -> None:
        self._most = most
        # With the load, whose machines are told apart by identity
        self._known: dict[tuple[object, ...], tuple[Workload, VirtualRound]] = {}

    def play(
        self, load: Workload, choices: Sequence[Assignment], start_s: float = 0.0
    ) -> VirtualRound:
        """Return the round with these choices, as `virtual_round` does."""
        key = *same_round(load, start_s), tuple(choices)
        if key not in self._known:
            if len(self._known) >= self._KEPT:
                del self._known[next(iter(self._known))]
            self._known[key] = load, virtual_round(load, choices, start_s, most=self._most)
        return self._known[key][1]


def same_round(load: Workload, start_s: float) -> tuple[object, ...]:
    """Return what is equal of two rounds that take the same time with the same choices.

    It holds as long as the machines of the workload, which are told apart by identity, are kept.
    """
    devices = tuple((id(d.costs), d.network, d.examples) for d in load.devices)
    changes = any(device.network.changes for device in load.devices)
    return devices, tuple(map(id, load.edges)), load.exchange, start_s if changes else 0.0


def _shortened(job: Job, share: float) -> Job:
    """Return a job with a share of its iterations, but for two at least."""
    count = max(min(2, job.iterations), int(share * job.iterations))
    if count == job.iterations:
        return job
    moves = tuple(
        dataclasses.replace(
            move,
            iteration=move.iteration * count // job.iterations,
            noticed=move.noticed if move.noticed < 0 else move.noticed * count // job.iterations,
            after=dataclasses.replace(move.after, iterations=count),
        )
        for move in job.moves
    )
    return dataclasses.replace(job, iterations=count, moves=moves)


def _idle(load: Workload, timeline: Timeline) -> dict[str, float]:
    """Return mean idle shares; a resource without events is idle all the time."""
    workers = [edge.workers for edge in load.edges]
    shares: dict[str, float] = dict.fromkeys(RESOURCES, 0.0)
    for resource, idle in timeline.idle(workers).items():
        shares[resource.partition(":")[0]] += 1.0 - idle
    counts = {kind: len(load.edges if kind == "edge" else load.devices) for kind in RESOURCES}
    return {kind: 1.0 - shares[kind] / counts[kind] for kind in RESOURCES}


def _seen(
    load: Workload, jobs: Sequence[Job], timeline: Timeline, paused: Sequence[float]
) -> tuple[Measured, ...]:
    busy = [dict.fromkeys(RESOURCES, 0.0) for _ in jobs]
    for event in timeline.events:
        if event.name != "load" and (event.kind, event.name) != ("edge", "update"):
            busy[event.job][event.kind] += event.end_s - event.start_s
    found = []
    for k, job in enumerate(jobs):
        legs = job.legs()
        turns = (
            turn
            for leg, start, stop in legs
            for i in range(start, stop)
            for turn in leg.turns_of(i)
        )
        sent = [turn.exchange for turn in turns if turn.exchange is not None]
        count = sum(stop - start for _, start, stop in legs)
        up = job.return_bytes + sum(exchange.up_bytes for exchange in sent)
        down = job.fetch_bytes + sum(exchange.down_bytes for exchange in sent)
        took = timeline.ends_s[k] - job.start_s
        found.append(
            Measured(
                max(0.0, took - paused[k] - _exchange(load, k, job)) / count,
                busy[k]["device"] / count,
                busy[k]["edge"] / count,
                busy[k]["up"] / (8 * up) if up else 0.0,
                busy[k]["down"] / (8 * down) if down else 0.0,
            )
        )
    return tuple(found)


def _exchange(load: Workload, k: int, job: Job) -> float:
    """Return the seconds in which a device receives and returns its part of the model."""
    if not job.fetch_bytes:
        return 0.0
    network = load.devices[k].network
    bits = 8 * job.fetch_bytes
    return bits / network.up_bits_s + bits / network.down_bits_s + 2 * network.latency_s


def predicted_iterations(load: Workload, choices: Sequence[Assignment]) -> list[list[float]]:
    """Return the seconds that each iteration of each device in a round is expected to take."""
    made = evaluate(load, choices)
    return iterations_of(load, made.iteration_s, made.rest_s)


def iterations_of(
    load: Workload, iteration_s: Sequence[float], rest_s: Sequence[float]
) -> list[list[float]]:
    """Return the seconds of each iteration of each device in a round.

    Args:
        load: What is trained.
        iteration_s: Seconds of one of full size, of each device.
        rest_s: Of the last one of an epoch.
    """
    counts = [len(mini_batches(device.examples, load.batch_size)) for device in load.devices]
    return [
        ([full] * (count - 1) + [rest]) * load.epochs
        for count, full, rest in zip(counts, iteration_s, rest_s, strict=True)
    ]
