"""From a module to a graph: record what a model computes, without losing anything on the way.

`torch.fx` records one forward pass of Python code as a graph. On its own it forgets three things
that split training and pruning depend on, and `trace` keeps them:

* *the mode*: ``F.dropout(x, p, self.training)`` would be frozen at what the model was when it was
  traced. The model is traced in both modes and every constant that differs becomes a `ByMode`.
  What ``train()``, ``eval()`` and forward set of single modules is kept as `Modes`;
* *the names*: modules, parameters and buffers keep their global names and their order, including
  those that forward never uses, and buffers stay as persistent as they were;
* *the model*: the graph works on copies of the modules that share their tensors, so tracing,
  ``.train()`` and ``.eval()`` leave the model that was given alone.

`fedsys.models.layers` sees such a graph as a chain of units; `fedsys.pruning` as channel
dependencies.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import linecache
import operator
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fedsys.errors import ModelError
from fedsys.models.asked_sizes import AskedSizes, Unanswered
from fedsys.models.assemble import copy_mode, copy_modules, graph_module
from fedsys.models.batchnorm import DeferredBatchNorm
from fedsys.models.modes import Modes, moved, plain_attributes, plain_state, set_attributes
from fedsys.models.origins import InPlace, Symbol, module_of, note_line
from fedsys.randomness import KeyedDropout, is_random_depth
from fedsys.transport.several import Several, examples_of, is_several, takes

Example: TypeAlias = Tensor | Several | Sequence[Any]
"""A batch of inputs, or the shape of an example (`fedsys.transport.several.Shape`)."""

_lock = threading.Lock()  # torch.fx patches nn.Module while it traces: one trace at a time


class ByMode(nn.Module):
    """A constant of the forward pass that is not the same in training and in evaluation.

    It stands in a graph as a call without inputs and follows ``.train()`` and ``.eval()``.
    """

    def __init__(self, training: object, evaluation: object) -> None:
        super().__init__()
        self.values = training, evaluation

    def extra_repr(self) -> str:
        """Show both values when the module is printed."""
        return f"training={self.values[0]!r}, evaluation={self.values[1]!r}"

    def forward(self) -> Any:
        """Return the value of the current mode."""
        return self.values[0] if self.training else self.values[1]


class _Tracer(fx.Tracer):  # torch.fx offers no other way to say which modules are leaves
    """Records calls of torch's own modules and notes in which module it was when it failed.

    Args:
        buffers: Record what is computed of buffers alone; else it is a constant of the graph.
        in_place: Let augmented assignments change their operand in the graph, too. In training that
            could be an input that another machine has sent, whose gradient is wanted.
        sizes: Answers what forward asks of sizes; None: it must ask nothing.
        count: Tensors that forward is given: the first arguments, or a tuple as the only one.
    """

    def __init__(
        self, *, buffers: bool, in_place: bool, sizes: AskedSizes | None, count: int = 1
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self.path: list[str] = []
        self.seen: dict[str, dict[str, Any]] = {}
        self.torn: list[str] = []
        self._in_place, self._count = in_place, count
        self._thread = threading.get_ident()
        self._contexts = _contexts()
        self._sizes, self._asking = sizes, False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, KeyedDropout | DeferredBatchNorm | ByMode)
        # a BatchNorm with a train() of its own: torch's forward cannot be traced through; one with
        # a forward of its own counts its batches in it, which a graph does not record
        torchs = type(m).forward.__module__.startswith("torch.nn")
        norm = isinstance(m, _NormBase) and (torchs or not self._in_place)
        if type(m) is nn.TransformerEncoder:  # a chain of blocks, which may be cut between them
            return False
        return own or is_random_depth(m) or norm or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # The first arguments are inputs; the others keep their defaults and may be branched on
        names = [*_inputs(self.root)][: self._count]
        if len(names) == self._count:
            return root_fn, [
                self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)
            ]  # fmt: skip
        (name,) = names  # forward takes a tuple
        made = (f"{name}_{index}" for index in range(self._count))
        return root_fn, [
            self.root, tuple(self.create_proxy("placeholder", name, (), {}) for name in made)
        ]  # fmt: skip

    # While torch.fx traces, it redirects the modules of *every* thread to the tracer. Other
    # threads may be training: they get what they would have got.
    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._asking or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if not _is_part(self.root, m) and not [*m.parameters(), *m.buffers()]:
            return forward(*args, **kwargs)  # `nn.ReLU()(x)`, made by forward: what it does counts
        self.path.append(self.path_of_module(m))
        if self.is_leaf_module(m, self.path[-1]):
            self._note(m, self.path[-1])
        elif type(m) is nn.TransformerEncoder:
            forward = partial(_by_layers, m)
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result

    def _note(self, leaf: nn.Module, path: str) -> None:
        """Keep what `leaf` and its parts are set to now that it is called."""
        for below, module in leaf.named_modules(prefix=path):
            now = plain_attributes(module)
            if self.seen.setdefault(below, now) != now:
                self.torn.append(below)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlace(node, self) if self._in_place else Symbol(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.answer(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)  # an assignment to several names says how many there are
        except fx.proxy.TraceError:
            return iter([cast(Any, obj)[index] for index in range(self.length(obj))])

    def answer(self, obj: fx.Proxy) -> Any:
        """Return the number that `obj` stands for."""
        return self._asked(obj, lambda sizes: sizes(obj.node))

    def length(self, obj: fx.Proxy) -> int:
        """Return how many parts `obj` has."""
        return int(self._asked(obj, lambda sizes: sizes.length(obj.node)))

    def _asked(self, obj: fx.Proxy, question: Callable[[AskedSizes], Any]) -> Any:
        if self._sizes is not None:
            self._asking = True  # what answers calls modules, which are not part of the forward
            try:
                return question(self._sizes)
            except Unanswered:
                pass
            finally:
                self._asking = False
        return super().to_bool(obj)  # which says why not

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self._contexts:  # a graph has no with-blocks: it would run without them
            raise ModelError("forward switches gradients or autocast for a part of itself")
        node = super().create_node(kind, *args, **kwargs)
        note_line(node, __file__)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._asking or threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _is_part(root: nn.Module, module: nn.Module) -> bool:
    return any(each is module for each in root.modules())


def _ask_an_input(graph: fx.Graph, sizes: AskedSizes, several: bool) -> None:
    """Let sizes of states be numbers where the graph is for one shape, or those of an input.

    What is made of them would need the states that it was made beside, and there would be no cut
    between the blocks that it goes to: ``x.view(*words.size(), -1)`` at the end, or a mask that is
    made once by ``arange(len(states), device=states.device)``.
    """
    entries = [node for node in graph.nodes if node.op == "placeholder"]
    entry = min(entries, key=sizes.nbytes)
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) and not _counts(node):
            continue
        if several and node.target is builtins.getattr and node.args[1] == "device":
            node.args = (source if source in entries else entry, "device")
        elif not isinstance(source, fx.Node) or _is_size_of(node, source):
            number = sizes.number(node)
            if number is not None and number != AskedSizes.ROWS:
                for user in list(node.users):
                    user.args = fx.map_arg(user.args, _in_place_of(node, number))
                    user.kwargs = fx.map_arg(user.kwargs, _in_place_of(node, number))
            elif several and number and _is_states(source, entries):
                with graph.inserting_before(node):
                    shape = graph.call_function(builtins.getattr, (entry, "shape"))
                node.args = (shape, 0)


def _counts(node: fx.Node) -> bool:
    """Say whether `node` computes with numbers alone, as in ``(-1,) + (12,)``."""
    alone = node.op == "call_function" and not node.all_input_nodes
    return alone and node.target is operator.add


def _is_states(source: object, entries: Sequence[fx.Node]) -> bool:
    """Say whether `source` is the shape of what is no input."""
    return isinstance(source, fx.Node) and _is_size(source) and source.args[0] not in entries


def _is_size_of(node: fx.Node, source: fx.Node) -> bool:
    one = node.op == "call_method" and node.target == "size" and len(node.args) == 2
    return one or (node.target is operator.getitem and _is_size(source))


def _is_size(node: fx.Node) -> bool:
    of_shape = node.target is builtins.getattr and str(node.args[1]) == "shape"
    return of_shape or (node.op == "call_method" and node.target == "size" and len(node.args) == 1)


def _in_place_of(node: fx.Node, number: object) -> Callable[[fx.Node], Any]:
    return lambda other: number if other is node else other


def _by_layers(
    encoder: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:  # fmt: skip
    """Do what the forward of torch's encoder does, which asks too much of tensors to be traced.

    Raises:
        ModelError: It would look at values of the mask, or pack what is not padding.
    """
    if mask is not None and is_causal is None:
        raise ModelError(
            "TransformerEncoder looks at the values of its mask to see whether it is causal; give "
            "is_causal=True or False with it"
        )
    if src_key_padding_mask is not None and encoder.use_nested_tensor:
        raise ModelError(
            "TransformerEncoder packs what is not padding in evaluation, which a graph cannot "
            "follow; make it with enable_nested_tensor=False"
        )
    causal = bool(is_causal)
    for layer in encoder.layers:
        src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
    return src if encoder.norm is None else encoder.norm(src)


def _contexts() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def trace(model: nn.Module, example: Example | None = None) -> fx.GraphModule:
    """Record the forward pass of `model`.

    Modules of ``torch.nn``, `KeyedDropout`, `DeferredBatchNorm`, torchvision's ``StochasticDepth``
    and timm's ``DropPath`` stay whole, all others are traced through. The result computes what the
    model computes, bit for bit, in training and in evaluation; its state dict has the model's
    names in the model's order and shares the model's tensors. Modules keep their paths and mode.

    Args:
        model: Takes one tensor, or several (`example` says so), as arguments or as one tuple;
            further arguments of ``forward`` keep their defaults. May be on the ``meta`` device: no
            tensor is computed.
        example: A batch of inputs, or the shape of one without the batch. Where forward asks for
            sizes, as in ``if H % 7``, those of this shape become constants, and the graph refuses
            inputs of others.

    Raises:
        ModelError: Forward depends on the values of tensors, or on sizes that `example` does not
            tell (the number of examples never is), takes several inputs, draws random
            constants or takes different paths in training and in evaluation. The message names
            the module and the line.
    """
    example = _as_example(example)
    _check_inputs(model, _count(example))
    try:
        traced = _traced(model, example, buffers=True)
    except ModelError:  # some forwards ask buffers for values or sizes: these are then constants
        traced = _traced(model, example, buffers=False)
    copy_mode(model, traced)
    return traced


def _as_example(example: Example | None) -> Example | None:
    """Return examples of several tensors in place of their shape, and all else as it is."""
    if isinstance(example, Tensor | Several) or example is None or not is_several(example):
        return example
    return examples_of(example, 2, "meta")


def _count(example: Example | None) -> int:
    """Return how many tensors an example has."""
    return len(example.tensors) if isinstance(example, Several) else 1


def _traced(model: nn.Module, example: Example | None, *, buffers: bool) -> fx.GraphModule:
    source = copy_modules(model)
    record = partial(_record, example=example, buffers=buffers)
    with _lock:
        evaluation = _settled(source, record, training=False)
        answering = dict(source.named_modules())
        training = _settled(source, record, training=True)
    if shapes := evaluation.shapes or training.shapes:
        for graph in (evaluation.graph, training.graph):
            _hold_shapes(graph, shapes, type(model).__name__)
    _check_same_modules(source, answering, training)
    _merge_modes(source, training.graph, evaluation.graph)
    modes = Modes.of(training.seen, evaluation.seen)
    return graph_module(source, training.graph, source.state_dict(), modes)


def trace_evaluation(model: nn.Module, example: Example | None = None) -> fx.GraphModule:
    """Record the forward pass of `model` in evaluation, which training may differ from.

    Args:
        model: As for `trace`, and the caller's own: the graph uses its modules, not copies, and
            the model is in evaluation mode afterwards.
        example: As for `trace`.

    Raises:
        ModelError: As `trace`, but for the differences between the modes.
    """
    example = _as_example(example)
    _check_inputs(model, _count(example))
    with _lock:
        recorded = _recorded_in_evaluation(model.eval(), example)
    for path, attributes in recorded.seen.items():
        if attributes["training"] and isinstance(model.get_submodule(path), _MODAL):
            raise ModelError(
                f"{path} ({type(model.get_submodule(path)).__name__}) stays in training when "
                f"{type(model).__name__} is put into evaluation, so an answer depends on chance or "
                "on the other examples of its batch; let eval() and forward leave it in evaluation"
            )
    if recorded.shapes:
        _hold_shapes(recorded.graph, recorded.shapes, type(model).__name__)
    return interpreted(model, recorded.graph, type(model).__name__)


def _recorded_in_evaluation(model: nn.Module, example: Example | None) -> _Recorded:
    """Record `model` with buffers as constants, or as symbols if they are given symbols."""
    record = partial(_record, model, example=example, in_place=True)
    held = {name: value for name, value in vars(model).items() if _is_constant(name)}
    try:
        return record(buffers=False)
    except ModelError as error:
        for name in [name for name in vars(model) if _is_constant(name)]:
            del vars(model)[name]  # of the pass that failed: they would be taken for those of this
        vars(model).update(held)
        try:  # as in `self.table.expand(len(x), -1)`, which takes no symbol as a number
            return record(buffers=True)
        except ModelError:
            raise error from error.__cause__


_MODAL = (_NormBase, KeyedDropout, nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
"""What computes something else in training than in evaluation."""


def interpreted(source: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return a module in evaluation that computes `graph` and has nothing else.

    Args:
        source: Has the modules and tensors that the graph names; they are shared.
        graph: What to compute.
        name: Of the module's class.
    """
    return _Deferred(source, graph, class_name=name).eval()


class _Deferred(fx.GraphModule):
    """A graph whose code is written when it is called or shown: most are only interpreted."""

    _due = True

    def recompile(self) -> Any:
        """Write the code again if it was written."""
        return None if self._due else super().recompile()

    def forward(self, *inputs: Any) -> Any:
        """Write the code, which replaces this method, and run it."""
        self._write()
        return type(self).forward(self, *inputs)

    @property
    def code(self) -> str:
        """What it runs, for people."""
        self._write()
        return super().code

    def __str__(self) -> str:
        self._write()
        return super().__str__()

    def _write(self) -> None:
        if self._due:
            self._due = False
            super().recompile()


def _check_inputs(model: nn.Module, count: int) -> None:
    required = [name for name, has_default in _inputs(model).items() if not has_default]
    if count > 1 and (takes(type(model).forward, count) or len(required) == 1):
        required = required[count:]
    if len(required) > 1 or not _inputs(model):
        rule = (
            "exactly one input"
            if count == 1
            else f"{count} inputs, or one tuple of them, and no more"
        )
        raise ModelError(
            f"{type(model).__name__}.forward takes ({', '.join(_inputs(model))}): "
            f"it must take {rule} without a default"
        )


def _inputs(model: nn.Module) -> dict[str, bool]:
    """Return the arguments of forward by name, and whether they have a default."""
    if isinstance(model, fx.GraphModule):  # its forward may interpret the graph, with any inputs
        taken = (node for node in model.graph.nodes if node.op == "placeholder")
        return {str(node.target): bool(node.args) for node in taken}
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {p.name: p.default is not p.empty for p in parameters if p.kind not in variable}


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One forward pass.

    Attributes:
        graph: What it computes.
        seen: What the modules that it called were set to.
        shapes: Of each input of the one example that the graph is for; empty if it asked for no
            sizes.
    """

    graph: fx.Graph
    seen: dict[str, dict[str, Any]]
    shapes: tuple[tuple[int, ...], ...]

    def steps(self) -> list[tuple[str, ...]]:
        """Return what is computed, to compare it with another pass."""
        return [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in self.graph.nodes]


_FAR = 1_000_000
"""Calls after which a counter should have had its effect."""


def _settled(
    source: nn.Module, record: Callable[[nn.Module], _Recorded], *, training: bool
) -> _Recorded:
    """Record a mode of `source`; refuse what would be another pass the next time.

    A pass that leaves everything as it was is the same for ever. If one sets something (a mode, a
    counter), it is recorded again after that, and with counters that have counted far.
    """
    _switch(source, training)
    before = plain_state(source)
    first = record(source)
    once = plain_state(source)
    _switch(source, not training)
    _switch(source, training)
    changed = {*moved(before, once), *moved(before, plain_state(source))}
    if not changed:
        return first
    set_attributes(source, once)
    _check_repeats(source, first, record(source), changed)
    far: dict[str, dict[str, Any]] = {}
    for path, name in changed:
        if type(value := once[path][name]) is int:
            far.setdefault(path, {})[name] = value + _FAR
    set_attributes(source, far)
    _switch(source, training)
    _check_repeats(source, first, record(source), changed)
    set_attributes(source, before)
    return first


def _switch(model: nn.Module, training: bool) -> None:
    model.train() if training else model.eval()


def _check_repeats(
    source: nn.Module, first: _Recorded, again: _Recorded, changed: set[tuple[str, str]]
) -> None:
    """Refuse passes that differ from one time to the next."""
    if first.steps() == again.steps() and first.seen == again.seen:
        return
    name = type(source).__name__
    touched = [f"{path}.{attribute}".lstrip(".") for path, attribute in sorted(changed)]
    differing = sorted({path for path, _ in moved(first.seen, again.seen)})
    where = differing[0] if differing else name
    raise ModelError(
        f"{where}: what it does depends on how often {name} was called or put into training "
        f"(through {', '.join(touched[:5])}), which halves on several machines cannot follow; let "
        "train(), eval() and forward set the same each time"
    )


def _check_same_modules(
    source: nn.Module, answering: dict[str, nn.Module], training: _Recorded
) -> None:
    """Refuse a model that puts other modules under its names when its mode changes."""
    for path in training.seen:
        if answering.get(path) is not source.get_submodule(path):
            raise ModelError(
                f"{path} is another module in training than in evaluation, where a graph has one; "
                f"let train() of {type(source).__name__} change the mode of one module"
            )


def _record(
    source: nn.Module,
    *,
    example: Example | None,
    buffers: bool,
    in_place: bool = False,
) -> _Recorded:
    """Trace `source` in its mode; tensors made by forward are kept as constants of `source`."""
    sizes = None if example is None else AskedSizes(source, example)
    tracer = _Tracer(buffers=buffers, in_place=in_place, sizes=sizes, count=_count(example))
    known = {name: source.__dict__.pop(name) for name in [*source.__dict__] if _is_constant(name)}
    state = _versions(source)
    try:
        with _nothing_kept(source), _autocast_by_symbols():
            graph = tracer.trace(source)
    except Exception as error:  # whatever the user's forward or torch.fx raises on a proxy
        raise ModelError(_why_untraceable(source, tracer, error)) from error
    _check_constants(source, known, state)
    if tracer.torn:
        raise ModelError(
            f"{tracer.torn[0]} is called several times in one forward pass and is set to something "
            f"else each time (training, for instance), which a graph of {type(source).__name__} "
            "cannot follow; make two modules of it that share their parameters"
        )
    if sizes is not None and sizes.used:
        _ask_an_input(graph, sizes, _count(example) > 1)
    if sizes is not None:
        _settle_arithmetic(graph, sizes)
    graph.lint()
    return _Recorded(graph, tracer.seen, sizes.shapes if sizes is not None and sizes.used else ())


def _check_constants(
    source: nn.Module, known: Mapping[str, Tensor], state: Mapping[str, object]
) -> None:
    """Refuse a model whose forward makes other constants each time, or changes what it holds."""
    for name, before in known.items():
        now = source.__dict__.get(name)
        if not before.is_meta and now is not None and not torch.equal(before, now):
            raise ModelError(
                f"{type(source).__name__} makes a different constant tensor in every forward pass "
                f"({name}, shape {tuple(now.shape)}); a traced model would repeat the first: "
                "derive it from the input, or make it a buffer"
            )
    for name, version in _versions(source).items():
        if state.get(name) != version:
            raise ModelError(
                f"{name}: forward of {type(source).__name__} changes it without regard to the "
                "input, which a graph does not record; leave it as it is, or change it by a value "
                "that was computed from the input"
            )


@contextmanager
def _autocast_by_symbols() -> Iterator[None]:
    """Let ``torch.autocast`` take the device of a symbol, as in ``autocast(x.device.type, …)``.

    It is that of the processor then, of which `_contexts` tells whether it was switched: one that
    is not enabled changes nothing, as training and serving enable none.
    """
    own = torch.autocast.__init__

    def told(self: torch.autocast, device_type: Any, *args: Any, **kwargs: Any) -> None:
        own(self, "cpu" if isinstance(device_type, fx.Proxy) else device_type, *args, **kwargs)

    torch.autocast.__init__ = told  # type: ignore[method-assign]  # other threads: as before
    try:
        yield
    finally:
        torch.autocast.__init__ = own  # type: ignore[method-assign]


@contextmanager
def _nothing_kept(source: nn.Module) -> Iterator[None]:
    """Forget what forward keeps in attributes of modules for the next time: they are symbols."""
    before = [(vars(module), dict(vars(module))) for module in source.modules()]
    held = [v for _, was in before for n, v in was.items() if _is_plain_container(n, v)]
    copies = [copy.copy(container) for container in held]
    try:
        yield
    finally:
        for container, was in zip(held, copies, strict=True):
            container.clear()
            container.update(was) if isinstance(container, dict) else container.extend(was)
        for now, attributes in before:
            for name in [name for name, value in now.items() if isinstance(value, fx.Proxy)]:
                del now[name]
                now.update({name: attributes[name]} if name in attributes else {})


def _is_plain_container(name: str, value: object) -> bool:
    return type(value) in (dict, list) and not name.startswith("_")


def _settle_arithmetic(graph: fx.Graph, sizes: AskedSizes) -> None:
    """Replace calls of Python's ``math`` by their results where the shape decides them."""
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__module__", "") != "math":
            continue
        try:
            value = sizes(node)
        except Unanswered:
            continue
        settled = partial(_settled_value, node, value)
        for user in list(node.users):
            user.args = fx.map_arg(user.args, settled)
            user.kwargs = fx.map_arg(user.kwargs, settled)
        graph.erase_node(node)


def _settled_value(settled: fx.Node, value: Any, node: fx.Node) -> Any:
    return value if node is settled else node


def _hold_shapes(graph: fx.Graph, shapes: Sequence[tuple[int, ...]], name: str) -> None:
    """Let `graph` refuse examples of other shapes: it was recorded with the sizes of this one."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    last = inputs[-1]
    for index, (entry, shape) in enumerate(zip(inputs, shapes, strict=True)):
        says = (
            f"{name} was recorded for examples of shape {shape}, which it asks for, and got others"
        )
        value, number = entry, index or ""
        for made, function, more in (
            ("input_shape", getattr, ("shape",)),
            ("example_shape", operator.getitem, (slice(1, None),)),
            ("same_shape", operator.eq, (shape,)),
            ("shape_check", torch._assert, (says,)),
        ):
            with graph.inserting_after(last):  # named, so that both modes have the same nodes
                node = f"_{made}{number}"
                last = value = graph.create_node(
                    "call_function", function, (value, *more), {}, node
                )


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return for each parameter and buffer which tensor it is, and how often that was changed."""
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor._version) for name, tensor in tensors}


def _is_constant(name: str) -> bool:
    return name.startswith("_tensor_constant")


def _why_untraceable(source: nn.Module, tracer: _Tracer, error: Exception) -> str:
    path = tracer.path[-1] if tracer.path else ""
    module = source.get_submodule(path)
    where = f"in {path} ({type(module).__name__})" if path else "in its forward"
    own = Path(__file__).as_posix()
    foreign = ("torch/fx/", "torch/nn/modules/module.py", "torch/_tensor.py", own)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename.replace("\\", "/") for part in foreign)
    ]
    if frames and frames[-1].lineno:
        text = linecache.getline(frames[-1].filename, frames[-1].lineno).strip()
        where += f", {frames[-1].filename}:{frames[-1].lineno}: `{text}`"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"{type(source).__name__} cannot be traced {where}: {reason}; make forward independent of "
        "the values of tensors, or list the units by hand: layered(model, example, units=[…])"
    )


def _merge_modes(source: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    """Replace constants of the graph `training` that `evaluation` has otherwise by `ByMode`."""
    pairs = list(zip_longest(training.nodes, evaluation.nodes))
    merge = _Merge(source, training)
    for now, other in pairs:
        if now is None or other is None or _step(now) != _step(other):
            path = next((module_of(node) for node in (now, other) if node and module_of(node)), "")
            raise ModelError(
                f"{type(source).__name__} computes different things in training and in "
                f"evaluation, from {path or 'its forward'} on ({now or other}); both modes must "
                "take the same steps: switch auxiliary outputs off"
            )
        with training.inserting_before(now):
            now.args = merge(now.args, other.args)
            now.kwargs = merge(now.kwargs, other.kwargs)


def _step(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, node.name


class _Merge:
    """Merges what a step is given in training with what it is given in evaluation."""

    def __init__(self, source: nn.Module, graph: fx.Graph) -> None:
        self._source, self._graph = source, graph

    def __call__(self, now: Any, other: Any) -> Any:
        if isinstance(now, fx.Node) or isinstance(other, fx.Node):
            return now  # nodes have equal names: both graphs count the same steps
        if isinstance(now, tuple | list) and type(now) is type(other) and len(now) == len(other):
            return type(now)([self(a, b) for a, b in zip(now, other, strict=True)])
        if isinstance(now, dict) and isinstance(other, dict) and now.keys() == other.keys():
            return {key: self(value, other[key]) for key, value in now.items()}
        if isinstance(now, slice) and isinstance(other, slice):
            bounds = ((now.start, other.start), (now.stop, other.stop), (now.step, other.step))
            return slice(*[self(a, b) for a, b in bounds])
        if now == other:
            return now
        count = sum(isinstance(module, ByMode) for module in self._source.children())
        name = f"_by_mode_{count}"
        self._source.add_module(name, ByMode(now, other))
        return self._graph.call_module(name)
