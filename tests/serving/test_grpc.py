import dataclasses
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.grpc_messages import MESSAGES
from fedsys.serving.http import Endpoint
from fedsys.serving.portfolio import PortfolioEngine
from tests.serving.chains import CARD, chain_of_three, images

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "portfolio"
BOTH = ServingConfig(
    address="http://127.0.0.1:0", grpc="grpc://127.0.0.1:0", max_delay_ms=0.0, variant="parent"
)


@pytest.fixture(scope="module")
def endpoint():
    engine = PortfolioEngine(Portfolio.load(GOLDEN), BOTH)
    with closing(Endpoint(engine, BOTH)) as made:
        yield made


@pytest.fixture(scope="module")
def client(endpoint):
    place = endpoint.grpc_address.removeprefix("grpc://")
    with closing(triton.InferenceServerClient(place)) as made:
        yield made


@pytest.fixture(scope="module")
def shape():
    return Portfolio.load(GOLDEN).about.input_shape


def fields(message, path=""):
    for field in message.fields:
        name = f"{path}.{field.name}"
        yield name, field.number, field.type
    for nested in message.nested_types:
        yield from fields(nested, f"{path}.{nested.name}")


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_those_of_the_published_protocol(name):
    """tritonclient has them from the published file."""
    theirs = getattr(service_pb2, name).DESCRIPTOR
    assert set(fields(MESSAGES[name].DESCRIPTOR)) == set(fields(theirs))


def asked(rows, shape, kind="FP32"):
    draw = np.random.default_rng(0)
    array = draw.integers(0, 256, (rows, *shape)).astype(np.uint8)
    array = array if kind == "UINT8" else draw.normal(size=(rows, *shape)).astype(np.float32)
    tensor = triton.InferInput("input", list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return array, tensor


def test_health_and_metadata_are_told(client, shape):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("classifier") and client.is_model_ready("classifier", "1")
    assert client.get_server_metadata().name == "fedsys"
    told = client.get_model_metadata("classifier")
    assert [t.name for t in told.outputs] == ["scores", "probabilities", "label"]
    assert list(told.inputs[0].shape) == [-1, *shape] and told.inputs[0].datatype == "FP32"


@pytest.mark.parametrize("kind", ["FP32", "UINT8"])
def test_answers_are_the_bits_of_http(endpoint, client, shape, kind):
    import tritonclient.http as over_http

    array, tensor = asked(3, shape, kind)
    result = client.infer("classifier", [tensor], request_id="seven")
    other = over_http.InferInput("input", list(array.shape), kind)
    other.set_data_from_numpy(array)
    with closing(over_http.InferenceServerClient(endpoint.address.removeprefix("http://"))) as http:
        expected = http.infer("classifier", [other])
        assert np.array_equal(result.as_numpy("scores"), expected.as_numpy("scores"))
        assert result.as_numpy("label").tolist() == [
            label.encode() if isinstance(label, str) else label
            for label in expected.as_numpy("label").tolist()
        ]
    response = result.get_response()
    assert response.id == "seven" and response.parameters["variant"].string_param == "parent"


def test_contents_that_are_not_raw_and_files_are_read(endpoint, shape):
    request = MESSAGES["ModelInferRequest"](model_name="classifier")
    given = request.inputs.add(name="input", datatype="FP32", shape=[1, *shape])
    given.contents.fp32_contents.extend([0.25] * int(np.prod(shape)))
    request.outputs.add(name="scores").parameters["classification"].int64_param = 2
    with grpc.insecure_channel(endpoint.grpc_address.removeprefix("grpc://")) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        response = call(request, timeout=30)
    assert list(response.outputs[0].shape) == [1, 2] and response.outputs[0].datatype == "BYTES"


REFUSED = [
    ({"model_name": "other"}, "NOT_FOUND", "'classifier' is"),
    ({"model_version": "2"}, "NOT_FOUND", "version '2' is not here"),
    ({"shape": [1, 5, 5, 5]}, "INVALID_ARGUMENT", "shape=[1, 5, 5, 5]: must be"),
    ({"name": "pixels"}, "INVALID_ARGUMENT", "inputs: 'pixels': must be 'input'"),
    ({"output": "logits"}, "INVALID_ARGUMENT", "outputs: 'logits': must be one of"),
    ({"rows": 300}, "INVALID_ARGUMENT", "must have at most 256 images"),
]


@pytest.mark.parametrize(("wrong", "code", "words"), REFUSED)
def test_errors_have_the_status_codes_of_grpc(client, shape, wrong, code, words):
    wrong = dict(wrong)
    sides = wrong.pop("shape", [wrong.pop("rows", 1), *shape])
    tensor = triton.InferInput(wrong.pop("name", "input"), sides, "FP32")
    tensor.set_data_from_numpy(np.zeros(sides, np.float32))
    outputs = [triton.InferRequestedOutput(wrong.pop("output"))] if "output" in wrong else None
    with pytest.raises(InferenceServerException) as caught:
        client.infer(wrong.pop("model_name", "classifier"), [tensor], outputs=outputs, **wrong)
    assert caught.value.status() == f"StatusCode.{code}" and words in caught.value.message()


def test_a_chain_answers_over_grpc_what_it_answers_over_http():
    options = dataclasses.replace(BOTH, variant=None)
    x = images(2)
    with chain_of_three() as (engine, _), closing(Endpoint(Kept(engine), options)) as made:
        expected = engine.answer(x.numpy()).scores
        place = made.grpc_address.removeprefix("grpc://")
        tensor = triton.InferInput("input", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x.numpy())
        with closing(triton.InferenceServerClient(place)) as client:
            result = client.infer("classifier", [tensor])
        assert np.array_equal(result.as_numpy("scores"), expected)
        assert result.get_response().parameters["cuts"].string_param == "1/2"


class Kept:
    """An engine that is closed by whoever made it."""

    card = CARD

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def close(self):
        """Leave that to whoever made it."""


@pytest.mark.parametrize("address", ["127.0.0.1:0", "grpc://127.0.0.1", "http://127.0.0.1:0"])
def test_an_address_of_another_form_is_refused(address):
    options = dataclasses.replace(BOTH, grpc=address)
    with chain_of_three() as (engine, _), pytest.raises(ConfigError, match=r"serving.grpc="):
        Endpoint(Kept(engine), options)
