"""The rounds of a run: configure, train, aggregate, evaluate.

Flower's own `Strategy.start` does the same from round 1, without telling anyone where the time
went. This loop times every part, judges each round on data of the server's own, and hands every
round to whoever wants to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsys.errors import ConfigError
from fedsys.faults import Fault, Faults, encode, from_json
from fedsys.privacy.budget import BudgetSpent
from fedsys.training.plain import Score
from fedsys.transport import records
from fedsys.transport.messages import FAULTS, STRUCK
from strategies.around import innermost
from strategies.one_by_one import KeepsOrder, OneByOne, RoundTally
from strategies.roster import Roster
from strategies.sampling import Sampled

Row = dict[str, Any]


@dataclass
class Stopwatch:
    """Seconds by name of what took them; `lap` ends one part and begins the next."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self.last
        self.last = now

    def total(self) -> float:
        """Return the seconds since the watch was started."""
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class RoundResult:
    """One finished round.

    Attributes:
        number: The round, from 1.
        arrays: The new global model.
        row: What goes into ``metrics.csv``.
        lost: Why a client that was asked did not contribute, by partition id.
    """

    number: int
    arrays: ArrayRecord
    row: Row
    lost: Mapping[int, str]


def play(
    strategy: Sampled,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    first: int,
    last: int,
    timeout_s: float,
    judge: Callable[[ArrayRecord], Score],
    metric: str = "accuracy",
    done: Callable[[RoundResult], None],
    elapsed_s: float = 0.0,
    faults: Faults | None = None,
    timed: Callable[[Sequence[int], Mapping[int, float]], Row] | None = None,
    began: Callable[[int, Sequence[int]], None] = lambda number, clients: None,
    stopped: Callable[[str], None] = lambda reason: None,
    adding: OneByOne | None = None,
) -> ArrayRecord:
    """Play rounds `first` to `last` and return the global model after them.

    Args:
        strategy: Chooses clients and aggregates.
        grid: Reaches the clients.
        arrays: The global model before round `first`.
        first: First round, from 1.
        last: Last round.
        timeout_s: Longest time for one phase, in seconds.
        judge: Scores a model on the validation part.
        metric: Name of what it tells beside the loss.
        done: Called after each round.
        elapsed_s: Seconds that the rounds before `first` took.
        faults: What is to strike; None for nothing.
        timed: Given the clients of a round, and what an iteration took those that measured it,
            returns columns about its time.
        began: Called in each round, with its clients, when it is settled what they are to do.
        stopped: Told why there are no more rounds, where the privacy budget allows none.
        adding: Adds replies up as they arrive; None: when all are there.

    Raises:
        ConfigError: The strategy makes no model although every client answered.
    """
    faults = faults or Faults()
    start = time.perf_counter() - elapsed_s
    for number in range(first, last + 1):
        watch = Stopwatch()
        try:
            trained = _train(
                strategy, grid, arrays, number, timeout_s, faults, watch, began, adding
            )
        except BudgetSpent as spent:
            stopped(str(spent))
            break
        arrays = arrays if trained.arrays is None else trained.arrays
        score = judge(arrays)
        federated = _federated_evaluation(strategy, grid, number, arrays, timeout_s)
        watch.lap("evaluate")
        row: Row = {
            "round": number,
            f"val_{metric}": score.accuracy,
            "val_loss": score.loss,
            **_plain(trained.metrics),
            **{f"clients_{name}": value for name, value in federated.items()},
            "clients": len(trained.clients),
            "examples": trained.tally.examples,
            "steps": trained.tally.steps,
            "seconds_round": watch.total(),
            "seconds_elapsed": time.perf_counter() - start,
            **watch.seconds,
            **({} if timed is None else timed(sorted(trained.clients), trained.tally.took)),
            "bytes_down": trained.bytes_down,
            "bytes_up": trained.tally.bytes_up,
        }
        done(RoundResult(number, arrays, row, trained.lost))
    return arrays


@dataclass(frozen=True)
class _Trained:
    """What came of the first phase of a round.

    `clients` are those that contributed.
    """

    arrays: ArrayRecord | None
    metrics: MetricRecord | None
    clients: set[int]
    lost: Mapping[int, str]
    bytes_down: int
    tally: RoundTally


def _train(
    strategy: Sampled,
    grid: Grid,
    arrays: ArrayRecord,
    number: int,
    timeout_s: float,
    faults: Faults,
    watch: Stopwatch,
    began: Callable[[int, Sequence[int]], None],
    adding: OneByOne | None,
) -> _Trained:
    faults.kill_server(number, "before_train")
    messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
    doomed = faults.of_round("device", number)
    arm(messages, doomed + faults.of_round("link", number), strategy.roster)
    watch.lap("configure")
    began(number, sorted(_clients(messages, strategy.roster)))
    sizes = {id(m.content): records.size_of(m.content) for m in _distinct(messages)}
    bytes_down = sum(sizes[id(m.content)] for m in messages)
    if adding is not None and isinstance(grid, KeepsOrder):
        aggregate, metrics, tally = adding.aggregate(number, grid, messages, timeout_s)
        watch.lap("train")
    else:
        replies = list(grid.send_and_receive(messages, timeout=timeout_s))
        watch.lap("train")
        note_struck(replies, faults)
        faults.kill_server(number, "after_train")
        tally = RoundTally(strategy.roster)
        aggregate, metrics = strategy.aggregate_train(number, list(tally.of(replies)))
    lost = dict(strategy.lost)
    if aggregate is None and not lost:  # and so it would be in every round
        raise ConfigError.of(
            "strategy",
            type(innermost(strategy)).__name__,
            f"needs more than the {len(messages)} replies of round {number} to make a model",
            "raise strategy.fraction_train or num_clients",
        )
    for fault in doomed:
        if fault.who in lost:
            faults.fire(fault)
    watch.lap("aggregate")
    clients = _clients(messages, strategy.roster) - set(lost)
    return _Trained(aggregate, metrics, clients, lost, bytes_down, tally)


def arm(messages: Iterable[Message], doomed: Iterable[Fault], roster: Roster) -> None:
    """Add to the message of each device what strikes it; the other messages stay as they are."""
    by_client: dict[object, list[Fault]] = {}
    for fault in doomed:
        by_client.setdefault(fault.who, []).append(fault)
    for message in messages if by_client else ():
        own = by_client.get(roster.partition_of(message.metadata.dst_node_id))
        if own:
            message.content = records.own_copy(message.content)
            message.content[FAULTS] = ConfigRecord(dict(encode(own)))


def note_struck(replies: Iterable[Message], faults: Faults) -> None:
    """Take what has struck out of the replies of devices that survived it."""
    for reply in replies:
        if reply.has_content() and FAULTS in reply.content:
            struck = from_json(str(reply.content.config_records[FAULTS][STRUCK]))
            del reply.content[FAULTS]
            for fault in struck:
                faults.fire(fault)


def _federated_evaluation(
    strategy: Sampled, grid: Grid, number: int, arrays: ArrayRecord, timeout_s: float
) -> Mapping[str, Any]:
    messages = list(strategy.configure_evaluate(number, arrays, ConfigRecord(), grid))
    if not messages:
        return {}
    replies = grid.send_and_receive(messages, timeout=timeout_s)
    return _plain(strategy.aggregate_evaluate(number, replies))


def _distinct(messages: Iterable[Message]) -> Iterable[Message]:
    """Return messages of which no two have the same content."""
    return {id(message.content): message for message in messages}.values()


def _plain(metrics: MetricRecord | None) -> dict[str, Any]:
    return {} if metrics is None else dict(metrics)


def _clients(messages: Iterable[Message], roster: Roster) -> set[int]:
    return {roster.partition_of(message.metadata.dst_node_id) for message in messages}
