"""From a recorded graph back to modules, without copying a tensor and without leaking code.

`graph_module` gives an ``fx.GraphModule``, which knows its graph. Each of these leaves its source
behind in the process for ever (77 kB for half a ResNet-50), so what is made for every session is a
`Stage`: modules and tensors of its own, and code that all equal stages share.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.models.modes import Modes

_programs: dict[Hashable, Callable[..., Any]] = {}
_lock = threading.Lock()


class Stage(nn.Module):
    """A module that runs a part of a recorded graph on modules and tensors of its own.

    Attributes:
        code: What it runs, for people.
        modes: What the whole model sets of its modules in training and in evaluation.
    """

    def __init__(self, code: str, program: Callable[..., Any], modes: Modes) -> None:
        super().__init__()
        self.code, self._program, self.modes = code, program, modes

    def train(self, mode: bool = True) -> Stage:
        """Do as the whole model does when it is put into training, or into evaluation."""
        super().train(mode)
        self.modes.apply(self, mode)
        return self

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the part of the model makes of what enters it."""
        return self._program(self, *inputs)


class Following(fx.GraphModule):
    """A recorded graph whose modules follow the modes of the model that it was made from."""

    @property
    def modes(self) -> Modes:
        """What that model sets of its modules in training and in evaluation."""
        found: Modes = self.meta.get("modes", Modes())  # torch.fx copies meta along, and no more
        return found

    def train(self, mode: bool = True) -> Following:
        """Do as that model does when it is put into training, or into evaluation."""
        super().train(mode)
        self.modes.apply(self, mode)
        return self


def following(
    root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str, modes: Modes
) -> Following:
    """Return the module that computes `graph` with what is in `root`, in the modes of `modes`."""
    built = Following(root, graph, class_name=class_name)
    built.meta["modes"] = modes
    return built


def modes_of(model: nn.Module) -> Modes:
    """Return what a recorded model keeps of the modes of its original; nothing for any other."""
    return model.modes if isinstance(model, Following | Stage) else Modes()


def graph_module(
    source: nn.Module, graph: fx.Graph, names: Iterable[str], modes: Modes
) -> fx.GraphModule:
    """Build the module that computes `graph` with copies of the modules of `source`.

    The copies share their tensors with `source` and own everything else. Children, parameters and
    buffers have the order of `source`.

    Args:
        source: Has every module, parameter and buffer that the graph names.
        graph: What to compute.
        names: Names of parameters and persistent buffers that the module must have even if the
            graph does not use them, or knows them by another name.
        modes: What `source` sets of its modules in training and in evaluation.
    """
    used = _used(source, graph)
    built = following(used, graph, type(source).__name__, modes)
    _complete(built, source, names)
    return built


def stage(source: nn.Module, graph: fx.Graph, names: Iterable[str], modes: Modes) -> Stage:
    """Build a `Stage` that computes `graph`; arguments and promises are those of `graph_module`."""
    used = _used(source, graph)
    built = Stage(*_program(used, graph), modes)
    for path in sorted(used, key=lambda path: path.count(".")):
        _place(built, path, used[path], persistent=True)
    _complete(built, source, names)
    return built


def program(source: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Return the function of ``(source, x)`` that computes `graph` with what `source` has."""
    return _program(_used(source, graph), graph)[1]


def _program(used: dict[str, Any], graph: fx.Graph) -> tuple[str, Callable[..., Any]]:
    """Return the source of what computes `graph`, and it; all equal graphs have one."""
    python = graph.python_code("self")
    # the source names functions, and two functions may have one name
    key = python.src, frozenset((name, id(value)) for name, value in python.globals.items())
    with _lock:
        if key not in _programs:
            _programs[key] = type(fx.GraphModule(used, graph)).forward
        return python.src, _programs[key]


def _used(source: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Return copies of the modules, and the tensors, that `graph` names."""
    memo: dict[int, Any] = {}
    used: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            used[node.target] = copy_modules(source.get_submodule(node.target), memo)
        elif node.op == "get_attr":
            path, _, attribute = node.target.rpartition(".")
            used[node.target] = getattr(source.get_submodule(path), attribute)
    return used


def copy_modules(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy modules but not tensors: the copy computes with the same parameters and buffers.

    Args:
        model: What to copy.
        memo: As for ``copy.deepcopy``: what is shared or replaced, by the id of the original. Given
            to several calls, it keeps what the originals share shared between the copies.

    Raises:
        ModelError: A module holds something that cannot be copied.
    """
    memo = {} if memo is None else memo
    for tensor in (*model.parameters(), *model.buffers()):
        memo.setdefault(id(tensor), tensor)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}; modules may hold parameters, "
            "buffers and plain values, but no results of a computation, locks or open files"
        ) from error


def _complete(built: nn.Module, source: nn.Module, names: Iterable[str]) -> None:
    """Add what the graph does not use, and take over persistence, order and mode of `source`."""
    persistent = source.state_dict(keep_vars=True)
    present: dict[str, Tensor] = dict(built.named_parameters(remove_duplicate=False))
    present |= dict(built.named_buffers(remove_duplicate=False))
    for name in names:
        if name not in present:
            _place(built, name, persistent[name], persistent=True)
    for name, tensor in present.items():
        if name not in persistent:
            _place(built, name, tensor, persistent=False)
    _order_like(source, built)
    copy_mode(source, built)


def _place(root: nn.Module, path: str, value: nn.Module | Tensor, *, persistent: bool) -> None:
    """Register `value` under its global name, making empty modules on the way."""
    *way, name = path.split(".")
    owner = root
    for step in way:
        if getattr(owner, step, None) is None:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        if hasattr(owner, name):
            delattr(owner, name)
        owner.register_buffer(name, value, persistent=persistent)


def _order_like(source: nn.Module, built: nn.Module) -> None:
    """Give children, parameters and buffers the order of `source`: optimizers and norms see it."""
    for path, original in source.named_modules():
        try:
            module = built.get_submodule(path)
        except AttributeError:
            continue
        for kind in ("_modules", "_parameters", "_buffers"):
            have: dict[str, Any] = getattr(module, kind)
            first = {key: have.pop(key) for key in [*getattr(original, kind)] if key in have}
            rest = dict(have)
            have.clear()
            have.update(first | rest)


def copy_mode(source: nn.Module, built: nn.Module) -> None:
    """Put the modules of `built` in the mode of those with the same path in `source`."""
    modes = {name: module.training for name, module in source.named_modules()}
    for name, module in built.named_modules():
        module.training = modes.get(name, source.training)
