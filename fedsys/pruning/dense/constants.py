"""Which channels do not depend on the input, and what they are.

One pass over the traced graph, in evaluation and float64, on a few probe inputs. Whether a channel
is constant is decided from the structure alone: all weights on channels that vary are exactly
zero, and so on through BatchNorm, activations, pooling, sums, products, concatenation and
flattening; or an activation is flat wherever its input can be (`fedsys.pruning.dense.bounds`).
What it is constant at is then read off the computation itself, so every operation
gives its constants exactly, however it works.

A constant map need not be uniform: where a convolution with zero padding reads a constant other
than zero, the border of the result differs from its middle. Two notions are offered (`Borders`):

* ``CARRIER`` calls a channel constant only if it is the same everywhere. The plan then keeps one
  constant channel in front of such a convolution and lets it carry the contributions of all
  others, border included. The result works for every input size that the model works for.
* ``MAP`` calls every channel constant that does not depend on the input. Contributions that vary
  over the map become a constant map added behind the convolution, which binds the model to the
  size of the example.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fedsys.pruning.dense.bounds import Bounds, bounds_of
from fedsys.pruning.dense.cloning import InFloat64
from fedsys.pruning.dense.ops import Kind, Op, describe, outputs_reading


class Borders(Enum):
    """What to do where constants other than zero meet zero padding."""

    CARRIER = "carrier"
    MAP = "map"


@dataclass(frozen=True, eq=False)
class Fixed:
    """The constant channels of one tensor.

    Attributes:
        where: Bool of ``(C,)``: the channel counts as constant.
        value: Float64 of ``(C, 1, …)``, or of ``(C, height, …)`` with `Borders.MAP`; 0 where the
            channel is not constant.
        still: Bool of ``(C,)``: the channel does not depend on the input. With `Borders.MAP` that
            is `where`; else there may be more, whose maps are not uniform.
    """

    where: Tensor
    value: Tensor
    still: Tensor

    @cached_property
    def varies(self) -> bool:
        """Whether no channel is constant."""
        return not bool(self.where.any())

    @cached_property
    def nonzero(self) -> Tensor:
        """Which channels are constant at something other than zero, bool of ``(C,)``."""
        if self.varies:
            return self.where
        return self.where & self.value.reshape(len(self.where), -1).ne(0).any(1)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A traced model, understood.

    Attributes:
        graph: The traced model in evaluation, in its own type.
        ops: Every node by name, in the order of computation.
        fixed: Constant channels of every tensor with channels, by name.
        bounds: Between which values its channels stay, by name.
        borders: The notion of constant that was used.
        output: What the model computes on the probes, float64.
    """

    graph: fx.GraphModule
    ops: dict[str, Op]
    fixed: dict[str, Fixed]
    bounds: dict[str, Bounds]
    borders: Borders
    output: Tensor

    def is_constant(self, op: Op) -> bool:
        """Say whether nothing that `op` reads depends on the input."""
        given = [self.fixed[n.name] for n in op.inputs if n.name in self.fixed]
        return bool(given) and all(bool(fixed.still.all()) for fixed in given)


def read(
    graph: fx.GraphModule, probes: Tensor, borders: Borders, *, closing: bool = True
) -> Reading:
    """Run `graph` once in float64 and find its constant channels.

    Args:
        graph: The traced model in evaluation. One layer at a time is copied to float64.
        probes: Float64 of ``(rows, …)``; the rows should differ.
        borders: Which channels count as constant.
        closing: Whether activations count as constant that are flat wherever their input can be.
    """
    run = _Run(graph, borders, closing)
    with torch.no_grad():
        output = run.run(probes)
    return Reading(graph, run.ops, run.fixed, run.bounds, borders, output)


class _Run(InFloat64):  # torch.fx's way to look at values while a graph runs
    def __init__(self, graph: fx.GraphModule, borders: Borders, closing: bool) -> None:
        super().__init__(graph)
        self.ops: dict[str, Op] = {}
        self.fixed: dict[str, Fixed] = {}
        self.bounds: dict[str, Bounds] = {}
        self._borders, self._closing = borders, closing
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._calls = Counter(n.target for n in graph.graph.nodes if n.op == "call_module")

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.module_at(n.target) if n.op == "call_module" else None
        if isinstance(value, Tensor) and n.op != "output":
            self._shapes[n] = tuple(value.shape)
        shared = module is not None and self._calls[n.target] > 1
        op = describe(n, module, self._shapes, shared)
        self.ops[n.name] = op
        if op.channels:
            known = [i.name for i in op.inputs if i.name in self.fixed]
            bounds = bounds_of(op, [self.bounds[name] for name in known])
            fixed = self._fixed(op, [self.fixed[name] for name in known], value, bounds)
            narrow = not fixed.varies
            self.bounds[n.name] = bounds.narrowed(fixed.where, fixed.value) if narrow else bounds
            self.fixed[n.name] = fixed
        return value

    def _fixed(self, op: Op, inputs: list[Fixed], value: Tensor, bounds: Bounds) -> Fixed:
        zero = [g.where & ~g.nonzero for g in inputs] if op.kind is Kind.MUL else []
        still = where = constant_channels(op, [given.still for given in inputs], zero)
        shown = value[0]
        if self._borders is Borders.CARRIER:
            if not all(g.where is g.still or torch.equal(g.where, g.still) for g in inputs):
                where = constant_channels(op, [given.where for given in inputs], zero)
            if op.zero_border:
                where = where & ~_bent_at_border(op, inputs[0])
            pixels = shown.reshape(op.channels, -1)
            if op.kind is Kind.CONSTANT:
                where = where & (pixels == pixels[:, :1]).all(1)
            shown = pixels[:, 0].view(-1, *(1 for _ in value.shape[2:]))
        if op.kind is Kind.SAME and self._closing and bool((closed := bounds.closed).any()):
            same = where is still
            where = where | closed
            still = where if same else still | closed
        if not bool(where.any()):
            return Fixed(where, torch.zeros_like(shown), still)
        known = where.view(-1, *(1 for _ in shown.shape[1:]))
        return Fixed(where, torch.where(known, shown, 0.0), still)


def constant_channels(op: Op, constant: list[Tensor], zero: list[Tensor]) -> Tensor:
    """Return which outputs of `op` are constant, bool of ``(C,)``.

    Args:
        op: The operation.
        constant: Which channels of each input are constant.
        zero: Which channels of each input are constant at zero.
    """
    match op.kind:
        case Kind.CONSTANT:
            return torch.ones(op.channels, dtype=torch.bool)
        case Kind.MIX:
            return ~outputs_reading(op, ~constant[0])
        case Kind.SCALE | Kind.SAME:
            return constant[0]
        case Kind.NORM:
            groups = constant[0].view(op.groups, -1).all(1)
            return groups.repeat_interleave(op.channels // op.groups)
        case Kind.ADD:
            return constant[0] & constant[1]
        case Kind.MUL:
            return (constant[0] & constant[1]) | zero[0] | zero[1]
        case Kind.CAT:
            return torch.cat(constant)
        case Kind.FLATTEN:
            return constant[0].repeat_interleave(op.channels // len(constant[0]))
        case _:
            return torch.zeros(op.channels, dtype=torch.bool)


def _bent_at_border(op: Op, given: Fixed) -> Tensor:
    """Return which outputs read a constant other than zero together with padded zeros."""
    if op.kind is Kind.MIX:
        return outputs_reading(op, given.nonzero, border=True)
    return given.nonzero


def dead_layers(reading: Reading) -> list[str]:
    """Return the names of layers behind which nothing depends on the input any more.

    A layer is a convolution or linear layer with input that varies and output that does not.
    """
    return [
        op.name
        for name, op in reading.ops.items()
        if op.kind is Kind.MIX
        and bool(reading.fixed[name].still.all())
        and not bool(reading.fixed[op.inputs[0].name].still.all())
    ]
