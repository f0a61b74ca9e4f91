"""The dense model of a plan: smaller layers of the same types, in a graph of the same operations.

With `K` the channels that stay and `c` the constants of the input, a layer ``y = W x + b`` becomes
``y_K = W_KK x_K + (b + W c)_K``; columns of constant channels that stay for others become zero.
Behind zero padding the constants act through the column of their carrier `k` instead,
``W'_ok = sum over i of W_oi c_i / c_k``, which is exact at every pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.pruning.dense.channels import Needs
from fedsys.pruning.dense.cloning import clone, copied
from fedsys.pruning.dense.constants import Borders, Reading
from fedsys.pruning.dense.ops import Conv, Kind, Op


def rebuild(reading: Reading, need: Needs, kept: Mapping[str, Tensor]) -> fx.GraphModule:
    """Return the model that computes what ``reading.graph`` computes, on the channels `kept`.

    Parameters are new: in float64 where constants may have gone into them, else in the type that
    they had. Modules keep their names. The model is in evaluation mode.
    """
    builder = _Builder(reading, need, kept)
    for name, op in reading.ops.items():
        if op.kind is Kind.OUTPUT:
            builder.graph.output(builder.arguments(op.node.args[0]))
        elif name in kept or _is_used(op, builder):
            builder.built[op.node] = builder.build(op)
    for node in reversed(list(builder.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            builder.graph.erase_node(node)
    used = {str(n.target) for n in builder.graph.nodes if n.op in ("call_module", "get_attr")}
    parts = {name: part for name, part in builder.parts.items() if name in used}
    model = fx.GraphModule(parts, builder.graph, class_name=type(reading.graph).__name__)
    return model.eval()


def _is_used(op: Op, builder: _Builder) -> bool:
    """Say whether a node without channels can be computed: sizes and tuples."""
    return not op.channels and all(n in builder.built for n in op.node.all_input_nodes)


@dataclass(slots=True)
class _Builder:
    """The new graph while it grows: old nodes to new nodes, names to modules and tensors."""

    reading: Reading
    need: Needs
    kept: Mapping[str, Tensor]
    graph: fx.Graph = field(default_factory=fx.Graph)
    built: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def arguments(self, old: Any) -> Any:
        return fx.node.map_arg(old, lambda node: self.built[node])

    def build(self, op: Op) -> fx.Node:
        match op.kind:
            case Kind.INPUT:
                return self.graph.placeholder(str(op.node.target))
            case Kind.CONSTANT:
                value = _attribute(self.reading.graph, str(op.node.target))
                return self.constant(value[:, self.kept[op.node.name]], self._own_name(op))
            case Kind.MIX:
                return self._mix(op)
            case Kind.SCALE | Kind.NORM:
                return self._call(op, _sliced(op, self.kept[op.node.name]))
            case Kind.ADD | Kind.MUL:
                return self._elementwise(op)
            case Kind.CAT:
                return self._concatenate(op)
            case _ if op.module is not None:
                return self._call(op, _copied(op.module))
            case _:
                return self._copy(op)

    def constant(self, value: Tensor, name: str = "") -> fx.Node:
        """Enter a buffer and return the node that reads it."""
        if not name:  # a model that was converted before has such names already
            numbers = (f"constant_{number}" for number in itertools.count())
            name = next(n for n in numbers if n not in self.parts and n not in self.taken)
        self.parts[name] = value.detach().clone()
        return self.graph.create_node("get_attr", name)

    def _own_name(self, op: Op) -> str:
        """Return the name of an attribute; none if it is of a layer that may become smaller."""
        owner = str(op.node.target).rpartition(".")[0]
        called = {other.name for other in self.reading.ops.values() if other.module is not None}
        return "" if owner in called else str(op.node.target)

    @property
    def taken(self) -> set[str]:
        """Names of attributes that the old graph reads."""
        return {str(n.target) for n in self.reading.graph.graph.nodes if n.op == "get_attr"}

    def _call(self, op: Op, module: nn.Module) -> fx.Node:
        self.parts[op.name] = module
        args, kwargs = self.arguments(op.node.args), self.arguments(op.node.kwargs)
        return self.graph.call_module(op.name, args, kwargs)

    def _copy(self, op: Op) -> fx.Node:
        if op.node.op == "get_attr":
            value = _attribute(self.reading.graph, str(op.node.target))
            if torch.is_tensor(value):
                return self.constant(value, self._own_name(op))
            self.parts[str(op.node.target)] = value
        node = self.graph.node_copy(op.node, lambda old: self.built[old])
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        return node

    # -------------------------------------------------------------------------------- layers

    def _mix(self, op: Op) -> fx.Node:
        rows, columns = self.kept[op.node.name], self.kept[op.inputs[0].name]
        if op.groups == 1:
            first, read = rows, columns | self.reading.fixed[op.inputs[0].name].nonzero
        else:  # groups are cut when they are complete
            first, read = torch.ones_like(rows), torch.ones_like(columns)
        weight, bias, bend = self._folded(op, first, read)
        weight = _cut_weight(op, weight, rows[first], columns[read])
        bias = bias[rows[first]]
        layer = clone(op.layer)
        if isinstance(layer, Conv):
            layer.in_channels, layer.out_channels = int(columns.sum()), int(rows.sum())
            layer.groups = layer.in_channels // weight.shape[1]
        else:
            assert isinstance(layer, nn.Linear)
            layer.in_features, layer.out_features = int(columns.sum()), int(rows.sum())
        layer.weight = nn.Parameter(weight)
        needs_bias = op.layer.bias is not None or bool(bias.any())
        layer.bias = nn.Parameter(bias) if needs_bias else None
        node = self._call(op, layer)
        if bend is None:
            return node
        return self.graph.call_function(torch.add, (node, self.constant(bend[:, rows[first]])))

    def _folded(
        self, op: Op, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weight, bias and constant map of the outputs `rows` of a layer.

        Outputs that are not live have no weights, and no bias unless they are held. The weight is
        that on the inputs `columns`, which are all that give something.
        """
        given = self.reading.fixed[op.inputs[0].name]
        where, value = given.where[columns], given.value[columns]
        live = self.need.live[op.node.name][rows]
        new = _selected(op.layer.weight.detach(), rows, columns)
        if not bool(live.all()):
            new[~live] = 0.0
        bias = torch.zeros(len(live), dtype=torch.float64)
        if op.layer.bias is not None:
            bias = torch.where(live, op.layer.bias.detach()[rows], bias)
        bend = None
        if bool(where.any()):
            new = new.double()
            fixed_part, new = _columns(op, new, where), _columns(op, new, ~where)
            if self.reading.borders is Borders.MAP and value.dim() > 1:
                tensors = {"weight": fixed_part, "bias": torch.zeros_like(bias)}
                bend = functional_call(op.layer, tensors, value.unsqueeze(0))
            else:
                carriers = self._carriers(op, columns)
                new = new + _carried(op, fixed_part, value, carriers)
                bias = bias + _uniform_part(op, fixed_part, value.reshape(-1), carriers)
        held = self.need.held[op.node.name][rows]
        if bend is None and not bool(held.any()):
            return new, bias, None
        value = self.reading.fixed[op.node.name].value[rows]
        if bend is None:
            bend = torch.zeros_like(value).unsqueeze(0)
        bend = bend + value * held.view(-1, *(1 for _ in value.shape[1:]))
        level = bend.reshape(len(bias), -1)[:, 0]  # what is uniform of a map belongs to the bias
        rest = bend - level.view(1, -1, *(1 for _ in value.shape[1:]))
        rounding = 1e-13 * bend.abs().amax()  # a uniform map, summed in float64 in another order
        return new, bias + level, rest if bool((rest.abs() > rounding).any()) else None

    def _carriers(self, op: Op, columns: Tensor) -> tuple[int, ...]:
        """Return the carrier of each group, counted among `columns`; -1 for none."""
        carriers = self.need.carriers.get(op.node.name, (-1,) * op.groups)
        return tuple(int(columns[:each].sum()) if each >= 0 else -1 for each in carriers)

    # -------------------------------------------------------------------------------- operands

    def _elementwise(self, op: Op) -> fx.Node:
        """A sum or product, with constants in place of operands that were cut."""
        name = op.node.name
        operands = []
        for old in op.inputs:
            if (name, old.name) not in self.need.cut:
                operands.append(self._aligned(op, old))
                continue
            value = self.reading.fixed[old.name].value[self.kept[name]].unsqueeze(0)
            neutral = 0.0 if op.kind is Kind.ADD else 1.0
            read = self.need.read(name)[self.kept[name]]
            second = old is op.inputs[1]
            if bool((value[:, read] == neutral).all()) and (second or not _subtracts(op)):
                return self._aligned(op, op.inputs[0 if second else 1])
            operands.append(self.constant(value))
        function = torch.mul if op.kind is Kind.MUL else torch.add
        return self.graph.call_function(torch.sub if _subtracts(op) else function, tuple(operands))

    def _aligned(self, op: Op, old: fx.Node) -> fx.Node:
        """Return the operand `old` with the channels of `op`; constants not held are filled in."""
        wanted, have, node = self.kept[op.node.name], self.kept[old.name], self.built[old]
        unheld = self.reading.fixed[old.name].where & ~self.need.held[old.name]
        if torch.equal(have, wanted) and not bool((self.need.read(op.node.name) & unheld).any()):
            return node
        layout, have = have, have & ~unheld
        missing = int((wanted & ~have).sum())
        position = torch.where(have, layout.cumsum(0) - 1, int(layout.sum()))[wanted]
        fixed = self.reading.fixed[old.name]
        spatial = fixed.value.dim() - 1
        if missing:
            padding = (0, 0) * spatial + (0, 1)
            node = self.graph.call_function(F.pad, (node, padding))
        node = self.graph.call_function(torch.index_select, (node, 1, self.constant(position)))
        fill = fixed.value[wanted].clone()
        fill[have[wanted]] = 0.0
        if bool(fill.any()):
            return self.graph.call_function(torch.add, (node, self.constant(fill.unsqueeze(0))))
        return node

    def _concatenate(self, op: Op) -> fx.Node:
        parts = [self.built[n] for n in op.inputs if n.name in self.kept and n in self.built]
        if len(parts) == 1:
            return parts[0]
        return self.graph.call_function(torch.cat, (parts, 1))


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, attribute = path.rpartition(".")
    return getattr(root.get_submodule(parent), attribute)


def _subtracts(op: Op) -> bool:
    return "sub" in getattr(op.node.target, "__name__", "")


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module; never in place, because a cut may let two operations read one tensor."""
    new = copied(module)
    if getattr(new, "inplace", False):
        new.inplace = False  # type: ignore[assignment]
    return new


def _sliced(op: Op, kept: Tensor) -> nn.Module:
    """Return a normalisation or PReLU with the parameters of the channels `kept`."""
    assert op.module is not None
    new, count = copied(op.module), int(kept.sum())
    if isinstance(new, nn.GroupNorm):
        per_group = new.num_channels // new.num_groups
        new.num_channels, new.num_groups = count, count // per_group
    elif isinstance(new, nn.PReLU):
        new.num_parameters = 1 if new.num_parameters == 1 else count
    elif isinstance(new, _BatchNorm):
        new.num_features = count
    if count == len(kept):
        return new
    for key, tensor in (*new.named_parameters(), *new.named_buffers()):
        if tensor.dim() == 1 and len(tensor) == len(kept):
            part = tensor.detach()[kept]
            setattr(new, key, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)
    return new


# --------------------------------------------------------------------------------------------------
# Weights of convolutions and linear layers, with groups: input `i` of group `g` is column
# `i % (in / groups)` of the rows of `g`


def _selected(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return a copy of some rows and columns of a weight."""
    whole = weight
    for dimension, chosen in enumerate((rows, columns)):
        if not bool(chosen.all()):
            weight = weight.index_select(dimension, chosen.nonzero().flatten())
    return weight.clone() if weight is whole else weight


def _columns(op: Op, values: Tensor, inputs: Tensor) -> Tensor:
    """Return the weight `values` with zeros in the columns of all but `inputs`."""
    mask = inputs.view(op.groups, 1, -1, *(1 for _ in values.shape[2:]))
    return (values.view(op.groups, -1, *values.shape[1:]) * mask).flatten(0, 1)


def _uniform_part(op: Op, values: Tensor, constants: Tensor, carriers: tuple[int, ...]) -> Tensor:
    """Return what uniform inputs `constants` add to each output of groups without a carrier."""
    taps = values.flatten(2).sum(2) if values.dim() > 2 else values
    added = taps.view(op.groups, -1, taps.shape[1]) @ constants.view(op.groups, -1, 1)
    return (added[..., 0] * (torch.tensor(carriers) < 0)[:, None]).flatten()


def _carried(op: Op, values: Tensor, constants: Tensor, carriers: tuple[int, ...]) -> Tensor:
    """Return a weight that has the effect of all constant inputs in the carriers' columns."""
    grouped = values.view(op.groups, -1, *values.shape[1:])
    result = torch.zeros_like(grouped)
    heights = constants.reshape(op.groups, -1)
    for group, carrier in enumerate(carriers):
        if carrier >= 0:  # it takes over what all constants do, at the border and inside
            column = carrier % heights.shape[1]
            ratio = heights[group] / heights[group, column]
            result[group, :, column] = torch.einsum("oi...,i->o...", grouped[group], ratio)
    return result.flatten(0, 1)


def _cut_weight(op: Op, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the weight of the rows and columns that stay, shape ``(out, in / groups, …)``.

    Without groups `values` has only these rows already.
    """
    if op.groups == 1:
        return values if bool(columns.all()) else values[:, columns]
    grouped = values.view(op.groups, -1, *values.shape[1:])
    by_row, by_column = rows.view(op.groups, -1), columns.view(op.groups, -1)
    parts = [
        grouped[group][by_row[group]][:, by_column[group]]
        for group in by_row.any(1).nonzero().flatten().tolist()
    ]
    return torch.cat(parts)
