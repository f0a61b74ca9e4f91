"""A model as a chain of units, and halves of it that compute what the whole computes.

Between two *units* exactly one tensor flows. They are found by liveness over the graph of the
model: after which nodes is one value alone still needed? Of these places those are kept that are
worth cutting at. What does no multiply-accumulates (normalisation, activation, pooling, dropout,
reshaping) belongs to the unit before it, so a cut comes after the pooling, where the tensor is
smallest, and never between a convolution and its BatchNorm.

Cut ``c`` gives units ``[0, c)`` to the device and ``[c, L)`` to the edge::

    model = layered(skeleton(...), (3, 32, 32))     # on meta: names, shapes, costs
    device, edge = split(model, resolve_cut(model, 0.3))
    fill(device, message)                           # the device never holds the edge's half

Both halves keep the global names of parameters and buffers; `join` puts states together by name.
For VGG-5 the useful cuts are the offloading points of FedAdapt (Wu et al., "FedAdapt: Adaptive
Offloading for IoT Devices in Federated Learning", IEEE Internet of Things Journal, 2022), and
`fractions` its workload per point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ConfigError, ModelError, did_you_mean
from fedsys.models.assemble import copy_modules, graph_module, modes_of, stage
from fedsys.models.chain import (
    UnitNodes,
    cuts_in_fc_block,
    find_chain,
    listed_chain,
    name_units,
    owners,
    prepared,
)
from fedsys.models.graph import Example, trace
from fedsys.models.measure import NodeCost, measure
from fedsys.models.modes import observed
from fedsys.models.origins import module_paths
from fedsys.models.states import fill, join
from fedsys.randomness import Address, KeyedDropout
from fedsys.transport.several import Inputs, Several, examples_of, is_several

__all__ = [
    "LayeredModel",
    "Unit",
    "fill",
    "fractions",
    "join",
    "layered",
    "resolve_cut",
    "section",
    "split",
    "stages",
]

_BATCH = 3  # of measurements; not 1, which is also the size of much that is not a batch


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of the chain.

    Attributes:
        name: Path of the module that it is, or of the first that computes in it.
        nodes: Names of its nodes in the graph, in order.
        output: Name of the node whose tensor leaves it.
        names: Global names of its parameters and persistent buffers, in the model's order.
        macs: Multiply-accumulates for one example, forward.
        params: Number of trainable and frozen parameters (elements, without buffers).
        bytes_out: Size of what leaves it for one example, in the dtype of the model.
        out_shape: Shape of what leaves it, without the batch; empty if it is not one tensor.
        beside: Further nodes whose tensors cross the cut behind it, with their shapes without the
            batch; they count in `bytes_out`. None in a chain of `layered`
            (`fedsys.models.several`).
        inputs: Which of several inputs of the model it needs itself, by index; what leaves it may
            be an input besides.
    """

    name: str
    nodes: tuple[str, ...]
    output: str
    names: tuple[str, ...]
    macs: int
    params: int
    bytes_out: int
    out_shape: tuple[int, ...]
    beside: tuple[tuple[str, tuple[int, ...]], ...] = ()
    inputs: tuple[int, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all nodes whose tensors leave it."""
        return (self.output, *(name for name, _ in self.beside))

    @property
    def out_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all tensors that leave it, without the batch."""
        return (self.out_shape, *(shape for _, shape in self.beside))


@dataclass(frozen=True, eq=False, slots=True)
class LayeredModel:
    """A model seen as a chain of ``L = len(units)`` units.

    Attributes:
        graph: The whole model; shares its tensors with the module it was made from.
        units: The chain.
        cuts: Useful cuts, ascending, in 1 … L-1. Cuts 0 and L are possible besides.
        names: All parameters and persistent buffers, in the model's order.
        shared: Parameters and buffers that several units use, with the indices of these units.
            No cut may separate them.
        input_bytes: Size of each of several inputs, for one example; empty where there is one.
        target_bytes: Size of what is to be learned of an example: a class is an int64.
    """

    graph: fx.GraphModule
    units: tuple[Unit, ...]
    cuts: tuple[int, ...]
    names: tuple[str, ...]
    shared: Mapping[str, tuple[int, ...]]
    input_bytes: tuple[int, ...] = ()
    target_bytes: int = 8

    def __len__(self) -> int:
        return len(self.units)

    def inputs(self, start: int, stop: int) -> tuple[int, ...]:
        """Return which of several inputs units ``[start, stop)`` need beside what enters them.

        They are sent to them as they are. At the start of the model all inputs enter.
        """
        needed = {index for unit in self.units[start:stop] for index in unit.inputs}
        return tuple(sorted(needed)) if start else ()


def layered(
    model: nn.Module,
    example: Example,
    *,
    units: Sequence[str | Sequence[str]] | None = None,
    fc_as_one: bool = True,
) -> LayeredModel:
    """See `model` as a chain of units.

    Args:
        model: Any module that `fedsys.models.graph.trace` traces, or a chain of the modules in
            `units`. May be on the ``meta`` device.
        example: A batch of inputs, or the shape of one example without the batch; `Several`, or the
            shape of several tensors, for a model that takes those.
        units: For what cannot be traced: the units as lists of module names, called in this order
            one after the other. ``"features.0:features.4"`` stands for these two siblings and all
            between them. Compared with the model on the example if the model has values.
        fc_as_one: Offer no cut inside the block of linear layers at the end, as in FedAdapt: there
            is nearly no work left to move. Not applied to models of linear layers only.

    Raises:
        ModelError: The model cannot be traced, does not accept the example, or is not the chain
            of `units`; the message says which.
    """
    if not isinstance(example, Tensor | Several) and is_several(example):
        example = examples_of(example, _BATCH)
    if units is None and not isinstance(example, Tensor | Several):
        return _of_shape(model, example, fc_as_one)
    if units is None:
        graph = trace(model, example)
        costs, batch = measured(graph, example)
        segments = find_chain(graph, costs, batch)
    else:
        x = _batch_like(model, example)
        if isinstance(x, Several):
            raise ModelError("units: a chain listed by hand is called with one tensor, not several")
        device = next((p.device for p in model.parameters()), x.device)
        modes = observed(model, x.to(device))
        graph, segments = listed_chain(model, units, modes)
        costs, batch = measured(graph, example)
        _check_same(model, graph, example)
    if not segments:
        raise ModelError(f"{type(model).__name__} computes nothing: its output is its input")
    return _chain(graph, segments, costs, batch, fc_as_one)


def _of_shape(model: nn.Module, shape: Sequence[int], fc_as_one: bool) -> LayeredModel:
    """See a model as a chain by the shape of its examples: of numbers, or else of tokens."""
    try:
        return layered(model, _batch_like(model, shape), fc_as_one=fc_as_one)
    except ModelError as refused:
        if not any(
            isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules()
        ):
            raise
        tokens = torch.zeros((_BATCH, *shape), dtype=torch.int64)
        try:
            return layered(model, tokens, fc_as_one=fc_as_one)
        except ModelError as also:
            if str(also) == str(refused):
                raise refused from None
            raise ModelError(f"as tokens: {also}; as numbers: {refused}") from also


def chain_of(
    graph: fx.GraphModule, segments: Sequence[UnitNodes], example: Example,
    *, fc_as_one: bool = True,
) -> LayeredModel:  # fmt: skip
    """See a graph as the chain of these units, which are known.

    Args:
        graph: The model.
        segments: Its units: nodes of `graph`, all of them that compute, in order.
        example: As for `layered`.
        fc_as_one: As for `layered`.
    """
    return _chain(graph, segments, *measured(graph, example), fc_as_one)


def _chain(
    graph: fx.GraphModule,
    segments: Sequence[UnitNodes],
    costs: Mapping[str, NodeCost],
    batch: int,
    fc_as_one: bool,
) -> LayeredModel:
    aside = prepared(graph, costs)
    owned, shared = owners(graph, segments, aside)
    entries = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = name_units(graph, segments, costs)
    chain = tuple(
        _unit(graph, name, segment, state, costs, batch, _given(segment, entries, aside))
        for name, segment, state in zip(names, segments, owned, strict=True)
    )
    tied = {c for users in shared.values() for c in range(users[0] + 1, users[-1] + 1)}
    closed = cuts_in_fc_block(graph, segments, costs) if fc_as_one else range(0)
    cuts = tuple(c for c in range(1, len(chain)) if c not in tied and c not in closed)
    sizes = [costs[entry.name].bytes // batch for entry in entries if aside]
    return LayeredModel(graph, chain, cuts, tuple(graph.state_dict()), shared, tuple(sizes))


def _given(
    segment: UnitNodes, entries: Sequence[fx.Node], aside: Collection[fx.Node]
) -> tuple[int, ...]:
    """Return the indices of those of several inputs that a unit needs."""
    todo, seen = list(segment.nodes), set[fx.Node]()
    while todo:
        found = {n for n in todo.pop().all_input_nodes if n in aside} - seen
        seen |= found
        todo.extend(found)
    return tuple(index for index, entry in enumerate(entries) if entry in seen)


def _unit(
    graph: fx.GraphModule,
    name: str,
    segment: UnitNodes,
    state: tuple[str, ...],
    costs: Mapping[str, NodeCost],
    batch: int,
    inputs: tuple[int, ...],
) -> Unit:
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    sizes = {id(parameters[n]): parameters[n].numel() for n in state if n in parameters}
    out = costs[segment.output.name]
    return Unit(
        name=name,
        nodes=tuple(node.name for node in segment.nodes),
        output=segment.output.name,
        names=state,
        macs=sum(costs[node.name].macs for node in segment.nodes) // batch,
        params=sum(sizes.values()),
        bytes_out=sum(costs[n.name].bytes for n in (segment.output, *segment.beside)) // batch,
        out_shape=out.shape[1:] if out.shape else (),
        beside=tuple((n.name, (costs[n.name].shape or ())[1:]) for n in segment.beside),
        inputs=inputs,
    )


def measured(graph: fx.GraphModule, example: Example) -> tuple[dict[str, NodeCost], int]:
    """Return what the nodes make of a batch, and its size."""
    real = _batch_like(graph, example)
    tensors = (real,) if isinstance(real, Tensor) else real.tensors
    on_meta = [torch.empty((_BATCH, *t.shape[1:]), dtype=t.dtype, device="meta") for t in tensors]
    try:
        given = on_meta[0] if isinstance(real, Tensor) else Several(tuple(on_meta))
        return measure(graph, given), _BATCH
    except ModelError:
        # Forward may look at values, which only tensors with values have
        if tensors[0].is_meta or any(p.is_meta for p in graph.parameters()):
            raise
        return measure(graph, real), len(real)


def _batch_like(model: nn.Module, example: Example) -> Inputs:
    """Return `example`, or a batch of examples of that shape in the dtype of the model."""
    if isinstance(example, Tensor | Several):
        return example
    if is_several(example):
        return examples_of(example, _BATCH)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    tensor = torch.randn(_BATCH, *example, generator=Address(0).torch("example"))
    return tensor.to(floats[0].dtype) if floats else tensor


def _check_same(model: nn.Module, chain: nn.Module, example: Example) -> None:
    """Compare a chain listed by hand with the model, in evaluation, if they have values."""
    x = _batch_like(model, example)
    assert isinstance(x, Tensor)  # as was asked
    if x.is_meta or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    with torch.no_grad():
        expected = copy_modules(model).eval()(x)
        got = copy_modules(chain).eval()(x)
    if not isinstance(expected, Tensor) or not torch.equal(expected, got):
        raise ModelError(
            f"units: called one after the other they do not compute what {type(model).__name__} "
            "computes; forward does something between them or calls them in another order: put "
            "such steps (a flatten, an addition) into modules and list these too"
        )


def fractions(model: LayeredModel) -> list[float]:
    """Return the share of the forward work that is done after each unit, ending with 1.

    ``fractions(model)[c - 1]`` is the device's share of the multiply-accumulates at cut c,
    FedAdapt's *u*. In a model without any, each unit counts the same.
    """
    work = list(accumulate(unit.macs for unit in model.units))
    if work[-1] == 0:
        work = list(range(1, len(work) + 1))
    return [done / work[-1] for done in work]


# --------------------------------------------------------------------------------------------------
# Cuts


def resolve_cut(model: LayeredModel, cut: int | float | str) -> int:
    """Return the index of the cut that a person means.

    Args:
        model: The chain.
        cut: An index in 0 … L; or a fraction of the work for the device, between 0 and 1: the
            useful cut nearest to it, the later of two equally near ones; or the name of a unit or
            module: the cut behind it. 0 and L are taken only if asked for by index.

    Raises:
        ConfigError: No such cut.
        ModelError: The cut would separate units that share a parameter.
    """
    if isinstance(cut, str):
        index = _behind(model, cut)
    elif isinstance(cut, int) and not isinstance(cut, bool):
        index = cut
        if not 0 <= index <= len(model):
            units = ", ".join(unit.name for unit in model.units)
            raise ConfigError.of(
                "cut", cut, f"must be in 0 … {len(model)}, the number of units", f"units: {units}"
            )
    elif isinstance(cut, float) and 0.0 < cut < 1.0:
        if not model.cuts:
            raise ConfigError.of(
                "cut",
                cut,
                f"must be 0 or {len(model)}: this model has no useful cut",
                "between its units more than one tensor flows, or they share parameters",
            )
        done = fractions(model)
        index = min(model.cuts, key=lambda c: (abs(done[c - 1] - cut), -c))
    else:
        raise ConfigError.of(
            "cut", cut, "must be an index, the name of a unit, or a fraction between 0 and 1"
        )
    _refuse_shared(model, index)
    return index


def _behind(model: LayeredModel, name: str) -> int:
    """Return the cut behind the unit or module `name`."""
    units = [unit.name for unit in model.units]
    if name in units:
        index = units.index(name) + 1
    else:
        nodes = {node.name: node for node in model.graph.graph.nodes}
        inside = [
            any(
                f"{path}.".startswith(f"{name}.")
                for n in unit.nodes
                for path in module_paths(nodes[n])
            )
            for unit in model.units
        ]
        if name == "" or True not in inside:
            raise ConfigError.of(
                "cut",
                name,
                "must be a unit or a module of the model",
                f"{did_you_mean(name, units)}units: {', '.join(units)}",
            )
        index = len(inside) - inside[::-1].index(True)
    if index == len(model):
        raise ConfigError.of(
            "cut", name, f"must leave units for the edge, and it ends the model; ask for {index}"
        )
    return index


def _refuse_shared(model: LayeredModel, cut: int) -> None:
    for name, users in model.shared.items():
        if users[0] < cut <= users[-1]:
            between = " and ".join(model.units[u].name for u in users)
            raise ModelError(
                f"cut {cut} separates units that share {name}: {between}; a parameter lives in one "
                f"half, so the cut must be one of {', '.join(map(str, model.cuts)) or 'none'}"
            )


# --------------------------------------------------------------------------------------------------
# Halves


def stages(model: LayeredModel, cuts: Sequence[int]) -> tuple[nn.Module, ...]:
    """Return the modules between the cuts: one more than there are cuts, in order.

    Called one after the other they compute what the model computes, bit for bit, in training and
    in evaluation. Their parameters and buffers have global names, are disjoint and complete (what
    forward never uses is in the last stage), and share the tensors of the model; on ``meta``, they
    are filled by `fill`. A stage of no units hands on what it is given.

    Args:
        model: The chain.
        cuts: Indices in 0 … L, ascending; equal ones make a stage of no units.

    Raises:
        ModelError: The cuts are not ascending indices; one separates units that share a parameter;
            or a stage on ``meta`` needs a tensor that no state dict has.
    """
    bounds = [0, *cuts, len(model)]
    if any(before > after for before, after in pairwise(bounds)):
        raise ModelError(f"cuts {list(cuts)} must be ascending and within 0 … {len(model)}")
    for cut in cuts:
        _refuse_shared(model, cut)
    return tuple(_stage(model, start, stop) for start, stop in pairwise(bounds))


def split(model: LayeredModel, cut: int) -> tuple[nn.Module, nn.Module]:
    """Return the device half, units ``[0, cut)``, and the edge half, ``[cut, L)``; see `stages`."""
    device, edge = stages(model, [cut])
    return device, edge


def section(model: LayeredModel, start: int, stop: int) -> fx.GraphModule:
    """Return units ``[start, stop)`` with their graph, to be described and built elsewhere.

    Computes what the stage of `stages` computes; for evaluation. Where several tensors cross a cut
    it takes them one by one, and returns them as a tuple, in the order of `Unit.outputs`.

    Raises:
        ModelError: Units that share a parameter would be separated.
    """
    for cut in (start, stop):
        _refuse_shared(model, cut)
    graph = stage_graph(model, start, stop)
    names = [name for unit in model.units[start:stop] for name in unit.names]
    return graph_module(model.graph, graph, names, modes_of(model.graph))


def _stage(model: LayeredModel, start: int, stop: int) -> nn.Module:
    for cut in (start, stop):
        if cut and model.units[cut - 1].beside:
            raise ModelError(f"cut {cut}: several tensors cross it, and a stage takes one")
    names = [name for unit in model.units[start:stop] for name in unit.names]
    graph = stage_graph(model, start, stop)
    built = stage(model.graph, graph, names, modes_of(model.graph))
    _continue_draws(built, model, start)
    hidden = dict(built.named_buffers()).keys() - built.state_dict().keys()
    for name in sorted(hidden):
        if built.get_buffer(name).is_meta:
            raise ModelError(
                f"{name} has no value and is in no state dict, so the half that needs it cannot be "
                "filled; register the buffer with persistent=True"
            )
    return built


def _continue_draws(built: nn.Module, model: LayeredModel, start: int) -> None:
    """Let dropouts that units before `start` call, too, draw as if they had been called there."""
    before = {name for unit in model.units[:start] for name in unit.nodes}
    called = Counter(
        module.name
        for node in model.graph.graph.nodes
        if node.op == "call_module" and node.name in before
        for module in model.graph.get_submodule(str(node.target)).modules()
        if isinstance(module, KeyedDropout)
    )
    for module in built.modules():
        if isinstance(module, KeyedDropout):
            module.earlier += called[module.name]


def stage_graph(model: LayeredModel, start: int, stop: int) -> fx.Graph:
    """Return the graph of units ``[start, stop)`` alone; its nodes have the names that they had."""
    units = model.units[start:stop]
    wanted = {name for unit in units for name in unit.nodes}
    original = model.graph.graph
    before = model.units[start - 1].outputs if start else ()
    nodes = {node.name: node for node in original.nodes}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # an attribute or constant: it goes to where it is used
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    entries = [node for node in original.nodes if node.op == "placeholder"]
    for number, name in enumerate(before):
        copies[nodes[name]] = graph.placeholder(f"x{number or ''}")
    for entry in entries if not start else [entries[i] for i in model.inputs(start, stop)]:
        copies[entry] = graph.placeholder(str(entry.target))
    for node in original.nodes:
        if node.name in wanted:
            copies[node] = graph.node_copy(node, copied)
    if units and stop == len(model):
        graph.node_copy(original.output_node(), copied)
        return graph
    leaving = units[-1].outputs if units else before or (entries[0].name,)
    values = tuple(copied(nodes[name]) for name in leaving)
    graph.output(values if len(values) > 1 else values[0])
    return graph
