"""What a model computes in evaluation, in fewer and plainer words, bit for bit.

A traced graph repeats what the code of the model says: checks of shapes, weights that are computed
anew in every pass, BatchNorm as a function of five tensors. None of it can be understood by
channels, and some of it cannot be saved as data. So, in this order:

* parametrised weights (``torch.nn.utils.parametrizations``) become plain ones (`baked`);
* operations in place become plain ones, and who reads their operand later reads their result;
* what depends on weights and buffers alone is computed once (`_fold_constants`), but for their
  type and device, which follow the model;
* functions whose weights are known become the layers of torch.nn that call them (`_LIFTED`);
* what nothing reads goes, and so do checks: they raise errors or compute nothing.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fedsys.models.batchnorm import DeferredBatchNorm
from fedsys.models.origins import module_paths
from fedsys.pruning.dense.vocabulary import METHODS
from fedsys.randomness import is_random_depth

_CHECKS = frozenset({torch._assert})
_PLAIN: Mapping[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod, operator.ipow: operator.pow, operator.iand: operator.and_,
    operator.ior: operator.or_, operator.ixor: operator.xor, torch.relu_: torch.relu,
    F.relu_: F.relu, F.elu_: F.elu, F.selu_: F.selu, F.celu_: F.celu, F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
}  # fmt: skip
"""Functions that change their operand, and those that do not."""

_FUNCTIONS_OF_METHODS: Mapping[Any, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "square": torch.square,
}  # fmt: skip


def baked(model: nn.Module) -> nn.Module:
    """Return `model`, or a copy with plain weights where it has parametrised ones.

    The copy has what the parametrisations compute in the mode of the model as parameters, and
    shares no tensor.
    """
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    plain = copy.deepcopy(model)
    for module in [m for m in plain.modules() if parametrize.is_parametrized(m)]:
        _bake(module)
    return plain


@torch.no_grad()
def _bake(module: nn.Module) -> None:
    """Turn a module into one of the class that it had, without `remove_parametrizations`.

    That changes the class, which copies of a module share.
    """
    computed: Any = module.parametrizations
    values = {name: getattr(module, name).clone() for name in computed}
    learned = {name for name in values if [*computed[name].parameters()]}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        if name in learned:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)


def simplify(graph: fx.GraphModule) -> None:
    """Simplify the graph of a model in evaluation; its output stays the same, bit for bit.

    Args:
        graph: Its modules and tensors may be shared with the model, and are left as they are; new
            ones are added under free names, and what is not used any more stays.
    """
    _drop_random_depth(graph)
    _take_out_of_place(graph.graph)
    _fold_constants(graph)
    _lift(graph)
    _drop_dead(graph.graph)
    graph.graph.lint()


def drop_checks(graph: fx.Graph) -> None:
    """Remove what refuses inputs of another size, where sizes are known to be right."""
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _CHECKS]:
        graph.erase_node(node)
    _drop_dead(graph)


def _drop_random_depth(graph: fx.GraphModule) -> None:
    """Remove torchvision's ``StochasticDepth`` and timm's ``DropPath``: nothing in evaluation."""
    called = dict(graph.named_modules(remove_duplicate=False))
    for node in [n for n in graph.graph.nodes if n.op == "call_module"]:
        if is_random_depth(called[str(node.target)]):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _take_out_of_place(graph: fx.Graph) -> None:
    """Let operations leave their operand as it is; a view of one that changes is not followed."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changes = _changes_operand(node)
        _name_plainly(node)
        if changes:
            changed = node.args[0]
            for user in [user for user in changed.users if order[user] > order[node]]:
                user.replace_input_with(changed, node)


def _changes_operand(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        owner: Any = node.graph.owning_module
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return _without_underscore(node) != node.target
    return node.target in _PLAIN or bool(node.kwargs.get("inplace", False))


def _without_underscore(node: fx.Node) -> str:
    name = str(node.target)
    in_place = name.endswith("_") and not name.endswith("__") and name[:-1] in METHODS
    return name[:-1] if in_place else name


def _name_plainly(node: fx.Node) -> None:
    """Take a word that changes nothing; sums and products have one, however they are written."""
    if node.op == "call_method":
        node.target = _without_underscore(node)
        if node.target in _FUNCTIONS_OF_METHODS and not node.kwargs:
            node.op, node.target = "call_function", _FUNCTIONS_OF_METHODS[node.target]
    elif node.op == "call_function":
        node.target = _PLAIN.get(node.target, node.target)
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}


# --------------------------------------------------------------------------------------------------
# Constants


def _fold_constants(graph: fx.GraphModule) -> None:
    """Compute what depends on no input; what cannot be computed alone stays."""
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = _attribute(graph, str(node.target))
        elif _can_be_computed(node) and all(source in known for source in node.all_input_nodes):
            _compute(node, known)
    for node, value in known.items():
        if node.op != "get_attr" and any(user not in known for user in node.users):
            _write_down(graph, node, value)


def _can_be_computed(node: fx.Node) -> bool:
    word = node.op in ("call_function", "call_method") and node.target not in _CHECKS
    return word and bool(node.all_input_nodes)


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> None:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    try:
        with torch.no_grad():
            if node.op == "call_function":
                assert callable(node.target)
                known[node] = node.target(*args, **kwargs)
            else:
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return  # it says so again when the model runs


def _write_down(graph: fx.GraphModule, node: fx.Node, value: Any) -> None:
    """Let those who read `node` read its value instead: a buffer, or numbers as arguments."""
    if isinstance(value, Tensor):
        name = _free(graph, "constant")
        graph.register_buffer(name, value.detach().clone())
        with graph.graph.inserting_before(node):
            new = graph.graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    elif isinstance(value, torch.dtype | torch.device):
        _let_follow(graph, node, value)
    elif _is_plain(value):
        for user in list(node.users):
            user.args, user.kwargs = _replaced((user.args, dict(user.kwargs)), node, value)


def _let_follow(graph: fx.GraphModule, node: fx.Node, value: torch.dtype | torch.device) -> None:
    """Let those who read a type or a device of weights read that of an empty buffer instead.

    It follows the model, into float64 or onto ``meta``, where a constant would stay; and a weight
    that is read could not be pruned.
    """
    attribute = "dtype" if isinstance(value, torch.dtype) else "device"
    name = f"empty_{str(value).removeprefix('torch.').replace(':', '_')}"
    if getattr(graph._buffers.get(name), attribute, None) != value:
        name = _free(graph, name)
        graph.register_buffer(name, torch.empty(0).to(value))
    with graph.graph.inserting_before(node):
        empty = graph.graph.get_attr(name)
        new = graph.graph.call_function(getattr, (empty, attribute))
    empty.meta, new.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(new)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _replaced(old: Any, node: fx.Node, value: Any) -> Any:
    """Return arguments in which `value` stands for `node`: fx maps nodes to nodes alone."""
    if old is node:
        return tuple(value) if isinstance(value, tuple) else value
    match old:
        case tuple():
            return tuple(_replaced(each, node, value) for each in old)
        case list():
            return [_replaced(each, node, value) for each in old]
        case dict():
            return {key: _replaced(each, node, value) for key, each in old.items()}
        case slice():
            return slice(*_replaced((old.start, old.stop, old.step), node, value))
    return old


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)


def _free(root: nn.Module, stem: str) -> str:
    """Return a name that `root` has nothing under."""
    names = (f"{stem}_{number}" if number else stem for number in itertools.count())
    return next(name for name in names if not hasattr(root, name))


# --------------------------------------------------------------------------------------------------
# Functions that become layers


def _lift(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        found = _LIFTED.get(node.target) if node.op == "call_function" else None
        if found is None:
            continue
        names, make = found
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        x = given.pop("input", None)
        tensors = {k: v for k, v in given.items() if isinstance(v, fx.Node)}
        others = set(node.all_input_nodes) - {x}
        known = others == set(tensors.values()) and all(n.op == "get_attr" for n in others)
        if not isinstance(x, fx.Node) or not known:
            continue
        values = {k: _attribute(graph, str(n.target)) for k, n in tensors.items()}
        layer = make(given | values)
        if layer is not None:
            path = _placed(graph, _owner(node, tensors), layer.eval())
            with graph.graph.inserting_before(node):
                new = graph.graph.call_module(path, (x,))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)


def _owner(node: fx.Node, tensors: Mapping[str, fx.Node]) -> str:
    """Return the path of the module whose weights `node` uses, or in whose forward it stands."""
    name = str(tensors["weight"].target) if "weight" in tensors else ""
    return name.rpartition(".")[0] or next(module_paths(node), "")


def _placed(graph: fx.GraphModule, owner: str, layer: nn.Module) -> str:
    """Give `layer` the name of the module that had its weights, or one below; return its path."""
    place = graph.get_submodule(owner)
    if owner and type(place) is nn.Module and not place._modules:
        held = {*place._parameters, *place._buffers}
        if held <= {*layer._parameters, *layer._buffers}:
            graph.add_submodule(owner, layer)
            return owner
    name = _free(place, type(layer).__name__.lower().removeprefix("deferred"))
    path = f"{owner}.{name}" if owner else name
    graph.add_submodule(path, layer)
    return path


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _batch_norm(given: Mapping[str, Any]) -> nn.Module | None:
    mean, variance = given.get("running_mean"), given.get("running_var")
    weight, bias = given.get("weight"), given.get("bias")
    if mean is None or variance is None or given.get("training", False):
        return None
    if (weight is None) != (bias is None):
        return None
    momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
    norm = DeferredBatchNorm(len(mean), eps, momentum, weight is not None)
    norm.running_mean, norm.running_var = mean.detach(), variance.detach()
    if weight is not None and bias is not None:
        norm.weight, norm.bias = _parameter(weight), _parameter(bias)
    return norm


def _group_norm(given: Mapping[str, Any]) -> nn.Module | None:
    weight, bias = given.get("weight"), given.get("bias")
    if weight is None or bias is None:
        return None
    norm = nn.GroupNorm(given["num_groups"], len(weight), given.get("eps", 1e-5), device="meta")
    norm.weight, norm.bias = _parameter(weight), _parameter(bias)
    return norm


def _linear(given: Mapping[str, Any]) -> nn.Module | None:
    weight = given.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    outputs, inputs = weight.shape
    return _with_weights(nn.Linear(inputs, outputs, device="meta"), given)


def _conv(kind: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]) -> Callable[..., Any]:
    def make(given: Mapping[str, Any]) -> nn.Module | None:
        weight, groups = given.get("weight"), given.get("groups", 1)
        if weight is None:
            return None
        numbers = {
            k: _plain_size(given[k]) for k in ("stride", "padding", "dilation") if k in given
        }
        inputs = weight.shape[1] * groups
        size = tuple(weight.shape[2:])
        layer: Any = kind(inputs, len(weight), size, groups=groups, device="meta", **numbers)
        return _with_weights(layer, given)

    return make


def _plain_size(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else value


def _with_weights(layer: Any, given: Mapping[str, Any]) -> nn.Module:
    bias = given.get("bias")
    layer.weight = _parameter(given["weight"])
    layer.bias = None if bias is None else _parameter(bias)
    made: nn.Module = layer
    return made


_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LIFTED: dict[Any, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], nn.Module | None]]] = {
    F.batch_norm: (tuple(inspect.signature(F.batch_norm).parameters), _batch_norm),
    F.group_norm: (tuple(inspect.signature(F.group_norm).parameters), _group_norm),
    F.linear: (("input", "weight", "bias"), _linear),
    F.conv1d: (_CONV_NAMES, _conv(nn.Conv1d)),
    F.conv2d: (_CONV_NAMES, _conv(nn.Conv2d)),
    F.conv3d: (_CONV_NAMES, _conv(nn.Conv3d)),
}
"""Names of the arguments in their order, and what makes the layer."""


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
