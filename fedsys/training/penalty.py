"""A penalty that lets channels die while a model is trained, and how channels are scaled.

Group lasso (Yuan & Lin, JRSS B 2006; for channels Wen et al., "Learning Structured Sparsity in Deep
Neural Networks", NeurIPS 2016) adds ``weight × Σ ‖w_c‖`` to the loss, over the filters w_c of all
channels. Where a normalisation follows a layer, the norm of its filters has no influence; there the
group of a channel is its scale γ_c alone, as in Liu et al., "Network Slimming", ICCV 2017. Groups
are not weighted by their size. Like the proximal term it is added to gradients per parameter, so
split training adds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.training.masks import LAYERS, prunable

NORMS = (_BatchNorm, nn.GroupNorm)


def norms_behind(graph: fx.GraphModule) -> dict[str, str]:
    """Return for each layer that only a normalisation with scales reads the name of that.

    Args:
        graph: A traced model (`fedsys.models.graph.trace`).
    """
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    modules = {node: graph.get_submodule(str(node.target)) for node in calls}
    found: dict[str, str] = {}
    for node, module in modules.items():
        users = list(node.users)
        reader = modules.get(users[0]) if len(users) == 1 else None
        if isinstance(module, LAYERS) and isinstance(reader, NORMS) and reader.weight is not None:
            found[str(node.target)] = str(users[0].target)
    return found


def output_layers(graph: fx.GraphModule) -> tuple[str, ...]:
    """Return the layers whose channels are outputs of the model: none of them may go.

    Args:
        graph: A traced model.
    """
    found: list[str] = []
    (end,) = (node for node in graph.graph.nodes if node.op == "output")
    open_, seen = list(end.all_input_nodes), set[fx.Node]()
    while open_:
        node = open_.pop()
        if node in seen:
            continue
        seen.add(node)
        called = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, LAYERS):
            found.append(str(node.target))
        else:
            open_ += node.all_input_nodes
    return tuple(sorted(found))


def channel_scales(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return what BatchNorm multiplies each channel of a layer with in evaluation, by layer.

    It is |γ| / √(σ² + ε): filters times this are those of the network without BatchNorm.
    """
    scales: dict[str, Tensor] = {}
    for layer, norm in norms_behind(graph).items():
        module = graph.get_submodule(norm)
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            spread = torch.sqrt(module.running_var + module.eps)
            scales[layer] = (module.weight.detach().abs() / spread).detach()
    return scales


@dataclass(frozen=True)
class Penalty:
    """The penalty as a gradient.

    Attributes:
        weight: Its weight in the loss.
        filters: Names of weights that have a group for each output.
        scales: Names of scales each of which is a group.
    """

    weight: float
    filters: frozenset[str]
    scales: frozenset[str]

    @classmethod
    def of(
        cls, graph: fx.GraphModule, weight: float, leave: Sequence[str] | None = None
    ) -> Penalty:
        """Return the penalty on all channels that can be pruned.

        Args:
            graph: The traced model.
            weight: Weight in the loss.
            leave: Layers to leave alone, as for `prunable`; None: those of the output.

        Raises:
            ConfigError: As `prunable`.
        """
        behind = norms_behind(graph)
        alone = output_layers(graph) if leave is None else leave
        layers = [name.rpartition(".")[0] for name in prunable(graph, alone)]
        return cls(
            weight,
            frozenset(f"{layer}.weight" for layer in layers if layer not in behind),
            frozenset(f"{behind[layer]}.weight" for layer in layers if layer in behind),
        )

    def add_to_gradients(self, named: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of the penalty; that of a channel that is zero is taken to be zero."""
        for name, p in named.items():
            if p.grad is None:
                continue
            if name in self.scales:
                p.grad.add_(p.detach().sign(), alpha=self.weight)
            elif name in self.filters:
                rows = p.detach().flatten(1)
                norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
                unit = torch.where(norms > 0, rows / norms, 0.0)
                p.grad.add_(unit.view_as(p), alpha=self.weight)
