"""Scores: how much each weight matters. Pure functions of a model, and of examples where needed.

========================  =====================================================================
`random`                  a keyed draw: the baseline of all baselines
`own`                     what a function of a user says
`magnitude`               |w|: Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019
`channel_norm`            norms of filters, or of coupled filters: Li et al., "Pruning Filters for
                          Efficient ConvNets", ICLR 2017
`magnitude_channel`       a mixture of both, which leaves whole channels dead
`group_norm`              norms of coupled filters, without BatchNorm, relative to their layers:
                          Fang et al., "DepGraph", CVPR 2023
`snip`                    |w g|: Lee et al., "SNIP", ICLR 2019
`grasp`                   w H g: Wang et al., "Picking Winning Tickets … by Preserving Gradient
                          Flow", ICLR 2020
`flow`                    |w dR/dw|: Tanaka et al., "Pruning neural networks without any data by
                          iteratively conserving synaptic flow", NeurIPS 2020
========================  =====================================================================

Each returns, for every weight that can be pruned, a tensor of its shape; what is small goes first.
The model is left as it was, to the running averages of its BatchNorm. Weights that are pruned
already must be zero in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation, batchnorm, instancenorm

from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.dense.removal import make_plan, masked_copy, probes
from fedsys.randomness import Address, drawing
from fedsys.training.masks import prunable
from fedsys.training.plain import Batches, device_of, forward

Scores = dict[str, Tensor]
Groups = Sequence[Sequence[str]]
"""Names of layers whose outputs of equal index are one channel."""
Blocks = Mapping[str, int]
"""By name of a layer, how many of its channels that follow each other are normalised together."""


# --------------------------------------------------------------------------------------------------
# Of the weights alone


def random(model: nn.Module, address: Address) -> Scores:
    """Return draws from [0, 1), each weight's a function of the address and its name."""
    return {
        name: torch.rand(w.shape, generator=address.torch("pruning", name=name))
        for name, w in prunable(model).items()
    }


def own(score: Callable[..., Scores], model: nn.Module) -> Scores:
    """Return what a function of a user says of ``model=``, for the weights that can be pruned.

    Raises:
        ConfigError: It has no tensor of its shape for one of them.
    """
    with torch.no_grad():
        found = score(model=model)
    if not isinstance(found, Mapping):
        rule = "must return a tensor for each weight, by its name"
        raise ConfigError.of("pruning.score", type(found).__name__, rule)
    for name, w in prunable(model).items():
        if getattr(found.get(name), "shape", None) != w.shape:
            rule = f"must return a tensor of {tuple(w.shape)} for {name}"
            raise ConfigError.of("pruning.score", sorted(found), rule, "magnitude: w.abs()")
    return {name: found[name].detach().float() for name in prunable(model)}


def magnitude(model: nn.Module) -> Scores:
    """Return |w|."""
    return {name: w.detach().abs() for name, w in prunable(model).items()}


def channel_norm(
    model: nn.Module,
    *,
    order: int = 1,
    groups: Groups = (),
    scales: Mapping[str, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> Scores:
    """Return for each weight the mean norm of the channel that it computes.

    Li et al. (2017) rank the filters of one layer by the sum of |w|. Here it is the mean, over the
    number of weights, so that filters of different layers can be compared.

    Args:
        model: The model.
        order: 1 for the mean of |w|, 2 for the root of the mean of w².
        groups: Layers that share their channels, such as the operands of residual sums, from
            `coupled_layers`: a channel is then as large as its filters in all of them.
        scales: Factors of the channels of layers by name, ``(channels,)``, such as those of the
            BatchNorm behind them (`fedsys.training.penalty.channel_scales`).
        blocks: Channels that go together or not at all, by the name of their layer: all of them
            have the mean of their norms, so that they go at once.

    Raises:
        ConfigError: For an `order` other than 1 and 2.
    """
    if order not in (1, 2):
        raise ConfigError.of("pruning.order", order, "must be 1 or 2")
    powers = {n: w.detach().abs().flatten(1) ** order for n, w in prunable(model).items()}
    for layer, scale in (scales or {}).items():
        if f"{layer}.weight" in powers:
            powers[f"{layer}.weight"] *= scale.unsqueeze(1) ** order
    sums = {name: power.sum(1) for name, power in powers.items()}
    counts = {name: power.shape[1] for name, power in powers.items()}
    for group in groups:
        names = [n for layer in group if (n := f"{layer}.weight") in powers]
        if len({len(sums[name]) for name in names}) == 1:
            total = torch.stack([sums[name] for name in names]).sum(0)
            count = sum(counts[name] for name in names)
            sums |= dict.fromkeys(names, total)
            counts |= dict.fromkeys(names, count)
    means = {name: sums[name] / counts[name] for name in powers}
    for layer, size in (blocks or {}).items():
        if (name := f"{layer}.weight") in means and len(means[name]) % size == 0:
            together = means[name].reshape(-1, size).mean(1, keepdim=True)
            means[name] = together.expand(-1, size).reshape(-1)
    norms = {name: mean ** (1 / order) for name, mean in means.items()}
    return {
        name: norms[name].reshape(-1, *(1 for _ in w.shape[1:])).expand(w.shape)
        for name, w in prunable(model).items()
    }


def magnitude_channel(
    model: nn.Module, *, mix: float = 0.8, order: int = 1, groups: Groups = (),
    blocks: Blocks | None = None,
) -> Scores:  # fmt: skip
    """Return (1 - mix) |w| + mix × the norm of the channel.

    Magnitudes alone leave few channels without any weight before 95 % sparsity, so that little of
    the model can be removed. With a larger `mix`, weights of weak channels go before weak weights
    of strong channels; with 1, whole channels go.

    Args:
        model: The model.
        mix: From 0 (`magnitude`) to 1 (`channel_norm`).
        order: As for `channel_norm`.
        groups: As for `channel_norm`.
        blocks: As for `channel_norm`.

    Raises:
        ConfigError: For a `mix` outside [0, 1] or a wrong `order`.
    """
    if not 0.0 <= mix <= 1.0:
        raise ConfigError.of("pruning.mix", mix, "must be in [0, 1]")
    norms = channel_norm(model, order=order, groups=groups, blocks=blocks)
    return {name: (1 - mix) * size + mix * norms[name] for name, size in magnitude(model).items()}


def group_norm(
    model: nn.Module, *, groups: Groups = (), scales: Mapping[str, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> Scores:  # fmt: skip
    """Return for each weight the norm of its channel, relative to the mean of its layer.

    As in Torch-Pruning's group importance, filters of coupled layers count together and norms are
    divided by the mean of the group, so that layers of any size compete. Differences: what reads a
    channel does not count, and filters are those of the network without BatchNorm, with `scales`.

    Args:
        model: The model.
        groups: As for `channel_norm`.
        scales: As for `channel_norm`.
        blocks: As for `channel_norm`.
    """
    norms = channel_norm(model, order=2, groups=groups, scales=scales, blocks=blocks)
    means = {name: norm.flatten(1)[:, 0].mean() for name, norm in norms.items()}
    return {name: norm / means[name] if means[name] > 0 else norm for name, norm in norms.items()}


def per_cost(scores: Mapping[str, Tensor], costs: Mapping[str, float], weight: float) -> Scores:
    """Return what a layer loses with each weight, for what its channel costs.

    What a weight is worth is its squared score over the mean of a channel, as a share of what its
    layer has without the channels that go before it: as in Lee et al. ("Layer-adaptive Sparsity for
    the Magnitude-based Pruning", ICLR 2021), there for weights. So the fewer channels a layer has
    left, the dearer they are, and no cost strips it of all. That is divided by the cost of the
    channel to the power `weight`: with 1 it is the greedy rule of a knapsack, and layers are left
    with about equal costs. Molchanov et al. ("Pruning Convolutional Neural Networks for Resource
    Efficient Inference", ICLR 2017, section 2.3) subtract a multiple of the cost instead, which has
    to fit the scale of scores; Shen et al. ("Structural Pruning via Latency-Saliency Knapsack",
    NeurIPS 2022) fill a knapsack of measured latency.

    Args:
        scores: Of weights, by name, at least 0.
        costs: Of one channel, by name of the layer (`fedsys.pruning.structure.channel_costs`).
            Only their ratios count. Layers without one count as of the geometric mean.
        weight: Exponent of the cost, at least 0.

    Raises:
        ConfigError: A cost, or the weight, is out of range.
    """
    if not 0.0 <= weight < math.inf:
        raise ConfigError.of("pruning.cost_weight", weight, "must be at least 0 and finite")
    known = {name: costs[layer] for name in scores if (layer := name.rpartition(".")[0]) in costs}
    for name, cost in known.items():
        if not 0.0 < cost < math.inf:
            raise ConfigError.of(f"costs[{name}]", cost, "must be above 0 and finite")
    mean = sum(map(math.log, known.values())) / max(1, len(known))
    factors = {name: math.exp(weight * (mean - math.log(cost))) for name, cost in known.items()}
    return {name: _of_the_rest(each) * factors.get(name, 1.0) for name, each in scores.items()}


def _of_the_rest(score: Tensor) -> Tensor:
    """Return squared scores, ``(channels, …)``, over those of all channels that do not go before.

    All weights of a channel together have as much as the channel: its share times their number.
    """
    squares = score.detach().double() ** 2
    sums = squares.flatten(1).sum(1)
    rest = torch.where(sums >= sums.unsqueeze(1), sums, 0.0).sum(1)
    fan_in = squares[0].numel()
    shares = torch.where(rest > 0, fan_in / rest.clamp(min=torch.finfo(rest.dtype).tiny), 0.0)
    return squares * shares.reshape(-1, *(1 for _ in score.shape[1:]))


def coupled_layers(
    model: nn.Module, example: Tensor | Sequence[int]
) -> tuple[tuple[str, ...], ...]:
    """Return the layers whose outputs only go together: by sums, or by depthwise convolution.

    Args:
        model: Any model that `fedsys.models.graph.trace` traces.
        example: A batch of inputs, or the shape of one input without the batch.

    Raises:
        ModelError: The model does not trace or run on such an input.
    """
    plan = make_plan(masked_copy(model, None), probes(example))
    found = []
    for group in plan.groups:
        widths = dict.fromkeys(edit.before for edit in group)
        found += [tuple(e.name for e in group if e.before == width) for width in widths]
    return tuple(names for names in found if len(names) > 1)


# --------------------------------------------------------------------------------------------------
# Of gradients on examples


def snip(model: nn.Module, batches: Batches, address: Address) -> Scores:
    """Return |w g|, g the gradient of the mean loss: how much the loss depends on each weight.

    Lee et al. (2019), equation 5, before they divide by the sum, which changes no order. BatchNorm
    and dropout work as in training.

    Args:
        model: The model, usually at initialisation.
        batches: Pairs of inputs and labels.
        address: For the draws of dropout.

    Raises:
        ConfigError: There are no examples.
    """
    trial, weights = _trial(model)
    gradient = _gradient(trial, weights, _listed(trial, batches), address, 1.0)
    return {n: (w * g).abs().detach() for (n, w), g in zip(weights.items(), gradient, strict=True)}


def grasp(
    model: nn.Module, batches: Batches, address: Address, *, temperature: float = 200.0
) -> Scores:
    """Return w (H g): what the squared norm of the gradient loses, to first order, without w.

    Wang et al. (2020), equation 8, with the opposite sign: they remove the *largest* -w (H g). H
    and g are of the mean loss over all examples, in all weights that can be pruned.

    Args:
        model: The model, usually at initialisation.
        batches: Pairs of inputs and labels.
        address: For the draws of dropout.
        temperature: Outputs are divided by it, so that the softmax is not saturated; 200 in the
            paper.

    Raises:
        ConfigError: There are no examples, or `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ConfigError.of("pruning.temperature", temperature, "must be above 0")
    trial, weights = _trial(model)
    listed = _listed(trial, batches)
    gradient = _gradient(trial, weights, listed, address, temperature)
    product = [torch.zeros_like(w) for w in weights.values()]
    for loss in _losses(trial, listed, address, temperature):
        parts = _grad(loss, weights, create_graph=True)
        along = torch.stack([(p * g).sum() for p, g in zip(parts, gradient, strict=True)]).sum()
        for total, part in zip(product, _grad(along, weights), strict=True):
            total += part
    return {n: (w * h).detach() for (n, w), h in zip(weights.items(), product, strict=True)}


def _trial(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return a copy in training mode, to be differentiated by its weights alone, and these."""
    trial = copy.deepcopy(model).train().requires_grad_(False)
    weights = prunable(trial)
    for weight in weights.values():
        weight.requires_grad_(True)
    return trial, weights


def _listed(model: nn.Module, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    device = device_of(model)
    listed = [(x.to(device), y.to(device)) for x, y in batches]
    if not listed:
        raise ConfigError.of("pruning.batches", 0, "must be at least 1 mini-batch to score with")
    return listed


def _losses(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], address: Address, temperature: float
) -> Iterator[Tensor]:
    """Yield the share of each mini-batch in the mean loss over all examples."""
    examples = sum(len(y) for _, y in batches)
    for step, (x, y) in enumerate(batches):
        with drawing(address, step, len(y)):
            outputs = forward(model, x) / temperature
        yield F.cross_entropy(outputs, y, reduction="sum") / examples


def _gradient(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    batches: list[tuple[Tensor, Tensor]],
    address: Address,
    temperature: float,
) -> list[Tensor]:
    totals = [torch.zeros_like(w) for w in weights.values()]
    for loss in _losses(model, batches, address, temperature):
        for total, part in zip(totals, _grad(loss, weights), strict=True):
            total += part
    return totals


def _grad(
    value: Tensor, weights: dict[str, nn.Parameter], create_graph: bool = False
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, materialize_grads=True
    )


# --------------------------------------------------------------------------------------------------
# Of the flow through the network


def linear_copy(model: nn.Module) -> nn.Module:
    """Return the network whose outputs on ones are sums, over paths, of products of |w|.

    In float64, with |w| for w. Biases are zero, normalisation and activations are the identity:
    they would spoil what the score rests on, that each layer of a chain has the same total.
    (BatchNorm divides the flow away, ReLU6 cuts it off.) Activations that a model calls as
    functions stay; on a flow, which is never negative, ReLU is the identity anyway.
    """
    linear = copy.deepcopy(model).double().eval()
    for name, module in list(linear.named_modules(remove_duplicate=False)):
        if name and isinstance(module, _PASSED):
            parent, _, child = name.rpartition(".")
            setattr(linear.get_submodule(parent), child, nn.Identity())
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.abs_()
        for module in linear.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias.zero_()
    return linear.requires_grad_(False)


def flow(linear: nn.Module, input_shape: Sequence[int]) -> Scores:
    """Return |w dR/dw| for R the flow of ones through a network that `linear_copy` returned.

    Tanaka et al. (2020), equation 3; `fedsys.pruning.sparsify.synflow_masks` repeats it.

    Args:
        linear: The network.
        input_shape: Of one input without the batch.

    Raises:
        ModelError: The flow is too large for float64.
    """
    weights = prunable(linear)
    for weight in weights.values():
        weight.requires_grad_(True)
    ones = torch.ones((1, *input_shape), dtype=torch.float64, device=device_of(linear))
    gradients = _grad(linear(ones).sum(), weights)
    scores = {
        n: (w * g).abs().detach() for (n, w), g in zip(weights.items(), gradients, strict=True)
    }
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ModelError(
                f"{name}: the synaptic flow exceeds float64, as where gates multiply flows "
                "(squeeze-and-excitation); choose another pruning.method, or smaller weights"
            )
    return scores


_NOT_PASSED = ("GLU", "MultiheadAttention")  # these do more than to bend each element
_PASSED: tuple[type[nn.Module], ...] = (
    *(getattr(nn, name) for name in activation.__all__ if name not in _NOT_PASSED),
    batchnorm._BatchNorm,
    instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
