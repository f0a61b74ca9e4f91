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
from typing import Any, Protocol, cast

from fedsys.transport.codecs import CODECS
from fedsys.config import Config, Spec, call_target
from fedsys.errors import ConfigError, did_you_mean
from fedsys.models.layered import LayeredModel, resolve_cut
from fedsys.planning.options import PLANNED

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


class Fixed:
    """The cut that the user names, the same in every round.

    Args:
        cut: An index, the name of a unit, or a fraction of the work (see
            `fedsys.models.layered.resolve_cut`); or a list with one of these for each device, which is
            repeated if there are more devices.
        codec: Name of a codec, or ``{up: …, down: …}``.
        num_edges: Number of edge servers; device i is at edge ``i mod num_edges``.
        micro_batches: Pieces of a mini-batch, or a list like that of `cut`; None: those of the
            schedule.
    """

    def __init__(self, cut: Any, codec: Any, num_edges: int, micro_batches: Any = None) -> None:
        self._cuts = list(cut) if isinstance(cut, list | tuple) else [cut]
        if not self._cuts or any(c is None for c in self._cuts):
            raise ConfigError.of(
                "policy.cut", cut, "must be an index, the name of a unit or a fraction",
                "for instance policy.cut=0.3",
            )  # fmt: skip
        self._codecs = codecs_of(codec)
        self._num_edges = num_edges
        pieces = micro_batches if isinstance(micro_batches, list | tuple) else [micro_batches]
        if not pieces or not all(n is None or (type(n) is int and n > 0) for n in pieces):
            raise ConfigError.of(
                "policy.micro_batches", micro_batches, "must be a whole number of at least 1",
                "or a list with one for each device; null takes schedule.micro_batches",
            )  # fmt: skip
        self._pieces: list[int | None] = list(pieces)

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> PolicyState:
        """Return the resolved cuts."""
        try:
            return tuple(resolve_cut(layers, cut) for cut in self._cuts)
        except ConfigError as error:
            raise ConfigError(f"policy.{error}") from error

    def plan(
        self, state: PolicyState, seen: Mapping[int, Observation]
    ) -> tuple[PolicyState, Mapping[int, Assignment]]:
        """Return the same assignments every time."""
        up, down = self._codecs
        return state, {
            node: Assignment(
                state[node % len(state)],
                node % self._num_edges,
                up,
                down,
                self._pieces[node % len(self._pieces)],
            )
            for node in seen
        }


def codecs_of(codec: Any) -> tuple[str, str]:
    """Return the codecs for up and down that ``policy.codec`` names.

    >>> codecs_of("fp16")
    ('fp16', 'fp16')

    Raises:
        ConfigError: There is no such codec.
    """
    pair = codec if isinstance(codec, Mapping) else {"up": codec, "down": codec}
    for direction in ("up", "down"):
        name = pair.get(direction)
        if name not in CODECS:
            hint = did_you_mean(str(name), CODECS)
            raise ConfigError.of(
                "policy.codec", name, f"must be one of {', '.join(CODECS)}", hint.strip()
            )
    return str(pair["up"]), str(pair["down"])


def build_policy(
    spec: Spec, num_edges: int, config: Config | None = None, examples: Sequence[int] = ()
) -> OffloadPolicy | None:
    """Return the policy of the ``policy`` group; None where everything stays on the devices.

    Args:
        spec: The group; of kind ``own`` its ``_target_`` names the policy, which may take the
            other arguments too.
        num_edges: Number of edge servers.
        config: The run; needed by policies that plan.
        examples: Examples of each client; likewise.

    Raises:
        ConfigError: There is no such policy, or an argument is not usable.
    """
    kind = spec.get("kind", "none")
    if kind == "none":
        return None
    if kind == "fixed":
        pieces = spec.get("micro_batches")
        return Fixed(spec.get("cut"), spec.get("codec", "fp32"), num_edges, pieces)
    if kind in PLANNED and config is not None:
        from strategies.policies.planned import Planned  # it imports this module

        return Planned(config, examples)
    if kind == "own":
        target = {key: value for key, value in spec.items() if key != "kind"}
        given = {"num_edges": num_edges, "config": config, "examples": examples}
        return cast(OffloadPolicy, call_target(target, "policy", **given))
    known = ("none", "fixed", *PLANNED, "own")
    hint = did_you_mean(str(kind), known)
    raise ConfigError.of("policy.kind", kind, f"must be one of {', '.join(known)}", hint.strip())
