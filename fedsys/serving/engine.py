"""What stands behind the endpoint: anything that turns images into class scores.

The endpoint knows `Engine` alone. A portfolio whose variants change is one
(`fedsys.serving.portfolio`); whatever else computes answers, on this machine or on others, becomes
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
"""Images and scores, from the request to the answer: an engine may do without PyTorch."""

Fact = str | int | float | bool


@dataclass(frozen=True)
class Card:
    """What a client must know of the model.

    Attributes:
        classes: Names of the outputs.
        input_shape: Channels, height and width of an image.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.
        platform: What computes, in a word, for the metadata of the protocol.
    """

    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    platform: str


@dataclass(frozen=True, eq=False)
class Answer:
    """Class scores of a batch, and who gave them.

    Attributes:
        scores: float32 ``(batch, classes)``, before softmax.
        by: Name of what answered: one and the same for the whole batch.
        facts: What else a client may want to know; plain values.
    """

    scores: Array
    by: str
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class Pressure:
    """How urgent a batch is.

    Attributes:
        waited_ms: How long its oldest request has waited, in milliseconds.
        behind: Images that wait behind it.
    """

    waited_ms: float = 0.0
    behind: int = 0


CALM = Pressure()


class Watch(Protocol):
    """Whoever wants to know what happens at the endpoint. Called from several threads."""

    def arrived(self, rows: int) -> None:
        """Images came and wait."""

    def left(self, rows: int) -> None:
        """Images wait no more."""

    def received(self, size: int, seconds: float) -> None:
        """A body of `size` bytes took so long to arrive."""

    def answered(self, milliseconds: float) -> None:
        """A request was answered so long after it had come."""


class Engine(Protocol):
    """Computes answers."""

    @property
    def card(self) -> Card:
        """What a client must know."""

    @property
    def watch(self) -> Watch:
        """Who is told what happens at the endpoint."""

    @property
    def ready(self) -> bool:
        """Whether requests are answered now; else they wait."""

    @property
    def lanes(self) -> int:
        """Batches that may be computed at once."""

    def is_quick(self, rows: int) -> bool:
        """Return whether so many images are answered now, in less time than handing them over.

        Then whoever took them in may compute them himself; nobody else is heard meanwhile.
        """

    def answer(self, images: Array, pressure: Pressure = CALM, by: str = "") -> Answer:
        """Return the scores of normalised float32 images ``(batch, C, H, W)``.

        Args:
            images: The images.
            pressure: How urgent they are.
            by: Who is to compute them if that can be: they are part of what it has begun.
        """

    def status(self) -> Mapping[str, Any]:
        """Return how it is, as plain values; numbers at its top become metrics."""

    def close(self) -> None:
        """End; called once, after the last answer."""
