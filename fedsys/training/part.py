"""A part of a model in training: what a device and an edge server both do with theirs.

The plain loop (`fedsys.training.plain.train`) does to the whole model, per parameter and in the
order of names, what `Part` does to the parameters of one machine. Only clipping needs to know of
the other parts, and only one number per parameter: its squared norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsys.config import Config, pruning
from fedsys.errors import ModelError
from fedsys.models.fused import fuse, fusion_of
from fedsys.models.layers import LayeredModel, fill, stages
from fedsys.models.lora import learned
from fedsys.training import optimizers
from fedsys.training import plain as training
from fedsys.training.masks import Holding, Masks
from fedsys.training.penalty import Penalty
from fedsys.training.plain import Proximal


class Part:
    """Modules of one machine that are trained together.

    Args:
        modules: Stages of a model, filled; they have global names.
        config: The run, whose ``client`` says how to train.
        round_: The round, which decides the learning rate.
        proximal_mu: Weight of FedProx's term; 0 for none.
        optimizer_state: State by global name, of these parameters; None to begin anew.
        masks: What is pruned, packed (`fedsys.training.masks.Masks.packed`), by global name.
        penalty: On channels, so that they die; None for none.
        anchor: Parameters by global name towards which FedProx's term pulls; None: those that the
            modules have now, at the start of the round.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        config: Config,
        round_: int,
        *,
        proximal_mu: float = 0.0,
        optimizer_state: Mapping[str, Tensor] | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        self.modules = tuple(modules)
        self._clip_norm = config.client.clip_norm
        self.named = {n: p for m in self.modules for n, p in m.named_parameters()}
        self._adapters = config.client.train == "lora"
        start = anchor or self.named
        if self._adapters:
            start = {n: p for n, p in start.items() if self.named[n].requires_grad}
        self._anchor = (
            Proximal(
                proximal_mu,
                {n: t.detach().to(self.named[n].device, copy=True) for n, t in start.items()},
            )
            if proximal_mu
            else None
        )
        client = config.client
        place = pruning.position(config.pruning, round_, config.rounds)
        lr = optimizers.learning_rate(client.lr, client.lr_schedule, *place)
        self.optimizer: Optimizer | None = None
        if self.named:  # a stage of pooling or flattening alone has nothing to train
            self.optimizer = optimizers.make_optimizer(self.named.values(), client, lr)
            optimizers.unpack_optimizer(self.optimizer, self.named, optimizer_state or {})
        self._penalty = penalty
        pruned = Masks.unpacked(masks or {}, self.named)
        self._holding = Holding(pruned, self.named, self.optimizer)
        for module in self.modules:
            module.train()
            if client.frozen:  # else each parameter as the model has it: some parts may be frozen
                module.requires_grad_(False)

    @property
    def clips(self) -> bool:
        """Whether a step needs the norms of the other parts."""
        return self._clip_norm is not None

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for parameter in self.named.values():
            parameter.grad = None

    def norms(self) -> dict[str, float]:
        """Return the squared norms of the gradients, with proximal term and penalty in them.

        To be called once per step, after the last backward.
        """
        if self._anchor is not None:
            self._anchor.add_to_gradients(self.named)
        if self._penalty is not None:
            self._penalty.add_to_gradients(self.named)
        return training.squared_norms(self.named) if self.clips else {}

    def step(self, norms: Mapping[str, float]) -> None:
        """Clip by the joint norm and step.

        Args:
            norms: Squared norms of all parts of the model.
        """
        if self._clip_norm is not None:
            training.clip_gradients(self.named, self._clip_norm, norms)
        if self.optimizer is not None:
            optimizers.step(self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by global name; not copied.

        With adapters these, and buffers: the others are as the configuration makes them.

        Raises:
            ModelError: Training moved a weight that is pruned.
        """
        self._holding.check()
        states = (_learned(m) if self._adapters else m.state_dict() for m in self.modules)
        return {n: t.detach() for state in states for n, t in state.items()}

    def anchor(self) -> dict[str, Tensor]:
        """Return the parameters at the start of the round, where FedProx's term needs them."""
        return {} if self._anchor is None else {n: t.cpu() for n, t in self._anchor.start.items()}

    def nbytes(self) -> int:
        """Return the bytes of parameters, buffers and optimizer state."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        kept = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        held = [t for m in self.modules for t in m.state_dict().values()]
        return sum(t.nbytes for t in (*held, *kept))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state by global name; copied."""
        return (
            {} if self.optimizer is None else optimizers.pack_optimizer(self.optimizer, self.named)
        )


def _learned(module: nn.Module) -> dict[str, Tensor]:
    names, state = learned(module), module.state_dict()
    return {name: tensor for name, tensor in state.items() if name in names}


def filled_stages(
    model: LayeredModel,
    cuts: Sequence[int],
    which: Sequence[int],
    state: Mapping[str, Tensor],
    device: torch.device,
    memory_format: str = "contiguous",
    base: Mapping[str, Tensor] | None = None,
    *,
    kernels: str = "plain",
) -> list[nn.Module]:
    """Return some of the stages between cuts, with the tensors of `state`.

    Args:
        model: The whole model on ``meta``; it takes no memory.
        cuts: Ascending indices.
        which: Indices of the wanted stages.
        state: The tensors of the wanted stages by global name, no others; owned by the stages
            afterwards.
        device: Where the stages are to be.
        memory_format: Their layout, as ``client.memory_format``.
        base: Tensors of the model that need not be in `state`, by global name; shared.
        kernels: By what they compute, as ``client.kernels``.

    Raises:
        ModelError: The state does not fit.
    """
    all_stages = stages(model, cuts)
    chosen = [all_stages[i] for i in which]
    wanted = {name for stage in chosen for name in stage.state_dict()}
    if unexpected := sorted(state.keys() - wanted):
        raise ModelError(f"the state is not that of the stages: {', '.join(unexpected[:5])}")
    for stage in chosen:
        known = {**(base or {}), **state}
        fill(stage, {name: known[name] for name in stage.state_dict() if name in known})
        training.lay_out(stage.to(device), memory_format)
        if kernels == "fused":
            fuse(stage, fusion_of(model))
    return chosen


def names_between(model: LayeredModel, cuts: Sequence[int]) -> list[set[str]]:
    """Return for each stage between cuts the names of its parameters and persistent buffers."""
    return [set(stage.state_dict()) for stage in stages(model, cuts)]


def keep_gradient(x: Tensor) -> list[Tensor]:
    """Return a list that backward will put the gradient of `x` into, in the layout that it has.

    ``x.grad`` is laid out in memory as `x` is. In a model that is not split the gradient keeps the
    layout in which it was computed, and sums over it in the units before have other last bits in
    another one: where tokens are transposed pixels, gradients of scales were off by 1e-8 of
    themselves.
    """
    kept: list[Tensor] = []
    x.requires_grad_().register_hook(kept.append)  # type: ignore[no-untyped-call]
    return kept


def safe_input(module: nn.Module, x: Tensor) -> Tensor:
    """Return `x`, or a copy if `module` works in place and might begin with that."""
    if x.requires_grad and any(getattr(m, "inplace", False) for m in module.modules()):
        return x.clone()
    return x
