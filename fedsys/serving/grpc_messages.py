"""The messages of the Open Inference Protocol over gRPC, made from its published field numbers.

The protocol: https://github.com/kserve/open-inference-protocol (gRPC), which is that of NVIDIA
Triton: package ``inference``, service ``GRPCInferenceService``. The table below says what a
``.proto`` file would; the classes are made from it when this module is imported, in a pool of their
own, so that a client of the protocol in the same process keeps its own.
"""

from __future__ import annotations

import re
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"

_MESSAGES: Final = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1;",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1;",
    "ModelReadyRequest": "string name = 1; string version = 2;",
    "ModelReadyResponse": "bool ready = 1;",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": (
        "string name = 1; string version = 2; repeated string extensions = 3;"
    ),
    "ModelMetadataRequest": "string name = 1; string version = 2;",
    "ModelMetadataResponse.TensorMetadata": (
        "string name = 1; string datatype = 2; repeated int64 shape = 3;"
    ),
    "ModelMetadataResponse": (
        "string name = 1; repeated string versions = 2; string platform = 3; "
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4; "
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5;"
    ),
    "InferParameter": (
        "oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3; "
        "oneof double double_param = 4; oneof uint64 uint64_param = 5;"
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1; repeated int32 int_contents = 2; "
        "repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4; "
        "repeated uint64 uint64_contents = 5; repeated float fp32_contents = 6; "
        "repeated double fp64_contents = 7; repeated bytes bytes_contents = 8;"
    ),
    "ModelInferRequest.InferInputTensor": (
        "string name = 1; string datatype = 2; repeated int64 shape = 3; "
        "map InferParameter parameters = 4; InferTensorContents contents = 5;"
    ),
    "ModelInferRequest.InferRequestedOutputTensor": (
        "string name = 1; map InferParameter parameters = 2;"
    ),
    "ModelInferRequest": (
        "string model_name = 1; string model_version = 2; string id = 3; "
        "map InferParameter parameters = 4; "
        "repeated ModelInferRequest.InferInputTensor inputs = 5; "
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6; "
        "repeated bytes raw_input_contents = 7;"
    ),
    "ModelInferResponse.InferOutputTensor": (
        "string name = 1; string datatype = 2; repeated int64 shape = 3; "
        "map InferParameter parameters = 4; InferTensorContents contents = 5;"
    ),
    "ModelInferResponse": (
        "string model_name = 1; string model_version = 2; string id = 3; "
        "map InferParameter parameters = 4; "
        "repeated ModelInferResponse.InferOutputTensor outputs = 5; "
        "repeated bytes raw_output_contents = 6;"
    ),
}
"""Fields by message: kind, type, name and number. ``map`` has keys of text."""

_FIELD = re.compile(r"(?:(repeated|oneof|map) )?([\w.]+) (\w+) = (\d+);")
_Field: Any = descriptor_pb2.FieldDescriptorProto


def _file() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="fedsys/open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {}
    for name in _MESSAGES:
        outer, _, inner = name.partition(".")
        message = made.get(outer) or file.message_type.add(name=outer)
        made.setdefault(outer, message)
        if inner:
            made[name] = message.nested_type.add(name=inner)
    for name, text in _MESSAGES.items():
        for kind, of, field, number in _FIELD.findall(text):
            _add_field(made[name], name, kind, of, field, int(number))
    return file


def _add_field(message: Any, owner: str, kind: str, of: str, name: str, number: int) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind == "map":
        entry = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        _add_entry(message.nested_type.add(name=entry), of)
        of, kind = f"{owner}.{entry}", "repeated"
    if kind == "repeated":
        field.label = _Field.LABEL_REPEATED
    if kind == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    _set_type(field, of)


def _add_entry(entry: Any, of: str) -> None:
    entry.options.map_entry = True
    _set_type(entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL), "string")
    _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), of)


def _set_type(field: Any, of: str) -> None:
    scalar = getattr(_Field, f"TYPE_{of.upper()}", None)
    field.type = scalar or _Field.TYPE_MESSAGE
    if scalar is None:
        field.type_name = f".{PACKAGE}.{of}"


def _classes() -> dict[str, Any]:
    pool: Any = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _MESSAGES
        if "." not in name
    }


MESSAGES: Final[dict[str, Any]] = _classes()
"""The classes of messages by name."""
