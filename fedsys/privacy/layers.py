"""What each example adds to the gradient of a layer: its squared norm, and weighted sums of it.

A layer's rule is given its input and the gradient of its output, both ``(examples, …)``, where the
loss is the *sum* over examples: then row i of the output's gradient is that of example i alone. For
a weight the gradient of an example is a product of the two, and where that product would be larger
than what it is made of, its norm is taken without it (Goodfellow, "Efficient Per-Example Gradient
Computations", 2015; for convolutions Bu et al., "Scalable and Efficient Training of Large
Convolutional Neural Networks with Differential Privacy", NeurIPS 2022, section 3). Weighted sums
come from the same two tensors, so there is no second backward (Bu et al., "Differentially Private
Optimization on Large Model at Small Cost", ICML 2023). Modules without a rule of their own are
differentiated for each example by `torch.func`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight


@dataclass
class LayerRecord:
    """What a layer was given and what came back, for one piece of a mini-batch.

    Attributes:
        module: The layer.
        inputs: What it was called with.
        gradient: Of its output, ``(examples, …)``; None until the backward.
        kept: Gradients by example that were small enough to be kept, by name of the parameter.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    gradient: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The first input."""
        return cast(Tensor, self.inputs[0])

    @property
    def g(self) -> Tensor:
        """The gradient of the output; zero if nothing came back."""
        assert self.gradient is not None
        return self.gradient

    def without(self, gone: Tensor) -> LayerRecord:
        """Return the record with nothing of some examples, whose gradients may not be finite.

        Args:
            gone: ``(examples,)``, whether an example is left out.
        """

        def zeroed(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return tensor
            return tensor.masked_fill(gone.view(-1, *[1] * (tensor.dim() - 1)), 0.0)

        kept = {name: zeroed(tensor) for name, tensor in self.kept.items()}
        inputs = tuple(map(zeroed, self.inputs))
        return dataclasses.replace(self, inputs=inputs, gradient=zeroed(self.g), kept=kept)


Rule = Callable[[LayerRecord, Tensor | None], Mapping[str, Tensor]]
"""Of a record and weights ``(examples,)``: by name of the parameter the weighted sum of gradients,
or, without weights, the squared norms by example."""


def rule_of(module: nn.Module) -> Rule:
    """Return the rule by which a module's parameters are treated."""
    if isinstance(module, nn.Linear):
        return linear
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return convolution if isinstance(module, nn.Conv2d) and plain else by_example
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return normalisation
    if type(module) is nn.Embedding and not module.scale_grad_by_freq and not module.sparse:
        return embedding
    return by_example


# --------------------------------------------------------------------------------------------------
# Rules


def linear(record: LayerRecord, weights: Tensor | None) -> dict[str, Tensor]:
    """Treat ``y = x Wᵀ + b``, over any number of positions between examples and features."""
    examples = len(record.g)
    x, g = (t.reshape(examples, -1, t.shape[-1]) for t in (record.x, record.g))
    found = _products(record, g.transpose(1, 2), x, weights)
    return found | _bias(record, g.sum(1) if g.shape[1] > 1 else g[:, 0], weights)


def convolution(record: LayerRecord, weights: Tensor | None) -> dict[str, Tensor]:
    """Treat a convolution as a linear layer over the patches of its input, in each group."""
    module = cast(nn.Conv2d, record.module)
    x, g, groups = record.x, record.g, module.groups
    bias = _bias(record, g.flatten(2).sum(2), weights)
    if weights is not None and "weight" not in record.kept:
        scaled = g * weights.view(-1, 1, 1, 1)
        how: Any = (module.stride, module.padding, module.dilation, groups)
        summed = conv2d_weight(x, list(module.weight.shape), scaled, *how)  # type: ignore[no-untyped-call]
        return {"weight": summed} | bias
    if weights is not None:
        return {"weight": _weighted(record.kept["weight"], weights)} | bias
    where: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
    patches = F.unfold(x, *where)
    examples, positions = len(g), patches.shape[-1]
    left = g.reshape(examples * groups, -1, positions)
    right = patches.reshape(examples * groups, -1, positions).transpose(1, 2)
    found = _products(record, left, right, None, shape=module.weight.shape, groups=groups)
    return found | bias


def normalisation(record: LayerRecord, weights: Tensor | None) -> dict[str, Tensor]:
    """Treat the scales and shifts of a GroupNorm or LayerNorm."""
    module, g = record.module, record.g
    if isinstance(module, nn.GroupNorm):
        x = F.group_norm(record.x, module.num_groups, eps=module.eps)
        summed = tuple(range(2, g.dim()))
    else:
        norm = cast(nn.LayerNorm, module)
        x = F.layer_norm(record.x, norm.normalized_shape, eps=norm.eps)
        summed = tuple(range(1, g.dim() - len(norm.normalized_shape)))
    scale = g * x
    found = _small("weight", scale.sum(summed) if summed else scale, weights)
    return found | _bias(record, g.sum(summed) if summed else g, weights)


def embedding(record: LayerRecord, weights: Tensor | None) -> dict[str, Tensor]:
    """Treat a table of vectors: rows that an example looks up twice add up."""
    module = cast(nn.Embedding, record.module)
    rows = record.x.reshape(len(record.x), -1)
    g = record.g.reshape(*rows.shape, -1)
    if module.padding_idx is not None:
        g = g.masked_fill((rows == module.padding_idx).unsqueeze(-1), 0.0)
    if weights is None:
        same = (rows.unsqueeze(1) == rows.unsqueeze(2)).to(g.dtype)
        return {"weight": (same * (g @ g.transpose(1, 2))).flatten(1).sum(1)}
    total = torch.zeros_like(module.weight)
    scaled = g * weights.view(-1, 1, 1)
    return {"weight": total.index_add_(0, rows.flatten(), scaled.flatten(0, 1))}


def by_example(record: LayerRecord, weights: Tensor | None) -> dict[str, Tensor]:
    """Differentiate any module for each example by itself, whose gradients are kept."""
    if weights is None:
        named = {
            n: p.detach() for n, p in record.module.named_parameters(recurse=False) if learns(p)
        }

        def one(g: Tensor, *inputs: Any) -> Any:
            def outputs(values: Mapping[str, Tensor]) -> Tensor:
                made = functional_call(record.module, dict(values), tuple(i[None] for i in inputs))
                return cast(Tensor, made)[0]

            return vjp(outputs, named)[1](g)[0]

        record.kept |= vmap(one, randomness="error")(record.g, *record.inputs)
    return {n: found for n, t in record.kept.items() for found in _small(n, t, weights).values()}


def learns(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is trained, also while a private step keeps autograd from it."""
    return bool(getattr(parameter, "trained_privately", parameter.requires_grad))


# --------------------------------------------------------------------------------------------------
# Pieces of rules


def _products(
    record: LayerRecord,
    left: Tensor,
    right: Tensor,
    weights: Tensor | None,
    *,
    shape: torch.Size | None = None,
    groups: int = 1,
) -> dict[str, Tensor]:
    """Treat a weight whose gradient is ``left @ right`` by example (and group).

    Args:
        record: Of the layer, with a ``weight``.
        left: ``(examples × groups, outputs, positions)``.
        right: ``(examples × groups, positions, inputs)``.
        weights: As for a rule.
        shape: Of the weight, where it is not ``(outputs, inputs)``.
        groups: Of the layer.
    """
    blocks, outputs, positions = left.shape
    inputs = right.shape[2]
    if weights is None:
        if positions == 1:
            squares = left.flatten(1).square().sum(1) * right.flatten(1).square().sum(1)
        elif 2 * positions * positions <= outputs * inputs:
            grams = (left.transpose(1, 2) @ left) * (right @ right.transpose(1, 2))
            squares = grams.flatten(1).sum(1)
        else:
            kept = (left @ right).reshape(blocks // groups, *(shape or (outputs, inputs)))
            record.kept["weight"] = kept
            return {"weight": kept.flatten(1).square().sum(1)}
        return {"weight": squares.view(-1, groups).sum(1)}
    if "weight" in record.kept:
        return {"weight": _weighted(record.kept["weight"], weights)}
    scaled = left * weights.view(-1, 1, 1)
    return {"weight": scaled.transpose(1, 2).flatten(0, 1).T @ right.flatten(0, 1)}


def _bias(record: LayerRecord, rows: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    return {} if getattr(record.module, "bias", None) is None else _small("bias", rows, weights)


def _small(name: str, rows: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """Treat a parameter whose gradients by example are small."""
    if weights is None:
        return {name: rows.flatten(1).square().sum(1)}
    return {name: _weighted(rows, weights)}


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    return (weights @ rows.flatten(1)).view(rows.shape[1:])
