"""Which channels stay: those that matter, those held constant for others, those tied to them.

Backwards through the graph, from the outputs:

* a channel is *live* if it varies with the input and something live reads it with a weight other
  than zero. Everything else about the conversion follows from these sets. They are a fixed point:
  a live output of a layer has, by definition, an input that varies, which is live in turn.
* a channel is *held* if it is constant but its value must be there: as an operand of a sum whose
  other operand is live, as an output of the model, or as a carrier in front of a convolution with
  zero padding (see `fedsys.pruning.dense.constants`). The filter of a held channel is zero, its
  bias is the constant.
* a channel is *tied* if it stays only because tensors must fit each other: operands of a sum have
  equal channels, the groups of a grouped convolution equal sizes. It computes zero. With
  ``Coupling.SCATTER`` sums tie nothing: operands are brought into place by an index.

An operand of a sum or product that has no live channel is *cut*: it becomes a constant, and the
block that computed it disappears. If the constant is neutral, so does the operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from fedsys.errors import ModelError
from fedsys.pruning.dense.constants import Borders, Fixed, Reading, dead_layers
from fedsys.pruning.dense.ops import Kind, Op, inputs_read_by


class Coupling(Enum):
    """How operands of sums and products that live on different channels come together."""

    GROUP = "group"
    SCATTER = "scatter"


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """What the outputs of a model depend on.

    Attributes:
        live: Channels that vary and matter, bool of ``(C,)`` by name of the node.
        held: Channels that are constant and whose value is read.
        carriers: For a padded convolution, the input channel of each group that carries the
            contributions of all constants; -1 for a group without.
        cut: Pairs (operation, operand) where the operand is replaced by a constant.
    """

    live: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)
    carriers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cut: set[tuple[str, str]] = field(default_factory=set)

    def read(self, name: str) -> Tensor:
        """Return the channels of node `name` whose values are read."""
        return self.live[name] | self.held[name]


def needs(reading: Reading, coupling: Coupling) -> Needs:
    """Find the live and held channels of every tensor.

    Raises:
        ModelError: The output does not depend on the input; names the layers without weights.
    """
    need = Needs()
    for name, fixed in reading.fixed.items():
        need.live[name] = torch.zeros_like(fixed.where)
        need.held[name] = torch.zeros_like(fixed.where)
    for name, op in reversed(reading.ops.items()):
        if op.kind is Kind.OUTPUT:
            _refuse_constant_output(reading, op)
        _ask(reading, coupling, need, name, op)
    return need


def _ask(reading: Reading, coupling: Coupling, need: Needs, name: str, op: Op) -> None:
    """Enter what `op` needs of its inputs to give what is needed of it."""
    inputs = [node.name for node in op.inputs if node.name in reading.fixed]
    if op.kind in (Kind.OUTPUT, Kind.OPAQUE):
        for source in inputs:
            _require(need, reading.fixed[source], source, torch.tensor(True))
        return
    if not op.channels or op.kind in (Kind.INPUT, Kind.CONSTANT):
        return
    wanted = need.read(name)
    match op.kind:
        case Kind.MIX:
            _ask_mix(reading, need, name, op)
        case Kind.SCALE | Kind.SAME:
            _require(need, reading.fixed[inputs[0]], inputs[0], wanted)
        case Kind.NORM:
            groups = wanted.view(op.groups, -1).any(1)
            wanted = groups.repeat_interleave(op.channels // op.groups)
            _require(need, reading.fixed[inputs[0]], inputs[0], wanted)
        case Kind.ADD | Kind.MUL:
            _ask_operands(reading, coupling, need, op, inputs)
        case Kind.CAT:
            where, sizes = reading.fixed[name].where, [len(need.live[source]) for source in inputs]
            for asked, wants in ((need.live, wanted & ~where), (need.held, wanted & where)):
                if bool(wants.any()):
                    for source, part in zip(inputs, torch.split(wants, sizes), strict=True):
                        asked[source] |= part
        case Kind.FLATTEN:
            channels = len(need.live[inputs[0]])
            _require(need, reading.fixed[inputs[0]], inputs[0], wanted.view(channels, -1).any(1))


def _require(need: Needs, fixed: Fixed, source: str, wanted: Tensor) -> None:
    if fixed.varies:
        need.live[source] |= wanted
        return
    need.live[source] |= wanted & ~fixed.where
    need.held[source] |= wanted & fixed.where


def _ask_mix(reading: Reading, need: Needs, name: str, op: Op) -> None:
    source = op.inputs[0].name
    fixed = reading.fixed[source]
    read = inputs_read_by(op, need.live[name])
    need.live[source] |= read & ~fixed.where
    if reading.borders is Borders.MAP or not op.zero_border or not bool(fixed.nonzero.any()):
        return
    bent = inputs_read_by(op, need.live[name], border=True)
    disturbing = (bent & fixed.nonzero).view(op.groups, -1).any(1)
    height = fixed.value.reshape(len(read), -1).abs().amax(1).view(op.groups, -1)
    best = height.argmax(1) + torch.arange(op.groups) * height.shape[1]
    carriers = torch.where(disturbing, best, -1)
    need.carriers[name] = tuple(carriers.tolist())
    need.held[source][carriers[disturbing]] = True


def _ask_operands(
    reading: Reading, coupling: Coupling, need: Needs, op: Op, inputs: list[str]
) -> None:
    name = op.node.name
    live, held = need.live[name], need.held[name]
    varies = {source: bool((live & ~reading.fixed[source].where).any()) for source in inputs}
    # A uniform constant has no size of its own: what is left must have that of the result.
    whole = [source for source in inputs if reading.ops[source].shape[2:] == op.shape[2:]]
    sized = reading.borders is Borders.MAP or any(varies[source] for source in whole)
    for source in inputs:
        fixed = reading.fixed[source]
        if not varies[source] and sized and any(varies.values()):
            need.cut.add((name, source))
            continue
        need.live[source] |= live & ~fixed.where
        # a constant product may have an operand that varies: times zero, so it may be anything
        if coupling is Coupling.GROUP or not varies[source]:
            need.held[source] |= (live | held) & fixed.where


def _refuse_constant_output(reading: Reading, op: Op) -> None:
    if not reading.is_constant(op):
        return
    dead = dead_layers(reading)
    named = ", ".join(dead[:8]) + (", …" if len(dead) > 8 else "")
    reason = f"all weights that would pass the input on are zero in {named}" if dead else "it is"
    raise ModelError(
        f"the output of the pruned model does not depend on its input: {reason}; "
        "prune less, or leave these layers out"
    )


# --------------------------------------------------------------------------------------------------
# Channels that stay


Multiples = int | Mapping[str, int]
"""What numbers of channels are rounded up to: all alike, or by the name of the layer (others 1)."""


def keep(
    reading: Reading, need: Needs, coupling: Coupling, round_to: Multiples = 1
) -> Mapping[str, Tensor]:
    """Find the channels that stay: those that are read, and the fewest that fit them.

    Args:
        reading: The model.
        need: Its live and held channels.
        coupling: Whether operands of sums and products are tied.
        round_to: Let layers keep a multiple of this many channels where they have that many.

    Returns:
        Bool of ``(C,)`` by name, for the nodes that the output needs; others are absent.
    """
    kept = {name: need.read(name) for name in need.live}
    used = settle(reading, need.cut, coupling, kept)
    while round_to != 1 and _round(reading, used, kept, round_to):
        used = settle(reading, need.cut, coupling, kept)
    return {name: kept[name] for name in used if name in kept}


def settle(
    reading: Reading, cut: set[tuple[str, str]], coupling: Coupling, kept: dict[str, Tensor]
) -> list[str]:
    """Let `kept` grow until everything fits; return the nodes in use, in order."""
    filled: set[str] = set()
    while True:
        before = int(torch.cat(list(kept.values())).sum())
        used = set()
        for name, op in reversed(reading.ops.items()):
            if op.kind not in (Kind.OUTPUT, Kind.INPUT) and name not in used:
                continue
            used.add(name)
            inputs = [n.name for n in op.inputs if n.name in kept and (name, n.name) not in cut]
            _fit(op, kept, name, inputs, coupling)
            filled.update(n for n in inputs if n not in filled and bool(kept[n].any()))
            for source in inputs:
                if source not in filled and op.kind is not Kind.CAT:
                    kept[source] = torch.arange(len(kept[source])) == 0
                    filled.add(source)  # a tensor has at least one channel
            used.update(filled.intersection(inputs))
            used.update(n.name for n in op.node.all_input_nodes if n.name not in kept)
        if before == int(torch.cat(list(kept.values())).sum()):
            return [name for name in reading.ops if name in used]


def _fit(op: Op, kept: dict[str, Tensor], name: str, inputs: list[str], coupling: Coupling) -> None:
    """Let the channels of the inputs and the output of one operation grow until they fit.

    Tensors are replaced, never changed: what is tied shares one.
    """
    match op.kind:
        case Kind.INPUT:
            kept[name] = torch.ones_like(kept[name])
        case Kind.OPAQUE:
            if name in kept:
                kept[name] = torch.ones_like(kept[name])
        case Kind.ADD | Kind.MUL if coupling is Coupling.SCATTER:
            pass
        case Kind.SCALE | Kind.SAME | Kind.ADD | Kind.MUL | Kind.NORM:
            together = kept[name]
            for source in inputs:
                if kept[source] is not together:
                    together = together | kept[source]
            if op.kind is Kind.NORM:
                groups = together.view(op.groups, -1).any(1)
                together = groups.repeat_interleave(op.channels // op.groups)
            for each in (name, *inputs):
                kept[each] = together
        case Kind.CAT:
            joined = torch.cat([kept[source] for source in inputs])
            if torch.equal(joined, kept[name]):
                return
            kept[name] = joined | kept[name]
            parts = torch.split(kept[name], [len(kept[source]) for source in inputs])
            kept.update(zip(inputs, parts, strict=True))
        case Kind.FLATTEN:
            source = inputs[0]
            kept[source] = kept[source] | kept[name].view(len(kept[source]), -1).any(1)
            kept[name] = kept[source].repeat_interleave(op.channels // len(kept[source]))
        case Kind.MIX if op.groups > 1:
            _balance(op, kept, name, inputs[0])


def _balance(op: Op, kept: dict[str, Tensor], name: str, source: str) -> None:
    """Give all groups that stay the same number of inputs and the same number of outputs."""
    inputs, outputs = (kept[each].view(op.groups, -1) for each in (source, name))
    stays = inputs.any(1) | outputs.any(1)
    kept[source], kept[name] = _filled(inputs, stays), _filled(outputs, stays)


def _filled(side: Tensor, stays: Tensor) -> Tensor:
    """Add the first channels missing, ``(groups, per group)``, to as many as the most have."""
    count = side.sum(1)
    missing = torch.where(stays, count.max().clamp(min=1) - count, 0)
    rank = (~side).cumsum(1)  # the first channel that is not there has rank 1
    return (side | (~side & (rank <= missing[:, None]))).flatten()


def _round(reading: Reading, used: list[str], kept: dict[str, Tensor], round_to: Multiples) -> bool:
    """Add channels to layers whose number is no multiple of `round_to`; say whether any was."""
    changed = False
    for name in used:
        op = reading.ops[name]
        if op.kind is not Kind.MIX or op.groups > 1:
            continue
        multiple = round_to if isinstance(round_to, int) else round_to.get(op.name, 1)
        now = int(kept[name].sum())
        missing = min(math.ceil(now / multiple) * multiple, op.channels) - now
        if missing > 0:
            absent = ~kept[name]
            kept[name] = ~(absent & (absent.cumsum(0) > missing))
            changed = True
    return changed
