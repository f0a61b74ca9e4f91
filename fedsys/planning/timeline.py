"""A round as events on resources: device compute, uplink, edge compute, downlink.

A device works through its turns in the order of a schedule (`fedsys.training.schedule`). What it
sends takes its place in the queue of its uplink, then waits for a worker of its edge server, in
order of arrival; the answer takes its place in the queue of the downlink. Links are those of
`fedsys.transport.shaping`: a lane with one server, the rate of the moment, then the latency.

For one device and constant rates the recurrences of `fedsys.planning.contention` give the same
times.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedsys.errors import ConfigError
from fedsys.planning.jobs import Job, LegChange, Turn
from fedsys.planning.resources import Event
from fedsys.transport.network import Rate, finish_time


@dataclass(frozen=True, slots=True)
class PlayedMove:
    """A pause in which a device went from one edge server to another.

    Attributes:
        job: Index of the device.
        iteration: Mini-batches that were done when it left.
        source: Index of the edge server that it left.
        target: Of the one where it went on; its own, if it was out of reach for a while.
        start_s: When the pause began.
        end_s: When it ended.
        anew: Whether its round began anew.
        bytes: Bytes that went between the edge servers meanwhile.
    """

    job: int
    iteration: int
    source: int
    target: int
    start_s: float
    end_s: float
    anew: bool = False
    bytes: int = 0

    @property
    def pause_s(self) -> float:
        """Seconds in which the device stood still."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """The events of a round, and when each device has finished.

    Attributes:
        events: In the order in which they were decided.
        ends_s: For each job, when its device and its session have both finished.
        start_s: When the first job began.
        moves: Pauses of devices that went to other edge servers.
    """

    events: tuple[Event, ...]
    ends_s: tuple[float, ...]
    start_s: float = 0.0
    moves: tuple[PlayedMove, ...] = ()

    @property
    def seconds(self) -> float:
        """Time from the first start to the last end."""
        return max(self.ends_s, default=self.start_s) - self.start_s

    def busy(self) -> dict[str, float]:
        """Return the busy seconds of each resource; of an edge, added over its workers."""
        sums: dict[str, float] = {}
        for event in self.events:
            sums[event.resource] = sums.get(event.resource, 0.0) + event.end_s - event.start_s
        return sums

    def idle(self, workers: Sequence[int] = ()) -> dict[str, float]:
        """Return the share of the round, 0 to 1, in which each resource does nothing.

        Args:
            workers: Workers of each edge; 1 where not given.
        """
        shares = {}
        for resource, busy in self.busy().items():
            kind, _, name = resource.partition(":")
            count = workers[int(name)] if kind == "edge" and int(name) < len(workers) else 1
            whole = self.seconds * count
            shares[resource] = max(0.0, 1.0 - busy / whole) if whole else 0.0
        return shares

    def critical_path(self) -> tuple[Event, ...]:
        """Return the chain of events that decided the end, first one first.

        Between an event on a link and the next one may lie the latency, and between two of a device
        the pause of a move.
        """
        if not self.events:
            return ()
        at: int | None = max(range(len(self.events)), key=lambda i: (self.events[i].end_s, i))
        path = []
        while at is not None:
            path.append(self.events[at])
            at = self.events[at].cause
        return tuple(reversed(path))


# --------------------------------------------------------------------------------------------------
# The simulator


def play(jobs: Sequence[Job], workers: Sequence[int] = ()) -> Timeline:
    """Play the round of some devices.

    Ties are decided by the index of the job, so the same jobs always give the same events.

    Args:
        jobs: The devices.
        workers: Sessions that each edge computes at the same time; 1 where not given.

    Raises:
        ConfigError: A name occurs twice, or a job has no iteration or an edge below 0.
    """
    if len({job.name for job in jobs}) != len(jobs):
        raise ConfigError.of("jobs", [job.name for job in jobs], "must have different names")
    for job in jobs:
        if job.iterations < 1 or job.edge < 0 or not 0 <= job.start_s < math.inf:
            raise ConfigError.of(
                f"jobs.{job.name}", (job.iterations, job.edge, job.start_s),
                "must have an iteration, an edge, and a start, none negative",
            )  # fmt: skip
    return _Simulation(jobs, workers).run()


@dataclass
class _Lane:
    """One direction of a network: free from a moment on, because of an event."""

    resource: str
    rate: Rate
    free_s: float
    cause: int | None = None


@dataclass
class _Run:
    """How far a device has come."""

    job: Job
    index: int
    up: _Lane
    down: _Lane
    last_of: Mapping[int, int]  # by number of turns: the last one that sends; -1 for none
    free_s: float
    cause: int | None = None
    turn: int = 0
    iteration: int = 0
    load_left_s: float = 0.0
    due: set[int] = field(default_factory=set)
    answers: dict[int, tuple[float, int]] = field(default_factory=dict)
    session_cause: int | None = None
    session_busy: bool = False
    session_free_s: float = 0.0
    moves: list[LegChange] = field(default_factory=list)
    noticed_s: dict[int, float] = field(default_factory=dict)
    end_s: float = 0.0


@dataclass
class _Edge:
    """Workers that are free, and what waits, in order of arrival."""

    free: list[int | None]
    waiting: list[tuple[float, int, int, int, int]] = field(default_factory=list)


class _Simulation:
    def __init__(self, jobs: Sequence[Job], workers: Sequence[int]) -> None:
        self._events: list[Event] = []
        self._moves: list[PlayedMove] = []
        self._heap: list[tuple[float, int, int, int, tuple[int, ...]]] = []
        self._sequence = 0
        self._runs = [_started(job, index) for index, job in enumerate(jobs)]
        self._edges: Mapping[int, _Edge] = {
            e: _Edge([None] * (workers[e] if e < len(workers) else 1))
            for e in {leg.edge for job in jobs for leg, _, _ in job.legs()}
        }

    def run(self) -> Timeline:
        for run in self._runs:
            if run.job.fetch_bytes:
                lane = run.down
                event = self._transfer(run, lane, "fetch", -1, run.free_s, None, True)
                run.free_s, run.cause = lane.free_s + run.job.network.latency_s, event
            self._advance(run)
        while self._heap:
            now = self._heap[0][0]
            while self._heap and self._heap[0][0] == now:
                _, kind, job, _, data = heapq.heappop(self._heap)
                run = self._runs[job]
                edge = self._edges[run.job.edge]
                if kind == 0:
                    self._served(run, edge, now, *data)
                else:
                    edge.waiting.append((now, job, *data))  # type: ignore[arg-type]  # turn, iteration, cause
            # What ends at one moment is free before any of it is taken again
            for edge in self._edges.values():
                self._dispatch(edge, now)
        start = min((run.job.start_s for run in self._runs), default=0.0)
        ends = tuple(run.end_s for run in self._runs)
        return Timeline(tuple(self._events), ends, start, tuple(self._moves))

    def _add(self, run: _Run, resource: str, name: str, iteration: int, piece: int,
             start_s: float, end_s: float, cause: int | None) -> int:  # fmt: skip
        self._events.append(
            Event(resource, name, iteration, piece, start_s, end_s, run.index, cause)
        )
        run.end_s = max(run.end_s, end_s)
        return len(self._events) - 1

    def _push(self, at: float, kind: int, job: int, data: tuple[int, ...]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at, kind, job, self._sequence, data))

    def _transfer(self, run: _Run, lane: _Lane, name: str, piece: int, ready_s: float,
                  cause: int | None, model: bool = False, iteration: int = 0,
                  nbytes: float = 0.0) -> int:  # fmt: skip
        if model:
            nbytes = run.job.fetch_bytes if name == "fetch" else run.job.return_bytes
        start = max(ready_s, lane.free_s)
        why = lane.cause if lane.free_s > ready_s else cause
        lane.free_s = finish_time(start, nbytes, lane.rate)
        lane.cause = self._add(run, lane.resource, name, iteration, piece, start, lane.free_s, why)
        return lane.cause

    # --- the device -------------------------------------------------------------------------------

    def _advance(self, run: _Run) -> None:
        """Let the device do all turns that do not wait for an answer that is not yet known."""
        device = f"device:{run.job.name}"
        while True:
            if run.moves and self._stands(run):
                return
            if run.iteration >= run.job.iterations:
                break
            turns = run.job.turns_of(run.iteration)
            if run.turn == len(turns):
                self._finish_iteration(run, device)
                continue
            turn = turns[run.turn]
            start, cause = run.free_s, run.cause
            if turn.piece in run.due:
                if turn.piece not in run.answers:
                    return
                run.due.discard(turn.piece)
                arrived, event = run.answers.pop(turn.piece)
                self._load(run, device, arrived)
                if arrived > start:
                    start, cause = arrived, event
            end = start + turn.device_s
            run.cause = self._add(
                run, device, turn.name, run.iteration, turn.piece, start, end, cause
            )
            run.free_s = end
            if turn.exchange is not None:
                sent = self._transfer(
                    run, run.up, "up", turn.piece, end, run.cause,
                    iteration=run.iteration, nbytes=turn.exchange.up_bytes,
                )  # fmt: skip
                run.due.add(turn.piece)
                arrival = run.up.free_s + run.job.network.latency_s
                self._push(arrival, 1, run.index, (run.turn, run.iteration, sent))
            run.turn += 1
        if run.turn == 0 and run.job.return_bytes and run.iteration == run.job.iterations:
            self._transfer(run, run.up, "return", -1, run.free_s, run.cause, True, run.iteration)
            run.end_s = max(run.end_s, run.up.free_s + run.job.network.latency_s)
            run.iteration += 1

    def _stands(self, run: _Run) -> bool:
        """Do the moves that are due; return whether one waits until the session stands still."""
        while run.moves and run.turn == 0:
            move = run.moves[0]
            if move.noticed == run.iteration:  # its state begins to go ahead
                run.noticed_s.setdefault(id(move), run.free_s)
            if move.iteration > run.iteration:
                return False
            if run.session_busy:
                return True
            self._move(run)
        return False

    def _move(self, run: _Run) -> None:
        """Let a device stand still, and go on at another edge server."""
        move = run.moves.pop(0)
        start = max(run.free_s, run.session_free_s)
        ahead = run.noticed_s.get(id(move), -math.inf) + move.ahead_s
        end = max(start, ahead) + move.pause_s
        source, target = run.job.edge, move.after.edge
        self._moves.append(
            PlayedMove(run.index, run.iteration, source, target, start, end, move.anew, move.bytes)
        )
        run.job, run.free_s, run.session_free_s = move.after, end, end
        run.last_of = {len(turns): _last_sending(turns) for turns in _both(run.job)}
        run.iteration = 0 if move.anew else run.iteration
        run.load_left_s = run.job.load_of(run.iteration) if move.anew else run.load_left_s
        run.end_s = max(run.end_s, end)

    def _load(self, run: _Run, device: str, until_s: float) -> None:
        """Load while an answer is awaited."""
        seconds = min(run.load_left_s, until_s - run.free_s)
        if seconds > 0:
            run.load_left_s -= seconds
            end = run.free_s + seconds
            self._add(run, device, "load", run.iteration, -1, run.free_s, end, run.cause)

    def _finish_iteration(self, run: _Run, device: str) -> None:
        for name, seconds in (("load", run.load_left_s), ("update", run.job.device_update_s)):
            if seconds > 0:
                end = run.free_s + seconds
                run.cause = self._add(
                    run, device, name, run.iteration, -1, run.free_s, end, run.cause
                )
                run.free_s = end
        run.iteration += 1
        run.turn, run.load_left_s = 0, run.job.load_of(run.iteration)

    # --- the edge ---------------------------------------------------------------------------------

    def _dispatch(self, edge: _Edge, now: float) -> None:
        """Start what arrived first among that whose session is not in work."""
        position = 0
        while edge.free and position < len(edge.waiting):
            arrived, job, turn_index, iteration, sent = edge.waiting[position]
            run = self._runs[job]
            if run.session_busy:
                position += 1
                continue
            del edge.waiting[position]
            worker = edge.free.pop(0)
            cause: int | None = sent
            if now > arrived:  # it waited: for its session or for a worker, whichever came last
                ends = [c for c in (run.session_cause, worker) if c is not None]
                cause = max(ends, key=lambda c: self._events[c].end_s, default=sent)
            turn = run.job.turns_of(iteration)[turn_index]
            assert turn.exchange is not None
            end = now + turn.exchange.edge_s
            event = self._add(
                run, f"edge:{run.job.edge}", turn.name, iteration, turn.piece, now, end, cause
            )
            run.session_busy = True
            self._push(end, 0, job, (turn_index, iteration, event))

    def _served(
        self, run: _Run, edge: _Edge, now: float, turn_index: int, iteration: int, event: int
    ) -> None:
        """Send the answer; after the last one of a mini-batch the session steps."""
        if turn_index >= 0:
            turn = run.job.turns_of(iteration)[turn_index]
            assert turn.exchange is not None
            down = self._transfer(
                run, run.down, "down", turn.piece, now, event,
                iteration=iteration, nbytes=turn.exchange.down_bytes,
            )  # fmt: skip
            run.answers[turn.piece] = (run.down.free_s + run.job.network.latency_s, down)
            self._advance(run)
            if turn_index == run.last_of[len(run.job.turns_of(iteration))] and (
                run.job.edge_update_s > 0
            ):
                end = now + run.job.edge_update_s
                update = self._add(
                    run, f"edge:{run.job.edge}", "update", iteration, -1, now, end, event
                )
                self._push(end, 0, run.index, (-1, iteration, update))
                return
        run.session_busy, run.session_cause, run.session_free_s = False, event, now
        edge.free.append(event)
        if run.moves:  # it may have waited for its session
            self._advance(run)


def _started(job: Job, index: int) -> _Run:
    return _Run(
        job,
        index,
        _Lane(f"up:{job.name}", job.network.up, job.start_s),
        _Lane(f"down:{job.name}", job.network.down, job.start_s),
        {len(turns): _last_sending(turns) for turns in _both(job)},
        free_s=job.start_s,
        load_left_s=job.load_of(0),
        moves=list(job.moves),
        end_s=job.start_s,
    )


def _both(job: Job) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    return job.rest_turns, job.turns


def _last_sending(turns: tuple[Turn, ...]) -> int:
    """Return the index of the last turn that sends something; -1 for none."""
    return max((i for i, turn in enumerate(turns) if turn.exchange is not None), default=-1)
