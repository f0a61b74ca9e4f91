"""The same model as a finer chain, which may be cut where several tensors are alive.

A residual block is one unit of `fedsys.models.layers.layered`, as inside of it two tensors are
alive; a dense block is one for all its layers. For inference nothing speaks against sending two::

    ──┬─ conv ─ bn ─ relu ─┼─ conv ─ bn ─ add ─ relu ──      ┼  crossed by two tensors
      └────────────────────┼──────────────┘

What is cut is one order of the steps. That of the model is taken, or another one in which some
steps come first: those that a minimum cut (`fedsys.partition.minimum_cut`) leaves on the device.

A tensor that is sent is another tensor on the other side. Where a step works in place on memory
that is also another value's, both would have to see it, so no cut comes between the two.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fedsys.errors import ModelError
from fedsys.models.assemble import graph_module, modes_of
from fedsys.models.chain import Costs, UnitNodes, in_place, works
from fedsys.models.layers import LayeredModel, chain_of, measured
from fedsys.models.origins import sourceless

_FRESH_LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)
_FRESH_FUNCTIONS = (
    operator.add, operator.sub, operator.mul, operator.matmul, torch.add, torch.mul, torch.cat,
    torch.matmul, torch.stack, F.conv2d, F.linear, F.batch_norm, F.layer_norm,
)  # fmt: skip
"""What makes a tensor of its own; all else may return what it was given, or a view of it."""

Roots = Mapping[fx.Node, frozenset[fx.Node]]
"""The steps whose memory the value of a step may be."""


def finer(
    layers: LayeredModel,
    example: Tensor | Sequence[int],
    most: int,
    *,
    first: Collection[str] = (),
    fc_as_one: bool = True,
) -> LayeredModel:
    """Return the same model as a chain that may be cut where up to `most` tensors are alive.

    Args:
        layers: The model.
        example: As for `fedsys.models.layers.layered`.
        most: Tensors that may cross a cut.
        first: Names of steps that come before all others; with each of them what it reads. There
            is a cut behind them, whatever crosses it. Empty: the order of the model.
        fc_as_one: As for `layered`.

    Raises:
        ModelError: In that order a step would work in place on what another one has yet to read,
            or there can be no cut behind those steps.
    """
    module = layers.graph if not first else _reordered(layers.graph, first)
    costs, batch = measured(module, example)
    steps = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    steps = [n for n in steps if not sourceless(n)]
    forced = max((i for i, n in enumerate(steps) if n.name in first), default=-1)
    segments = list(_segments(module, steps, costs, batch, most, forced))
    return chain_of(module, segments, example, fc_as_one=fc_as_one)


def _segments(
    module: fx.GraphModule, steps: Sequence[fx.Node], costs: Costs, batch: int, most: int,
    forced: int,
) -> Iterator[UnitNodes]:  # fmt: skip
    """Yield the units: each but the one behind a forced cut multiplies.

    Between two steps that multiply there is one cut: where the fewest bytes cross, the last of
    those that are alike.
    """
    alive, start = _alive(module.graph, steps), 0
    may = _legal(module, steps, alive, costs, batch)
    if forced >= 0 and not may[forced]:
        raise ModelError(
            f"{steps[forced].name}: the model cannot be cut behind it: what crosses is no batch of "
            "tensors, or a later step works on it in place"
        )
    worked, best = False, -1
    for i, node in enumerate(steps):
        if works(module, node, costs):
            if best >= 0:
                yield UnitNodes(tuple(steps[start : best + 1]), alive[best][0], alive[best][1:])
                start, best = best + 1, -1
            worked = True
        if i == forced:
            yield UnitNodes(tuple(steps[start : i + 1]), alive[i][0], alive[i][1:])
            start, worked, best = i + 1, False, -1
        elif worked and may[i] and len(alive[i]) <= most:
            sizes = [sum(costs[v.name].bytes for v in alive[j]) for j in (i, best)]
            best = i if best < 0 or sizes[0] <= sizes[1] else best
    yield UnitNodes(tuple(steps[start:]), module.graph.output_node())


def _legal(
    module: fx.GraphModule, steps: Sequence[fx.Node], alive: Sequence[Sequence[fx.Node]],
    costs: Costs, batch: int,
) -> list[bool]:  # fmt: skip
    """Say behind which steps what is alive can be sent: batches, on which nothing works later."""
    roots = _roots(module, costs)
    changed = {i: roots[n] for i, n in enumerate(steps) if in_place(module, n)}
    found = []
    for i, values in enumerate(alive):
        shapes = [costs[value.name].shape for value in values]
        held = frozenset[fx.Node]().union(*(roots[value] for value in values))
        overwritten = any(j > i and memory & held for j, memory in changed.items())
        found.append(all(s and s[0] == batch for s in shapes) and not overwritten)
    return found


def _alive(graph: fx.Graph, steps: Sequence[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """Return what was made before and is needed after each step, the newest first."""
    index = {node: i for i, node in enumerate(steps)} | {graph.output_node(): len(steps)}
    last = {node: max((index[user] for user in node.users), default=-1) for node in graph.nodes}
    entry = next(node for node in graph.nodes if node.op == "placeholder")
    values, found = [entry], []
    for i, node in enumerate(steps):
        values = [value for value in (node, *values) if last[value] > i]
        found.append(tuple(values))
    return found


def _roots(module: fx.GraphModule, costs: Costs) -> Roots:
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr") or _fresh(module, node, costs):
            roots[node] = frozenset([node])
        else:
            roots[node] = frozenset().union(*(roots[n] for n in node.all_input_nodes))
    return roots


def _fresh(module: fx.GraphModule, node: fx.Node, costs: Costs) -> bool:
    if in_place(module, node):
        return False
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _FRESH_LAYERS)
    return node.target in _FRESH_FUNCTIONS or (node.op != "output" and costs[node.name].macs > 0)


def _reordered(module: fx.GraphModule, first: Collection[str]) -> fx.GraphModule:
    """Return the same model with some steps before all others."""
    old = list(module.graph.nodes)
    early = {n for n in old if n.op == "placeholder" or sourceless(n) or n.name in first}
    order = sorted(old, key=lambda n: n not in early)  # stable
    place = {node: i for i, node in enumerate(order)}
    for node in old:
        if any(place[read] > place[node] for read in node.all_input_nodes):
            raise ModelError(f"{node.name} cannot come first: it reads what comes later")
    _check_in_place(module, old, place)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in order:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph_module(module, graph, module.state_dict(), modes_of(module))


def _check_in_place(
    module: fx.GraphModule, old: Sequence[fx.Node], place: Mapping[fx.Node, int]
) -> None:
    """Refuse an order in which a step reads what another one has overwritten, or has yet to."""
    for before, node in enumerate(old):
        if not in_place(module, node):
            continue
        for after, reader in enumerate(old):
            reads = set(reader.all_input_nodes) & set(node.all_input_nodes)
            moved = (before < after) != (place[node] < place[reader])
            if reader is not node and reads and moved:
                raise ModelError(
                    f"{node.name} works in place on what {reader.name} reads, so the two cannot "
                    "change places; build the model with inplace=False"
                )
