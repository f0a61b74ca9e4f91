"""Dense models as data: weights in safetensors, the graph in JSON, no code in either.

A folder holds ``weights.safetensors`` and ``architecture.json``. The JSON names operations with
their arguments, layers by class and constructor arguments, and the checksum of the weights. Only
words of `fedsys.pruning.dense.vocabulary` can be used, so a file from an untrusted source can at
most describe a strange model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import keyword
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fedsys.errors import ModelError
from fedsys.models.assemble import following, modes_of
from fedsys.models.modes import Modes
from fedsys.models.origins import place_of
from fedsys.pruning.dense.vocabulary import (
    ATTRIBUTES,
    DTYPES,
    LAYERS,
    METHODS,
    function_of,
    name_of,
)
from fedsys.pruning.file_names import ARCHITECTURE as ARCHITECTURE
from fedsys.pruning.file_names import WEIGHTS as WEIGHTS

FORMAT = "fedsys-dense-model-1"
STILL = "in_evaluation"
"""Layers that stay in evaluation when the model is trained; absent if there are none."""
FROZEN = "frozen"
"""Parameters that need no gradient; absent if there are none."""


def constructor_arguments(module: nn.Module, kind: type[nn.Module] | None = None) -> dict[str, Any]:
    """Return the arguments that make a module of ``torch.nn`` like `module`, without its weights.

    Args:
        module: The layer.
        kind: The class that is to be made; its own if None.

    Modules of torch.nn keep their arguments in attributes of the same name, but for ``bias``, which
    becomes the parameter itself.
    """
    result: dict[str, Any] = {}
    for name in inspect.signature((kind or type(module)).__init__).parameters:
        if name in ("self", "device", "dtype") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        result[name] = value is not None if name == "bias" else value
    if isinstance(module, nn.MultiheadAttention):  # it keeps two of them as parameters
        result |= {
            "bias": module.in_proj_bias is not None,
            "add_bias_kv": module.bias_k is not None,
        }
    return result


# --------------------------------------------------------------------------------------------------
# Saving


def describe(model: fx.GraphModule) -> dict[str, Any]:
    """Return the architecture of `model` as JSON data.

    Raises:
        ModelError: It has an operation or a layer that cannot be named; says in which line.
    """
    layers: dict[str, Any] = {}
    nodes = []
    for node in model.graph.nodes:
        nodes.append([
            node.name, node.op, _name_of(node), _encode(node.args, node),
            _encode(dict(node.kwargs), node),
        ])  # fmt: skip
        if node.op == "call_module":
            layers[node.target] = _describe_layer(node, model.get_submodule(node.target))
    constants = {
        str(node.target): str(_lookup(model, str(node.target)).dtype)
        for node in model.graph.nodes
        if node.op == "get_attr"
    }
    body = {"format": FORMAT, "layers": layers, "constants": sorted(constants), "nodes": nodes}
    still = sorted(path for path in modes_of(model).training if path in layers)
    frozen = sorted(name for name, p in model.named_parameters() if not p.requires_grad)
    return body | ({STILL: still} if still else {}) | ({FROZEN: frozen} if frozen else {})


def _lookup(model: nn.Module, path: str) -> Tensor:
    parent, _, attribute = path.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), attribute)
    return tensor


def _name_of(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_function":
        name = name_of(target)
        if name == "getattr" and (len(node.args) != 2 or node.args[1] not in ATTRIBUTES):
            raise _unsaveable(node, f"reads .{node.args[1]}")
        if name is None:
            module, name = getattr(target, "__module__", None), getattr(target, "__name__", target)
            raise _unsaveable(node, f"calls {f'{module}.' if module else ''}{name}()")
        return name
    if node.op == "call_method" and target not in METHODS:
        raise _unsaveable(node, f"calls .{target}()")
    return str(target)


def _unsaveable(node: fx.Node, does: str) -> ModelError:
    return ModelError(
        f"{node.name} {does}, which cannot be saved as data{_at(node)}; write it with functions of "
        "torch or torch.nn.functional that compute on tensors (those known stand in "
        "fedsys/pruning/dense/vocabulary.py), or compute it once and keep it as a buffer"
    )


def _at(node: fx.Node) -> str:
    place = place_of(node)
    return f" ({place})" if place else ""


def _describe_layer(node: fx.Node, module: nn.Module) -> list[Any]:
    kind = _word(module)
    if kind is None:
        name = type(module).__name__
        raise ModelError(
            f"{node.target} is a {name}, which cannot be saved as data{_at(node)}: it is none of "
            "the layers of torch.nn in fedsys/pruning/dense/vocabulary.py; build it of these, in a "
            "module of your own"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ModelError(
            f"{node.target} has hooks, which are code and cannot be saved as data{_at(node)}; "
            "write what they do in forward; in place of torch.nn.utils.weight_norm or "
            "spectral_norm take those of torch.nn.utils.parametrizations"
        )
    return [kind.__name__, _encode(constructor_arguments(module, kind), node)]


def _word(module: nn.Module) -> type[nn.Module] | None:
    """Return the class by which a layer can be named: its own, or what a BatchNorm is made of.

    A BatchNorm with a ``train()`` of its own is one of torch in evaluation.
    """
    own = type(module)
    for kind in own.__mro__ if isinstance(module, _NormBase) else (own,):
        if LAYERS.get(kind.__name__) is kind:
            return kind if kind.forward is own.forward else None
    return None


def _encode(value: Any, node: fx.Node) -> Any:
    """Return an argument of `node` as JSON data."""

    def each(values: Iterable[Any]) -> list[Any]:
        return [_encode(v, node) for v in values]

    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case fx.Node():
            return {"node": value.name}
        case list():
            return {"list": each(value)}
        case tuple():
            return {"tuple": each(value)}
        case dict():
            return {"dict": {str(k): _encode(v, node) for k, v in value.items()}}
        case slice():
            return {"slice": each((value.start, value.stop, value.step))}
        case EllipsisType():
            return {"ellipsis": None}
        case torch.device():
            return str(value)
        case torch.dtype() if str(value).removeprefix("torch.") in DTYPES:
            return {"dtype": str(value).removeprefix("torch.")}
    raise _unsaveable(node, f"takes an argument of type {type(value).__name__}")


def save(model: fx.GraphModule, folder: str | os.PathLike[str]) -> Path:
    """Write `model` to `folder`, which is made if need be; return it.

    Args:
        model: A dense model, as `fedsys.pruning.dense.shrink` returns it.
        folder: Gets `ARCHITECTURE` and `WEIGHTS`.

    Raises:
        ModelError: The model has an operation or a layer that cannot be named.
    """
    folder = Path(folder)
    weights = save_tensors(_apart(model.state_dict()))
    body = describe(model) | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    text = json.dumps({"sha256": _digest(body), **body}, indent=1, allow_nan=False)
    (folder / ARCHITECTURE).write_text(text + "\n", encoding="utf-8")
    return folder


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors none of which shares memory with another: a file holds each for itself."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        whole = tensor.detach().cpu().contiguous()
        place = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return tensors


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Loading


def load(folder: str | os.PathLike[str]) -> fx.GraphModule:
    """Read the model that `save` wrote: same modules, same graph, the same bits.

    Raises:
        ModelError: A file is missing or damaged, or names something that is not allowed.
    """
    folder = Path(folder)
    try:
        text = (folder / ARCHITECTURE).read_text(encoding="utf-8")
        weights = (folder / WEIGHTS).read_bytes()
        body = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder} holds no dense model that can be read: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ModelError(f"{folder / ARCHITECTURE} is not of the format {FORMAT}")
    if body.pop("sha256", None) != _digest(body):
        raise ModelError(f"{folder / ARCHITECTURE} is damaged: its checksum does not fit; "
                         "copy or make the model again")  # fmt: skip
    if body.get("weights_sha256") != hashlib.sha256(weights).hexdigest():
        raise ModelError(f"{folder / WEIGHTS} is damaged: its checksum does not fit; "
                         "copy or make the model again")  # fmt: skip
    try:
        return build(body, load_tensors(weights))
    except ModelError:
        raise
    except Exception as error:  # layers refuse arguments by whatever their authors chose
        raise ModelError(f"{folder} does not describe a model: {error!r}") from error


def build(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Make the model that `body` describes, in evaluation mode, with the weights `tensors`.

    Raises:
        ModelError: `body` names something that is not allowed, or `tensors` do not fit.
    """
    parts: dict[str, Any] = {}
    for path, (kind, arguments) in body["layers"].items():
        parts[_checked_path(path)] = _make_layer(path, kind, _decode(arguments, {}))
    for path in body["constants"]:
        if path not in tensors:
            raise ModelError(f"the weights lack the constant {path}")
        layer, _, name = _checked_path(path).rpartition(".")
        parts[path] = getattr(parts[layer], name) if layer in parts else tensors[path]
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, kind, target, args, kwargs in body["nodes"]:
        arguments = _decode(args, nodes), _decode(kwargs, nodes)
        for key in arguments[1]:
            _checked_name(key)
        nodes[name] = _make_node(graph, parts, _checked_name(name), kind, target, *arguments)
    graph.lint()
    still = {_checked_path(path): {"training": False} for path in body.get(STILL, ())}
    model = following(parts, graph, "DenseModel", Modes(still))
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    for name in body.get(FROZEN, ()):
        model.get_parameter(_checked_path(name)).requires_grad_(False)
    return model.eval()


def _checked_name(name: object) -> str:
    """Let identifiers pass: torch.fx turns names into source text."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ModelError(f"{name!r} is not a name")
    return name


def _checked_path(path: object) -> str:
    steps = path.split(".") if isinstance(path, str) else []
    ordinary = str.maketrans("_-", "00")  # torchvision's RegNet has names such as block1-0
    plain = all(s.isascii() and s.translate(ordinary).isalnum() and s[:2] != "__" for s in steps)
    if not steps or not plain:
        raise ModelError(f"{path!r} is not the path of a module")
    return ".".join(steps)


def _make_layer(path: str, kind: object, arguments: object) -> nn.Module:
    if not isinstance(kind, str) or kind not in LAYERS or not isinstance(arguments, dict):
        raise ModelError(f"{path} asks for a layer {kind!r}, which is not allowed")
    makes_tensors = "device" in inspect.signature(LAYERS[kind].__init__).parameters
    extra = {"device": "meta"} if makes_tensors else {}
    return LAYERS[kind](**arguments, **extra)


def _make_node(
    graph: fx.Graph,
    parts: Mapping[str, Any],
    name: str,
    kind: str,
    target: Any,
    args: Any,
    kwargs: Any,
) -> fx.Node:
    allowed: Any
    if kind == "call_function":
        allowed = function_of(target)
        if allowed is getattr and (len(args) != 2 or args[1] not in ATTRIBUTES or kwargs):
            allowed = None
    elif kind == "call_method":
        allowed = target if target in METHODS else None
    elif kind in ("call_module", "get_attr"):
        allowed = target if target in parts else None
    elif kind in ("placeholder", "output"):
        allowed = _checked_name(target)
    else:
        allowed = None
    if allowed is None:
        raise ModelError(f"{name} asks for {kind} {target!r}, which is not allowed")
    return graph.create_node(kind, allowed, args, kwargs, name=name)


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelError(f"an argument {value!r} is not allowed")
    (kind, content), *rest = value.items()
    if rest:
        raise ModelError("an argument is described twice")
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "list":
            return [_decode(v, nodes) for v in content]
        case "tuple":
            return tuple(_decode(v, nodes) for v in content)
        case "dict":
            return {k: _decode(v, nodes) for k, v in content.items()}
        case "slice":
            return slice(*(_decode(v, nodes) for v in content))
        case "dtype":
            return DTYPES[content]
        case "ellipsis":
            return ...
    raise ModelError(f"an argument of kind {kind!r} is not allowed")
