"""Values as plain JSON and arrays, and back, to the bit.

What can be kept is a tree of None, bool, int, float, str, bytes, arrays, tensors and Flower's
array records, in lists, tuples and dicts. Arrays are referred to by the SHA-256 of what they are:
equal arrays are kept once, and damage shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedsys.transport import records

Tree = Any
"""One of the values above."""

Arrays = dict[str, NDArray[Any]]
"""Arrays by their hash."""


class NotKeepable(TypeError):
    """A value has no form in a checkpoint; the message says which and of what type."""


def encode(value: Tree, arrays: Arrays, where: str = "value") -> Any:
    """Return `value` as plain JSON in which arrays are references.

    Args:
        value: The tree.
        arrays: Receives the arrays by the hash that refers to them.
        where: Name of the value in messages.

    Raises:
        NotKeepable: Names the part that has no form in a checkpoint.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, np.ndarray):
        return {"array": _keep(value, arrays, where)}
    if isinstance(value, np.generic):  # not a float: it decides the type of sums
        return {"scalar": _keep(np.asarray(value), arrays, where)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _keep(_numpy_of(value, where), arrays, where)}
    if isinstance(value, bytes):
        return {"bytes": _keep(np.frombuffer(value, np.uint8), arrays, where)}
    if isinstance(value, ArrayRecord):
        return {"record": [[k, _keep(records.view(a), arrays, where)] for k, a in value.items()]}
    if type(value) in (list, tuple):
        parts = [encode(part, arrays, f"{where}[{i}]") for i, part in enumerate(value)]
        return {type(value).__name__: parts}
    if type(value) is dict:
        items = [
            [_key(k, where), encode(part, arrays, f"{where}[{k!r}]")] for k, part in value.items()
        ]
        return {"dict": items}
    raise NotKeepable(f"{where} is of type {type(value).__name__}")


def _key(key: object, where: str) -> object:
    if type(key) in (str, int):
        return key
    raise NotKeepable(f"{where} has a key of type {type(key).__name__}")


def _numpy_of(tensor: torch.Tensor, where: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = tensor.detach().cpu().numpy()
    except TypeError as error:
        raise NotKeepable(f"{where} is a tensor of {tensor.dtype}") from error
    return array


def _keep(array: NDArray[Any], arrays: Arrays, where: str) -> str:
    if array.dtype.kind not in "biuf" or not array.dtype.isnative:
        raise NotKeepable(f"{where} is an array of {array.dtype}")
    array = np.asarray(array, order="C")
    name = array_sha256(array)
    arrays[name] = array
    return name


def array_sha256(array: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's type, shape and row-major bytes."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    if array.size:
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def decode(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Tree:
    """Return what `encode` was given; every array has memory of its own and can be written to."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "float":
            return float.fromhex(content)
        case "array":
            return arrays[content].copy()
        case "scalar":
            return arrays[content][()]
        case "tensor":
            return torch.from_numpy(arrays[content].copy())
        case "bytes":
            return arrays[content].tobytes()
        case "record":
            return records.record_of({k: arrays[name] for k, name in content})
        case "list":
            return [decode(part, arrays) for part in content]
        case "tuple":
            return tuple(decode(part, arrays) for part in content)
        case "dict":
            return {k: decode(part, arrays) for k, part in content}
    raise ValueError(f"a value of the unknown kind {kind!r}")


def keepable(value: Tree) -> bool:
    """Tell whether `encode` takes a value, without reading what its arrays hold."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biuf" and value.dtype.isnative
    if type(value) is dict:
        return all(type(k) in (str, int) and keepable(v) for k, v in value.items())
    if type(value) in (list, tuple):
        return all(map(keepable, value))
    plain = (type(None), bool, int, float, str, bytes)
    return type(value) in plain or isinstance(value, ArrayRecord | torch.Tensor)
