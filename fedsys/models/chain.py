"""Where a graph can be cut: the chain of units, found by liveness.

A value is *alive* between two steps of a graph if it was made before and is needed after. Where one
tensor alone is alive (and it is a batch of examples), everything before and everything after are
joined by that tensor only, so the graph falls into segments::

    conv ─┼─ bn ─┼─ relu ─┼─┬─ conv ── bn ─┬─ add ─┼─ pool ─┼─ fc      ┼  one tensor is alive
                            └──────────────┘
    units:  conv bn relu        conv bn add pool         fc

Segments that multiply nothing join the unit before them (those at the very start the first unit),
as does one that would overwrite in place the tensor that it is given.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fedsys.errors import ModelError, did_you_mean
from fedsys.models.assemble import copy_modules, graph_module
from fedsys.models.measure import NodeCost
from fedsys.models.modes import Modes
from fedsys.models.origins import module_paths, sourceless

Costs = Mapping[str, NodeCost]

_NAMED_FOR_PYTHON = (operator.and_, operator.or_, operator.not_, operator.is_)
"""Functions whose ``_`` keeps them apart from words of the language, and that change nothing."""

_OVERWRITING = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@dataclass(frozen=True, slots=True)
class UnitNodes:
    """The nodes of one unit in order, the one that makes what leaves it, and what leaves besides.

    What leaves besides was made by the unit or by one before it.
    """

    nodes: tuple[fx.Node, ...]
    output: fx.Node
    beside: tuple[fx.Node, ...] = ()

    def __add__(self, after: UnitNodes) -> UnitNodes:
        return UnitNodes(self.nodes + after.nodes, after.output, after.beside)


def find_chain(module: fx.GraphModule, costs: Costs, batch: int) -> list[UnitNodes]:
    """Return the units of a traced model.

    Args:
        module: The model.
        costs: What every node makes of a batch.
        batch: Size of that batch: what crosses a cut must have it in front.
    """
    segments: list[UnitNodes] = []
    for segment in _segments(module, costs, batch):
        begins = any(works(module, node, costs) for node in segment.nodes)
        whole = segments and any(works(module, node, costs) for node in segments[-1].nodes)
        if begins and whole and not _overwrites(module, segments[-1].output, segment):
            segments.append(segment)
        elif segments:
            segments[-1] += segment
        else:
            segments = [segment]
    return segments


def _segments(module: fx.GraphModule, costs: Costs, batch: int) -> Iterator[UnitNodes]:
    """Yield the pieces between which one batch of tensors flows."""
    graph, aside = module.graph, prepared(module, costs)
    steps = [n for n in graph.nodes if n.op not in ("placeholder", "output") and not sourceless(n)]
    steps = [n for n in steps if n not in aside]
    index = {node: i for i, node in enumerate(steps)} | {graph.output_node(): len(steps)}
    last = {n: max((index.get(user, -1) for user in n.users), default=-1) for n in graph.nodes}
    entries = [node for node in graph.nodes if node.op == "placeholder"]
    alive: set[fx.Node] = set() if aside else {*entries}
    crossed, start = entries[0], 0
    for i, node in enumerate(steps[:-1]):
        alive = {value for value in {*alive, node} if last[value] > i}
        if len(alive) != 1:
            continue
        (value,) = alive
        shape = costs[value.name].shape
        if value is not crossed and shape and shape[0] == batch:
            yield UnitNodes(tuple(steps[start : i + 1]), value)
            crossed, start = value, i + 1
    if steps:
        yield UnitNodes(tuple(steps[start:]), graph.output_node())


def prepared(module: fx.GraphModule, costs: Costs) -> frozenset[fx.Node]:
    """Return of a model of several inputs these, and what is made of them without learning.

    A mask that every block needs would be alive all along, and there would be no place for a cut.
    So inputs go to each part that needs them, beside the one tensor that crosses, and what is made
    of them by functions that neither multiply nor read a parameter is made there, too.
    """
    entries = [node for node in module.graph.nodes if node.op == "placeholder"]
    found = set(entries) if len(entries) > 1 else set()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    plain = set(found)  # and what no input is in, but no parameter either
    for node in module.graph.nodes if found else ():
        if node.op == "get_attr" and node.target not in parameters:
            plain.add(node)
        computes = node.op in ("call_function", "call_method") and not works(module, node, costs)
        if computes and not in_place(module, node) and plain.issuperset(node.all_input_nodes):
            plain.add(node)
            found |= {node} if found & {*node.all_input_nodes} else set()
    return frozenset(found)


def works(module: nn.Module, node: fx.Node, costs: Costs) -> bool:
    """Say whether a unit may begin with `node`: it multiplies, or looks up what it has learned."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if isinstance(called, nn.Embedding | nn.EmbeddingBag):
            return True
    return node.target is F.embedding or costs[node.name].macs > 0


def _overwrites(module: nn.Module, value: fx.Node, segment: UnitNodes) -> bool:
    """Say whether `segment` works in place on `value`: autograd forbids it for what is received."""
    return any(in_place(module, node) for node in segment.nodes if value in node.all_input_nodes)


def in_place(module: nn.Module, node: fx.Node) -> bool:
    """Say whether `node` changes what it is given first."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    named_so = name.endswith("_") and not name.endswith("__")
    named_so = named_so and node.target not in _NAMED_FOR_PYTHON
    return node.target in _OVERWRITING or named_so or bool(node.kwargs.get("inplace"))


# --------------------------------------------------------------------------------------------------
# Names, state, and the block of linear layers


def name_units(module: nn.Module, segments: Sequence[UnitNodes], costs: Costs) -> list[str]:
    """Return one name per unit: the largest module in which no other unit works, as a path.

    A unit without a module of its own is named after the first module or function that works.
    """
    working = [
        [n for n in segment.nodes if works(module, n, costs)] or list(segment.nodes)
        for segment in segments
    ]
    paths = [[_ancestors(node) for node in nodes] for nodes in working]
    everywhere = [set().union(*unit) for unit in paths]
    names: list[str] = []
    for unit, nodes in enumerate(working):
        foreign = set().union(*everywhere[:unit], *everywhere[unit + 1 :])
        common = set.intersection(*map(set, paths[unit])) - foreign
        name = min(common, key=len) if common else max(paths[unit][0], key=len, default="")
        name = name or nodes[0].name
        again = sum(known.partition(" (")[0] == name for known in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _ancestors(node: fx.Node) -> list[str]:
    """Return the paths of all modules around the step `node`, without the model itself."""
    paths = {path for path in module_paths(node) if path}
    for path in list(paths):
        while path := path.rpartition(".")[0]:
            paths.add(path)
    return list(paths)


def owners(
    module: nn.Module, segments: Sequence[UnitNodes], aside: Collection[fx.Node] = ()
) -> tuple[list[tuple[str, ...]], dict[str, tuple[int, ...]]]:
    """Return the names of parameters and persistent buffers by unit, and who shares which.

    A tensor with several names has all of them in one unit. What nobody uses is the last unit's,
    what several use the first's, and stands in the mapping with the indices of its users. Steps of
    `aside` are done by each unit that needs them.
    """
    state = module.state_dict(keep_vars=True)
    users: dict[int, set[int]] = {}
    for index, segment in enumerate(segments):
        for name in _state_of(module, segment, state, aside):
            users.setdefault(id(state[name]), set()).add(index)
    owned: list[list[str]] = [[] for _ in segments]
    shared: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        using = sorted(users.get(id(tensor), {len(segments) - 1}))
        owned[using[0]].append(name)
        if len(using) > 1:
            shared[name] = tuple(using)
    return [tuple(names) for names in owned], shared


def _state_of(
    module: nn.Module, segment: UnitNodes, state: Mapping[str, Any], aside: Collection[fx.Node]
) -> Iterator[str]:
    """Yield the names of the state that the steps of `segment` use."""
    seen: set[fx.Node] = set()
    todo = list(segment.nodes)
    while todo:
        node = todo.pop()
        todo += [n for n in node.all_input_nodes if (sourceless(n) or n in aside) and n not in seen]
        seen.add(node)
        if node.op == "get_attr" and node.target in state:
            yield str(node.target)
        elif node.op == "call_module":
            called = module.get_submodule(str(node.target))
            for name in called.state_dict(keep_vars=True):
                yield f"{node.target}.{name}"


def cuts_in_fc_block(module: nn.Module, segments: Sequence[UnitNodes], costs: Costs) -> range:
    """Return the cuts inside the linear layers at the end of a model that has others before."""
    first = len(segments)
    while first and _is_linear(module, segments[first - 1], costs):
        first -= 1
    return range(first + 1, len(segments)) if first else range(0)


def _is_linear(module: nn.Module, segment: UnitNodes, costs: Costs) -> bool:
    """Say whether all work of `segment` is done by linear layers on ``(batch, features)``."""
    return all(
        len(costs[node.name].shape or ()) == 2
        and (
            isinstance(module.get_submodule(str(node.target)), nn.Linear)
            if node.op == "call_module"
            else node.target is F.linear
        )
        for node in segment.nodes
        if works(module, node, costs)
    )


# --------------------------------------------------------------------------------------------------
# A chain listed by hand


def listed_chain(
    model: nn.Module, units: Sequence[str | Sequence[str]], modes: Modes
) -> tuple[fx.GraphModule, list[UnitNodes]]:
    """Return the graph that calls the modules of `units` one after the other.

    Args:
        model: Has the modules; nothing is known about its forward.
        units: For each unit a name, a range of siblings ``"first:last"`` (both included), or a
            list of these.
        modes: What the model sets of its modules in training and in evaluation.

    Raises:
        ModelError: A name is unknown or listed twice, or modules with a state are not listed.
    """
    called = [
        [
            name
            for item in ([unit] if isinstance(unit, str) else unit)
            for name in _expand(model, item)
        ]
        for unit in units
    ]
    _check_listed(model, [name for names in called for name in names])
    graph = fx.Graph()
    value = graph.placeholder("x")
    segments: list[UnitNodes] = []
    for names in called:
        nodes = []
        for name in names:
            value = graph.call_module(name, (value,))
            nodes.append(value)
        segments.append(UnitNodes(tuple(nodes), value))
    graph.output(value)
    built = graph_module(copy_modules(model), graph, model.state_dict(), modes)
    found = {node.name: node for node in built.graph.nodes}
    return built, [
        UnitNodes(tuple(found[n.name] for n in k.nodes), found[k.output.name]) for k in segments
    ]


def _expand(model: nn.Module, item: str) -> list[str]:
    """Return the module names that a name or a range stands for."""
    first, colon, last = item.partition(":")
    last = last if colon else first
    path = first.rpartition(".")[0]
    known = [name for name, _ in model.named_modules() if name]
    for name in (first, last):
        if name not in known:
            raise ModelError(
                f"units: {type(model).__name__} has no module {name!r}; "
                f"{did_you_mean(name, known)}it has {', '.join(known[:20])}"
            )
    siblings = [f"{path}.{k}" if path else k for k, _ in model.get_submodule(path).named_children()]
    if last not in siblings or siblings.index(first) > siblings.index(last):
        raise ModelError(f"units: {item!r} must be two children of one module, the first first")
    return siblings[siblings.index(first) : siblings.index(last) + 1]


def _check_listed(model: nn.Module, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        for other in names[:i]:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ModelError(f"units: {name!r} is listed twice, the other time as {other!r}")
    left = [
        state
        for state in model.state_dict()
        if not any(state.startswith(f"{name}.") for name in names)
    ]
    if left or not names:
        raise ModelError(
            f"units: {', '.join(left) or 'everything'} is in no unit; list all modules with "
            "parameters or buffers in the order in which forward calls them"
        )
