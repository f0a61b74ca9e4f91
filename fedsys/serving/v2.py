"""The Open Inference Protocol, version 2, as functions from bytes to values and back.

The protocol: https://github.com/kserve/open-inference-protocol (REST), with two extensions of
NVIDIA Triton, whose clients use them: tensors as raw bytes behind the JSON (``binary_tensor_data``,
the header ``Inference-Header-Content-Length`` says where the JSON ends) and ``classification``.

A model has one input, ``input``, whose datatype says what it is:

* ``FP32`` ``[n, C, H, W]``: what the model takes, normalised;
* ``UINT8`` ``[n, C, H, W]``: pixels, normalised here as in training;
* ``BYTES`` ``[n]``: PNG or JPEG files; base64 in JSON, which cannot hold bytes.

and three outputs: ``scores`` and ``probabilities`` (``FP32`` ``[n, classes]``) and ``label``
(``BYTES`` ``[n]``). All sizes are checked against each other before memory is taken for tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from fedsys.errors import RequestError
from fedsys.serving.batching import Served
from fedsys.serving.engine import Array, Card, Fact
from fedsys.serving.images import decode, normalise
from fedsys.serving.tensor_json import (
    INPUT as INPUT,
)
from fedsys.serving.tensor_json import (
    files,
    form,
    numbers,
    only_input,
    parameters,
    parse,
    written,
)
from fedsys.serving.tensor_json import (
    refuse as refuse,
)

VERSION = "1"
"""The one version of the model: which variant answered stands in the parameters of a response."""

EXTENSIONS = ("binary_tensor_data", "classification")
HEADER_LENGTH = "Inference-Header-Content-Length"
SCORES, PROBABILITIES, LABEL = "scores", "probabilities", "label"
OUTPUTS = (SCORES, PROBABILITIES, LABEL)
_DIGITS = 18  # of a length in bytes
_HEADS, _HEAD_BYTES = 64, 1024  # of JSON in front of raw tensors that are kept, and of each


@dataclass(frozen=True)
class Wanted:
    """One output that a client asks for.

    Attributes:
        name: One of `OUTPUTS`.
        binary: Whether as raw bytes.
        top: With ``classification``: how many classes, best first; 0 for the tensor itself.
    """

    name: str
    binary: bool = False
    top: int = 0


@dataclass(frozen=True, eq=False)
class Inference:
    """A request for inference.

    Attributes:
        images: Normalised float32 ``(n, C, H, W)``.
        wanted: Outputs in the order of the answer.
        id: Given back as it came; None for none.
    """

    images: Array
    wanted: tuple[Wanted, ...] = field(default_factory=lambda: tuple(map(Wanted, OUTPUTS)))
    id: str | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """What the JSON of a request says; it is shared, and so not changed.

    Attributes:
        tensor: Its one tensor, with the numbers of it if they stand in the JSON.
        kind: Datatype of the tensor.
        shape: Of the tensor.
        size: Bytes of the tensor behind the JSON; None for none.
        wanted: As in `Inference`.
        id: As in `Inference`.
    """

    tensor: Mapping[str, Any]
    kind: str
    shape: list[int]
    size: int | None
    wanted: tuple[Wanted, ...]
    id: str | None


Known = Callable[[bytes], Asked]
"""What is known of the JSON in front of raw tensors, by its bytes (`known_heads`)."""


def metadata(name: str, card: Card) -> dict[str, Any]:
    """Return the metadata of the model."""
    channels, height, width = card.input_shape
    classes = len(card.classes)
    return {
        "name": name,
        "versions": [VERSION],
        "platform": f"fedsys_{card.platform}",
        "inputs": [
            {
                "name": INPUT,
                "datatype": "FP32",
                "shape": [-1, channels, height, width],
                "parameters": {"also": "UINT8 pixels of this shape, BYTES files of shape [-1]"},
            }
        ],
        "outputs": [
            {"name": SCORES, "datatype": "FP32", "shape": [-1, classes]},
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, classes]},
            {"name": LABEL, "datatype": "BYTES", "shape": [-1]},
        ],
    }


# --------------------------------------------------------------------------------------------------
# Requests


def read(
    body: bytes | bytearray,
    header_length: str | None,
    card: Card,
    *,
    max_rows: int,
    resize: bool = False,
    known: Known | None = None,
) -> Inference:
    """Read a request for inference.

    Args:
        body: Of the HTTP request: JSON, then raw tensors if `header_length` is given.
        header_length: Value of the header `HEADER_LENGTH`.
        card: Of the model.
        max_rows: Images that one request may have.
        resize: Whether images of another size are resized.
        known: Of `known_heads`, for this card and as many rows.

    Raises:
        RequestError: With the status that HTTP has for it.
    """
    view = memoryview(body)
    end = len(view)
    if header_length is not None:
        said = header_length.isdecimal() and len(header_length) <= _DIGITS
        if not said or int(header_length) > len(view):
            refuse(f"{HEADER_LENGTH}: {header_length[:30]}: must be at most the length of the body")
        end = int(header_length)
    if header_length is not None and known is not None and end <= _HEAD_BYTES:
        asked = known(bytes(view[:end]))
    else:
        tree = parse(body, tensor=True) if header_length is None else parse(view[:end])
        asked = _asked(tree, card, max_rows)
    return Inference(_images(asked, view[end:], card, resize), asked.wanted, asked.id)


def known_heads(card: Card, max_rows: int) -> Known:
    """Return what reads the JSON in front of raw tensors: a client sends the same again and again.

    The last few of them are kept, by all of their bytes; what is refused is not.

    Args:
        card: Of the model.
        max_rows: As for `read`.
    """

    @lru_cache(_HEADS)
    def known(head: bytes) -> Asked:
        return _asked(parse(head), card, max_rows)

    return known


def _asked(tree: Mapping[str, Any], card: Card, max_rows: int) -> Asked:
    tensor = only_input(tree)
    kind, shape = form(tensor, card.input_shape, max_rows)
    size, identity = parameters(tensor, INPUT).get("binary_data_size"), tree.get("id")
    if size is not None and type(size) is not int:
        refuse(f"{INPUT}: binary_data_size={size!r}: must be the bytes behind JSON")
    if identity is not None and not isinstance(identity, str):
        refuse("id: must be a text")
    return Asked(tensor, kind, shape, size, _wanted(tree, card), identity)


def _wanted(tree: Mapping[str, Any], card: Card) -> tuple[Wanted, ...]:
    default = parameters(tree, "the request").get("binary_data_output", False)
    outputs = tree.get("outputs")
    if not outputs:
        return tuple(Wanted(name, bool(default)) for name in OUTPUTS)
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        refuse("outputs: must be a list of objects")
    result: list[Wanted] = []
    for output in outputs:
        name = output.get("name")
        if name not in OUTPUTS:
            refuse(f"outputs: {repr(name)[:60]}: must be one of {', '.join(OUTPUTS)}")
        if name in {wanted.name for wanted in result}:  # a short request has no endless answer
            refuse(f"outputs: {name!r}: must be asked for once")
        about = parameters(output, f"outputs: {name}")
        top = about.get("classification", 0)
        if isinstance(top, bool) or not isinstance(top, int) or top < 0 or (top and name == LABEL):
            refuse(f"outputs: {name}: classification={top!r}: must be a number of classes")
        binary = bool(about.get("binary_data", default))
        result.append(Wanted(name, binary, min(top, len(card.classes))))
    return tuple(result)


def _images(asked: Asked, raw: memoryview, card: Card, resize: bool) -> Array:
    kind, shape, size = asked.kind, asked.shape, asked.size
    if size is not None:
        if size != len(raw):
            refuse(f"{INPUT}: binary_data_size={size!r}: must be the {len(raw)} bytes behind JSON")
    elif len(raw):
        refuse(f"{len(raw)} bytes stand behind the JSON and belong to no tensor")
    if kind == "BYTES":
        found = files(asked.tensor, shape[0]) if size is None else _files_raw(raw, shape[0])
        return normalise(np.stack([
            decode(file, card, resize=resize, where=f"image {i}") for i, file in enumerate(found)
        ]), card)  # fmt: skip
    in_json = size is None
    values = numbers(asked.tensor, kind, shape) if in_json else _numbers_raw(raw, kind, shape)
    return normalise(values, card) if kind == "UINT8" else _finite(values)


def _numbers_raw(raw: memoryview, kind: str, shape: Sequence[int]) -> Any:
    form = np.dtype("<f4") if kind == "FP32" else np.dtype("u1")
    expected = math.prod(shape) * form.itemsize
    if len(raw) != expected:
        refuse(f"{INPUT}: {len(raw)} bytes: must be {expected} for {kind} {list(shape)}")
    array = np.frombuffer(raw, form).reshape(shape)
    return array.astype(form.newbyteorder("="))  # a copy, whose numbers lie at multiples of four


def _finite(values: Array) -> Array:
    if not np.isfinite(values).all():
        refuse(f"{INPUT}: has numbers that are not finite in FP32")
    return values


def _files_raw(raw: memoryview, count: int) -> list[bytes]:
    """Read elements of BYTES: each a length of four bytes, little-endian, and so many bytes."""
    files: list[bytes] = []
    place = 0
    while place < len(raw) and len(files) < count:
        if place + 4 > len(raw):
            refuse(f"{INPUT}: ends within a length")
        (size,) = struct.unpack_from("<I", raw, place)
        if place + 4 + size > len(raw):
            refuse(f"{INPUT}: element {len(files)} says {size} bytes, and fewer are there")
        files.append(bytes(raw[place + 4 : place + 4 + size]))
        place += 4 + size
    if len(files) != count or place != len(raw):
        refuse(f"{INPUT}: has other than {count} elements")
    return files


# --------------------------------------------------------------------------------------------------
# Answers


def write(
    inference: Inference, scores: Array, card: Card, name: str, facts: Mapping[str, Fact]
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if raw tensors follow it.

    Args:
        inference: The request.
        scores: float32 ``(n, classes)``.
        card: Of the model.
        name: Of the model.
        facts: Become the parameters of the answer.
    """
    outputs, raws = [], []
    for wanted in inference.wanted:
        kind, shape, array = _output(wanted, scores, card)
        entry: dict[str, Any] = {"name": wanted.name, "datatype": kind, "shape": shape}
        if wanted.binary:
            raw = _raw(kind, array)
            raws.append(raw)
            entry["parameters"] = {"binary_data_size": len(raw)}
        else:
            entry["data"] = array if kind == "BYTES" else [_number(v) for v in array.tolist()]
        outputs.append(entry)
    tree = {
        "model_name": name,
        "model_version": VERSION,
        **({"id": inference.id} if inference.id is not None else {}),
        "parameters": dict(facts),
        "outputs": outputs,
    }
    head = written(tree)
    return (head + b"".join(raws), len(head)) if raws else (head, None)


def facts_of(served: Served) -> dict[str, Fact]:
    """Return what a client is told of its answer, as parameters."""
    return {
        "variant": served.by,
        "batch": served.batch,
        "queue_ms": round(served.queue_ms, 3),
        "compute_ms": round(served.compute_ms, 3),
        **served.facts,
    }


def _number(value: float) -> float:
    if not math.isfinite(value):
        raise RequestError(500, "the model gave a number that is not finite")
    return value


def _output(wanted: Wanted, scores: Array, card: Card) -> tuple[str, list[int], Any]:
    if wanted.name == LABEL:
        labels = [card.classes[i] for i in scores.argmax(1).tolist()]
        return "BYTES", [len(labels)], labels
    values = _softmax(scores) if wanted.name == PROBABILITIES else scores
    if not wanted.top:
        return "FP32", list(values.shape), values.ravel()
    best = np.argsort(-values, axis=1, kind="stable")[:, : wanted.top]
    texts = [
        f"{value:.6f}:{index}:{card.classes[index]}"
        for row in zip(np.take_along_axis(values, best, 1).tolist(), best.tolist(), strict=True)
        for value, index in zip(*row, strict=True)
    ]
    return "BYTES", [values.shape[0], wanted.top], texts


def _softmax(scores: Array) -> Array:
    with np.errstate(invalid="ignore"):  # what is not finite is told apart
        powers: Array = np.exp(scores - scores.max(1, keepdims=True))
        powers /= powers.sum(1, keepdims=True)
        return powers


def _raw(kind: str, array: Any) -> bytes:
    if kind == "FP32":
        return bytes(array.astype("<f4").tobytes())
    encoded = [text.encode() for text in array]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
