"""The endpoint beside those who only take its places, memory and time.

Sixteen JSON bodies of 15 MiB took 1.1 GB and the health check with them: all were held at one time,
and the parser held the interpreter while it read each.
"""

import asyncio
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.commands.bench.crowd import HEALTH, Crowd, ask, forms, press
from fedsys.config.serving import ServingConfig
from fedsys.errors import RequestError
from fedsys.serving import v2
from fedsys.serving.engine import CALM, Answer, Card
from fedsys.serving.http import Endpoint
from fedsys.serving.json_process import LARGE_BYTES, JsonProcess
from fedsys.serving.tensor_json import with_raw_tensor
from tests.waiting import until

CARD = Card(("cat", "dog", "owl", "elk"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3, "test")
INFER = "/v2/models/classifier/infer"


class Sums:
    """An engine whose scores are the sum of the pixels times 0, 1, 2, 3."""

    card, ready, lanes = CARD, True, 1
    watch = SimpleNamespace(**dict.fromkeys(("arrived", "left", "answered"), lambda n: None))
    watch.received = lambda size, seconds: None

    def is_quick(self, rows):
        return rows < 4

    def answer(self, images, pressure=CALM, by=""):
        return Answer(images.sum((1, 2, 3))[:, None] * np.arange(4, dtype=np.float32), "sums")

    def status(self):
        return {"variant": "sums"}

    def close(self):
        """Nothing to end."""


def call(endpoint, method, path, body=None, headers=None):
    with closing(http.client.HTTPConnection(endpoint.address[7:], timeout=60)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def infer(endpoint, tree):
    status, body, _ = call(endpoint, "POST", INFER, json.dumps(tree).encode())
    return status, json.loads(body)


def tensor(datatype, shape, data=None):
    entry = {"name": "input", "datatype": datatype, "shape": shape}
    return {"inputs": [entry | ({} if data is None else {"data": data})]}


@pytest.fixture(scope="module")
def endpoint():
    options = ServingConfig(
        address="http://127.0.0.1:0", max_delay_ms=0.0, max_connections=64, max_rows=400,
        max_waiting_bytes=4 << 20, max_body_bytes=2 << 20,
    )  # fmt: skip
    with closing(Endpoint(Sums(), options)) as made:
        yield made


def metric(endpoint, name):
    lines = endpoint.metrics.text().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_honest_clients_are_answered_beside_a_crowd(endpoint):
    """Scaled down; ``fedsys bench serving_load`` has the whole, with times."""
    crowd = Crowd(150, 50, 4 << 20, 6, 1_500_000, "classifier", CARD.input_shape, 300)
    stop = threading.Event()

    async def pressed():
        ended = asyncio.Event()
        ending = asyncio.ensure_future(asyncio.to_thread(stop.wait))
        ending.add_done_callback(lambda _: ended.set())
        await press(endpoint.address, crowd, ended)

    pressing = threading.Thread(target=lambda: asyncio.run(pressed()), daemon=True)
    asked = list(forms("classifier", CARD.input_shape).values())
    pressing.start()
    try:
        with ThreadPoolExecutor(5) as pool:
            clients = [
                pool.submit(ask, endpoint.address, asked[n % 2], lambda k: k >= 60, 0.03)
                for n in range(4)
            ]
            health = pool.submit(ask, endpoint.address, HEALTH, lambda k: k >= 40, 0.05, keep=False)
            heard = [*(client.result() for client in clients), health.result()]
    finally:
        stop.set()
        pressing.join(30)
    assert [one.failures.total() for one in heard] == [0] * 5
    assert [len(one.ms) for one in heard] == [60] * 4 + [40]
    assert metric(endpoint, 'fedsys_serving_connections_ended_total{reason="full"}') > 0
    assert metric(endpoint, 'fedsys_serving_connections_ended_total{reason="refused_431"}') > 0


# --------------------------------------------------------------------------------------------------
# Large JSON


def large(rows=300):
    """A request with JSON that is read apart, and its images."""
    values = np.random.default_rng(1).random((rows, 3, 8, 8))
    tree = tensor("FP32", list(values.shape), values.tolist())
    return tree, values.astype(np.float32)


def test_large_json_is_answered_as_small_json_is(endpoint):
    tree, images = large()
    assert len(json.dumps(tree)) > LARGE_BYTES
    tree |= {"id": "mine", "outputs": [{"name": "scores"}]}
    before = metric(endpoint, "fedsys_serving_json_apart_total")
    status, told = infer(endpoint, tree)
    assert (status, told["id"]) == (200, "mine")
    expected = images.sum((1, 2, 3))[:, None] * np.arange(4.0)
    assert np.allclose(np.reshape(told["outputs"][0]["data"], (-1, 4)), expected)
    assert metric(endpoint, "fedsys_serving_json_apart_total") > before


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["UINT8", "FP32", "BYTES"]),
    st.lists(st.one_of(st.integers(-1, 300), st.floats(), st.text(max_size=4)), max_size=5),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_the_raw_form_is_the_same_request_or_the_same_refusal(kind, data, shape):
    card = replace(CARD, input_shape=(1, 2, 1))
    text = json.dumps({"id": "a", **tensor(kind, shape, data)}).encode()
    said = []
    for raw in (False, True):
        try:
            head, tail = with_raw_tensor(text, card.input_shape, 16) if raw else (text, b"")
            length = str(len(head)) if raw else None
            read = v2.read(head + tail, length, card, max_rows=16)
            said.append((read.id, read.images.tolist()))
        except RequestError as error:
            said.append((error.status, str(error)))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[" * 200_000, "not JSON"),
        (b'{"inputs": [' + b" " * 200_000, "not JSON"),
        (json.dumps({**large(5)[0], "parameters": {"x": "y" * 200_000}}).encode(), "without data"),
        (json.dumps(tensor("FP32", [1, 3, 8, 8], [0.5] * 100_000)).encode(), "more than 192"),
    ],
)
def test_large_json_that_is_wrong_is_told_so(endpoint, body, told):
    status, said, _ = call(endpoint, "POST", INFER, body)
    assert status in (400, 413)
    assert told in json.loads(said)["error"]


def test_a_large_json_head_before_raw_tensors_is_refused(endpoint):
    head = json.dumps({**tensor("FP32", [1]), "x": "y" * 200_000}).encode()
    status, body, _ = call(endpoint, "POST", INFER, head, {v2.HEADER_LENGTH: str(len(head))})
    assert status == 413
    assert v2.HEADER_LENGTH in json.loads(body)["error"]


def test_the_process_that_reads_json_is_replaced_when_it_ends():
    process = JsonProcess(CARD.input_shape, 16)
    text = json.dumps(tensor("UINT8", [1, 3, 8, 8], [*range(192)])).encode()
    with closing(process):
        expected = process.read(text)
        process._process.kill()
        process._process.wait()
        with pytest.raises(RequestError, match="send the tensor as raw bytes"):
            process.read(text)
        assert process.read(text) == expected
    assert expected[1] == bytes(range(192))


# --------------------------------------------------------------------------------------------------
# Memory of bodies


def begin(endpoint, size, sent):
    """Begin a request with a body of `size` bytes, and send some of them."""
    host, _, port = endpoint.address.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
    connection.sendall(head.encode() + b" " * sent)
    return connection


def test_bodies_wait_for_memory_and_slow_ones_give_it_back(endpoint):
    """Two hold all the memory there is and send nothing more; a third gets it nevertheless."""
    with ExitStack() as stack:
        slow = [stack.enter_context(begin(endpoint, 2 << 20, 100_000)) for _ in range(2)]
        until(lambda: metric(endpoint, "fedsys_serving_bodies_bytes") == 4 << 20)
        status, _ = infer(endpoint, large()[0])
        assert status == 200
        assert metric(endpoint, "fedsys_serving_bodies_slow_total") >= 1
        del slow
    until(lambda: metric(endpoint, "fedsys_serving_bodies_bytes") == 0)


def test_more_bodies_than_may_wait_are_told_to_come_again(endpoint, monkeypatch):
    monkeypatch.setattr("fedsys.serving.bodies.MOST_WAITING", 0)
    body = b" " * 200_000
    with closing(http.client.HTTPConnection(endpoint.address[7:], timeout=30)) as connection:
        connection.request("POST", INFER, body)
        response = connection.getresponse()
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert "max_waiting_bytes" in json.loads(response.read())["error"]
    assert call(endpoint, "GET", "/v2/health/ready")[0] == 200
