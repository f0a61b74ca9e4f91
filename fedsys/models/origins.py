"""Where the nodes of a traced graph come from: module, line of the model's code, and assignment."""

from __future__ import annotations

import inspect
import linecache
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

_LINE = "line_of_model"  # key in a node's meta
_TORCH = os.path.dirname(torch.__file__) + os.sep


class Symbol(fx.Proxy):  # torch.fx lets tracers answer `if x`, and refuses the rest
    """A value that may be asked for a number; its tracer answers, or refuses."""

    tracer: Any

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _SymbolAttribute(self, name)

    def __int__(self) -> int:
        return int(self.tracer.answer(self))

    def __float__(self) -> float:
        return float(self.tracer.answer(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.answer(self))

    def __len__(self) -> int:
        return int(self.tracer.length(self))


class _SymbolAttribute(fx.proxy.Attribute, Symbol):  # type: ignore[misc]
    """An attribute of such a value, which may be asked, too."""

    def __repr__(self) -> str:
        """Name it without recording it: ``str(x.device)`` is a key of caches, and no step."""
        return f"{type(self).__name__}({self.root.node.name}.{self.attr})"


class InPlace(Symbol):  # torch.fx records `x += y` as `x = x + y`, and forgets aliases of x
    """A value whose augmented assignments are recorded as what they are."""


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(self: fx.Proxy, other: Any) -> Any:
        name = function.__name__[1:]  # as nodes of the plain operation are called
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name)

    return change


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(InPlace, f"__{_name}__", _recording(getattr(operator, _name)))


def note_line(node: fx.Node, tracer: str) -> None:
    """Note the line that is being traced in `node`: the innermost that is not torch's.

    Args:
        node: Was just made.
        tracer: File of the tracer, which is no part of the model.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, tracer, __file__)):
        frame = frame.f_back
    node.meta[_LINE] = None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def place_of(node: fx.Node) -> str:
    """Say where in a model's code `node` was recorded: module, file, line and its text.

    Empty where that is not known, as for nodes that were made later.
    """
    line = node.meta.get(_LINE)
    path = module_of(node)
    where = f"in {path}" if path else ""
    if line is not None:
        text = linecache.getline(*line).strip()
        where += f"{', ' if where else 'in '}{line[0]}:{line[1]}" + (f": `{text}`" if text else "")
    return where


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose forward made `node`; empty for the model itself."""
    return next(_stack(node), "")


def _stack(node: fx.Node) -> Iterator[str]:
    """Yield the paths of the modules in whose forward `node` was made, the innermost first."""
    for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
        yield str(path)


def sourceless(node: fx.Node) -> bool:
    """Say whether `node` needs no input: an attribute or a constant, free to be placed anywhere."""
    return node.op == "get_attr" or (node.op == "call_module" and not node.all_input_nodes)


def module_paths(node: fx.Node) -> Iterator[str]:
    """Yield the path of the module that `node` calls, and of those in whose forward it stands."""
    if node.op == "call_module":
        yield str(node.target)
    yield from _stack(node)
