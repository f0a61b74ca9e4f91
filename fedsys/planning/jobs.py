"""What a device does in a round, as the timeline plays it: turns, and what they send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedsys.transport.network import Network

NO_LIMIT: Final = Network()


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a device sends after a turn, and what comes back.

    Attributes:
        up_bytes: Bytes sent.
        edge_s: Seconds that the edge works on it.
        down_bytes: Bytes of the answer.
    """

    up_bytes: float
    edge_s: float
    down_bytes: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One operation of a device; it begins once the answer for its piece is there, if one is due.

    Attributes:
        name: Operation of the schedule.
        piece: Index of the micro-batch.
        device_s: Seconds on the device, CPU time of its messages included.
        exchange: What is sent afterwards; None for nothing.
    """

    name: str
    piece: int
    device_s: float
    exchange: Exchange | None = None


@dataclass(frozen=True, slots=True)
class LegChange:
    """A device goes on at another edge server, or waits until it reaches its own again.

    Attributes:
        iteration: Mini-batches that are done when it leaves.
        pause_s: Seconds in which it stands still.
        after: What it does from there on.
        anew: Whether its round begins anew there.
        noticed: Mini-batches that are done when its state begins to be sent ahead; -1: it is not.
        ahead_s: Seconds that this takes; what is left of it when the device leaves is waited for.
        bytes: Bytes that go between the edge servers in the pause.
    """

    iteration: int
    pause_s: float
    after: Job
    anew: bool = False
    noticed: int = -1
    ahead_s: float = 0.0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """What one device does in a round.

    Attributes:
        name: Name of the device.
        turns: One iteration, in the order of the device.
        network: Its connection.
        edge: Index of its edge server.
        device_update_s: Seconds of the optimizer step on the device.
        edge_update_s: On the edge, after the answer to the last piece.
        load_s: Seconds to load the next mini-batch: done while answers are awaited, the rest after.
        iterations: Number of mini-batches.
        start_s: When it begins, in seconds of the trace of the network.
        fetch_bytes: Bytes of the model that the device receives first.
        return_bytes: Bytes of the model that it sends at the end.
        rest_turns: The iteration that works on what is left of an epoch; empty for none.
        epoch: Iterations in an epoch; its last one is `rest_turns`.
        rest_load_s: As `load_s`, in that iteration.
        moves: What happens between iterations, in its order.
    """

    name: str
    turns: tuple[Turn, ...]
    network: Network = NO_LIMIT
    edge: int = 0
    device_update_s: float = 0.0
    edge_update_s: float = 0.0
    load_s: float = 0.0
    iterations: int = 1
    start_s: float = 0.0
    fetch_bytes: float = 0.0
    return_bytes: float = 0.0
    rest_turns: tuple[Turn, ...] = ()
    epoch: int = 0
    rest_load_s: float = 0.0
    moves: tuple[LegChange, ...] = ()

    def legs(self) -> list[tuple[Job, int, int]]:
        """Return what it does one after the other: as which job, and from which iteration to which.

        Where a round begins anew, so does the count.
        """
        made, job, at = [], self, 0
        for move in self.moves:
            stop = max(at, min(move.iteration, self.iterations))
            made.append((job, at, stop))
            job, at = move.after, 0 if move.anew else stop
        return [*made, (job, at, self.iterations)]

    def turns_of(self, iteration: int) -> tuple[Turn, ...]:
        """Return the turns of an iteration, counted from 0."""
        return self.rest_turns if self._is_rest(iteration) else self.turns

    def load_of(self, iteration: int) -> float:
        """Return the seconds of loading in an iteration, counted from 0."""
        return self.rest_load_s if self._is_rest(iteration) else self.load_s

    def _is_rest(self, iteration: int) -> bool:
        return bool(self.rest_turns and self.epoch and (iteration + 1) % self.epoch == 0)
