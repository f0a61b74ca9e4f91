"""What computing and sending cost: seconds per unit of a model, bytes at each cut, CPU of messages.

Costs of a machine come from measurement, or from the nominal rates of its class::

    pi = MachineClass("pi3", macs_per_s=1e9).costs(layers)
    pi.seconds(25, 0, 2)                             # forward and backward of 25 at cut 2
    frame_bytes(crossings(layers)[2], 25, "int8")    # a micro-batch of 25 at cut 2

Time on a link is that of `fedsys.transport.network.finish_time`, and a link is a
`fedsys.transport.network.Network`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import ConfigError, did_you_mean, is_number
from fedsys.models.layers import LayeredModel
from fedsys.models.lora import sent
from fedsys.transport.codecs import CODECS, encoded_bytes

Array = NDArray[np.float64]

FRAME_BYTES: Final = 256
"""Bytes of a frame of a session beside its tensors: prefix, header and checksums."""


PRIVATE_BACKWARD: Final = 2.1
"""Norms and clipped sums of examples over a plain backward: of VGG-5 with GroupNorm, 100 examples,
2.07 was measured on one thread (25 examples: 2.37), forwards alike (benchmarks/privacy.md)."""

PRIVATE_UPDATE: Final = 14.0
"""Noise and optimizer step over a step of SGD, measured likewise."""


RELEASE_MACS: Final = {"gaussian": 140.0, "laplace": 300.0, "secure": 2200.0}
"""Multiply-accumulates whose time is that of clipping one number of an activation and adding noise
to it, forward and backward, by kind of noise: measured on one thread at the cuts of VGG-5. Noise of
the operating system takes by far the most; of Laplace's that was not measured."""


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError.of(name, value, "must be 0 or more, and finite")


@dataclass(frozen=True, slots=True)
class Messaging:
    """CPU time that a machine spends on a message that it sends or receives.

    Attributes:
        message_s: Seconds for each message.
        byte_s: Seconds for each encoded byte, by codec; 0 for a codec that is not listed.
    """

    message_s: float = 0.0
    byte_s: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("message_s", self.message_s)
        for codec, value in self.byte_s.items():
            if codec not in CODECS:
                raise ConfigError.of("byte_s", codec, f"must be one of {', '.join(CODECS)}")
            _check(f"byte_s.{codec}", value)

    def seconds(self, nbytes: float, codec: str) -> float:
        """Return the CPU seconds for one message of `nbytes`."""
        return self.message_s + nbytes * self.byte_s.get(codec, 0.0)


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """What one machine takes for one model of ``L`` units.

    Seconds are given for micro-batches of one size, or of several: small ones cost more than their
    share. Between the sizes they are interpolated, beyond them they grow in proportion.

    Attributes:
        name: Name of the machine or its class.
        rows: Examples of a micro-batch, ascending; one for each row of the two tables.
        forward_s: For each size the seconds of each unit, forward: ``len(rows)`` times L.
        backward_s: Likewise, backward.
        update_s: Seconds of the optimizer for each unit, once per mini-batch.
        operation_s: Fixed seconds of each forward and each backward of a micro-batch.
        load_s: Seconds to load one example; of devices only.
        messaging: CPU time of messages.
        workers: Sessions that an edge server computes at the same time.
        release_s: For each unit the seconds in which what one example leaves behind it is clipped
            and made noisy on a device, if the cut is there; empty: nothing of that is done.

    Raises:
        ConfigError: A time is negative or not finite, or lengths differ.
    """

    name: str
    rows: tuple[int, ...]
    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    update_s: tuple[float, ...]
    operation_s: float = 0.0
    load_s: float = 0.0
    messaging: Messaging = Messaging()
    workers: int = 1
    release_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows or list(self.rows) != sorted({max(1, n) for n in self.rows}):
            raise ConfigError.of(f"{self.name}.rows", self.rows, "must be sizes, ascending from 1")
        for name in ("forward_s", "backward_s"):
            table = getattr(self, name)
            lengths = {len(row) for row in table}
            if len(table) != len(self.rows) or lengths != {len(self.update_s)} or 0 in lengths:
                raise ConfigError.of(
                    f"{self.name}.{name}", table, "must have a value for each size and unit",
                    "profile the model that is trained",
                )  # fmt: skip
            for value in (v for row in table for v in row):
                _check(f"{self.name}.{name}", value)
        for name in ("operation_s", "load_s"):
            _check(f"{self.name}.{name}", getattr(self, name))
        for value in self.update_s:
            _check(f"{self.name}.update_s", value)
        if self.workers < 1:
            raise ConfigError.of(f"{self.name}.workers", self.workers, "must be at least 1")

    def __len__(self) -> int:
        return len(self.update_s)

    def done_after(self, rows: Array) -> tuple[Array, Array]:
        """Return the seconds of the first units, forward and backward, for sizes of micro-batches.

        Args:
            rows: Examples, ``(N,)``; fractions are means over micro-batches of unlike size.

        Returns:
            Twice ``(N, L + 1)``: at index c the seconds of units ``[0, c)``.
        """
        return _cumulated(self.rows, self.forward_s, rows), _cumulated(
            self.rows, self.backward_s, rows
        )

    def seconds(self, rows: int, first: int = 0, last: int | None = None) -> tuple[float, float]:
        """Return the seconds of units ``[first, last)``, forward and backward.

        The fixed time of an operation is in them if there is a unit.
        """
        last = len(self) if last is None else last
        forward, backward = self.done_after(np.array([float(rows)]))
        fixed = self.operation_s if last > first else 0.0
        return (
            float(forward[0, last] - forward[0, first]) + fixed,
            float(backward[0, last] - backward[0, first]) + fixed,
        )

    def slower(self, factor: float) -> MachineCosts:
        """Return the same machine when everything that it computes takes `factor` times as long."""

        def times(table: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(value * factor for value in row) for row in table)

        return replace(
            self,
            forward_s=times(self.forward_s),
            backward_s=times(self.backward_s),
            update_s=tuple(value * factor for value in self.update_s),
            operation_s=self.operation_s * factor,
            release_s=tuple(value * factor for value in self.release_s),
        )

    def release_seconds(self, rows: float, cut: int) -> float:
        """Return the seconds to make what leaves for an edge private, behind a cut below ``L``."""
        return rows * self.release_s[cut - 1] if self.release_s and cut else 0.0

    def releasing(self, layers: LayeredModel, noise: str) -> MachineCosts:
        """Return what it takes where activations are clipped and made noisy before they leave.

        Args:
            layers: The model, by whose units multiply-accumulates are timed.
            noise: A key of `RELEASE_MACS`.
        """
        macs = sum(unit.macs for unit in layers.units)
        mac_s = sum(self.forward_s[-1]) / (self.rows[-1] * macs) if macs else 0.0
        seconds = tuple(RELEASE_MACS[noise] * mac_s * each.elements for each in crossings(layers))
        return replace(self, release_s=seconds)

    def private(self) -> MachineCosts:
        """Return what it takes where the gradient of each example is clipped, with noise."""
        return replace(
            self,
            backward_s=tuple(tuple(PRIVATE_BACKWARD * v for v in row) for row in self.backward_s),
            update_s=tuple(PRIVATE_UPDATE * value for value in self.update_s),
        )


def _cumulated(sizes: tuple[int, ...], table: tuple[tuple[float, ...], ...], rows: Array) -> Array:
    """Interpolate each unit between the sizes, in proportion beyond them, and add up."""
    known = np.array(table)
    out = np.zeros((len(rows), known.shape[1] + 1))
    if len(sizes) == 1:
        units = known * (rows / sizes[0])[:, None]
    else:
        ends = np.array(sizes, dtype=float)
        inside = np.minimum(np.maximum(rows, ends[0]), ends[-1])
        right = np.minimum(np.maximum(np.searchsorted(ends, inside), 1), len(ends) - 1)
        share = ((inside - ends[right - 1]) / (ends[right] - ends[right - 1]))[:, None]
        units = known[right - 1] * (1 - share) + known[right] * share
        units *= (rows / inside)[:, None]
    np.cumsum(units, axis=1, out=out[:, 1:])
    return out


@dataclass(frozen=True, slots=True)
class MachineClass:
    """Nominal rates of a kind of machine.

    Attributes:
        name: Name of the class.
        macs_per_s: Multiply-accumulates per second, forward.
        backward_ratio: Backward seconds for one second of forward; 2 by the count of operations.
        params_per_s: Parameters per second that the optimizer updates.
        operation_s: As in `MachineCosts`; likewise the others.
        load_s: Seconds to load one example.
        messaging: CPU time of messages.
        workers: Sessions computed at the same time.
        source: Where the rates come from.

    Raises:
        ConfigError: A rate is not above 0, or a time is negative.
    """

    name: str
    macs_per_s: float
    backward_ratio: float = 2.0
    params_per_s: float = math.inf
    operation_s: float = 0.0
    load_s: float = 0.0
    messaging: Messaging = Messaging()
    workers: int = 1
    source: str = "nominal"

    def __post_init__(self) -> None:
        for name in ("macs_per_s", "params_per_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError.of(
                    f"{self.name}.{name}", value, "must be more than 0", "leave the machine out"
                )
        _check(f"{self.name}.backward_ratio", self.backward_ratio)

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> MachineClass:
        """Return the class that a fleet file describes.

        Args:
            name: Its name, for messages.
            values: The attributes; ``message_s`` and ``byte_s`` stand beside the others.

        Raises:
            ConfigError: A key is unknown, ``macs_per_s`` is missing, or a value is not usable.
        """
        known = {f.name for f in fields(cls)} - {"name", "messaging"} | {"message_s", "byte_s"}
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known)
                raise ConfigError.of(f"{name}.{key}", values[key], "must be a known key", hint)
        if "macs_per_s" not in values:
            raise ConfigError.of(
                f"{name}.macs_per_s", None, "must be given", "its multiply-accumulates per second"
            )
        for key, value in values.items():
            if key not in ("source", "byte_s") and not is_number(value):
                raise ConfigError.of(f"{name}.{key}", value, "must be a number")
        rest = {k: v for k, v in values.items() if k not in ("message_s", "byte_s")}
        messaging = Messaging(values.get("message_s", 0.0), dict(values.get("byte_s", {})))
        return cls(name, messaging=messaging, **rest)

    def costs(self, layers: LayeredModel) -> MachineCosts:
        """Return what this kind of machine takes for a model."""
        forward = tuple(unit.macs / self.macs_per_s for unit in layers.units)
        return MachineCosts(
            self.name,
            (1,),
            (forward,),
            (tuple(seconds * self.backward_ratio for seconds in forward),),
            tuple(unit.params / self.params_per_s for unit in layers.units),
            self.operation_s,
            self.load_s,
            self.messaging,
            self.workers,
        )


@dataclass(frozen=True, slots=True)
class Crossing:
    """The tensor that crosses one cut, for one example, or several of one type together.

    Attributes:
        elements: Elements.
        channels: Size of its first dimension.
        itemsize: Bytes of an element in the type of the model.
        beside: Bytes of inputs that go to the edge with it, as they are.
        target_bytes: Bytes of what is to be learned, which goes with it, too.
        gradient_share: Share of its elements that the edge sends a gradient of: those that are not
            zero, behind a ReLU (`fedsys.models.rectified`), as far as that was seen.
    """

    elements: int
    channels: int
    itemsize: int = 4
    beside: int = 0
    target_bytes: int = 8
    gradient_share: float = 1.0

    @property
    def more(self) -> int:
        """Bytes that go to the edge with it, whatever the codec."""
        return self.beside + self.target_bytes


def crossings(layers: LayeredModel) -> tuple[Crossing, ...]:
    """Return what leaves each unit: the tensor at cut ``c`` is at index ``c - 1``; length L."""
    made = []
    for cut, unit in enumerate(layers.units, 1):
        elements = sum(math.prod(shape) for shape in unit.out_shapes)
        channels = sum((shape or (1,))[0] for shape in unit.out_shapes)
        beside = sum(layers.input_bytes[index] for index in layers.inputs(cut, len(layers)))
        each = unit.bytes_out // elements
        made.append(Crossing(elements, channels, each, beside, layers.target_bytes))
    return tuple(made)


def tensor_bytes(crossing: Crossing, rows: int, codec: str) -> int:
    """Return the bytes that `fedsys.transport.codecs` makes of `rows` examples."""
    return encoded_bytes(crossing.elements * rows, crossing.channels, codec, crossing.itemsize)


def frame_bytes(crossing: Crossing, rows: int, codec: str, *, labels: bool = False) -> int:
    """Return the bytes of the frame with that tensor, with labels and inputs if they go along."""
    more = crossing.more if labels else 0
    return tensor_bytes(crossing, rows, codec) + FRAME_BYTES + rows * more


def answer_bytes(crossing: Crossing, rows: int, codec: str) -> int:
    """Return the bytes of the frame with the gradient of that tensor."""
    return round(tensor_bytes(crossing, rows, codec) * crossing.gradient_share) + FRAME_BYTES


def norm_bytes(rows: int) -> int:
    """Return the bytes of the frame with a norm for each example, as one whole number."""
    return 8 * rows + FRAME_BYTES


def state_bytes(layers: LayeredModel) -> tuple[int, ...]:
    """Return the bytes of the parameters and persistent buffers of each unit, in their types.

    A tensor that several units use counts in the first of them. Beside adapters what does not learn
    counts nowhere: it is neither sent nor moved.
    """
    tensors = layers.graph.state_dict(keep_vars=True)
    travels = sent(layers.graph).keys()
    counted: set[int] = set()
    sizes = []
    for unit in layers.units:
        names = [name for name in unit.names if name in travels]
        own = {id(tensors[name]): tensors[name].nbytes for name in names}
        sizes.append(sum(size for key, size in own.items() if key not in counted))
        counted |= own.keys()
    return tuple(sizes)
