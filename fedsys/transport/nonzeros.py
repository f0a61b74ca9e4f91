"""Elements of a gradient that the receiver does not need, left out of the message.

Behind a ReLU an activation is zero in many places, and there the ReLU's own backward makes the
gradient zero, whatever came. The receiver of the gradient wrote the activation and the sender got
it, so both know these places from the same bits: `Nonzeros` of the activation *as it was written*.
What is zero in those bits is left out, and the receiver fills zeros in. All else is as it was: the
gradient is written by its codec as a whole first, and keeps the order of its dimensions in memory.

A codec that makes zeros of small elements would have their gradients lost. So the activation is
written with ``mark=True`` (`fedsys.transport.codecs.encode_activation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fedsys.errors import FrameError
from fedsys.transport.tensors import dense_bytes, tensor_at

SKIP: Final = "skip_zeros"
"""What a frame with an activation says: its gradient is not needed where it is zero."""
LEFT_OUT: Final = "left_out"
"""What a frame with a gradient says: zeros are left out, and the order of its dimensions."""
LEAST_LEFT_OUT: Final = 0.05
"""Share of elements from which on leaving them out is worth the work of both sides."""

Order = tuple[int, ...]
"""Of dimensions in memory, from the slowest; empty for a contiguous tensor."""

_Bits = np.ndarray[Any, np.dtype[Any]]


class Nonzeros:
    """The elements of an activation that are not zero as it was written: some bit of them is set.

    Args:
        x: The tensor ``x`` of the frame, of any shape. It must not change.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()
        self._found: dict[Order, np.ndarray[Any, np.dtype[np.int64]]] = {}

    @property
    def shape(self) -> torch.Size:
        """Shape of the activation."""
        return self._x.shape

    def find(self) -> None:
        """Look for them ahead, for a gradient whose dimensions are in the same order."""
        self._where(dense_bytes("x", self._x).order)

    def of(self, gradient: Tensor) -> tuple[Tensor, Order] | None:
        """Return the elements of a gradient where the activation is not zero.

        Args:
            gradient: As its codec wrote it, of the shape of the activation.

        Returns:
            These elements ``(n,)`` as they are in memory, and the order of the dimensions there.
            None where so few would be left out that all may as well be sent.
        """
        written = dense_bytes("x", gradient)
        where = self._where(written.order)
        if len(where) > (1 - LEAST_LEFT_OUT) * gradient.numel():
            return None
        chosen = _bits(written.data, gradient.element_size()).take(where)
        return torch.from_numpy(chosen).view(gradient.dtype), written.order

    def filled(self, chosen: Tensor, order: Sequence[int]) -> Tensor:
        """Return the gradient of which `of` chose some elements; the others are zeros.

        Raises:
            FrameError: They are not as many, or the order is none of these dimensions.
        """
        dims, order = self._x.dim(), tuple(order)
        if order and sorted(order) != list(range(dims)):
            raise FrameError(f"gradient without zeros: order {order} for {dims} dimensions")
        where = self._where(order)
        if chosen.shape != where.shape:
            got = f"{tuple(chosen.shape)} instead of {tuple(where.shape)}"
            raise FrameError(f"gradient without zeros: elements of shape {got}")
        # By torch, whose memory begins where its own tensors do, so that sums have the same bits
        whole = torch.zeros(self._x.numel() * chosen.element_size(), dtype=torch.uint8).numpy()
        size = chosen.element_size()
        _bits(whole.data, size)[where] = _bits(dense_bytes("x", chosen).data, size)
        return tensor_at(whole, 0, chosen.dtype, tuple(self.shape), order)

    def _where(self, order: Order) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return their places in memory where the dimensions are in an order."""
        if order not in self._found:
            written, natural = dense_bytes("x", self._x), tuple(range(self._x.dim()))
            is_set = _bits(written.data, self._x.element_size()) != 0
            if written.order != order:
                here, there = written.order or natural, order or natural
                laid_out = is_set.reshape([written.shape[dim] for dim in here])
                is_set = laid_out.transpose([here.index(dim) for dim in there]).reshape(-1)
            self._found[order] = np.flatnonzero(is_set)
        return self._found[order]


def restored(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], nonzeros: Nonzeros | None
) -> Mapping[str, Tensor]:
    """Return the tensors of a frame with a gradient, as its codec wrote them.

    Args:
        tensors: Of the frame.
        meta: Of the frame; `LEFT_OUT` says that zeros are left out of ``x``, and its order.
        nonzeros: Of the activation; None where all was asked for.

    Raises:
        FrameError: They do not belong together.
    """
    order = meta.get(LEFT_OUT)
    if order is None:
        return tensors
    whole = isinstance(order, list) and all(type(dim) is int for dim in order)
    if nonzeros is None or not whole or "x" not in tensors:
        raise FrameError(f"{LEFT_OUT}={str(order)[:40]}: the frame holds no such gradient")
    return {**tensors, "x": nonzeros.filled(tensors["x"], order)}


def _bits(data: memoryview, size: int) -> _Bits:
    """View memory as whole numbers of a size in bytes."""
    return np.frombuffer(data, f"u{size}")
