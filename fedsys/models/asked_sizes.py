"""What a forward asks of sizes while it is traced: answered where only the input's shape decides.

``if H % window: pad`` or ``int(math.sqrt(tokens))`` want a number where a trace has a symbol. The
number is found by running what was recorded so far on the ``meta`` device, where tensors have a
shape and no values: once with two examples, as a model on a processor, and once with three, as on
a GPU. An answer that is the same in both depends on neither and becomes a constant of the graph,
which then holds for inputs of that shape. What depends on values of tensors stays refused.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fedsys.models.measure import meta_player
from fedsys.transport.several import Several

_UNKNOWN = object()
_ROWS = 2, 3
"""Examples of the two runs."""

_MORE_ROWS = 1, 7
"""Of two more, where a size is looked at that nobody compared: half of two is half of three."""

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
_META = torch.device("meta")
_NOWHERE = {"is_meta": False, "is_mps": False, "is_xpu": False}


class Unanswered(Exception):
    """The answer depends on more than the shape of an example."""


class AskedSizes:
    """Answers for one trace.

    Args:
        root: The module that is traced; left as it is.
        example: A batch of inputs, or the shape of one without the batch, in the model's dtype.

    Attributes:
        shapes: Of each input of one example.
        used: Whether there was an answer.
    """

    def __init__(self, root: nn.Module, example: Tensor | Several | Sequence[int]) -> None:
        floats = (p.dtype for p in root.parameters() if p.is_floating_point())
        if isinstance(example, Tensor | Several):
            tensors = (example,) if isinstance(example, Tensor) else example.tensors
            forms = [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors]
        else:
            forms = [(tuple(example), next(floats, torch.float32))]
        self.shapes = tuple(shape for shape, _ in forms)
        self.used = False

        def run(rows: int, kind: str = "cpu") -> _Run:
            return _Run(root, [((rows, *shape), dtype) for shape, dtype in forms], kind)

        self._runs = [run(*pair) for pair in zip(_ROWS, ("cpu", "cuda"), strict=True)]
        self._more = [run(rows) for rows in _MORE_ROWS]

    ROWS = "rows"
    """What `number` says of a size that is the number of examples."""

    def number(self, node: fx.Node) -> int | tuple[int, ...] | str | None:
        """Return a size, or several: numbers, `ROWS`, or None where they depend on the examples."""
        first, *others = (run.value(node) for run in (*self._runs, *self._more))
        if (first, *others) == (*_ROWS, *_MORE_ROWS):
            return self.ROWS
        if not all(type(first) is type(other) and first == other for other in others):
            return None
        if isinstance(first, tuple):
            return tuple(first)
        return first if type(first) is int else None

    def nbytes(self, entry: fx.Node) -> int:
        """Return the size of an input in bytes."""
        return int(self._runs[0].value(entry).nbytes)

    def length(self, node: fx.Node) -> int:
        """Return how many parts the value of `node` has.

        Raises:
            Unanswered: It has none, or their number depends on more than an example's shape.
        """
        first, second = (run.value(node) for run in self._runs)
        if not all(isinstance(value, Tensor | tuple | list) for value in (first, second)):
            raise Unanswered
        if (isinstance(first, Tensor) and not first.ndim) or len(first) != len(second):
            raise Unanswered
        self.used = True
        return len(first)

    def __call__(self, node: fx.Node) -> Any:
        """Return the value of `node`.

        Raises:
            Unanswered: It is a tensor, or depends on values, on the number of examples or on where
                the model runs.
        """
        first, second = (run.value(node) for run in self._runs)
        if first is _UNKNOWN or second is _UNKNOWN or not _plain(first) or first != second:
            raise Unanswered
        self.used = True
        return first


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(part) for part in value)
    return isinstance(value, _PLAIN)


class _Run:
    """What was recorded, played on inputs of one shape and as if on one kind of device."""

    def __init__(
        self, root: nn.Module, forms: Sequence[tuple[tuple[int, ...], torch.dtype]], device: str
    ) -> None:
        self._root, self._device = root, torch.device(device)
        self._inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in forms]
        self._player: fx.Interpreter | None = None
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return what `node` makes, or that it cannot be known."""
        if self._player is None:
            self._player = meta_player(self._root, node.graph)
            self._player.env = self._values
        for due in self._due(node):
            self._values[due] = self._played(self._player, due)
        return self._values[node]

    def _due(self, node: fx.Node) -> list[fx.Node]:
        """Return what is to be played, in order: `node` and what it needs."""
        wanted: set[fx.Node] = set()
        found = [node]
        while found:
            if (now := found.pop()) not in wanted and now not in self._values:
                wanted.add(now)
                found.extend(now.all_input_nodes)
        return [due for due in node.graph.nodes if due in wanted] if len(wanted) > 1 else [*wanted]

    def _played(self, player: fx.Interpreter, node: fx.Node) -> Any:
        if node.op == "placeholder":
            known = [n for n in node.graph.nodes if n.op == "placeholder"]
            return self._inputs[known.index(node)]
        if any(self._values[source] is _UNKNOWN for source in node.all_input_nodes):
            return _UNKNOWN
        args, kwargs = player.fetch_args_kwargs_from_env(node)
        if node.target is builtins.getattr and isinstance(args[0], Tensor):
            answers = {"device": self._device, "is_cuda": self._device.type == "cuda", **_NOWHERE}
            if args[1] in answers:
                return answers[args[1]]
        elif _makes_tensors(node):
            args, kwargs = _on_meta(args), _on_meta(kwargs)
        try:
            with torch.no_grad():
                return getattr(player, node.op)(node.target, args, kwargs)
        except Exception:  # whatever an operation raises on tensors without values
            return _UNKNOWN


def _makes_tensors(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None)
    known = module in ("_operator", "builtins")
    return node.op == "call_method" or (node.op == "call_function" and not known)


def _on_meta(value: Any) -> Any:
    """Return arguments with ``meta`` in place of each device."""
    return tree_map(lambda leaf: _META if isinstance(leaf, torch.device) else leaf, value)
