"""Offloading policies: who decides at which cut, on which edge, each device trains in a round.

A policy is two pure functions over small records: `init` gives a state, `plan` takes it with what
was seen in the last round and gives the next state and one assignment for each device. Measuring
and sending happen in `strategies.offload`. A complete policy::

    class HalfAndHalf:
        def init(self, layers, nodes):
            return None

        def plan(self, state, seen):
            return state, {node: Assignment(cut=3, edge=0) for node in seen}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsys.models.layered import LayeredModel

OBSERVATION = "observation"
"""Name of the record in which a device tells what it measured."""

PolicyState = Any
"""Whatever a policy wants to remember, of plain values: it is kept in checkpoints."""


@dataclass(frozen=True)
class Assignment:
    """What one device does in a round.

    Attributes:
        cut: Units ``[0, cut)`` are on the device; all of them: classic federated learning.
        edge: Index of the edge server that has the others.
        codec_up: How activations are written, a name in `fedsys.transport.codecs.CODECS`.
        codec_down: How activation gradients are written.
        micro_batches: Pieces of a mini-batch; None: ``schedule.micro_batches``. It holds for whole
            models too, because BatchNorm sees each piece by itself.
    """

    cut: int
    edge: int
    codec_up: str = "fp32"
    codec_down: str = "fp32"
    micro_batches: int | None = None


@dataclass(frozen=True)
class Observation:
    """What was seen of a device in its last round.

    Attributes:
        steps: Optimizer steps; 0 before the first round.
        seconds: Seconds that the device trained.
        waited_s: Of these, seconds in which it waited for its edge.
        bytes_up: Bytes sent to the edge.
        bytes_down: Bytes received from it.
        compute_s: Seconds of a mini-batch in which the device computed, without loading; 0 here
            and below: unknown.
        up_bit_s: Seconds that a bit took to the edge, without the latency of ``network=``.
        down_bit_s: Seconds that a bit took from it.
        edge_s: Seconds of a mini-batch in which the edge computed for this device, without waiting
            for a processor and without its optimizer.
        iteration_s: Seconds from one mini-batch to the next; the median.
    """

    steps: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    compute_s: float = 0.0
    up_bit_s: float = 0.0
    down_bit_s: float = 0.0
    edge_s: float = 0.0
    iteration_s: float = 0.0

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Observation:
        """Return what a device tells in its reply; times that it does not tell are unknown."""
        return cls(
            steps=int(told["steps"]),
            seconds=float(told["seconds"]),
            waited_s=float(told["waited-s"]),
            bytes_up=int(told["bytes-up"]),
            bytes_down=int(told["bytes-down"]),
            compute_s=float(told.get("compute-s", 0.0)),
            up_bit_s=float(told.get("up-bit-s", 0.0)),
            down_bit_s=float(told.get("down-bit-s", 0.0)),
            edge_s=float(told.get("edge-s", 0.0)),
            iteration_s=float(told.get("iteration-s", 0.0)),
        )


class OffloadPolicy(Protocol):
    """State in, state out."""

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> PolicyState:
        """Return the state before the first round.

        Args:
            layers: The model, on ``meta``.
            nodes: Partition ids of all devices.
        """
        ...

    def plan(
        self, state: PolicyState, seen: Mapping[int, Observation]
    ) -> tuple[PolicyState, Mapping[int, Assignment]]:
        """Return the next state, and an assignment for each device in `seen`.

        Args:
            state: What `init` or the last `plan` returned.
            seen: The devices of this round, with what was last seen of each.
        """
        ...
