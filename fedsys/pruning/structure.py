"""What the architecture says about channels: which go together, their scales, their costs.

Removing a channel saves what its group computes for it (every layer whose outputs only go
together) and what the readers of the group spend on it. So the cost of a channel of layer L is the
cost of the whole group and of the readers' weights on it, divided by the channels of L. Counted in
elements of maps it is what the channel writes: one map for each layer, activation, pooling and sum
that its group passes through. A depthwise layer has few multiply-accumulates and large maps, and
its time goes with these.

Costs are those of the unpruned model: a function of the architecture and the shape of inputs alone,
so that a run that is resumed, and a model pruned in one step or in many, see the same costs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fedsys.config.pruning import CHANNEL_METHODS, PruningConfig
from fedsys.config.targets import call_target
from fedsys.errors import ConfigError, did_you_mean
from fedsys.models.graph import trace, trace_evaluation
from fedsys.models.measure import measure
from fedsys.pruning.dense.ops import IDENTITIES, Kind, Op, describe
from fedsys.pruning.dense.removal import masked_copy
from fedsys.pruning.scores import coupled_layers
from fedsys.training.penalty import channel_scales

_WEIGHED: Mapping[str, Callable[[Op], int]] = {
    "macs": lambda op: op.layer.weight.numel() * math.prod(op.shape[2:]),
    "params": lambda op: op.layer.weight.numel(),
}
"""What a layer costs for its weights."""

_ELEMENTS = "elements"
_CHANNEL_COSTS = (*_WEIGHED, _ELEMENTS)
_WRITTEN = (Kind.MIX, Kind.SAME, Kind.NORM, Kind.ADD, Kind.MUL, Kind.CAT)
"""Operations that write their outputs to memory; BatchNorm is folded where a variant answers."""

_TYING = (Kind.SCALE, Kind.SAME, Kind.NORM, Kind.ADD, Kind.MUL)


def structure(
    pruning: PruningConfig, model: nn.Module, input_shape: Sequence[int]
) -> dict[str, Any]:
    """Return what `fedsys.pruning.sparsify.one_shot` is to know of a model, or of its scores.

    Args:
        pruning: Its method and cost say what is needed; nothing is, unless channels are scored.
        model: Any model that `fedsys.models.graph.trace` traces.
        input_shape: Of one input without the batch.

    Raises:
        ModelError: The model does not trace or run on such an input.
    """
    if pruning.method == "own":
        return {"own": functools.partial(call_target, pruning.score or {}, "pruning.score")}
    if pruning.method not in CHANNEL_METHODS:
        return {}
    found: dict[str, Any] = {"groups": coupled_layers(model, input_shape)}
    if any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        found["blocks"] = normed_blocks(model, input_shape)
    if pruning.method == "group_norm":
        found["scales"] = channel_scales(trace(model, input_shape))
    if pruning.cost != "none":
        costs = channel_costs(model, input_shape, pruning.cost)
        found |= {"costs": costs, "cost_weight": pruning.cost_weight}
    return found


def normed_blocks(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Return how many channels of each layer a GroupNorm behind it normalises together.

    A channel of zeros still counts in the mean and the variance of its group, so only whole groups
    can be removed without changing what the others are.

    Args:
        model: Any model that `fedsys.models.graph.trace` traces.
        input_shape: Of one input without the batch.

    Raises:
        ModelError: The model does not trace or run on such an input.
    """
    ops = _operations(model, input_shape)
    groups, sizes = _groups(ops), dict[str, int]()
    for name, op in ops.items():
        if op.kind is Kind.NORM:
            size = op.channels // op.groups
            sizes[groups[name]] = max(size, sizes.get(groups[name], 1))
    mixes = {name: op for name, op in ops.items() if op.kind is Kind.MIX}
    return {op.name: sizes[groups[name]] for name, op in mixes.items() if groups[name] in sizes}


def channel_costs(model: nn.Module, input_shape: Sequence[int], cost: str) -> dict[str, float]:
    """Return what one channel costs, by the name of its layer.

    Args:
        model: Any model that `fedsys.models.graph.trace` traces; its weights do not count.
        input_shape: Of one input without the batch.
        cost: ``macs``: multiply-accumulates of one example. ``params``: weights of convolutions
            and linear layers. ``elements``: elements of maps of one example, BatchNorm folded.

    Raises:
        ConfigError: There is no such cost.
        ModelError: The model does not trace or run on such an input.
    """
    if cost not in _CHANNEL_COSTS:
        rule = f"must be one of {', '.join(_CHANNEL_COSTS)}"
        raise ConfigError.of("pruning.cost", cost, rule, did_you_mean(cost, _CHANNEL_COSTS))
    ops = _operations(model, input_shape)
    groups = _groups(ops)
    totals: defaultdict[str, float] = defaultdict(float)
    outputs: dict[str, Mapping[str, int]] = {}
    for name, op in ops.items():
        outputs[name] = _channels(op, groups[name], ops, [outputs[n.name] for n in op.inputs])
        if cost == _ELEMENTS:
            for group, channels in outputs[name].items():
                totals[group] += _map_size(op) * channels
        elif op.kind is Kind.MIX:
            totals[groups[name]] += _WEIGHED[cost](op)
            if op.groups == 1:  # else its own outputs go with what it reads
                read = outputs[op.inputs[0].name]
                for group, channels in read.items():
                    totals[group] += _WEIGHED[cost](op) * channels / op.layer.weight.shape[1]
    mixes = {name: op for name, op in ops.items() if op.kind is Kind.MIX}
    return {op.name: totals[groups[name]] / op.channels for name, op in mixes.items()}


def _map_size(op: Op) -> int:
    """Return the elements that a channel of the output takes, 0 where nothing is written."""
    if op.kind not in _WRITTEN or isinstance(op.module, IDENTITIES):
        return 0
    return math.prod(op.shape[2:])


def _operations(model: nn.Module, input_shape: Sequence[int]) -> dict[str, Op]:
    """Return what each node of the traced model does, without computing anything."""
    graph = trace_evaluation(masked_copy(model, None), input_shape)
    dtype = next((p.dtype for p in graph.parameters()), torch.float32)
    measured = measure(graph, torch.empty(2, *input_shape, device="meta", dtype=dtype))
    modules = dict(graph.named_modules())
    calls = Counter(n.target for n in graph.graph.nodes if n.op == "call_module")
    ops: dict[str, Op] = {}
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    for node in graph.graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        shape = measured[node.name].shape
        if shape is not None and node.op != "output":
            shapes[node] = shape
        ops[node.name] = describe(node, module, shapes, calls[node.target] > 1)
    return ops


def _groups(ops: Mapping[str, Op]) -> dict[str, str]:
    """Return for each node the name of a node that stands for all whose channels go together."""
    above = {name: name for name in ops}

    def root(name: str) -> str:
        while above[name] != name:
            name = above[name]
        return name

    for name, op in ops.items():
        if op.kind in _TYING or (op.kind is Kind.MIX and op.groups > 1):
            for source in op.inputs:
                above[root(source.name)] = root(name)
    return {name: root(name) for name in ops}


def _channels(
    op: Op, group: str, ops: Mapping[str, Op], inputs: Sequence[Mapping[str, int]]
) -> dict[str, int]:
    """Return how many channels of the output of `op` belong to which groups of layers."""
    if op.kind is Kind.MIX:
        return {group: op.channels}
    if op.kind in _TYING:
        return max((dict(each) for each in inputs), key=lambda each: sum(each.values()))
    if op.kind is Kind.CAT:
        return dict(sum(map(Counter, inputs), Counter()))
    if op.kind is Kind.FLATTEN:
        maps = ops[op.inputs[0].name].channels
        return {each: count * op.channels // maps for each, count in inputs[0].items()}
    return {}
