"""What is to be trained, and how one device may go about it: the records that planners work on.

A `Menu` says how long the five stages of an `Assignment` take for one micro-batch (letters as in
`fedsys.planning.contention`), `job_of` makes it a device of `fedsys.planning.timeline.play`. CPU
time of a message is charged to the machine that spends it: to the device in f and b, to the edge in
s.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import (
    Crossing,
    MachineCosts,
    answer_bytes,
    crossings,
    frame_bytes,
    state_bytes,
)
from fedsys.planning.jobs import Exchange, Job, Turn
from fedsys.training.schedule import micro_batch_bounds, operations
from fedsys.transport.network import Network

Array = NDArray[np.float64]

Written = Callable[[Crossing, int, str], int]
"""Bytes of a frame: of what crosses, for a number of examples, written by a codec."""

MOST_PIECES = 64


@dataclass(frozen=True, slots=True)
class EdgeLink:
    """Links between edge servers.

    Attributes:
        bits_s: Bits per second; infinite: no limit.
        latency_s: One way.
    """

    bits_s: float = math.inf
    latency_s: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """Return what a transfer takes until its last bit arrives."""
        return 8.0 * nbytes / self.bits_s + self.latency_s


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a plan.

    Attributes:
        name: For people.
        costs: What its machine takes.
        network: Its connection; planners use the rates without the trace.
        examples: Examples that it trains on.
    """

    name: str
    costs: MachineCosts
    network: Network = field(default_factory=Network)
    examples: int = 1


@dataclass(frozen=True)
class Workload:
    """What is trained, on which machines, and what may be chosen.

    Attributes:
        crossings: What leaves each unit; length L.
        state_bytes: Bytes of the parameters and buffers of each unit.
        cuts: Cuts below L that may be chosen; L always may, unless a planner is told otherwise.
        batch_size: Examples of a mini-batch.
        devices: Who trains.
        edges: Costs of each edge server.
        micro_batches: Numbers of pieces that may be chosen.
        codecs: Codecs that may be chosen.
        epochs: Passes over the examples of a device in a round.
        exchange: Whether devices receive and return their part of the model over their network in
            each round, so that the plan takes its time into account.
        schedule: Order of the pieces.
        depth: ``bounded``: pieces in flight at most.
        between: Links between edge servers, for devices that move.
        moments: Bytes of the optimizer's state for each byte of parameters; likewise.
        mirror: Whether sessions that were sent ahead have a shadow; likewise.
        norm_bytes: Bytes that device and edge send each other before a step, of norms by which
            gradients are clipped; 0: none.

    Raises:
        ConfigError: There is no device or edge, a machine is of another model, or a number of
            pieces is above the batch size.
    """

    crossings: tuple[Crossing, ...]
    state_bytes: tuple[int, ...]
    cuts: tuple[int, ...]
    batch_size: int
    devices: tuple[Device, ...]
    edges: tuple[MachineCosts, ...]
    micro_batches: tuple[int, ...] = (1,)
    codecs: tuple[str, ...] = ("fp32",)
    epochs: int = 1
    exchange: bool = True
    schedule: str = "pipelined"
    depth: int = 1
    between: EdgeLink = field(default_factory=EdgeLink)
    moments: float = 0.0
    mirror: bool = False
    norm_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not self.devices or not self.edges:
            raise ConfigError.of("fleet", "empty", "must have a device and an edge server")
        for machine in (*(d.costs for d in self.devices), *self.edges):
            if len(machine) != len(self.crossings):
                raise ConfigError.of(
                    machine.name, len(machine),
                    f"must have costs for the {len(self.crossings)} units of the model",
                )  # fmt: skip
        for count in self.micro_batches:
            if not 1 <= count <= self.batch_size:
                raise ConfigError.of(
                    "schedule.micro_batches", count,
                    f"must be from 1 to client.batch_size={self.batch_size}",
                )  # fmt: skip

    @property
    def units(self) -> int:
        """Number of units, L."""
        return len(self.crossings)

    @property
    def in_flight(self) -> int | None:
        """Pieces that a device has in flight at most; None: all of a mini-batch."""
        return {"pipelined": None, "sequential": 1}.get(self.schedule, self.depth)

    def at_round(self, number: int) -> Workload:
        """Return the workload with the networks of a round, from 1, where these go by rounds."""
        devices = tuple(
            dataclasses.replace(device, network=device.network.at(number - 1))
            if device.network.by_rounds
            else device
            for device in self.devices
        )
        return dataclasses.replace(self, devices=devices)

    def norms_s(self, device: Device) -> float:
        """Return how long a device that is split waits for norms before a step; 0 for none."""
        if not self.norm_bytes:
            return 0.0
        link, bits = device.network, 8.0 * self.norm_bytes
        told = bits / link.up_bits_s + bits / link.down_bits_s + 2 * link.latency_s
        return told + 2 * device.costs.messaging.message_s

    def iterations(self, device: Device) -> int:
        """Return the optimizer steps of a device in a round."""
        return self.epochs * len(mini_batches(device.examples, self.batch_size))

    def exchange_s(self) -> Array:
        """Return the seconds in which devices receive and return their part of the model.

        Returns:
            Seconds, ``(K, L + 1)``: of each device at each cut.
        """
        if not self.exchange:
            return np.zeros((len(self.devices), self.units + 1))
        bits = 8.0 * np.concatenate([[0.0], np.cumsum(self.state_bytes)])
        links = [device.network for device in self.devices]
        per_bit = np.array([1 / link.up_bits_s + 1 / link.down_bits_s for link in links])
        latency = np.array([[2 * link.latency_s] for link in links])
        seconds: Array = per_bit[:, None] * bits + latency
        return seconds


def workload(
    layers: LayeredModel,
    devices: Sequence[Device],
    edges: Sequence[MachineCosts],
    batch_size: int,
    *,
    micro_batches: Sequence[int] | None = None,
    codecs: Sequence[str] = ("fp32",),
    epochs: int = 1,
    exchange: bool = True,
) -> Workload:
    """Return the workload of a model.

    Args:
        layers: The model.
        devices: Who trains.
        edges: The edge servers.
        batch_size: Examples of a mini-batch.
        micro_batches: Numbers of pieces that may be chosen; None for `counts`.
        codecs: Codecs that may be chosen.
        epochs: Passes over the examples in a round.
        exchange: As in `Workload`.
    """
    return Workload(
        crossings(layers),
        state_bytes(layers),
        layers.cuts,
        batch_size,
        tuple(devices),
        tuple(edges),
        counts(batch_size) if micro_batches is None else tuple(micro_batches),
        tuple(codecs),
        epochs,
        exchange,
    )


def mini_batches(examples: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's mini-batches; a last one of one example joins its neighbour.

    >>> mini_batches(10, 4), mini_batches(9, 4)
    ([4, 4, 2], [4, 5])
    """
    whole, rest = divmod(examples, batch_size)
    if rest == 1 and whole:
        return [batch_size] * (whole - 1) + [batch_size + 1]
    return [batch_size] * whole + ([rest] if rest else [])


def counts(batch_size: int) -> tuple[int, ...]:
    """Return the numbers of micro-batches that are worth a thought.

    They divide the batch, or leave pieces of four examples or more, so that these are nearly of one
    size. None has fewer than two examples, of which BatchNorm could make nothing.

    >>> counts(100)
    (1, 2, 4, 5, 10, 20, 25, 50)
    >>> counts(7)
    (1,)
    """
    most = max(1, min(batch_size // 2, MOST_PIECES))
    divisors = [m for m in range(1, most + 1) if batch_size % m == 0]
    if len(divisors) < 4:
        divisors += [m for m in (2, 3, 4, 6, 8, 12, 16, 24, 32) if batch_size // m >= 4]
    return tuple(sorted({m for m in divisors if m <= most}))


# --------------------------------------------------------------------------------------------------
# Times


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one micro-batch in each stage, and of one mini-batch beside them.

    Arrays have one shape, an entry for each setting. A setting without an edge has zeros in the
    stages `up`, `edge` and `down`.

    Attributes:
        forward: On the device, with the CPU time of sending.
        up: On the uplink.
        edge: Forward and backward on the edge, with its messages.
        down: On the downlink.
        backward: On the device, with the CPU time of receiving.
        pieces: Number of micro-batches.
        device_update: Optimizer step of the device.
        edge_update: Optimizer step of the edge.
        load: Loading of the next mini-batch.
        latency: One way.
        offloaded: Whether there is an edge.
    """

    forward: Array
    up: Array
    edge: Array
    down: Array
    backward: Array
    pieces: Array
    device_update: Array
    edge_update: Array
    load: Array
    latency: Array
    offloaded: NDArray[np.bool_]


class Menu:
    """Some choices, with all of their costs that do not depend on the device.

    Args:
        load: What is trained.
        choices: The choices.
    """

    def __init__(self, load: Workload, choices: Sequence[Assignment]) -> None:
        self.load, self.choices = load, tuple(choices)
        self.cut = np.array([choice.cut for choice in choices])
        self.edge = np.array([choice.edge for choice in choices])
        self._wanted = np.array([float(choice.pieces) for choice in choices])
        self._codecs = sorted({codec for choice in choices for codec in choice.codecs})
        index = {codec: i for i, codec in enumerate(self._codecs)}
        self._up_codec, self._down_codec = (
            np.array([index[choice.codecs[way]] for choice in choices]) for way in (0, 1)
        )
        self._price(np.full(len(choices), float(load.batch_size)))

    def resized(self, sizes: Sequence[int]) -> Menu:
        """Return all choices for mini-batches of each of these sizes, one size after the other."""
        made = copy.copy(self)
        made.choices = self.choices * len(sizes)
        for name in ("cut", "edge", "_wanted", "_up_codec", "_down_codec"):
            setattr(made, name, np.tile(getattr(self, name), len(sizes)))
        made._price(np.repeat(np.array(sizes, dtype=float), len(self.cut)))
        return made

    def _price(self, batch: Array) -> None:
        self._batch = batch
        self.pieces = np.minimum(self._wanted, batch)
        self.offloaded = self.cut < self.load.units
        self._sizes, self._size = np.unique(batch / self.pieces, return_inverse=True)
        rows = self._sizes[self._size]
        more = np.array([0, *(crossing.more for crossing in self.load.crossings)])
        along = np.where(self.offloaded, more[self.cut] * rows, 0.0)
        self._up_bytes = self._frame_bytes(self._up_codec, rows) + along
        self._down_bytes = self._frame_bytes(self._down_codec, rows, answer_bytes)
        self._edge_s, self._edge_update_s = np.zeros(len(batch)), np.zeros(len(batch))
        for index in np.unique(self.edge[self.offloaded]):
            self._cost_edge(int(index))

    def _frame_bytes(
        self, codecs: NDArray[np.int64], rows: Array, written: Written = frame_bytes
    ) -> Array:
        """Return the bytes of a frame of each choice without labels."""
        found = np.zeros(len(rows))
        for index, codec in enumerate(self._codecs):
            mine = self.offloaded & (codecs == index)
            slope, fixed = _frame_table(self.load, codec, written)
            at = self.cut[mine] - 1
            found[mine] = slope[at] * rows[mine] + fixed[at]
        return found

    def _cost_edge(self, index: int) -> None:
        costs = self.load.edges[index]
        mine = self.offloaded & (self.edge == index)
        forward, backward = costs.done_after(self._sizes)
        both = (forward[:, -1:] - forward) + (backward[:, -1:] - backward)
        message_s = costs.messaging.message_s
        up_s, down_s = self._message_bytes_s(costs)
        seconds = both[self._size, self.cut] + 2 * (costs.operation_s + message_s)
        seconds += up_s + down_s
        self._edge_s[mine] = seconds[mine]
        self._edge_update_s[mine] = _after(costs.update_s)[self.cut[mine]]

    def _message_bytes_s(self, costs: MachineCosts) -> tuple[Array, Array]:
        """Return the CPU seconds that a machine spends on the bytes of a message, up and down."""
        by_codec = np.array([costs.messaging.byte_s.get(codec, 0.0) for codec in self._codecs])
        return (
            self._up_bytes * by_codec[self._up_codec],
            self._down_bytes * by_codec[self._down_codec],
        )

    def stages(self, device: Device) -> StageTimes:
        """Return the stages of a device; one entry for each choice."""
        costs, network = device.costs, device.network
        forward, backward = (t[self._size, self.cut] for t in costs.done_after(self._sizes))
        message_s = np.where(self.offloaded, costs.messaging.message_s, 0.0)
        up_s, down_s = self._message_bytes_s(costs)
        fixed = np.where(self.cut > 0, costs.operation_s, 0.0)
        after = _after(costs.update_s)
        norms_s = np.where(self.offloaded, self.load.norms_s(device), 0.0)
        released = np.array([0.0, *(costs.release_s or (0.0,) * self.load.units)])[self.cut]
        released = np.where(self.offloaded, released * self._sizes[self._size], 0.0)
        return StageTimes(
            forward=forward + fixed + message_s + up_s + released,
            up=8.0 * self._up_bytes / network.up_bits_s,
            edge=self._edge_s,
            down=8.0 * self._down_bytes / network.down_bits_s,
            backward=backward + fixed + message_s + down_s,
            pieces=self.pieces,
            device_update=after[0] - after[self.cut] + norms_s,
            edge_update=self._edge_update_s,
            load=costs.load_s * self._batch,
            latency=np.where(self.offloaded, network.latency_s, 0.0),
            offloaded=self.offloaded,
        )


def _after(values: Sequence[float]) -> Array:
    """Return at index c the sum of ``values[c:]``."""
    return np.concatenate([np.cumsum(np.array(values)[::-1])[::-1], [0.0]])


def _frame_table(load: Workload, codec: str, written: Written) -> tuple[Array, Array]:
    """Return the bytes of a frame without labels at each cut: for each example, and fixed."""
    many = np.array([written(c, 1000, codec) for c in load.crossings], dtype=float)
    more = np.array([written(c, 2000, codec) for c in load.crossings], dtype=float)
    slope = (more - many) / 1000
    return slope, many - 1000 * slope


def job_of(
    load: Workload, device: Device, choice: Assignment, *, name: str = "", start_s: float = 0.0,
    iterations: int | None = None,
) -> Job:  # fmt: skip
    """Return what a device does in a round, as the simulator plays it.

    Args:
        load: What is trained.
        device: The device.
        choice: How it trains.
        name: Its name among the jobs; by default its own.
        start_s: When it begins, in seconds of the trace of its network.
        iterations: Mini-batches of full size instead of those of a round.
    """
    sizes = mini_batches(device.examples, load.batch_size)
    rest = sizes[-1]
    full = iterations is not None or rest == load.batch_size
    whole = 0.0 if not load.exchange else float(sum(load.state_bytes[: choice.cut]))
    last = load.units
    edge = load.edges[choice.edge] if choice.cut < last else None
    return Job(
        name or device.name,
        _turns(load, device, choice, load.batch_size),
        device.network,
        choice.edge,
        float(sum(device.costs.update_s[: choice.cut])) + (edge is not None) * load.norms_s(device),
        0.0 if edge is None else float(sum(edge.update_s[choice.cut :])),
        device.costs.load_s * load.batch_size,
        iterations or load.iterations(device),
        start_s,
        whole,
        whole,
        () if full else _turns(load, device, choice, rest),
        len(sizes),
        0.0 if full else device.costs.load_s * rest,
    )


def _turns(load: Workload, device: Device, choice: Assignment, size: int) -> tuple[Turn, ...]:
    sizes = [stop - start for start, stop in micro_batch_bounds(size, choice.pieces)]
    if choice.cut == load.units:
        seconds = [device.costs.seconds(n, 0, choice.cut) for n in sizes]
        return tuple(
            Turn(name, piece, both[index])
            for piece, both in enumerate(seconds)
            for index, name in enumerate(("forward", "backward"))
        )
    own, there = device.costs.messaging, load.edges[choice.edge].messaging
    crossing, (codec, back) = load.crossings[choice.cut - 1], choice.codecs
    turns = []
    for name, piece in operations(load.schedule, len(sizes), load.depth, tail=False):
        n = sizes[piece]
        up = frame_bytes(crossing, n, codec, labels=True)
        down = answer_bytes(crossing, n, back)
        forward, backward = device.costs.seconds(n, 0, choice.cut)
        if name == "forward":
            edge_s = sum(load.edges[choice.edge].seconds(n, choice.cut))
            edge_s += there.seconds(up, codec) + there.seconds(down, back)
            exchange = Exchange(up, edge_s, down)
            forward += device.costs.release_seconds(n, choice.cut)
            turns.append(Turn(name, piece, forward + own.seconds(up, codec), exchange))
        else:
            turns.append(Turn(name, piece, backward + own.seconds(down, back)))
    return tuple(turns)
