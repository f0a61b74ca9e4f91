"""The Open Inference Protocol over gRPC: another way in to the same requests, rules and answers.

A request becomes what `fedsys.serving.v2` reads over HTTP (a small JSON head and raw bytes), and an
answer is made of what it writes; so what is refused, and in which words, is the same. Errors have
the status codes of gRPC that stand for those of HTTP.
"""

from __future__ import annotations

import ipaddress
import json
import struct
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, final
from urllib.parse import urlsplit

import grpc
import numpy as np

from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError, RequestError
from fedsys.serving import v2
from fedsys.serving.batching import Batcher
from fedsys.serving.engine import Engine
from fedsys.serving.grpc_messages import MESSAGES, SERVICE
from fedsys.serving.metrics import Metrics

_THREADS = 64  # each waits for its answer
_ROOM = 65_536  # bytes of a message beside its tensors
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {"FP32": ("fp32_contents", "<f4"), "UINT8": ("uint_contents", "u1")}


@final
class GrpcEntry:
    """Serves an engine over gRPC until it is closed.

    Args:
        engine: Behind the batcher.
        batcher: Has requests computed.
        options: ``serving.grpc`` is the address.
        metrics: Are told of requests and answers.

    Attributes:
        address: As ``grpc://host:port``, with the port that was chosen.

    Raises:
        ConfigError: The address has another form or cannot be listened on.
    """

    def __init__(
        self, engine: Engine, batcher: Batcher, options: ServingConfig, metrics: Metrics
    ) -> None:
        self._engine, self._batcher, self._options = engine, batcher, options
        self._metrics, self._draining = metrics, False
        limit = options.max_body_bytes + _ROOM
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, "grpc"),
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=max(_THREADS, options.max_queue),
        )
        handlers = {name: self._handler(name, call) for name, call in self._methods().items()}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        self.address = _listen(self._server, options.grpc or "")
        self._server.start()

    def close(self, grace_s: float) -> None:
        """Take no more requests, and finish those in work."""
        self._draining = True
        self._server.stop(grace_s).wait(grace_s + 1.0)

    def _methods(self) -> Mapping[str, Callable[[Any], Any]]:
        return {
            "ServerLive": lambda request: MESSAGES["ServerLiveResponse"](live=True),
            "ServerReady": lambda request: MESSAGES["ServerReadyResponse"](ready=self._ready),
            "ModelReady": self._model_ready,
            "ServerMetadata": self._about,
            "ModelMetadata": self._metadata,
            "ModelInfer": self._infer,
        }

    def _handler(self, name: str, call: Callable[[Any], Any]) -> Any:
        def answered(request: Any, context: Any) -> Any:
            try:
                return call(request)
            except RequestError as error:
                code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
                context.abort(code, str(error))

        return grpc.unary_unary_rpc_method_handler(
            answered,
            request_deserializer=MESSAGES[f"{name}Request"].FromString,
            response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
        )

    @property
    def _ready(self) -> bool:
        return self._engine.ready and not self._draining

    def _check(self, name: str, number: str) -> None:
        if name != self._options.name:
            v2.refuse(f"model {name!r} is not here; {self._options.name!r} is", 404)
        if number not in ("", v2.VERSION):
            v2.refuse(f"version {number!r} is not here; {v2.VERSION!r} is", 404)

    def _model_ready(self, request: Any) -> Any:
        self._check(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=self._ready)

    def _about(self, request: Any) -> Any:
        return MESSAGES["ServerMetadataResponse"](
            name="fedsys", version=version("fedsys"), extensions=v2.EXTENSIONS
        )

    def _metadata(self, request: Any) -> Any:
        self._check(request.name, request.version)
        told = v2.metadata(self._options.name, self._engine.card)
        rows = {
            key: [{k: row[k] for k in ("name", "datatype", "shape")} for row in told[key]]
            for key in ("inputs", "outputs")
        }
        return MESSAGES["ModelMetadataResponse"](
            name=told["name"], versions=told["versions"], platform=told["platform"], **rows
        )

    # ----------------------------------------------------------------------------------------------
    # Inference

    def _infer(self, request: Any) -> Any:
        status = 500
        try:
            response = self._inferred(request)
            status = 200
            return response
        except RequestError as error:
            status = error.status
            raise
        finally:
            self._metrics.ended(status)

    def _inferred(self, request: Any) -> Any:
        began = time.perf_counter()
        if self._draining:
            raise RequestError(503, "the endpoint is about to end; ask another one")
        self._check(request.model_name, request.model_version)
        head, raw = as_http(request)
        card, options = self._engine.card, self._options
        inference = v2.read(
            head + raw, str(len(head)), card, max_rows=options.max_rows, resize=options.resize
        )
        future = self._batcher.submit(inference.images)
        try:
            served = future.result(options.timeout_s)
        except TimeoutError as error:
            future.cancel()
            text = f"not answered within serving.timeout_s={options.timeout_s:g}"
            raise RequestError(504, text) from error
        facts = v2.facts_of(served)
        content, length = v2.write(inference, served.scores, card, options.name, facts)
        took = time.perf_counter() - began
        self._metrics.answered(served.by, inference.images.shape[0], served.batch, took)
        return as_message(content, length)


def as_http(request: Any) -> tuple[bytes, bytes]:
    """Return a request as `fedsys.serving.v2` reads it: the head in JSON, and the raw tensor.

    Raises:
        RequestError: Its tensor is neither raw nor of a type that has contents here.
    """
    raws = list(request.raw_input_contents)
    if raws and len(raws) != len(request.inputs):
        v2.refuse(f"raw_input_contents: {len(raws)} for {len(request.inputs)} inputs")
    inputs, tail = [], b""
    for index, tensor in enumerate(request.inputs):
        raw = raws[index] if raws else _contents(tensor)
        about = {**_plain(tensor.parameters), "binary_data_size": len(raw)}
        entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        inputs.append({**entry, "parameters": about})
        tail += raw
    outputs = [
        {"name": wanted.name, "parameters": {**_plain(wanted.parameters), "binary_data": True}}
        for wanted in request.outputs
    ]
    about = {**_plain(request.parameters), "binary_data_output": True}
    tree: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "parameters": about}
    if request.id:
        tree["id"] = request.id
    return json.dumps(tree).encode(), tail


def _contents(tensor: Any) -> bytes:
    if tensor.datatype == "BYTES":
        files = tensor.contents.bytes_contents
        return b"".join(struct.pack("<I", len(file)) + file for file in files)
    if tensor.datatype not in _CONTENTS:
        v2.refuse(f"{tensor.name}: datatype={tensor.datatype!r}: must be FP32, UINT8 or BYTES")
    field, kind = _CONTENTS[tensor.datatype]
    values = np.asarray(getattr(tensor.contents, field))
    if kind == "u1" and values.size and values.max() > 255:
        v2.refuse(f"{tensor.name}: uint_contents: must be numbers of UINT8")
    return bytes(values.astype(kind).tobytes())


def _plain(parameters: Any) -> dict[str, Any]:
    """Return parameters as plain values."""
    found = {}
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        found[key] = None if kind is None else getattr(value, kind)
    return found


def as_message(content: bytes, head_length: int | None) -> Any:
    """Return the message of an answer that `fedsys.serving.v2` wrote."""
    end = len(content) if head_length is None else head_length
    tree = json.loads(content[:end])
    outputs, raws, place = [], [], end
    for entry in tree["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        raws.append(content[place : place + size])
        place += size
        outputs.append({key: entry[key] for key in ("name", "datatype", "shape")})
    message = MESSAGES["ModelInferResponse"](
        model_name=tree["model_name"],
        model_version=tree["model_version"],
        id=tree.get("id", ""),
        outputs=outputs,
        raw_output_contents=raws,
    )
    for key, value in tree["parameters"].items():
        _set(message.parameters[key], value)
    return message


def _set(parameter: Any, value: object) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param"}
    setattr(parameter, kinds.get(type(value), "string_param"), value)


def _listen(server: Any, address: str) -> str:
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "grpc" or not parts.hostname or port is None:
        raise ConfigError.of("serving.grpc", address, "must be grpc://host:port")
    host = f"[{parts.hostname}]" if _is_v6(parts.hostname) else parts.hostname
    try:
        chosen = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError.of("serving.grpc", address, "must be free to listen on") from error
    return f"grpc://{host}:{chosen}"


def _is_v6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
