"""Inputs of a model that takes several tensors: for instance tokens and which of them are padding.

`Several` does what the machinery does with one tensor of inputs (take rows, move to a device), so
that whoever passes inputs on need not ask which of the two they are. Whoever calls a model does, by
`arguments`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from fedsys.errors import FrameError
from fedsys.transport.tensors import DTYPES

Shape: TypeAlias = tuple[Any, ...]
"""Of an example: whole numbers, or for each of several tensors its type and whole numbers, as in
``(("int64", 12), ("bool", 12))``."""

MOST: Final = 8
"""Tensors of an example, and dimensions of each."""


@dataclass(frozen=True, eq=False)
class Several:
    """Several tensors of the same examples.

    Attributes:
        tensors: Each ``(rows, …)``.
    """

    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: Any) -> Several:
        return Several(tuple(tensor[rows] for tensor in self.tensors))

    def index_select(self, dim: int, index: Tensor) -> Several:
        """Return the rows at some indices, copied."""
        return Several(tuple(tensor.index_select(dim, index) for tensor in self.tensors))

    def contiguous(self) -> Several:
        """Return the same, each laid out in the order of its dimensions."""
        return Several(tuple(tensor.contiguous() for tensor in self.tensors))

    def to(self, device: torch.device | str) -> Several:
        """Return the same on a device."""
        return Several(tuple(tensor.to(device) for tensor in self.tensors))


Inputs: TypeAlias = Any
"""A tensor, or `Several`; not told by the type, as what is made for images need not ask."""


def shape_of(inputs: Inputs) -> Shape:
    """Return the shape of an example.

    >>> shape_of(torch.zeros(5, 3)), shape_of(Several((torch.zeros(5, 3), torch.zeros(5))))
    ((3,), (('float32', 3), ('float32',)))
    """
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[1:])
    return tuple((_name(tensor), *tensor.shape[1:]) for tensor in inputs.tensors)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def is_several(shape: Sequence[Any]) -> bool:
    """Return whether a shape is that of several tensors."""
    return bool(shape) and not isinstance(shape[0], int)


def examples_of(shape: Sequence[Any], rows: int, device: str = "cpu") -> Several:
    """Return examples of several tensors: zeros, and True where they are booleans.

    Args:
        shape: For which `is_several` holds.
        rows: Their number.
        device: Where they are; on ``meta`` they have no values.
    """
    return Several(
        tuple(
            torch.full((rows, *form[1:]), form[0] == "bool", dtype=DTYPES[form[0]], device=device)
            for form in shape
        )
    )


def checked_shape(value: Any) -> Shape:
    """Return a shape that another machine sent.

    Raises:
        FrameError: It is none.
    """
    forms = value if isinstance(value, list | tuple) else ()
    several = bool(forms) and all(isinstance(form, list | tuple) and form for form in forms)
    shapes = [form[1:] for form in forms] if several else [forms]
    named = all(isinstance(f[0], str) and f[0] in DTYPES for f in forms) if several else bool(forms)
    sizes = all(type(n) is int and n > 0 for shape in shapes for n in shape)
    if not named or not sizes or len(forms) > MOST or any(len(shape) > MOST for shape in shapes):
        raise FrameError(f"open: {str(value)[:80]}: must be a shape, of one tensor or of several")
    return tuple(map(tuple, forms)) if several else tuple(forms)


def said(shape: Sequence[Any]) -> str:
    """Return a shape for people.

    >>> said((3, 32, 32)), said((("int64", 12), ("bool", 12)))
    ('3x32x32', '12 (int64) and 12 (bool)')
    """
    if not is_several(shape):
        return "x".join(map(str, shape))
    return " and ".join(f"{'x'.join(map(str, form[1:])) or '1'} ({form[0]})" for form in shape)


def beside(inputs: Inputs, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return some of several inputs, by the names that they have in a frame."""
    tensors = inputs.tensors if isinstance(inputs, Several) else ()
    return {f"input{index}": tensors[index] for index in indices}


def beside_of(
    tensors: Mapping[str, Tensor], shape: Sequence[Any], indices: Sequence[int], rows: int
) -> tuple[Tensor, ...]:
    """Return the inputs that a frame carries beside an activation.

    Args:
        tensors: Of the frame.
        shape: Of an example.
        indices: Which of its tensors are due.
        rows: How many examples.

    Raises:
        FrameError: One is missing, or has another shape or type.
    """
    found = []
    for index in indices:
        kind, *sizes = shape[index]
        tensor = tensors.get(f"input{index}")
        wanted = (rows, *sizes)
        if tensor is None or tuple(tensor.shape) != wanted or _name(tensor) != kind:
            raise FrameError(f"input {index}: must be {kind} of shape {wanted}")
        found.append(tensor)
    return tuple(found)


def arguments(model: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """Return what a model is called with.

    Several tensors are as many arguments where forward takes so many, and else one: a tuple.
    """
    if isinstance(inputs, Tensor):
        return (inputs,)
    tensors = inputs.tensors
    return tensors if takes(type(model).forward, len(tensors)) else (tensors,)


def takes(forward: Any, count: int) -> bool:
    """Return whether a method takes as many tensors as arguments of their own."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(named) >= count
