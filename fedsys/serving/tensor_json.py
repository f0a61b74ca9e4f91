"""Tensors in the JSON of requests: what is read of them without PyTorch.

`fedsys.serving.v2` reads small requests with it, and `fedsys.serving.json_process` large ones, for
which it changes JSON into the form with raw tensors.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import RequestError
from fedsys.serving.array_json import with_array

orjson: Any
try:  # of the extra `serve`: numbers in a tenth of the time
    orjson = importlib.import_module("orjson")
except ImportError:
    orjson = None

INPUT = "input"
MAX_JSON_DEPTH = 8  # of nested data; deeper than any tensor here


def refuse(text: str, status: int = 400) -> NoReturn:
    """Refuse a request: it can be mended by who sent it."""
    raise RequestError(status, text)


def parse(text: bytes | bytearray | memoryview, *, tensor: bool = False) -> dict[str, Any]:
    """Return the object that a body holds.

    Args:
        text: JSON.
        tensor: Whether numbers are expected in it: those of ``data`` may become an array then.

    Raises:
        RequestError: It is no JSON, or no object.
    """
    if tensor and (found := with_array(text, MAX_JSON_DEPTH)) is not None:
        return found
    try:
        tree = _loaded(text)
    except (ValueError, RecursionError) as error:
        refuse(f"the body is not JSON: {error}")
    if not isinstance(tree, dict):
        refuse("the body must be a JSON object with inputs")
    return tree


def _loaded(text: bytes | bytearray | memoryview) -> Any:
    if orjson is not None:
        with suppress(ValueError):  # what it does not take is taken, or refused in its words, below
            return orjson.loads(text)

    def constant(name: str) -> NoReturn:
        refuse(f"the body has {name}, which JSON has not")

    return json.loads(bytes(text), parse_constant=constant)


def written(tree: Mapping[str, Any]) -> bytes:
    """Return plain values as JSON; none of them is a number that JSON has not."""
    if orjson is not None:
        with suppress(TypeError):  # texts that are no UTF-8: a request may give half of a pair
            return bytes(orjson.dumps(tree))
    return json.dumps(tree, allow_nan=False).encode()


def only_input(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the one tensor of a request.

    Raises:
        RequestError: There is none, or more.
    """
    inputs = tree.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        refuse(f"inputs: must be a list of one tensor, {INPUT}")
    return inputs[0]


def parameters(tree: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the parameters of a request or a tensor."""
    found = tree.get("parameters") or {}
    if not isinstance(found, dict):
        refuse(f"{where}: parameters: must be an object")
    return found


def form(
    tensor: Mapping[str, Any], input_shape: Sequence[int], max_rows: int
) -> tuple[str, list[int]]:
    """Return datatype and shape of the input.

    Raises:
        RequestError: They are none that the model takes.
    """
    name, kind, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
    if name != INPUT:
        refuse(f"inputs: {name!r}: must be {INPUT!r}")
    if kind not in ("FP32", "UINT8", "BYTES"):
        refuse(f"{INPUT}: datatype={kind!r}: must be FP32, UINT8 or BYTES")
    whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not isinstance(shape, list) or not whole:
        refuse(f"{INPUT}: shape={shape!r}: must be a list of whole numbers above 0")
    fits = shape[1:] == list(input_shape) if kind != "BYTES" else shape[1:] in ([], [1])
    if not fits or not shape:
        must = "[n]" if kind == "BYTES" else f"[n, {', '.join(map(str, input_shape))}]"
        refuse(f"{INPUT}: shape={shape}: must be {must} for {kind}")
    if shape[0] > max_rows:
        refuse(f"{INPUT}: shape={shape}: must have at most {max_rows} images", 413)
    return kind, shape


def numbers(tensor: Mapping[str, Any], kind: str, shape: Sequence[int]) -> NDArray[Any]:
    """Return the numbers of ``data``: float32 or uint8 of `shape`; they may be infinite.

    Raises:
        RequestError: It holds something else, or too much.
    """
    data, size, whole = tensor.get("data"), math.prod(shape), kind == "UINT8"
    if isinstance(data, np.ndarray) and data.size == size and not (whole and data.max() > 255):
        return _narrowed(data, whole).reshape(shape)
    if isinstance(data, np.ndarray):
        data = data.tolist()  # to be refused as any list
    if not isinstance(data, list):
        refuse(f"{INPUT}: data: must be a list of numbers")
    flat, found = _flat(data, size)
    if len(flat) != size:
        refuse(f"{INPUT}: data: has {len(flat)} numbers: must be {size}")
    kinds = {int} if whole else {int, float}
    if not found <= kinds or (whole and not 0 <= min(flat) <= max(flat) <= 255):
        wrong = next(v for v in flat if type(v) not in kinds or (whole and not 0 <= v <= 255))
        refuse(f"{INPUT}: data: {repr(wrong)[:60]}: must be a number of {kind}")
    try:  # a third of the time of np.array
        packed = bytes(flat) if whole else struct.pack(f"{size}d", *flat)
    except (OverflowError, struct.error):
        refuse(f"{INPUT}: data: has numbers that are not finite in FP32")
    return _narrowed(np.frombuffer(packed, np.uint8 if whole else np.float64), whole).reshape(shape)


def _narrowed(values: NDArray[Any], whole: bool) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return values.astype(np.uint8 if whole else np.float32)


def _flat(data: list[Any], most: int) -> tuple[list[Any], set[type]]:
    """Return the values of lists within lists, and their types.

    Raises:
        RequestError: They are more, or nested more deeply, than any tensor here.
    """
    found = set(map(type, data))
    if list not in found and len(data) <= most:
        return data, found
    flat: list[Any] = []
    _flatten(data, flat, most, 0)
    return flat, set(map(type, flat))


def _flatten(data: list[Any], into: list[Any], most: int, depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        refuse(f"{INPUT}: data: is nested too deeply")
    if list not in set(map(type, data)):
        into += data[: most + 1]
    else:
        for value in data:
            if isinstance(value, list):
                _flatten(value, into, most, depth + 1)
            else:
                into.append(value)
            if len(into) > most:
                break
    if len(into) > most:
        refuse(f"{INPUT}: data: has more than {most} numbers")


def files(tensor: Mapping[str, Any], count: int) -> list[bytes]:
    """Return the files of ``data`` of the datatype BYTES.

    Raises:
        RequestError: They are not `count` texts in base64.
    """
    data = tensor.get("data")
    if not isinstance(data, list):
        refuse(f"{INPUT}: data: must be a list of texts in base64")
    flat, _ = _flat(data, count)
    if len(flat) != count:
        refuse(f"{INPUT}: data: has {len(flat)} elements: must be {count}")
    try:
        return [base64.b64decode(value, validate=True) for value in flat]
    except (TypeError, ValueError, binascii.Error) as error:
        refuse(f"{INPUT}: data: must be files in base64: {error}")


def with_raw_tensor(text: bytes, input_shape: Sequence[int], max_rows: int) -> tuple[bytes, bytes]:
    """Return the same request with a raw tensor: its JSON and the bytes that follow it.

    Raises:
        RequestError: As reading it would.
    """
    tree = parse(text, tensor=True)
    tensor = only_input(tree)
    kind, shape = form(tensor, input_shape, max_rows)
    about = parameters(tensor, INPUT)
    if about.get("binary_data_size") is not None:
        refuse(f"{INPUT}: binary_data_size: no bytes stand behind the JSON")
    if kind == "BYTES":
        raw = b"".join(struct.pack("<I", len(file)) + file for file in files(tensor, shape[0]))
    else:
        raw = numbers(tensor, kind, shape).tobytes()
    entry = {key: value for key, value in tensor.items() if key != "data"}
    entry["parameters"] = {**about, "binary_data_size": len(raw)}
    rest = {key: tree[key] for key in ("id", "outputs", "parameters") if key in tree}
    return json.dumps({**rest, "inputs": [entry]}).encode(), raw
