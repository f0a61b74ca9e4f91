"""From scores to masks: which weights go, in one shot or step by step.

`prune` is the one place that decides which weights go; everything else calls it with other scores.
It takes masks and gives masks, so it can be called between two rounds of federated training as well
as between two trainings::

    masks = one_shot("synflow", model, 0.9, input_shape=(3, 32, 32))
    small = shrink(model, (3, 32, 32), masks=masks)

When a run prunes between its rounds is for `fedsys.config.pruning` to say.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedsys.config.pruning import METHODS, SCOPES, check_cost
from fedsys.errors import ConfigError, ModelError, did_you_mean
from fedsys.models.graph import trace
from fedsys.pruning import scores as score_functions
from fedsys.pruning.scores import Groups, Scores
from fedsys.randomness import Address
from fedsys.training.masks import Masks
from fedsys.training.penalty import output_layers
from fedsys.training.plain import Batches

# --------------------------------------------------------------------------------------------------
# The decision


def prune(
    masks: Masks,
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: str = "global",
    keep_channels: int = 0,
) -> Masks:
    """Prune the weights of the lowest scores until a share of all masked weights is pruned.

    Exactly ``floor(sparsity × weights + 1/2)`` are pruned afterwards, unless more were before.
    Pruned weights stay pruned. Of equal scores, those of earlier layers and lower indices go first.

    Args:
        masks: What is pruned already. Layers without a mask are left alone and do not count.
        scores: For each masked weight a tensor of its shape; others are ignored.
        sparsity: Share of the weights, in [0, 1).
        scope: ``global`` compares all weights with each other; ``layer`` prunes the same share of
            each layer (within one weight, so that the total is exact).
        keep_channels: In each layer, the best weight of this many channels stays in any case: the
            channels with the best such weights.

    Raises:
        ConfigError: For an argument out of range, a score that is missing or of another shape, or
            channels to keep that do not fit the sparsity.
        ModelError: Scores are NaN, or a layer would lose all its weights; names it.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError.of("pruning.sparsity", sparsity, "must be in [0, 1)")
    _check(masks, scores, scope, keep_channels)
    goal = Fraction(str(sparsity))
    sizes = [mask.numel() for mask in masks.values()]
    if scope == "global":
        return _lowest(masks, scores, _rounded(goal * sum(sizes)), keep_channels)
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    counts = [_rounded(goal * end) - _rounded(goal * start) for start, end in pairwise(ends)]
    result: dict[str, Tensor] = {}
    for name, count in zip(masks, counts, strict=True):
        result |= _lowest(masks.part([name]), scores, count, keep_channels)
    return Masks(result)


def sparsity_after(weights: int, kept: int, share: float) -> float:
    """Return the sparsity at which of s survivors exactly ``ceil(share × s)`` are gone.

    Args:
        weights: Number of masked weights.
        kept: Those that are not pruned.
        share: Share of these that is to go.

    >>> sparsity_after(100, 80, 0.2)
    0.36
    """
    return (weights - kept + math.ceil(Fraction(str(share)) * kept)) / weights


def _rounded(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def _check(masks: Masks, scores: Mapping[str, Tensor], scope: str, keep_channels: int) -> None:
    if scope not in SCOPES:
        rule = f"must be one of {', '.join(SCOPES)}"
        raise ConfigError.of("pruning.scope", scope, rule, did_you_mean(scope, SCOPES))
    if keep_channels < 0:
        raise ConfigError.of("pruning.keep_channels", keep_channels, "must be at least 0")
    for name, mask in masks.items():
        if name not in scores:
            raise ConfigError.of("scores", list(scores), f"must have one for {name}")
        if scores[name].shape != mask.shape:
            rule = f"must be {tuple(mask.shape)}, the shape of the mask"
            raise ConfigError.of(f"scores[{name}].shape", tuple(scores[name].shape), rule)
        if bool(scores[name].isnan().any()):
            raise ModelError(f"{name}: some scores are NaN; the model or its training has diverged")


def _lowest(masks: Masks, scores: Mapping[str, Tensor], count: int, keep_channels: int) -> Masks:
    """Return masks in which `count` weights are pruned, unless more were before."""
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    values = torch.cat([scores[name].detach().cpu().flatten() for name in masks])
    free = kept
    if keep_channels:
        best = [_best(mask, scores[n].detach().cpu(), keep_channels) for n, mask in masks.items()]
        free = kept & ~torch.cat(best)
    more = count - int((~kept).sum())
    candidates = free.nonzero().flatten()
    if more > len(candidates):
        raise ConfigError.of(
            "pruning.keep_channels",
            keep_channels,
            f"must leave {more} weights to prune, not {len(candidates)}",
            "lower it, or pruning.sparsity",
        )
    if more > 0:
        compared = values[candidates]
        threshold = compared.kthvalue(more).values
        below = compared < threshold
        equal = candidates[compared == threshold][: more - int(below.sum())]
        kept = kept.clone()
        kept[candidates[below]] = False
        kept[equal] = False
    parts = torch.split(kept, [mask.numel() for mask in masks.values()])
    result = Masks({n: p.view_as(masks[n]) for n, p in zip(masks, parts, strict=True)})
    _check_alive(result, count)
    return result


def _best(mask: Tensor, scores: Tensor, keep_channels: int) -> Tensor:
    """Return where the best weights of the `keep_channels` best channels are, flat."""
    values = scores.masked_fill(~mask, -math.inf).flatten(1)
    tops, places = values.max(1)
    best = torch.zeros_like(values, dtype=torch.bool)
    chosen = tops.sort(descending=True, stable=True).indices[:keep_channels]
    best[chosen, places[chosen]] = True
    return best.flatten()


def _check_alive(masks: Masks, count: int) -> None:
    dead = [layer.name for layer in masks.figures().layers if not layer.kept]
    if dead:
        raise ModelError(
            f"{', '.join(dead)}: pruning {count} weights would leave none, and the model would "
            "answer the same to every input; lower pruning.sparsity, leave the layer alone with "
            "pruning.leave, or choose pruning.scope=layer or pruning.keep_channels=1"
        )


# --------------------------------------------------------------------------------------------------
# Before training


def gradual(sparsity: float, steps: int) -> tuple[float, ...]:
    """Return the sparsity after each of `steps` steps that prune equal shares of what is left.

    For pruning between rounds, and for SynFlow (Tanaka et al., 2020, algorithm 1). The last is
    `sparsity` itself.

    Raises:
        ConfigError: For a `sparsity` outside [0, 1), or no steps.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError.of("pruning.sparsity", sparsity, "must be in [0, 1)")
    if steps < 1:
        raise ConfigError.of("pruning.steps", steps, "must be at least 1")
    rising = (1.0 - (1.0 - sparsity) ** (step / steps) for step in range(1, steps))
    return (*rising, sparsity)


def synflow_masks(
    model: nn.Module,
    input_shape: Sequence[int],
    masks: Masks,
    sparsity: float,
    *,
    iterations: int = 100,
    keep_channels: int = 0,
) -> Masks:
    """Prune step by step by the synaptic flow of what is left, which spares the last of a layer.

    Tanaka et al. (2020), algorithm 1. Needs no data. Scores are compared globally.

    Args:
        model: The model; left as it was.
        input_shape: Of one input without the batch.
        masks: What is pruned already.
        sparsity: Share of the masked weights, in [0, 1).
        iterations: Steps; 100 in the paper.
        keep_channels: As for `prune`.

    Raises:
        ConfigError: As `prune` and `gradual`.
        ModelError: As `prune`, or the flow is too large for float64.
    """
    linear = score_functions.linear_copy(model)
    for target in gradual(sparsity, iterations):
        masks.apply(linear)
        scores = score_functions.flow(linear, input_shape)
        masks = prune(masks, scores, target, keep_channels=keep_channels)
    return masks


def left_alone(
    model: nn.Module, leave: Sequence[str] | None, input_shape: Sequence[int]
) -> tuple[str, ...]:
    """Return the layers to leave alone: `leave`, or those of the outputs if that is None.

    Raises:
        ModelError: The model does not trace.
    """
    return output_layers(trace(model, input_shape)) if leave is None else tuple(leave)


def one_shot(
    method: str,
    model: nn.Module,
    sparsity: float,
    *,
    masks: Masks | None = None,
    leave: Sequence[str] = (),
    scope: str = "global",
    keep_channels: int = 0,
    address: Address | None = None,
    batches: Batches = (),
    input_shape: Sequence[int] = (),
    mix: float = 0.8,
    groups: Groups = (),
    scales: Mapping[str, Tensor] | None = None,
    blocks: Mapping[str, int] | None = None,
    costs: Mapping[str, float] | None = None,
    cost_weight: float = 1.0,
    iterations: int = 100,
    own: Callable[..., Scores] | None = None,
) -> Masks:
    """Prune a model by one of `METHODS`.

    Args:
        method: Its name; ``synflow`` works in `iterations`, the others at once.
        model: Its weights are scored; where `masks` prune, they must be zero. Left as it was.
        sparsity: Share of the masked weights, in [0, 1).
        masks: What is pruned already; nothing if None.
        leave: Layers to leave alone, as for `Masks.dense`; only without `masks`.
        scope: As for `prune`; ``synflow`` knows ``global`` only.
        keep_channels: As for `prune`.
        address: For draws (random, and dropout in snip and grasp); seed 0 if None.
        batches: Examples for snip and grasp.
        input_shape: Of one input without the batch, for synflow.
        mix: For magnitude_channel.
        groups: For magnitude_channel and group_norm.
        scales: For group_norm.
        blocks: For magnitude_channel and group_norm: channels that go together or not at all.
        costs: For magnitude_channel and group_norm: what their scores are divided by, as for
            `fedsys.pruning.scores.per_cost`; nothing if None.
        cost_weight: As for `per_cost`.
        iterations: For synflow.
        own: For own: scores of ``model=``; what is small goes first.

    Raises:
        ConfigError: There is no such method, or one of its arguments is missing or out of range.
        ModelError: As `prune`.
    """
    masks = Masks.dense(model, leave) if masks is None else masks
    address = Address(0) if address is None else address
    if costs is not None:
        check_cost("given", method, scope)
    if method == "synflow":
        if scope != "global":
            raise ConfigError.of("pruning.scope", scope, "must be global for synflow")
        if not input_shape:
            raise ConfigError.of("input_shape", input_shape, "must be given for synflow")
        return synflow_masks(
            model, input_shape, masks, sparsity, iterations=iterations, keep_channels=keep_channels
        )
    channels = {"groups": groups, "blocks": blocks}
    scored = _scored(model, batches, address, mix, channels, scales)
    if method == "own":
        if own is None:
            raise ConfigError.of("own", own, "must be a function of the model")
        scored["own"] = functools.partial(score_functions.own, own, model)
    if method not in scored:
        rule = f"must be one of {', '.join(METHODS)}"
        raise ConfigError.of("pruning.method", method, rule, did_you_mean(method, METHODS))
    scores = scored[method]()
    if costs is not None:
        scores = score_functions.per_cost(scores, costs, cost_weight)
    return prune(masks, scores, sparsity, scope=scope, keep_channels=keep_channels)


def _scored(
    model: nn.Module,
    batches: Batches,
    address: Address,
    mix: float,
    channels: Mapping[str, Any],
    scales: Mapping[str, Tensor] | None,
) -> dict[str, Callable[[], Scores]]:
    """Return what scores weights by each method that scores once."""
    named = score_functions
    return {
        "random": lambda: named.random(model, address),
        "magnitude": lambda: named.magnitude(model),
        "magnitude_channel": lambda: named.magnitude_channel(model, mix=mix, **channels),
        "group_norm": lambda: named.group_norm(model, scales=scales, **channels),
        "snip": lambda: named.snip(model, batches, address),
        "grasp": lambda: named.grasp(model, batches, address),
    }
