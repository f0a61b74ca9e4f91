"""The rule that DNNShifter's public code applies, to compare with: parameters after it, no model.

A filter whose weights are all zero goes, with the slices of its consumers; its constant is dropped,
so the result computes something else. Nothing else goes: filters that only dead channels feed, or
that nobody reads, stay, and so do all channels that take part in a sum (the code leaves these
layers out by hand). A layer never goes whole.

Eccles et al., "DNNShifter: An efficient DNN pruning system for edge computing", FGCS 152, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsys.pruning.dense.channels import Coupling, settle
from fedsys.pruning.dense.constants import Borders, Reading, read
from fedsys.pruning.dense.ops import Kind, Op
from fedsys.pruning.dense.removal import evaluation_graph, masked_copy, probes


def reference_rule_parameters(
    model: nn.Module,
    example: Tensor | Sequence[int],
    *,
    masks: Mapping[str, Tensor] | None = None,
) -> int:
    """Count the parameters that the public rule leaves.

    Args:
        model: A masked model, as for `fedsys.pruning.dense.shrink.shrink`.
        example: A batch of inputs, or the shape of one input without the batch.
        masks: As for `fedsys.pruning.dense.shrink.shrink`.

    Returns:
        The number of parameters, with those of BatchNorm: the public code folds them into the
        convolutions for VGG and keeps them for ResNet.
    """
    graph = evaluation_graph(masked_copy(model, masks))
    reading = read(graph, probes(example).double(), Borders.CARRIER)
    kept = _kept(reading)
    gone = sum(_lost(reading, kept, name, op) for name, op in reading.ops.items())
    return sum(p.numel() for p in model.parameters()) - gone


def _kept(reading: Reading) -> dict[str, Tensor]:
    """Return the channels that stay: all where operations tie them, else filters that are not 0."""
    kept = {name: torch.zeros_like(fixed.where) for name, fixed in reading.fixed.items()}
    for name, op in reading.ops.items():
        if op.kind is Kind.MIX:
            present = op.connected.any(2).flatten() if op.connected is not None else kept[name]
            whole = op.groups > 1 or not bool(present.any()) or isinstance(op.layer, nn.Linear)
            kept[name] = torch.ones_like(present) if whole else present
        elif op.kind in (Kind.ADD, Kind.MUL):
            kept[name] = torch.ones_like(kept[name])
        elif op.kind in (Kind.OPAQUE, Kind.OUTPUT):
            for source in op.inputs:
                if source.name in kept:
                    kept[source.name] = torch.ones_like(kept[source.name])
    settle(reading, set(), Coupling.GROUP, kept)
    return kept


def _lost(reading: Reading, kept: Mapping[str, Tensor], name: str, op: Op) -> int:
    """Return how many parameters of one layer go."""
    if op.module is None or op.kind not in (Kind.MIX, Kind.SCALE):
        return 0
    now = sum(p.numel() for p in op.module.parameters())
    rows = int(kept[name].sum())
    if op.kind is Kind.SCALE:
        return now - now * rows // op.channels
    columns = int(kept[op.inputs[0].name].sum())
    before = op.layer.weight.numel()
    if op.groups > 1:
        after = before * rows // op.channels
    else:
        after = before * rows * columns // (op.channels * len(kept[op.inputs[0].name]))
    bias = 0 if op.layer.bias is None else op.channels - rows
    return before - after + bias
