"""JSON whose numbers become an array without becoming objects of Python before.

With simdjson (the extra ``serve``) the body of a request with the 3,072 numbers of a small image is
an array after 77 µs; by orjson, with a look at the type of each number, it took 275 to 446
(``benchmarks/serving.md``, on a busy machine). Whatever is not a plain tensor of numbers is
left to `fedsys.serving.tensor_json`, which takes it or refuses it in its words; so a request has
one answer, with this library or without.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

simdjson: Any
try:
    simdjson = importlib.import_module("simdjson")
except ImportError:
    simdjson = None

_FORMS: Mapping[str, tuple[str, Any]] = {"FP32": ("d", np.float64), "UINT8": ("u", np.uint64)}
_KEPT_BYTES = 1 << 18
"""Texts of more are read by a parser that is not kept: it has some 14 times their memory."""
_MOST_BYTES = 1 << 20
"""Texts of more are left to others: pysimdjson 7.0.2 was seen to lose its process on some that are
far larger, and those are read in a process of their own anyway."""
_MOST_KEYS = 64
"""Of an object: each is looked for from the first one on, so many take the square of the time."""

_of_thread = threading.local()


def with_array(text: bytes | bytearray | memoryview, depth: int) -> dict[str, Any] | None:
    """Return the object that a request is, with the numbers of its one tensor as a flat array.

    Args:
        text: JSON.
        depth: Of nested data that may be flattened.

    Returns:
        ``inputs[0]["data"]`` is float64 for the datatype FP32 and uint64 for UINT8. None if the
        text is of another form, or simdjson is not installed.
    """
    if simdjson is None or len(text) > _MOST_BYTES:
        return None
    try:
        return _read(_parser(len(text)), text, depth)
    except (ValueError, TypeError, RuntimeError, KeyError):
        return None


def _parser(size: int) -> Any:
    if size > _KEPT_BYTES:
        return simdjson.Parser()
    kept = getattr(_of_thread, "parser", None)
    if kept is None:
        kept = _of_thread.parser = simdjson.Parser()
    return kept


def _read(parser: Any, text: bytes | bytearray | memoryview, depth: int) -> dict[str, Any] | None:
    tree = _members(parser.parse(text))
    inputs = tree.pop("inputs", None)
    if not isinstance(inputs, simdjson.Array) or len(inputs) != 1:
        return None
    entry = _members(inputs[0])
    data, form = entry.pop("data", None), _FORMS.get(entry.get("datatype", ""))
    if not isinstance(data, simdjson.Array) or form is None or _depth(data) > depth:
        return None
    kind, numbers = form
    array = np.frombuffer(data.as_buffer(of_type=kind), numbers)
    return {**_plain(tree), "inputs": [{**_plain(entry), "data": array}]}


def _members(found: Any) -> dict[str, Any]:
    """Return the members of an object; its lists and objects still refer to the document.

    Raises:
        ValueError: It is none, has a key twice, of which others take the last, or too many.
    """
    if not isinstance(found, simdjson.Object) or len(found) > _MOST_KEYS:
        raise ValueError("no object of a request")
    keys = list(found.keys())
    members = {key: found[key] for key in keys}
    if len(members) != len(keys):
        raise ValueError("a key stands twice")
    return members


def _depth(data: Any) -> int:
    """Return how deeply the first value of nested lists lies."""
    found = 0
    while isinstance(data, simdjson.Array) and len(data):
        data, found = data[0], found + 1
    return found


def _plain(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without references to the document: its parser is used again."""

    def copied(value: Any) -> Any:
        if isinstance(value, simdjson.Object):
            return value.as_dict()
        return value.as_list() if isinstance(value, simdjson.Array) else value

    return {key: copied(value) for key, value in members.items()}
