"""The four resources of split training, and what happens on them: as modelled, and as measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from fedsys.transport.messages import read

RESOURCES: Final[Mapping[str, str]] = {
    "device": "device",
    "up": "uplink",
    "edge": "edge",
    "down": "downlink",
}
"""Kinds of resources: by their name in figures and columns, what people call them."""


class Event(NamedTuple):
    """One stay on a resource.

    Attributes:
        resource: A kind, of `RESOURCES` or ``loader``; where several are told apart, with the name
            of the device or the index of the edge: ``up:NAME``, ``edge:INDEX``.
        name: What is done.
        step: Index of the mini-batch in the round.
        piece: Index of the micro-batch; -1 for what belongs to none.
        start_s: When it begins, in seconds of the round or of the device's clock.
        end_s: When it ends; on a modelled link before the latency.
        job: Index of the device.
        cause: Index of the event whose end decided when this one begins; None for the first, and
            where it is not known.
    """

    resource: str
    name: str
    step: int
    piece: int
    start_s: float
    end_s: float
    job: int = 0
    cause: int | None = None

    @property
    def kind(self) -> str:
        """The kind of the resource."""
        return self.resource.partition(":")[0]

    @property
    def lane(self) -> str:
        """What people call that kind."""
        return RESOURCES.get(self.kind, self.kind)

    @property
    def title(self) -> str:
        """What is done, with the piece."""
        return self.name if self.piece < 0 else f"{self.name} {self.piece}"


@dataclass(frozen=True)
class Measured:
    """What a mini-batch took a device, and a bit on its way; 0 where unknown.

    Attributes:
        iteration_s: From one mini-batch to the next; the median.
        compute_s: In which the device computed, loading not included; the mean.
        edge_s: In which the edge computed for it, without waiting for a processor and without its
            optimizer step; the mean.
        up_bit_s: Seconds for a bit to the edge, without the latency of ``network=``.
        down_bit_s: Seconds for a bit from it.
    """

    iteration_s: float = 0.0
    compute_s: float = 0.0
    edge_s: float = 0.0
    up_bit_s: float = 0.0
    down_bit_s: float = 0.0


@dataclass(frozen=True)
class Observation(Measured):
    """What was seen of a device in its last round, beside what was measured of a mini-batch.

    Attributes:
        steps: Optimizer steps; 0 before the first round.
        seconds: Seconds that the device trained.
        waited_s: Of these, seconds in which it waited for its edge.
        bytes_up: Bytes sent to the edge.
        bytes_down: Bytes received from it.
        probe_bytes: Bytes sent and received to measure the link of a device without a session.
        gradient_share: Share of the elements of gradients that its edge sent; 0: unknown.
    """

    steps: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    probe_bytes: int = 0
    gradient_share: float = 0.0

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Observation:
        """Return what a device tells in its reply; times that it does not tell are unknown.

        Raises:
            RuntimeFailure: A key is missing, or its value of another type.
        """
        own = ("steps", "seconds", "waited_s", "bytes_up", "bytes_down")
        return read(cls, told, required=own)
