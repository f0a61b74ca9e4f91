"""The form in which a dense model answers: BatchNorm folded away, layers under short names.

In evaluation BatchNorm is an affine map of each channel. Behind a convolution or a linear layer
whose output nothing else reads, the layer computes it as well, with other weights (Jacob et al.,
CVPR 2018, section 3.2)::

    γ (W x + b - μ) / √(σ² + ε) + β  =  (s W) x + (s (b - μ) + β)    with  s = γ / √(σ² + ε)

and one pass over the outputs is saved. And the code that torch.fx generates looks each layer up by
its path, in as many steps as the path is long, every time; names of one step save the rest.

Both are done when a model is read to answer, not in the files
(`fedsys.pruning.dense.architecture`): there BatchNorm and names stay, so that a variant can be
trained, re-calibrated and pruned like the model that it came from. New weights are computed in
float64 by operations that IEEE 754 rounds in one way only, so the same files give the same bits
everywhere.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.models.batchnorm import DeferredBatchNorm
from fedsys.models.measure import NodeCost, measure
from fedsys.pruning.dense.cloning import clone
from fedsys.pruning.dense.removal import probes
from fedsys.pruning.dense.shrink import compared, tolerance_of

_log = logging.getLogger(__name__)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_AT_ONCE = 1 << 16
"""Weights that are in float64 at a time: half a megabyte, which a cache holds."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, DeferredBatchNorm)
_EXACT_ROWS = 2
"""Rows of the probes that are computed in float64 too, where convolutions are several times slower
than in float32; zero is left out."""

_NUDGES = 6
"""Times that inputs are moved by their last digit to see how far rounding moves outputs."""


class _Changed(ModelError):
    """Folding changes outputs."""


def foldable(model: fx.GraphModule, input_shape: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the nodes that are a BatchNorm which `answering` folds away.

    Its only input is the output of a convolution or a linear layer that is called once and that
    nothing else reads; it has running statistics and is in evaluation mode.

    Args:
        model: A traced model of one input.
        input_shape: Of one input without the batch.

    Raises:
        ModelError: The model has to be run to tell, and does not run on such an input.
    """
    pairs = _Pairs(model, _parts(model), input_shape)
    return tuple(norm.name for _, norm in pairs)


def answering(
    model: fx.GraphModule,
    input_shape: Sequence[int],
    *,
    fold: bool = True,
    keep: Collection[str] = (),
) -> fx.GraphModule:
    """Return `model` in the form in which it answers.

    Without folding outputs are the same bits; with it they are equal up to rounding
    (`check_folding`).

    Args:
        model: A traced model of one input, in evaluation mode. It is left as it was, and shares
            the layers that are not folded.
        input_shape: Of one input without the batch.
        fold: Whether BatchNorm is folded, where that is possible.
        keep: Names of nodes that are a BatchNorm which is left (`folding`).

    Raises:
        ModelError: As `foldable`.
    """
    graph = copy.deepcopy(model.graph)
    nodes = {node.name: node for node in graph.nodes}
    parts = _parts(model)
    if fold:
        for layer, norm in _Pairs(model, parts, input_shape):
            if norm.name in keep:
                continue
            parts[str(layer.target)] = _folded(parts[str(layer.target)], parts[str(norm.target)])
            nodes[norm.name].replace_all_uses_with(nodes[layer.name])
            graph.erase_node(nodes[norm.name])
    short: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = short.setdefault(str(node.target), f"m{len(short)}")
    root = {name: parts[path] for path, name in short.items()}
    return fx.GraphModule(root, graph, class_name="DenseModel").eval()


def folding(model: fx.GraphModule, input_shape: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """Say which BatchNorms `answering` can fold so that outputs stay.

    Where the model with all folded does not pass `check_folding`, one after the other is folded,
    and those are kept with which it does not pass.

    Args:
        model: A traced model of one input, in evaluation mode, as it is saved.
        input_shape: Of one input without the batch.

    Returns:
        How many can be folded, and the names of the nodes that are to be kept.

    Raises:
        ModelError: As `foldable`.
    """
    names = foldable(model, input_shape)
    if not names or _change(model, (), input_shape) is None:
        return len(names), ()
    keep = list(names)
    for name in names:
        fewer = [other for other in keep if other != name]
        change = _change(model, fewer, input_shape)
        if change is None:
            keep = fewer
        else:
            _log.warning("BatchNorm %s is kept: %s", name, change)
    return len(names) - len(keep), tuple(keep)


def _change(
    model: fx.GraphModule, keep: Collection[str], input_shape: Sequence[int]
) -> ModelError | None:
    """Return what `check_folding` says against folding all but those to keep."""
    try:
        check_folding(model, answering(model, input_shape, keep=keep), input_shape, keep=keep)
    except _Changed as error:
        return error
    return None


def check_folding(
    model: fx.GraphModule,
    folded: nn.Module,
    input_shape: Sequence[int],
    *,
    keep: Collection[str] = (),
) -> tuple[float, float]:
    """Compare `folded` with the model that it was made of, on the probes of the conversion.

    Args:
        model: A dense model in evaluation mode, as it is saved.
        folded: What `answering` made of it.
        input_shape: Of one input without the batch.
        keep: What `answering` was told to keep.

    Returns:
        The largest differences in the model's own type and, folded once more, in float64.

    Raises:
        ModelError: One exceeds the tolerance of its type (`fedsys.pruning.dense.shrink.TOLERANCE`)
            times max(1, largest output) of the example, and what rounding explains (`as_near`).
    """
    inputs = probes(input_shape)
    own = next((p.dtype for p in model.parameters()), torch.float32)
    difference = _compare(model, folded, inputs.to(own))
    exact = copy.deepcopy(model).double()
    again = answering(exact, input_shape, keep=keep)
    return difference, _compare(exact, again, inputs[:_EXACT_ROWS].double())


def _compare(model: nn.Module, folded: nn.Module, inputs: Tensor) -> float:
    with torch.inference_mode():
        expected, got = model(inputs), folded(inputs)
    difference, passes = compared(expected, got)
    if not passes and not as_near(model, inputs, expected, got):
        raise _Changed(
            f"folding BatchNorm changes outputs by {difference:.3g} in {inputs.dtype}, more than "
            f"{tolerance_of(inputs.dtype):g} x max(1, max|output|) and than rounding does: some "
            "variance may be too close to 0 for this type, or outputs hang on the last digit; keep "
            "BatchNorm by variants.fold_batchnorm=false"
        )
    return difference


def as_near(model: nn.Module, inputs: Tensor, expected: Tensor, got: Tensor) -> bool:
    """Say whether `got` is as near as `expected` to what `model` computes in float64.

    Rounding alone moves outputs of deep models, and of attention whose logits are large, by more
    than the tolerance. Another order of operations moves them by as much, but elsewhere. How far
    it moves them is a matter of chance where there are few outputs. So the model is asked for the
    inputs once more with their last digit moved up or down, `_NUDGES` times, and the largest
    distance counts.

    Args:
        model: What computed `expected` of `inputs`.
        inputs: ``(n, …)``.
        expected: Outputs ``(n, …)`` in the model's own type.
        got: Those of a model that computes the same in another order.

    Returns:
        Whether `got` is finite and at most twice as far away.
    """
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(inputs.double()).flatten(1)
        moved = [model(nudged) for nudged in _nudged(inputs.to(expected.dtype))]
    own = max((outputs.flatten(1) - exact).abs().max() for outputs in (expected, *moved))
    other = (got.flatten(1) - exact).abs().max()
    return bool(torch.isfinite(other) & (other <= 2.0 * own))


def _nudged(inputs: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_NUDGES):
        signs = 2 * torch.randint(2, inputs.shape, generator=generator) - 1
        yield inputs * (1 + signs.to(inputs) * torch.finfo(inputs.dtype).eps)


# --------------------------------------------------------------------------------------------------
# What can be folded


class _Pairs:
    """The pairs of a layer and the BatchNorm that it can take in, as nodes of the graph."""

    def __init__(
        self, model: fx.GraphModule, parts: Mapping[str, Any], input_shape: Sequence[int]
    ) -> None:
        self._model, self._parts, self._input_shape = model, dict(parts), input_shape
        nodes = list(model.graph.nodes)
        called = [str(node.target) for node in nodes if node.op == "call_module"]
        self._calls = Counter(id(parts[path]) for path in called)
        read = [str(node.target) for node in nodes if node.op == "get_attr"]
        self._read = {path.rpartition(".")[0] for path in read}

    def __iter__(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        for norm in self._model.graph.nodes:
            sources = norm.all_input_nodes
            if norm.op == "call_module" and len(sources) == 1 and self._fits(sources[0], norm):
                yield sources[0], norm

    def _fits(self, source: fx.Node, node: fx.Node) -> bool:
        norm = self._parts[str(node.target)]
        if not _plain(norm, _NORMS) or norm.running_mean is None:
            return False
        if source.op != "call_module" or len(source.users) != 1 or source.target in self._read:
            return False
        layer = self._parts[str(source.target)]
        if not _plain(layer, _LAYERS) or self._calls[id(layer)] != 1:
            return False
        fits = norm.num_features == _outputs(layer) and norm.running_var.dtype == layer.weight.dtype
        return fits and self._by_channel(source, layer, norm)

    def _by_channel(self, source: fx.Node, layer: Any, norm: Any) -> bool:
        """Say whether outputs of the layer are what BatchNorm takes for channels: dimension 1."""
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
            return True  # it refuses inputs without a batch, and linear layers of four dimensions
        shape = self._shapes[source.name].shape
        return shape is not None and len(shape) == layer.weight.dim()

    @cached_property
    def _shapes(self) -> Mapping[str, NodeCost]:
        example = torch.empty((1, *self._input_shape), device="meta")
        return measure(self._model, example)


def _parts(model: fx.GraphModule) -> dict[str, Any]:
    """Return the modules and tensors that the graph names, by their paths."""
    found: dict[str, Any] = {}
    for node in model.graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in found:
            parent, _, name = str(node.target).rpartition(".")
            found[str(node.target)] = getattr(model.get_submodule(parent), name)
    return found


def _plain(module: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Say whether a module computes what its class does in evaluation, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) in kinds and not module.training and not hooks


def _outputs(layer: Any) -> int:
    outputs: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return outputs


# --------------------------------------------------------------------------------------------------
# New weights


@torch.no_grad()
def _folded(layer: Any, norm: Any) -> nn.Module:
    """Return a layer that computes what `norm` makes of the outputs of `layer`."""
    mean, scale = norm.running_mean.double(), 1.0 / (norm.running_var.double() + norm.eps).sqrt()
    if norm.weight is not None:
        scale = norm.weight.double() * scale
    shift = -mean if layer.bias is None else layer.bias.double() - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    new: Any = clone(layer)
    weight = layer.weight
    new.weight = nn.Parameter(_scaled(layer, scale), weight.requires_grad)
    new.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    made: nn.Module = new
    return made


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    """Return the weights times the factor of their output, computed in float64."""
    weight: Tensor = layer.weight.detach()
    factors = scale.view(-1, 1)  # of weights (outputs, inputs of a group, …)
    if isinstance(layer, _TRANSPOSED):  # (inputs, outputs of a group, …)
        groups: int = layer.groups
        factors = scale.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    factors = factors.view(*factors.shape, *[1] * (weight.dim() - 2))
    scaled = torch.empty_like(weight)
    rows = max(1, _AT_ONCE // weight[0].numel())
    each = (torch.split(t, rows) for t in (scaled, weight, factors))
    for into, part, factor in zip(*each, strict=True):
        into.copy_(part * factor)
    return scaled
