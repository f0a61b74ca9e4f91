"""Low-rank adapters beside linear layers, of which alone a model learns.

A layer ``W x + b`` becomes ``W x + b + (α / r) B A x`` with ``A`` of ``(r, in)`` and ``B`` of
``(out, r)``; ``W`` and ``b`` stay as they are (Hu et al., "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, section 4.1). ``B`` begins as zero, so the model begins as it was.

Names of what was there stay: ``fc.weight`` has ``fc.lora_a`` and ``fc.lora_b`` beside it. Whoever
has the configuration can make what does not learn, so only adapters and buffers travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.errors import ConfigError
from fedsys.randomness import Address

_LEARNS = (".lora_a", ".lora_b")


class LoraLinear(nn.Module):
    """A linear layer that stays as it is, and an adapter beside it.

    Args:
        layer: Its weight, ``(out, in)``, and its bias are shared, and learn no more.
        rank: Of the adapter, r.
        alpha: Its weight is ``alpha / rank``.
        draws: Initial values of ``A``; None leaves it as it is, for a model without values.
    """

    bias: Tensor | None

    def __init__(
        self, layer: nn.Linear, rank: int, alpha: float, draws: torch.Generator | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.scale = layer.weight, alpha / rank
        self.register_parameter("bias", layer.bias)
        self.lora_a = nn.Parameter(layer.weight.new_zeros(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        if draws is not None:  # as kaiming_uniform_ with a = √5, which takes no generator of meta
            bound = layer.in_features**-0.5
            drawn = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=draws)
            self.lora_a.data.copy_(drawn)

    def extra_repr(self) -> str:
        """Show sizes when the module is printed."""
        return f"in={self.in_features}, out={self.out_features}, rank={len(self.lora_a)}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(…, out)`` of ``(…, in)``."""
        added = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + added * self.scale


def adapted(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int | None
) -> nn.Module:
    """Put adapters beside linear layers of `model`, in place, and let nothing else learn.

    Args:
        model: With values, or on ``meta``.
        rank: Of each adapter.
        alpha: Over `rank`, the weight of each adapter.
        targets: Names of layers, whole or their ends, as ``qkv`` for ``blocks.0.attention.qkv``;
            empty: all linear layers.
        seed: Of the run, from which each adapter is drawn by its name; None: the model is on
            ``meta``.

    Returns:
        The model.

    Raises:
        ConfigError: One of `targets` names no linear layer, or there is none.
    """
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name}
    wanted = {t: [n for n in layers if n == t or n.endswith(f".{t}")] for t in targets}
    for target, found in wanted.items():
        if not found:
            raise ConfigError.of(
                "client.lora.targets", target, "must name linear layers of the model, or their "
                "ends", f"it has {', '.join(layers) or 'none'}",
            )  # fmt: skip
    chosen = [n for n in layers if not targets or any(n in found for found in wanted.values())]
    if not chosen:
        raise ConfigError.of(
            "client.train",
            "lora",
            "needs a model with linear layers as modules",
            "client.train=all",
        )
    for name in chosen:
        draws = None if seed is None else Address(seed).torch("lora", name=name)
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, LoraLinear(layers[name], rank, alpha, draws))
    for module in model.modules():
        if type(module) is nn.TransformerEncoderLayer:
            module.activation_relu_or_gelu = 0  # else evaluation reads weights past the adapters
    return model


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return any(name.endswith(_LEARNS) for name, _ in model.named_parameters())


def learned(model: nn.Module) -> set[str]:
    """Return the names of what training changes in a model with adapters: these, and buffers."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {n for n in model.state_dict() if n not in parameters or n.endswith(_LEARNS)}


def sent(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model as it is sent: of one with adapters, what it learns."""
    state = model.state_dict()
    if not any(name.endswith(_LEARNS) for name in state):
        return dict(state)
    names = learned(model)
    return {name: tensor for name, tensor in state.items() if name in names}
