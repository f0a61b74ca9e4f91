"""Which units of a chain the kernels compute: found in its graph, by names of modules.

What is found holds for the whole model and for every part of it alike, so that both compute the
same units by the same kernels.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedsys.models.assemble import modes_of
from fedsys.models.batchnorm import DeferredBatchNorm
from fedsys.models.layers import LayeredModel
from fedsys.models.modes import Modes

LARGEST_PATCH = 160
"""Numbers that an output is computed from, at most: the statistics take their square for each
position, where torch's own convolution is at its best with many of them."""
PATCH_PER_OUTPUT = 5
"""The same for each output channel, where there are statistics."""
LARGEST_WINDOW = 127  # places in it are told by a byte
_CAPS: Mapping[object, float] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu"), math.inf),
    **dict.fromkeys((nn.ReLU6, F.relu6), 6.0),
}
"""What modules, functions and methods that are a ReLU cap at."""
WITH_STATISTICS = (nn.BatchNorm2d, DeferredBatchNorm, nn.GroupNorm)


@dataclass(frozen=True, slots=True)
class UnitPaths:
    """Modules that are computed at once, by their paths.

    Attributes:
        conv: The convolution.
        norm: The normalisation behind it; empty for none.
        activation: ReLU or ReLU6; empty for a function, or for a module that is called elsewhere,
            too: either may well be applied once more, as it changes nothing the second time.
        pool: The max pooling; empty for none.
        cap: What the activation caps at: 6, or infinity.
    """

    conv: str
    norm: str
    activation: str
    pool: str
    cap: float

    @property
    def others(self) -> Iterator[str]:
        """The modules behind the convolution."""
        return (path for path in (self.norm, self.activation, self.pool) if path)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What of a chain is computed by the kernels.

    Attributes:
        units: What they compute.
        plain: Why other convolutions are none of theirs, by path.
        modes: What the model sets of its modules in training and in evaluation.
    """

    units: tuple[UnitPaths, ...]
    plain: Mapping[str, str]
    modes: Modes

    def in_words(self) -> str:
        """Return which convolutions are computed how, in a line."""
        fused = ", ".join(unit.conv for unit in self.units) or "none"
        told = "; ".join(f"{path}: {why}" for path, why in self.plain.items())
        return f"fused convolutions: {fused}" + (f"; plain: {told}" if told else "")


@functools.lru_cache(maxsize=16)
def fusion_of(layers: LayeredModel) -> Fusion:
    """Return what of a chain is computed by the kernels."""
    graph = layers.graph
    calls = Counter(_called(graph, node) for node in graph.graph.nodes)
    del calls[None]
    home = {name: index for index, unit in enumerate(layers.units) for name in unit.nodes}
    units: list[UnitPaths] = []
    plain: dict[str, str] = {}
    for node in graph.graph.nodes:
        if _called(graph, node) not in calls or not isinstance(_called(graph, node), nn.Conv2d):
            continue
        unit, nodes = _behind(graph, node, calls)
        modules = [graph.get_submodule(path) for path in (unit.conv, *unit.others)]
        why = _misfit(unit, modules)
        if not why and any(calls[module] > 1 for module in modules):
            why = "a module of it is called more than once"
        if not why and len({home.get(each.name) for each in nodes}) > 1:
            why = "it is divided among units"
        if why:
            plain[unit.conv] = why
        else:
            units.append(unit)
    return Fusion(tuple(units), plain, modes_of(graph))


def _called(graph: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    """Return the module that a node calls; None if it calls none."""
    if node is None or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def _behind(
    graph: fx.GraphModule, conv: fx.Node, calls: Mapping[nn.Module | None, int]
) -> tuple[UnitPaths, list[fx.Node]]:
    """Return a convolution with what follows it, and the nodes of that."""
    norm, activation, pool, cap, nodes = "", "", "", 0.0, [conv]
    node = _next(graph, conv)
    if node is not None and type(_called(graph, node)) in WITH_STATISTICS:
        nodes.append(node)
        norm, node = str(node.target), _next(graph, node)
    if node is not None and (found := _cap(graph, node)):
        nodes.append(node)
        cap, module = found, _called(graph, node)
        activation = str(node.target) if module is not None and calls[module] == 1 else ""
        node = _next(graph, node)
        if node is not None and type(_called(graph, node)) is nn.MaxPool2d:
            nodes.append(node)
            pool = str(node.target)
    return UnitPaths(str(conv.target), norm, activation, pool, cap), nodes


def _cap(graph: fx.GraphModule, node: fx.Node) -> float:
    """Return what the ReLU of a node caps at; 0 if it is none."""
    called = _called(graph, node)
    if called is not None:
        return _CAPS.get(type(called), 0.0)
    return _CAPS.get(node.target, 0.0)


def _next(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return what alone uses a value, and nothing else besides; identities are passed over."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "output" or len(node.all_input_nodes) != 1:
            return None
        if type(_called(graph, node)) is not nn.Identity:
            return node
    return None


def _misfit(unit: UnitPaths, modules: list[nn.Module]) -> str:
    """Return why the kernels do not compute a unit; empty if they do."""
    conv = modules[0]
    assert isinstance(conv, nn.Conv2d)
    patch = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}"
    if conv.groups != 1 or conv.dilation != (1, 1):
        return "it has groups or a dilation"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "its padding is not that of zeros on all sides"
    if not unit.cap:
        return "no ReLU is behind it"
    if patch > LARGEST_PATCH:
        return f"{patch} numbers make an output, and {LARGEST_PATCH} is the most that pays"
    if unit.norm and patch > (most := PATCH_PER_OUTPUT * conv.out_channels):
        return f"{patch} numbers make an output, and {most} is the most that pays with a norm"
    return _unpooled(modules[-1]) if unit.pool else ""


def _unpooled(pool: nn.Module) -> str:
    """Return why the kernels do not compute a pooling; empty if they do."""
    assert isinstance(pool, nn.MaxPool2d)
    high, wide = pair(pool.kernel_size)
    if pool.return_indices or pair(pool.dilation) != (1, 1):
        return "its pooling has a dilation, or returns indices"
    return "its pooling has too large a window" if high * wide > LARGEST_WINDOW else ""


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of what torch takes as one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
