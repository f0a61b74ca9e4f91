"""The plan of a conversion: what would go, and why, before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ConfigError, ModelError
from fedsys.models.graph import interpreted, trace_evaluation
from fedsys.pruning.dense.channels import Coupling, Multiples, Needs, keep, needs
from fedsys.pruning.dense.cloning import clone_model
from fedsys.pruning.dense.constants import Borders, Reading, read
from fedsys.pruning.dense.ops import Kind
from fedsys.pruning.dense.rebuild import rebuild
from fedsys.pruning.dense.simplify import baked, simplify
from fedsys.randomness import Address
from fedsys.transport.tensors import INTEGERS

_MUTE = (
    "every input gives the same output, because the signs of weights close activations; these are "
    "kept as if they were open"
)
"""Nothing would be left otherwise, and an untrained model is of use to look at its architecture."""


@dataclass(frozen=True, slots=True)
class LayerEdit:
    """What a plan does to one convolution or linear layer.

    Attributes:
        name: Path of the layer.
        before: Number of its outputs.
        after: Number of its outputs that stay; 0 if the layer goes.
        constant: Outputs that do not depend on the input, and go.
        unread: Outputs that nothing depends on, and go.
        held: Outputs that stay to give a constant.
        tied: Outputs that stay only because of other layers in their group.
    """

    name: str
    before: int
    after: int
    constant: int
    unread: int
    held: int
    tied: int

    def __str__(self) -> str:
        went = f"{self.constant} constant and {self.unread} unread removed"
        if not self.after:
            return f"{self.name}: {self.before} -> 0, removed"
        stay = [f"{n} {why}" for n, why in ((self.held, "held"), (self.tied, "tied")) if n]
        extra = f"; {' and '.join(stay)} stay" if stay else ""
        return f"{self.name}: {self.before} -> {self.after} ({went}{extra})"


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """All edits of one conversion, before they are done.

    Attributes:
        reading: The model, understood, with its constants.
        need: Live and held channels of every tensor.
        kept: Channels that stay, bool of ``(C,)`` by name of the node; absent nodes go.
        groups: Edits of the layers; layers of one group have equal channels.
        blocks: Names of sums and products one operand of which becomes a constant.
        note: What a person should know besides; empty if there is nothing.
    """

    reading: Reading
    need: Needs
    kept: Mapping[str, Tensor]
    groups: tuple[tuple[LayerEdit, ...], ...]
    blocks: tuple[str, ...]
    note: str = ""

    @property
    def edits(self) -> list[LayerEdit]:
        """The edits of all layers, group by group."""
        return [edit for group in self.groups for edit in group]

    def __str__(self) -> str:
        before, after = (sum(e.before for e in self.edits), sum(e.after for e in self.edits))
        lines = [
            f"{before - after} of {before} channels go, in {len(self.edits)} layers and "
            f"{len(self.groups)} groups"
        ]
        for number, group in enumerate(self.groups, start=1):
            lines += [f"{number:4}  {group[0]}", *(f"      {edit}" for edit in group[1:])]
        lines += [f"      {name}: an operand is constant, its block goes" for name in self.blocks]
        lines += [f"      {self.note}"] if self.note else []
        return "\n".join(lines)

    def rounded(self, coupling: Coupling, round_to: Multiples) -> Removal:
        """Return this plan with channels of zeros added, as for `make_plan`."""
        kept = keep(self.reading, self.need, coupling, round_to)
        return replace(self, kept=kept, groups=_groups(self.reading, self.need, kept))

    def apply(self) -> fx.GraphModule:
        """Return the dense model of this plan in evaluation; some parts may be in float64."""
        return rebuild(self.reading, self.need, self.kept)


def make_plan(
    model: nn.Module,
    inputs: Tensor,
    *,
    borders: Borders = Borders.CARRIER,
    coupling: Coupling = Coupling.GROUP,
    round_to: Multiples = 1,
) -> Removal:
    """Find which channels of `model` can go, by the zeros of its parameters.

    Args:
        model: Any model that `fedsys.models.graph.trace` traces.
        inputs: A batch of inputs, ``(rows, …)``.
        borders: What to do where constants meet zero padding.
        coupling: What to do where operands of sums have different channels.
        round_to: Keep a multiple of this many channels, where a layer has that many; or so by the
            name of the layer.

    Raises:
        ModelError: The model does not trace or run on such inputs, or its output does not depend
            on its input.
        ConfigError: For a `round_to` below 1.
    """
    return plan_graph(
        evaluation_graph(clone_model(model), inputs),
        inputs,
        borders=borders,
        coupling=coupling,
        round_to=round_to,
    )


def plan_graph(
    graph: fx.GraphModule,
    inputs: Tensor,
    *,
    borders: Borders,
    coupling: Coupling,
    round_to: Multiples,
) -> Removal:
    """Find which channels can go of a model that `evaluation_graph` returned.

    Arguments and errors are those of `make_plan`.
    """
    for multiple in [round_to] if isinstance(round_to, int) else round_to.values():
        if multiple < 1:
            raise ConfigError.of("variants.round_to", multiple, "must be at least 1")
    try:
        reading = read(graph, inputs.double(), borders)
        note = _MUTE if _is_constant(reading) else ""
        if note:
            reading = read(graph, inputs.double(), borders, closing=False)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the model does not run on an input of shape {tuple(inputs.shape[1:])}: {error}"
        ) from error
    if not isinstance(reading.output, Tensor):
        raise ModelError(
            f"the model returns a {type(reading.output).__name__}; it must return one tensor"
        )
    need = needs(reading, coupling)
    kept = keep(reading, need, coupling, round_to)
    blocks = tuple(sorted({op for op, _ in need.cut if op in kept}))
    return Removal(reading, need, kept, _groups(reading, need, kept), blocks, note)


def _is_constant(reading: Reading) -> bool:
    ends = [op for op in reading.ops.values() if op.kind is Kind.OUTPUT]
    return any(reading.is_constant(op) for op in ends)


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor] | None) -> nn.Module:
    """Return a copy of `model` on the CPU in evaluation, zero where a mask is zero.

    Parameters are new, but those that no mask changes share the memory of `model`, as buffers do.

    Raises:
        ConfigError: A mask is not of a parameter, or not of its shape.
    """
    masks, named = masks or {}, dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in named:
            raise ConfigError.of("masks", name, "must be the name of a parameter of the model")
        if mask.shape != named[name].shape:
            rule = f"must be {tuple(named[name].shape)}, the shape of the parameter"
            raise ConfigError.of(f"masks[{name}].shape", tuple(mask.shape), rule)
    tensors = {id(buffer): buffer.cpu() for buffer in model.buffers()}
    for name, parameter in named.items():
        value = parameter.detach().cpu()
        if name in masks:
            value = _masked(value, masks[name].cpu().bool())
        tensors[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    return clone_model(model, tensors).eval()


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return ``torch.where(mask, values, 0.0)``: as products of integers in two thirds the time."""
    return (values.view(INTEGERS[values.element_size()]) * mask).view(values.dtype)


def probes(example: Tensor | Sequence[int]) -> Tensor:
    """Return inputs to compare models on: random, of extreme contrast, and zero.

    Args:
        example: A batch of inputs, or the shape of one input without the batch.
    """
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else tuple(example)
    draws = torch.randn((2, *shape), generator=Address(0).torch("probes"))
    return torch.stack([draws[0], 8.0 * draws[1].sign(), torch.zeros(shape)])


def evaluation_graph(
    model: nn.Module, example: Tensor | Sequence[int] | None = None
) -> fx.GraphModule:
    """Trace `model` and return the graph of its evaluation mode, simplified.

    Args:
        model: The caller's own: the graph uses its modules, not copies, unless some have
            parametrised weights (`fedsys.pruning.dense.simplify.baked`).
        example: A batch of inputs, or the shape of one without the batch, for a forward that asks
            for sizes (`fedsys.models.graph.trace`).

    Raises:
        ModelError: The model does not trace.
    """
    graph = trace_evaluation(baked(model.eval()), example)
    simplify(graph)
    return interpreted(graph, graph.graph, type(model).__name__)


def _groups(
    reading: Reading, need: Needs, kept: Mapping[str, Tensor]
) -> tuple[tuple[LayerEdit, ...], ...]:
    """Collect the layers whose outputs must have equal channels, in order of computation."""
    group_of: dict[str, str] = {}

    def root(name: str) -> str:
        while group_of.setdefault(name, name) != name:
            name = group_of[name]
        return name

    for name, op in reading.ops.items():
        tied = op.kind in (Kind.SCALE, Kind.SAME, Kind.NORM, Kind.ADD, Kind.MUL)
        if tied or (op.kind is Kind.MIX and op.groups > 1):
            for source in op.inputs:
                if (name, source.name) not in need.cut and source.name in kept and name in kept:
                    group_of[root(source.name)] = root(name)
    groups: dict[str, list[LayerEdit]] = {}
    for name, op in reading.ops.items():
        if op.kind is Kind.MIX:
            groups.setdefault(root(name), []).append(_edit(reading, need, kept, name))
    return tuple(tuple(group) for group in groups.values())


def _edit(reading: Reading, need: Needs, kept: Mapping[str, Tensor], name: str) -> LayerEdit:
    op, where = reading.ops[name], reading.fixed[name].where
    stays = kept.get(name, torch.zeros_like(where))
    return LayerEdit(
        name=op.name,
        before=op.channels,
        after=int(stays.sum()),
        constant=int((where & ~stays).sum()),
        unread=int((~where & ~stays).sum()),
        held=int((need.held[name] & stays).sum()),
        tied=int((stays & ~need.read(name)).sum()),
    )
