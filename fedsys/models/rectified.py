"""Cuts behind a ReLU, where the gradient at zeros of the activation changes nothing.

The backward of ReLU and ReLU6 gives zero where their output is zero, whatever comes. Max pooling
hands the gradient of an output to an input of the same value, and reshaping to the element itself,
so behind them the same holds. It does not hold behind anything else: the mean of a BatchNorm is
moved by every gradient, and a dropout multiplies, so that an infinite gradient is not nothing.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedsys.models.layers import LayeredModel

RELUS: Final = frozenset(
    (nn.ReLU, nn.ReLU6, F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_")
)
"""Modules, functions and methods that are a ReLU or a ReLU6."""

_POOLS: Final = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_SAME_ELEMENTS: Final = frozenset(
    (nn.Identity, nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, "flatten", "reshape")
)


def is_rectified(layers: LayeredModel, cut: int) -> bool:
    """Return whether what crosses a cut needs no gradient where it is zero.

    Args:
        layers: The model.
        cut: In 0 … L.
    """
    if not 0 < cut < len(layers) or layers.units[cut - 1].beside:
        return False
    graph = layers.graph
    names = {node.name: node for node in graph.graph.nodes}
    node: fx.Node | None = names[layers.units[cut - 1].output]
    while node is not None:
        what = _what(graph, node)
        if what in RELUS:
            return True
        node = _before(node) if what in _SAME_ELEMENTS or _pools(graph, node) else None
    return False


def _what(graph: fx.GraphModule, node: fx.Node) -> object:
    """Return the type of the module that a node calls, the function, or the name of the method."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else None


def _pools(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is max pooling, and leaves one tensor."""
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return type(module) in _POOLS and not getattr(module, "return_indices", False)


def _before(node: fx.Node) -> fx.Node | None:
    """Return what a node takes its elements from."""
    given = node.args[0] if node.args else None
    return given if isinstance(given, fx.Node) else None
