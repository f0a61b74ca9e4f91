"""What was decided for one device: the one record of planners, policies, messages and clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.transport.messages import read


@dataclass(frozen=True, slots=True)
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
    edge: int = 0
    codec_up: str = "fp32"
    codec_down: str = "fp32"
    micro_batches: int | None = None

    @property
    def codecs(self) -> tuple[str, str]:
        """How tensors are written on the way up, and down."""
        return self.codec_up, self.codec_down

    @property
    def pieces(self) -> int:
        """Pieces of a mini-batch where no schedule says otherwise."""
        return self.micro_batches or 1

    def to_list(self) -> list[int | str]:
        """Return what checkpoints keep; the codec down is empty where it is that up."""
        up, down = self.codecs
        return [self.cut, self.pieces, up, self.edge, "" if down == up else down]

    @classmethod
    def of_list(cls, values: Sequence[Any]) -> Assignment:
        """Return what `to_list` took down."""
        cut, pieces, up, edge, down = values
        return cls(cut, edge, up, down or up, pieces)

    def to_record(self) -> dict[str, int | str]:
        """Return what a device is told of it; pieces and addresses of its edge stand beside."""
        return {"cut": self.cut, "codec-up": self.codec_up, "codec-down": self.codec_down}

    @classmethod
    def of(cls, record: Mapping[str, Any], micro_batches: int) -> Assignment:
        """Return what a device was told.

        Raises:
            RuntimeFailure: A key is missing, or its value of another type.
        """
        return read(cls, record, micro_batches=micro_batches)
