"""Dense models before they are measured: the parent, converted levels, and both in fewer bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsys import data
from fedsys.config import VariantsConfig
from fedsys.data import Dataset
from fedsys.errors import ModelError
from fedsys.pruning.dense.architecture import load as load_dense
from fedsys.pruning.dense.architecture import save as save_dense
from fedsys.pruning.dense.channels import Coupling, Multiples
from fedsys.pruning.dense.constants import Borders
from fedsys.pruning.dense.fold import answering, as_near, folding
from fedsys.pruning.dense.frozen import keep_frozen
from fedsys.pruning.dense.removal import Removal, evaluation_graph, masked_copy, probes
from fedsys.pruning.dense.shrink import Shrunk, compared, count_parameters, shrink, tolerance_of
from fedsys.pruning.levels import Level, spread
from fedsys.pruning.measuring import macs
from fedsys.pruning.portfolio import PARENT, Content, Variant
from fedsys.pruning.precision import HALVES, OnnxModule, halved, int8

CALIBRATION = 512
"""Training images on which the scales of int8 are found."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A dense model before it is measured.

    Attributes:
        variant: Its figures as far as they are known.
        content: What is saved of it.
        module: What answers: as `fedsys.pruning.portfolio.Portfolio.module` will read it.
    """

    variant: Variant
    content: Content
    module: nn.Module


def parent_candidate(
    model: nn.Module,
    options: VariantsConfig,
    input_shape: Sequence[int],
    images: Tensor | None = None,
) -> Candidate:
    """Return the unpruned model as a candidate: its graph in evaluation, in float32.

    BatchNorm is folded as in its variants, so that they are not faster by that alone.

    Args:
        model: The model.
        options: How BatchNorm is treated.
        input_shape: Of one input without the batch.
        images: What it is compared on besides the probes, as for `convert`.

    Raises:
        ModelError: It does not trace, run on such an input or return one tensor, or folding
            changes its answers.
    """
    graph = evaluation_graph(masked_copy(model, None), input_shape).float()
    whole = masked_copy(model, None).float()
    try:
        output = _outputs(whole, probes(input_shape))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the model does not run on an input of shape {tuple(input_shape)}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns a {type(output).__name__}; it must return one tensor")
    if not compared(output, _outputs(graph, probes(input_shape)))[1]:
        raise ModelError(
            "the traced model computes something else than the model; an operation in place on a "
            "part or a view of a tensor can be the reason: write it so that it gives a new tensor"
        )
    content = _as_saved(keep_frozen(graph, whole, probes(input_shape)[:2]))
    module, folded, kept, made = _answering(content, options, input_shape)
    variant = Variant(
        name=PARENT,
        accuracy=0.0,
        params=count_parameters(content),
        macs=macs(content, input_shape),
        bytes=0,
        peak_bytes=0,
        latencies=(),
        folded=folded,
        kept=kept,
        made=f"the unpruned model{made}",
        max_abs_diff=_difference(whole, module, input_shape),
        max_abs_output=float(output.abs().max()),
    )
    return Candidate(_compared(variant, whole, module, images), content, module)


def convert(
    level: Level,
    options: VariantsConfig,
    input_shape: Sequence[int],
    say: Callable[[Removal], None],
    images: Tensor | None = None,
    round_to: Multiples | None = None,
) -> tuple[Candidate, Shrunk]:
    """Return the dense model of a level, verified.

    Args:
        level: The masked model.
        options: How borders, sums, numbers of channels and BatchNorm are treated.
        input_shape: Of one input without the batch.
        say: Is told what will be removed, before it is.
        images: Real images, normalised, ``(n, …)``, on which what answers is compared with the
            masked model too; None leaves it at the probes.
        round_to: What numbers of channels are rounded up to; None: what `options` say, where
            ``auto`` rounds none.

    Raises:
        ModelError: As `fedsys.pruning.dense.shrink.shrink`, or outputs or answers for an image
            differ.
    """
    if round_to is None:
        round_to = options.round_to if isinstance(options.round_to, int) else 1
    small = shrink(
        level.model,
        input_shape,
        masks=level.masks,
        borders=Borders(options.borders),
        coupling=Coupling(options.coupling),
        round_to=round_to,
        announce=say,
    )
    content = _as_saved(small.model)
    module, folded, kept, made = _answering(content, options, input_shape)
    difference = small.report.max_abs_diff
    masked = masked_copy(level.model, level.masks)
    if folded:
        difference = _difference(masked, module, input_shape)
    variant = Variant(
        name=level.name,
        accuracy=0.0,
        params=small.report.parameters,
        macs=macs(content, input_shape),
        bytes=0,
        peak_bytes=0,
        latencies=(),
        sparsity=_sparsity(level),
        folded=folded,
        kept=kept,
        made=f"{level.made}{made}",
        max_abs_diff=difference,
        max_abs_output=small.report.max_abs_output,
        source=level.source,
        channels=_channels(level, small.plan),
    )
    return Candidate(_compared(variant, masked, module, images), content, module), small


def _sparsity(level: Level) -> float:
    """Return the share of the parent's weights that is pruned, before and by the level's masks."""
    sparsity = level.masks.figures().sparsity
    if level.origin is None:
        return sparsity
    return 1.0 - (1.0 - level.origin.sparsity) * (1.0 - sparsity)


def _channels(level: Level, plan: Removal) -> tuple[tuple[str, int, int], ...]:
    """Return the outputs of each layer, in the parent and in the dense model."""
    before = {} if level.origin is None else {n: of for n, of, _ in level.origin.channels}
    return tuple((e.name, before.get(e.name, e.before), e.after) for e in plan.edits)


def _compared(
    variant: Variant, masked: nn.Module, module: nn.Module, images: Tensor | None
) -> Variant:
    """Compare what answers with the model that it was made of on real images.

    Returns:
        The variant with the largest difference and output so far, and the answers that differ.

    Raises:
        ModelError: A difference exceeds the tolerance and what rounding does to the masked model,
            or an answer differs that is no tie.
    """
    if images is None or not len(images):
        return variant
    dtype = next((p.dtype for p in masked.parameters()), torch.float32)
    expected, got = (_outputs(m, images.to(dtype)).flatten(1) for m in (masked, module))
    difference, passes = compared(expected, got)
    tolerance = tolerance_of(dtype)
    if not passes and not as_near(masked, images, expected, got):
        raise ModelError(
            f"verification: the dense model differs from the masked one by {difference:.3g} on "
            f"{len(images)} validation images in {dtype}, more than {tolerance:g} x max(1, "
            "max|output|); its numbers may be too large for this type: "
            "try variants.fold_batchnorm=false"
        )
    other = expected.argmax(1) != got.argmax(1)
    gap = expected.amax(1) - expected.gather(1, got.argmax(1, keepdim=True)).squeeze(1)
    tie = gap <= torch.clamp(tolerance * expected.abs().amax(1).clamp(min=1.0), min=difference)
    if wrong := int((other & ~tie).sum()):
        raise ModelError(
            f"verification: {wrong} of {len(images)} validation images are answered otherwise by "
            "the dense model than by the masked one; this is a defect: please report it"
        )
    return dataclasses.replace(
        variant,
        max_abs_diff=max(variant.max_abs_diff, difference),
        max_abs_output=max(variant.max_abs_output, float(expected.abs().max())),
        compared_images=len(images),
        other_answers=int(other.sum()),
    )


def _answering(
    content: fx.GraphModule, options: VariantsConfig, input_shape: Sequence[int]
) -> tuple[fx.GraphModule, int, tuple[str, ...], str]:
    """Return what answers, how many BatchNorms are folded in it, which are not, and in words."""
    folded, kept = folding(content, input_shape) if options.fold_batchnorm else (0, ())
    module = answering(content, input_shape, fold=folded > 0, keep=kept)
    made = f", {folded} BatchNorms folded" if folded else ""
    if kept:
        made += f", {len(kept)} kept that would change outputs ({', '.join(kept)})"
    return module, folded, kept, made


def _as_saved(model: fx.GraphModule) -> fx.GraphModule:
    """Return what a reader of the saved model will get; names what cannot be saved as data."""
    with TemporaryDirectory(prefix="fedsys-dense-") as name:
        return load_dense(save_dense(model, name))


def lowered_name(candidate: Candidate, precision: str) -> str:
    """Return the name of a candidate in another precision."""
    return f"{candidate.variant.name}-{precision}"


def lower(candidate: Candidate, precision: str, dataset: Dataset) -> Candidate:
    """Return a candidate of float32 in another precision.

    Raises:
        ModelError: int8 needs a package that is not installed; an operation is not there in this
            precision; or some number is too large for it, so that outputs are not finite.
    """
    model = candidate.module
    assert isinstance(model, fx.GraphModule)  # lower precisions are made of float32 alone
    content: Content
    module: nn.Module
    if precision in HALVES:
        content = module = halved(model, precision)
    else:
        some = spread(dataset.train, CALIBRATION)
        content = int8(model, [x for x, _ in data.eval_batches(some, dataset, 64)])
        module = OnnxModule(content)
    try:
        difference = _difference(model, module, dataset.input_shape)
    except RuntimeError as error:  # of torch, for an operation that has no such kernel
        raise ModelError(f"the model does not run in {precision}: {error}") from error
    if not math.isfinite(difference):
        raise ModelError(
            f"in {precision} some outputs are not finite: numbers of the model are too large for it"
        )
    variant = dataclasses.replace(
        candidate.variant,
        name=lowered_name(candidate, precision),
        precision=precision,
        made=f"{candidate.variant.made}, in {precision}",
        max_abs_diff=difference,
        compared_images=0,
        other_answers=0,
    )
    return Candidate(variant, content, module)


def _outputs(model: nn.Module, inputs: Tensor) -> Any:
    with torch.inference_mode():
        return model(inputs)


def _difference(model: nn.Module, other: nn.Module, input_shape: Sequence[int]) -> float:
    """Return the largest difference of outputs on the probes, in the type of `model`."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    inputs = probes(input_shape).to(dtype)
    return float((_outputs(model, inputs) - _outputs(other, inputs)).abs().max())
