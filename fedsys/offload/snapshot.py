"""What a session is told when it is opened, and what is left of it when it is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsys.errors import FrameError
from fedsys.transport.codecs import CODECS
from fedsys.transport.several import Shape, checked_shape
from fedsys.transport.wire import Frame

State = Mapping[str, Tensor]

_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


@dataclass(frozen=True)
class SessionSpec:
    """What a server app tells an edge server about a session.

    Attributes:
        id: Name of the session; unique in its run.
        token: What the device must present.
        client: Partition id of the device.
        round: The round, from 1.
        first: First unit on the edge.
        last: End of the units on the edge; less than all for a label-private cut.
        config: The run's configuration as YAML: the model and how to train it.
        input_shape: ``(C, H, W)`` of one example, or as `fedsys.transport.several.Shape`.
        num_classes: Number of classes.
        micro_batches: Pieces of a mini-batch.
        proximal_mu: Weight of FedProx's term.
        codec_up: How the device writes activations.
        codec_down: How the edge writes what it returns.
        holder: Name in the certificate of the device; empty for any that has the token.
        replicate_every: Steps between two replicas of the session; 0 for none.
        fleet: What the edge servers of its run know each other by; empty: it stays where it is.
        noise: Deviation of the noise over ``privacy.clip_norm``; 0 for none.
        expected: Examples of a mini-batch on average, by which private sums are divided.
    """

    id: str
    token: str
    client: int
    round: int
    first: int
    last: int
    config: str
    input_shape: Shape
    num_classes: int
    micro_batches: int = 1
    proximal_mu: float = 0.0
    codec_up: str = "fp32"
    codec_down: str = "fp32"
    holder: str = ""
    replicate_every: int = 0
    fleet: str = field(default="", repr=False)
    noise: float = 0.0
    expected: float = 0.0

    def to_meta(self) -> dict[str, Any]:
        """Return plain values for the header of a frame."""
        return dataclasses.asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> SessionSpec:
        """Return the specification that a frame carries.

        Raises:
            FrameError: A value is missing or has another type.
        """
        values: dict[str, Any] = {}
        for spec in dataclasses.fields(cls):
            value = meta.get(spec.name)
            expected = _KINDS.get(str(spec.type), (list,))
            if not isinstance(value, expected) or isinstance(value, bool):
                raise FrameError(f"open: {spec.name}={str(value)[:40]!r} is not a {spec.type}")
            values[spec.name] = checked_shape(value) if isinstance(value, list) else value
        made = cls(**values)
        sizes = made.num_classes, made.micro_batches
        if not all(type(n) is int and n > 0 for n in sizes):
            raise FrameError(f"open: {sizes}: must be classes and pieces, each above 0")
        if made.codec_up not in CODECS or made.codec_down not in CODECS:
            raise FrameError(f"open: codecs {made.codec_up!r:.40} and {made.codec_down!r:.40}")
        return made


@dataclass(frozen=True)
class Snapshot:
    """A frozen session.

    Attributes:
        step: Steps that are done.
        state: Parameters and buffers of the edge's units, by global name.
        optimizer: State of their optimizer, by global name.
        anchor: Parameters at the start of the round, by global name, if FedProx's term pulls
            towards them and they are no longer those in `state`.
        masks: What is pruned of these parameters, packed, by global name.
        first: First unit of these; None: as the session was opened.
    """

    step: int
    state: State
    optimizer: State
    anchor: State = dataclasses.field(default_factory=dict)
    masks: State = dataclasses.field(default_factory=dict)
    first: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors for a frame."""
        parts = {"state": self.state, "optimizer": self.optimizer, "anchor": self.anchor}
        parts["masks"] = self.masks
        return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}

    def to_meta(self) -> dict[str, Any]:
        """Return what the header of a frame says beside the tensors."""
        return {"step": self.step} | ({} if self.first is None else {"first": self.first})

    def of(self, names: Collection[str], *, others: bool = False) -> Snapshot:
        """Return what belongs to some parameters and buffers, or all that does not.

        Names of what is kept beside a parameter begin with its own, before a ``|``.
        """

        def taken(named: State) -> State:
            return {n: t for n, t in named.items() if (n.partition("|")[0] in names) != others}

        return Snapshot(
            self.step,
            taken(self.state),
            taken(self.optimizer),
            taken(self.anchor),
            taken(self.masks),
        )

    def with_(self, more: Snapshot) -> Snapshot:
        """Return what either has of other units."""
        return Snapshot(
            self.step,
            {**self.state, **more.state},
            {**self.optimizer, **more.optimizer},
            {**self.anchor, **more.anchor},
            {**self.masks, **more.masks},
        )

    @classmethod
    def from_frame(cls, frame: Frame) -> Snapshot:
        """Return the snapshot that a frame carries.

        Raises:
            FrameError: Its step or its first unit is no whole number.
        """
        step = natural(frame, "step")
        named = frame.tensors
        return cls(
            step,
            _part(named, "state/"),
            _part(named, "optimizer/"),
            _part(named, "anchor/"),
            _part(named, "masks/"),
            natural(frame, "first") if "first" in frame.meta else None,
        )


@dataclass(frozen=True)
class SessionPosition:
    """Where a session stands, also within a step.

    Attributes:
        snapshot: The state after the last step.
        incarnation: Of the session.
        operations: What was done of the next step, in its order. Done again, it leaves the same
            gradients, replies and statistics: draws have addresses.
        replies: To the step before, each with ``for``, the kind of operation that it answers.
    """

    snapshot: Snapshot
    incarnation: str
    operations: tuple[Frame, ...] = ()
    replies: tuple[Frame, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors for a frame."""
        tensors = self.snapshot.tensors()
        for name, listed in (("operation", self.operations), ("reply", self.replies)):
            for index, frame in enumerate(listed):
                tensors |= {f"{name}/{index}/{n}": t for n, t in frame.tensors.items()}
        return tensors

    def to_meta(self) -> dict[str, Any]:
        """Return what the header of a frame says beside the tensors and the snapshot's own."""
        return {
            "operations": [[f.kind, dict(f.meta)] for f in self.operations],
            "replies": [[f.kind, dict(f.meta)] for f in self.replies],
            "incarnation": self.incarnation,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> SessionPosition:
        """Return the position that a frame carries.

        Raises:
            FrameError: It is none.
        """
        return cls(
            Snapshot.from_frame(frame),
            str(frame.meta.get("incarnation")),
            _frames(frame.meta.get("operations"), frame.tensors, "operation"),
            _frames(frame.meta.get("replies"), frame.tensors, "reply"),
        )


def _frames(listed: object, tensors: State, name: str) -> tuple[Frame, ...]:
    if not isinstance(listed, list):
        raise FrameError(f"{name}: must be a list")
    made = []
    for index, one in enumerate(listed):
        if not (isinstance(one, list) and len(one) == 2 and isinstance(one[1], dict)):
            raise FrameError(f"{name} {index}: must be a kind and its values")
        prefix = f"{name}/{index}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        made.append(Frame(str(one[0]), one[1], own))
    return tuple(made)


def _part(tensors: State, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def natural(frame: Frame, name: str) -> int:
    """Return a whole number of at least 0 from the header of a frame.

    Raises:
        FrameError: It is missing or something else.
    """
    value = frame.meta.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise FrameError(f"{frame.kind}: {name}={str(value)[:40]!r} is not a whole number")
    return value
