"""From a masked model to a small dense one that computes the same function.

Unstructured pruning leaves a model with many zeros, which is no faster than before. DNNShifter
(Eccles et al., "DNNShifter: An efficient DNN pruning system for edge computing", FGCS 152, 2024)
removes filters that are all zero from it. What such a filter *outputs* is its bias, though, so its
consumers lose a constant, and channels that end in sums, or that no consumer reads, stay. Here the
conversion is exact and complete, on the traced graph of any model::

    small = shrink(model, (3, 32, 32), masks=masks)
    print(small.plan)           # what went, group by group
    small.model(images)         # a plain torch.fx.GraphModule of dense torch.nn layers
    save(small.model, folder)   # safetensors and JSON; load(folder) gives the same bits

`fedsys.pruning.dense.constants` finds constants, `fedsys.pruning.dense.channels` what must stay,
`fedsys.pruning.dense.rebuild` makes the model, `fedsys.pruning.dense.architecture` saves it.
Nothing removable is left: with ``borders=Borders.MAP, coupling=Coupling.SCATTER`` exactly those
channels stay that vary with the input and that an output depends on. The defaults trade a few of
them for speed: one carrier channel in front of a padded convolution instead of a constant map, and
equal channels in all operands of a sum instead of an index. A ReLU counts as constant if bounds of
each of its inputs keep it closed (`fedsys.pruning.dense.bounds`); that several inputs together
never open it is not found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.pruning.dense.channels import Coupling, Multiples
from fedsys.pruning.dense.cloning import InFloat64
from fedsys.pruning.dense.constants import Borders
from fedsys.pruning.dense.frozen import keep_frozen
from fedsys.pruning.dense.ops import Kind
from fedsys.pruning.dense.removal import Removal, evaluation_graph, masked_copy, plan_graph, probes

_TRIED = 2
"""Probes with which it is seen what training does to the modes of the layers."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference between outputs that passes, times max(1, largest output) of the example."""


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one conversion.

    Attributes:
        parameters_before: Parameters of the masked model, zeros included.
        parameters: Parameters of the dense model, and constants of its graph.
        macs_before: Multiply-accumulates per example of the masked model, in layers understood.
        macs: Those of the dense model.
        channels_before: Outputs of all convolutions and linear layers.
        channels: Those that stay.
        max_abs_diff: Largest difference of outputs in the model's own type, on the probes; NaN
            if not verified.
        max_abs_diff_float64: The same in float64.
        max_abs_output: Largest output of the masked model on the probes.
        seconds: Duration of the whole conversion, verification included.
    """

    parameters_before: int
    parameters: int
    macs_before: int
    macs: int
    channels_before: int
    channels: int
    max_abs_diff: float
    max_abs_diff_float64: float
    max_abs_output: float
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """A dense model, how it was made, and what it saves."""

    model: fx.GraphModule
    plan: Removal
    report: Report


def shrink(
    model: nn.Module,
    example: Tensor | Sequence[int],
    *,
    masks: Mapping[str, Tensor] | None = None,
    borders: Borders = Borders.CARRIER,
    coupling: Coupling = Coupling.GROUP,
    round_to: Multiples = 1,
    verify: bool = True,
    announce: Callable[[Removal], None] | None = None,
) -> Shrunk:
    """Convert a masked model to a plain dense one with equal outputs in evaluation.

    Args:
        model: Any model that `fedsys.models.graph.trace` traces. It is left as it was.
        example: A batch of inputs, or the shape of one input without the batch.
        masks: Names of parameters to masks of their shapes; where a mask is zero, so is the
            parameter. Without masks the zeros of the parameters count.
        borders: What to do where constants meet zero padding.
        coupling: What to do where operands of sums have different channels.
        round_to: Keep a multiple of this many channels, where a layer has that many: some
            processors are faster then. The channels added compute zero. Or so by the name of the
            layer (`fedsys.pruning.rounding` measures where it pays); others are not rounded.
        verify: Compare outputs of both models on random and extreme inputs.
        announce: Is told what will be removed, before it is.

    Returns:
        The model in evaluation mode on the CPU, with the type of the model given.

    Raises:
        ModelError: The model does not trace or run on such an input, its output does not depend on
            its input any more, or verification fails.
        ConfigError: For a mask that does not fit, or a `round_to` below 1.
    """
    start = time.perf_counter()
    masked = masked_copy(model, masks)
    dtype = next((p.dtype for p in masked.parameters()), torch.float32)
    inputs = probes(example)
    mixed = _mixed(inputs)
    plan = plan_graph(
        evaluation_graph(masked, inputs),
        mixed,
        borders=borders,
        coupling=coupling,
        round_to=round_to,
    )
    if announce is not None:
        announce(plan)
    small = plan.apply()
    exact = _run_exactly(small, mixed) if verify else plan.reading.output
    _round(small, dtype)
    small = keep_frozen(small, masked, inputs[:_TRIED].to(dtype))
    difference = difference_float64 = float("nan")
    if verify:
        expected, got = _run(masked, inputs.to(dtype)), _run(small, inputs.to(dtype))
        difference = _verified(expected, got)
        difference_float64 = _verified(plan.reading.output, exact)
    report = _report(masked, plan, small, difference, difference_float64)
    return Shrunk(small, plan, replace(report, seconds=time.perf_counter() - start))


def _report(
    masked: nn.Module,
    plan: Removal,
    small: fx.GraphModule,
    difference: float,
    difference_float64: float,
) -> Report:
    """Return what a conversion saves; how long it took is not known here."""
    return Report(
        parameters_before=sum(p.numel() for p in masked.parameters()),
        parameters=count_parameters(small),
        macs_before=_macs(plan, plan.reading.graph),
        macs=_macs(plan, small),
        channels_before=sum(edit.before for edit in plan.edits),
        channels=sum(edit.after for edit in plan.edits),
        max_abs_diff=difference,
        max_abs_diff_float64=difference_float64,
        max_abs_output=float(plan.reading.output.abs().max()),
        seconds=0.0,
    )


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, and the numbers in the constants of its graph."""
    total = sum(p.numel() for p in model.parameters())
    if isinstance(model, fx.GraphModule):
        read = {str(n.target) for n in model.graph.nodes if n.op == "get_attr"}
        buffers = [b for name, b in model.named_buffers() if name in read]
        total += sum(b.numel() for b in buffers if b.is_floating_point())
    return total


def _mixed(probes: Tensor) -> Tensor:
    """Return one input that is random in its left half and of extreme contrast in its right one.

    It is what is computed in float64, where convolutions are several times slower than in float32.
    """
    half = probes.shape[-1] // 2
    return torch.cat([probes[:1, ..., :half], probes[1:2, ..., half:]], -1)


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring what is in float64, because it was computed, to the type of the model."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def _run(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(inputs)
    return output


def _run_exactly(model: fx.GraphModule, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = InFloat64(model).run(inputs.double())
    return output


def compared(expected: Tensor, got: Tensor) -> tuple[float, bool]:
    """Compare outputs of equal type and shape, ``(rows, …)``.

    Returns:
        The largest difference, and whether that of each row is within `TOLERANCE` of the type, or
        1e-2 for others, times max(1, largest output of the row).
    """
    difference = (expected - got).abs().flatten(1).amax(1)
    tolerance = tolerance_of(expected.dtype)
    allowed = tolerance * expected.abs().flatten(1).amax(1).clamp(min=1.0)
    return float(difference.max()), bool((difference <= allowed).all())


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the difference that passes where the largest output of an example is 1."""
    return TOLERANCE.get(dtype, 1e-2)


def _verified(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference.

    Raises:
        ModelError: It is more than `compared` allows, or the shapes differ.
    """
    if expected.shape != got.shape:
        raise ModelError(f"verification: outputs of shape {tuple(got.shape)}, not {expected.shape}")
    difference, passes = compared(expected, got)
    if not passes:
        raise ModelError(
            f"verification: the dense model differs from the masked one by {difference:.3g} in "
            f"{expected.dtype}, more than {tolerance_of(expected.dtype):g} x max(1, max|output|); "
            "its numbers may be too large for this type, or this is a defect: please report it"
        )
    return difference


def _macs(plan: Removal, model: fx.GraphModule) -> int:
    total = 0
    present = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    for op in plan.reading.ops.values():
        if op.kind is Kind.MIX and op.name in present:
            weight = model.get_parameter(f"{op.name}.weight")
            total += weight.numel() * math.prod(op.shape[2:])
    return total
