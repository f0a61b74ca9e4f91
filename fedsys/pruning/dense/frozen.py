"""What a dense model takes over from its original for training: the parts that are frozen.

A dense model is made from the graph of evaluation, which knows nothing of training. Trained as a
variant it would train a BatchNorm that the original keeps in evaluation, or weights that need no
gradient there.
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fedsys.models.assemble import Following, following
from fedsys.models.modes import Modes, observed
from fedsys.randomness import KeyedDropout

_MODAL = (_NormBase, KeyedDropout)


def keep_frozen(dense: fx.GraphModule, original: nn.Module, example: Tensor) -> Following:
    """Return `dense`, in evaluation, with the frozen parts of `original` frozen.

    Layers that `original` keeps in evaluation while it trains stay so, momentums are those of
    training, and parameters of equal names need a gradient as there.

    Args:
        dense: Made of `original`; its modules are used, not copied.
        original: Run once in training and in evaluation, and left as it was.
        example: A batch of two or more inputs for it.
    """
    modal = any(isinstance(module, _MODAL) for module in original.modules())
    kept = observed(original, example).training if modal else {}
    still: dict[str, dict[str, bool]] = {}
    for path, module in dense.named_modules():
        special = kept.get(path, {})
        if "momentum" in special and isinstance(module, _NormBase):
            module.momentum = special["momentum"]  # type: ignore[assignment]  # of the same kind
        if isinstance(module, _MODAL) and special.get("training") is False:
            still[path] = {"training": False}
    learns = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(learns.get(name, True))
    used = {str(n.target) for n in dense.graph.nodes if n.op in ("call_module", "get_attr")}
    parts = {path: _attribute(dense, path) for path in used}  # torch.fx orders them by the graph
    built = following(parts, dense.graph, type(dense).__name__, Modes(still))
    built.eval()
    return built


def _attribute(root: nn.Module, path: str) -> nn.Module | Tensor:
    parent, _, name = path.rpartition(".")
    found: nn.Module | Tensor = getattr(root.get_submodule(parent), name)
    return found
