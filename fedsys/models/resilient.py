"""A model with early exits, and with adapters past units: it answers without some of its units.

CONTINUER (Abdul Majeed et al., "CONTINUER: Maintaining Distributed DNN Services During Edge
Failures", IEEE EDGE 2022) answers on after a host of a chain failed by repartitioning, by an early
exit before it, or by skipping it. The latter two are *paths* through a `ResilientModel`::

    model = resilient(layered(backbone, (3, 32, 32)), (3, 32, 32), num_classes=10, seed=1)
    exit_path(model, 5)        # units [0, 5) and a head: images in, scores out
    skip_path(model, 4, 7)     # all units but [4, 7)
    exit_chain(model, 5)       # the same as a chain of units, for hosts to divide

Names of parameters and buffers are those of the backbone, those of heads begin with ``exits.``,
those of adapters with ``adapters.``: so the state of the backbone is what is left without these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.models import exits as known
from fedsys.models.assemble import graph_module, modes_of, program
from fedsys.models.chain import UnitNodes
from fedsys.models.exits import Run
from fedsys.models.graph import trace
from fedsys.models.layers import LayeredModel, chain_of, stage_graph
from fedsys.models.origins import sourceless
from fedsys.randomness import Address, seeded_default_generator

EXITS, ADAPTERS = "exits", "adapters"
PREFIXES = (f"{EXITS}.", f"{ADAPTERS}.")
"""What the names of parameters and buffers begin with that are not the backbone's."""


class ResilientModel(nn.Module):
    """A chain of units with early exits and adapters; it computes what the backbone computes.

    Without exits and skips its output is the backbone's to the bit: the same operations run in the
    same order. It shares the tensors of the backbone.

    Args:
        layers: The backbone.
        input_shape: Of an image, without the batch.
        heads: Exit heads by boundary: that of ``b`` sees what leaves units ``[0, b)``.
        adapters: What stands in for single units that change the shape, by unit.

    Raises:
        ModelError: The backbone has a part called ``exits`` or ``adapters`` itself.
    """

    def __init__(
        self,
        layers: LayeredModel,
        input_shape: Sequence[int],
        heads: Mapping[int, nn.Module],
        adapters: Mapping[int, nn.Module],
    ) -> None:
        super().__init__()
        for name in (EXITS, ADAPTERS):
            if hasattr(layers.graph, name):
                raise ModelError(f"the model has a part called {name!r}; give it another name")
        self.layers, self.input_shape = layers, tuple(input_shape)
        self._frozen = False
        for kind in ("_modules", "_parameters", "_buffers"):
            getattr(self, kind).update(getattr(layers.graph, kind))
        self._non_persistent_buffers_set |= layers.graph._non_persistent_buffers_set
        self.exits = nn.ModuleDict({str(b): head for b, head in sorted(heads.items())})
        self.adapters = nn.ModuleDict({str(u): a for u, a in sorted(adapters.items())})
        self._programs: list[Callable[..., Any]] = [
            program(self, stage_graph(layers, u, u + 1)) for u in range(len(layers))
        ]
        self._still = {n for n, p in self.named_parameters() if not p.requires_grad}
        self.train(layers.graph.training)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Behind how many units there is an exit, ascending."""
        return tuple(int(b) for b in self.exits)

    @property
    def adapted(self) -> tuple[int, ...]:
        """The units that have an adapter."""
        return tuple(int(u) for u in self.adapters)

    def skips(self, longest: int | None = None) -> tuple[Run, ...]:
        """Return the runs of units that can be left out, of `longest` units at most."""
        return known.allowed_skips(self.layers, self.adapted, longest)

    def train(self, mode: bool = True) -> ResilientModel:
        """Do as the backbone does when it is put into training; frozen, it stays in evaluation."""
        super().train(mode)
        if self._frozen:
            for name, child in self.named_children():
                child.train(mode and name in (EXITS, ADAPTERS))
        modes_of(self.layers.graph).apply(self, mode and not self._frozen)
        return self

    def freeze(self, frozen: bool) -> None:
        """Let the backbone keep its parameters and statistics, or let it learn again.

        What learned before learns again; the mode changes with the next call of `train`.
        """
        self._frozen = frozen
        for name, parameter in self.named_parameters():
            if not name.startswith(PREFIXES):
                parameter.requires_grad_(not frozen and name not in self._still)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the backbone, ``(rows, classes)``."""
        for unit in range(len(self.layers)):
            x = self.unit(unit, x)
        return x

    def unit(self, index: int, x: Tensor) -> Tensor:
        """Return what one unit of the backbone makes of `x`."""
        out: Tensor = self._programs[index](self, x)
        return out

    def outputs(self, x: Tensor, skipped: Run | None = None) -> dict[int, Tensor]:
        """Return the scores of all exits that are reached, and the final ones as those of ``L``.

        Args:
            x: Images ``(rows, …)``.
            skipped: Units ``[first, last)`` that are left out; None: none.

        Raises:
            ModelError: The run cannot be left out.
        """
        return self.scores_of(self.tensors(x, skipped))

    def tensors(self, x: Tensor, skipped: Run | None = None) -> dict[int, Tensor]:
        """Return what is at each boundary that is reached, with the input as that of 0.

        Arguments and errors as for `outputs`.
        """
        found, unit, units = {0: x}, 0, len(self.layers)
        while unit < units:
            if skipped is not None and unit == skipped[0]:
                x, unit = self.past(x, *skipped), skipped[1]
            else:
                x, unit = self.unit(unit, x), unit + 1
            found[unit] = x
        return found

    def scores_of(
        self, tensors: Mapping[int, Tensor], seen: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[int, Tensor]:
        """Return the scores of the exits at these boundaries, and the final ones as those of ``L``.

        Args:
            tensors: What is there.
            seen: What exits see of it.
        """
        units = len(self.layers)
        found = {b: self.exits[str(b)](seen(x)) for b, x in tensors.items() if str(b) in self.exits}
        return found | {units: tensors[units]}

    def past(self, x: Tensor, first: int, last: int) -> Tensor:
        """Return what stands in for the output of units ``[first, last)``, given their input."""
        for unit in self.steps(first, last):
            x = self.adapters[str(unit)](x)
        return x

    def steps(self, first: int, last: int) -> tuple[int, ...]:
        """Return the units whose adapters lead past units ``[first, last)``.

        Raises:
            ModelError: The run cannot be left out.
        """
        steps = known.steps_past(self.layers, self.adapted, first, last)
        if steps is None:
            raise ModelError(
                f"units [{first}, {last}) cannot be left out: the first and the last unit never "
                "can, and where the shapes before and behind differ each unit needs an adapter"
            )
        return steps


def resilient(
    layers: LayeredModel,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    seed: int,
    boundaries: Iterable[int] | None = None,
    norm: str = "batch",
    pool: int = 1,
) -> ResilientModel:
    """Give a model exits, and adapters past every unit that changes the shape.

    Args:
        layers: The backbone, with values or on ``meta``; its tensors are shared.
        input_shape: Of an image, without the batch.
        num_classes: Outputs of an exit.
        seed: The `seed` of the run, from which heads and adapters are drawn.
        boundaries: Where exits are to stand; None: behind every unit where one can.
        norm: What follows a convolution of an adapter.
        pool: Places in each direction to which exits pool a map.

    Raises:
        ModelError: There can be no exit at one of `boundaries`; lists where there can.
    """
    possible = known.allowed_exits(layers)
    wanted = possible if boundaries is None else tuple(sorted(set(boundaries)))
    for boundary in wanted:
        if boundary not in possible:
            listed = ", ".join(map(str, possible)) or "nowhere"
            raise ModelError(f"no exit can stand behind {boundary} units; it can behind {listed}")
    device = next((p.device for p in layers.graph.parameters()), None)
    with seeded_default_generator(Address(seed).seed_for("init", name=EXITS)):
        heads = {
            b: known.exit_head(layers.units[b - 1].out_shape, num_classes, pool) for b in wanted
        }
        adapters = {
            u: known.adapter(layers.units[u - 1].out_shape, layers.units[u].out_shape, norm)
            for u in known.adapted_units(layers)
        }
    model = ResilientModel(layers, input_shape, _present(heads), _present(adapters))
    for part in (model.exits, model.adapters):
        part.to(device)
    return model


def _present(modules: Mapping[int, nn.Module | None]) -> dict[int, nn.Module]:
    return {index: module for index, module in modules.items() if module is not None}


# --------------------------------------------------------------------------------------------------
# Paths


def exit_path(model: ResilientModel, boundary: int) -> fx.GraphModule:
    """Return units ``[0, boundary)`` and their exit: images in, scores out.

    Raises:
        ModelError: There is no exit.
    """
    return exit_chain(model, boundary).graph


def skip_path(model: ResilientModel, first: int, last: int) -> fx.GraphModule:
    """Return the model without units ``[first, last)``, with adapters where they are needed.

    Raises:
        ModelError: The run cannot be left out.
    """
    return skip_chain(model, first, last).graph


def exit_chain(model: ResilientModel, boundary: int) -> LayeredModel:
    """Return `exit_path` as a chain: the first `boundary` units of the model, then the exit.

    Raises:
        ModelError: There is no exit.
    """
    if str(boundary) not in model.exits:
        listed = ", ".join(map(str, model.boundaries)) or "none"
        raise ModelError(f"there is no exit behind {boundary} units; there are: {listed}")
    return _path(model, [*range(boundary), f"{EXITS}.{boundary}"])


def skip_chain(model: ResilientModel, first: int, last: int) -> LayeredModel:
    """Return `skip_path` as a chain: the units that are left, with one unit for each adapter.

    Raises:
        ModelError: The run cannot be left out.
    """
    past = [f"{ADAPTERS}.{unit}" for unit in model.steps(first, last)]
    return _path(model, [*range(first), *past, *range(last, len(model.layers))])


def _path(model: ResilientModel, parts: Sequence[int | str]) -> LayeredModel:
    """Return the chain of some units, by index, and some modules of `model`, by path."""
    graph = fx.Graph()
    source = next(n for n in model.layers.graph.graph.nodes if n.op == "placeholder")
    value = graph.placeholder(str(source.target))
    bounds: list[tuple[list[str], str]] = []
    names: list[str] = []
    for part in parts:
        if isinstance(part, int):
            piece, prefix = stage_graph(model.layers, part, part + 1), ""
            names += model.layers.units[part].names
        else:
            piece, prefix = trace(model.get_submodule(part)).graph, f"{part}."
            names += [n for n in model.state_dict() if n.startswith(prefix)]
        nodes, value = _append(graph, piece, value, prefix)
        bounds.append((nodes, value.name))
    graph.output(value)
    built = graph_module(model, graph, names, modes_of(model.layers.graph))
    found = {node.name: node for node in built.graph.nodes}
    segments = [UnitNodes(tuple(found[n] for n in nodes), found[out]) for nodes, out in bounds]
    seen = chain_of(built, segments, model.input_shape)
    named = [model.layers.units[part].name if isinstance(part, int) else part for part in parts]
    units = (replace(unit, name=name) for unit, name in zip(seen.units, named, strict=True))
    return replace(seen, units=tuple(units))


def _append(
    graph: fx.Graph, piece: fx.Graph, value: fx.Node, prefix: str
) -> tuple[list[str], fx.Node]:
    """Copy the steps of `piece` behind `value`; return their names and what leaves them."""
    copies: dict[fx.Node, fx.Node] = {}
    steps: list[str] = []
    for node in piece.nodes:
        if node.op == "placeholder":
            copies[node] = value
        elif node.op != "output":
            copies[node] = copied = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copied.target = f"{prefix}{node.target}"
            if not sourceless(node):
                steps.append(copied.name)
    (made,) = piece.output_node().args
    assert isinstance(made, fx.Node)  # a unit hands on one tensor
    return steps, copies[made]
