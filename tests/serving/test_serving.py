import base64
import dataclasses
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, suppress
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.utils import InferenceServerException

from fedsys.commands import serve
from fedsys.config import compose_text, parse
from fedsys.config.serving import ObjectiveConfig, ServingConfig
from fedsys.data.dataset import Dataset, Images
from fedsys.data.folder import _decode, _Form
from fedsys.data.loader import eval_batches
from fedsys.errors import ConfigError, ModelError, RequestError
from fedsys.main import main
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving import array_json, tensor_json, v2
from fedsys.serving.batching import Batcher, BatchLimits
from fedsys.serving.engine import CALM, Answer, Card
from fedsys.serving.http import Endpoint, listen
from fedsys.serving.images import decode, normalise
from fedsys.serving.portfolio import PortfolioEngine
from tests.waiting import until

CARD = Card(("cat", "dog", "owl", "elk"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3, "test")
ANYWHERE = ServingConfig(address="http://127.0.0.1:0", max_delay_ms=0.0)
INFER = "/v2/models/classifier/infer"


def pixels(rows=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8, generator=draw)


def images_of(rows):
    return pixels(rows).numpy().astype(np.float32)


def png(image, form="PNG"):
    out = io.BytesIO()
    Image.fromarray(image.numpy().transpose(1, 2, 0)).save(out, form)
    return out.getvalue()


class Idle:
    """Nobody wants to know."""

    def arrived(self, rows):
        """Ignore it."""

    left = answered = arrived

    def received(self, size, seconds):
        """Ignore it."""


class Sums:
    """An engine that can be held: scores are the sum of the pixels times 0, 1, 2, 3."""

    card, watch, lanes = CARD, Idle(), 1
    ready = True
    quick = False

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        self.batches = []
        self.error = None
        self.closed = False

    def is_quick(self, rows):
        return self.quick

    def answer(self, images, pressure=CALM, by=""):
        self.batches.append(images.shape[0])
        assert self.go.wait(30)
        if self.error:
            raise self.error
        with np.errstate(over="ignore", invalid="ignore"):
            sums = images.sum((1, 2, 3), dtype=np.float32)[:, None]
            return Answer(sums * np.arange(4, dtype=np.float32), "sums", {"x": 1})

    def status(self):
        return {"variant": "sums", "batches": len(self.batches)}

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def portfolio(portfolio_folder):
    return Portfolio.load(portfolio_folder)


@pytest.fixture(scope="module")
def endpoint(portfolio):
    with closing(Endpoint(PortfolioEngine(portfolio, ANYWHERE), ANYWHERE)) as made:
        yield made


def call(endpoint, method, path, body=None, headers=None):
    place = endpoint.address.removeprefix("http://")
    with closing(http.client.HTTPConnection(place, timeout=60)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def infer(endpoint, tree, raw=b"", **headers):
    head = json.dumps(tree).encode()
    if raw:
        headers[v2.HEADER_LENGTH] = str(len(head))
    status, body, _ = call(endpoint, "POST", INFER, head + raw, headers)
    return status, json.loads(body)


def tensor(datatype, shape, data=None, **parameters):
    entry = {"name": "input", "datatype": datatype, "shape": shape, "parameters": parameters}
    return {"inputs": [entry | ({} if data is None else {"data": data})]}


# --------------------------------------------------------------------------------------------------
# From images to tensors


def test_an_image_becomes_what_training_makes_of_it():
    """To the bit: the loader of the training data is the reference."""
    part = Images(pixels(3), torch.zeros(3, dtype=torch.int64))
    card = dataclasses.replace(CARD, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    data = Dataset("d", part, part, part, CARD.classes, card.mean, card.std, "none")
    ((expected, _),) = eval_batches(part, data, 3)
    files = [decode(png(image), card) for image in part.pixels]
    assert np.array_equal(normalise(np.stack(files), card), expected)


def test_grey_images_and_jpeg_are_decoded():
    grey = dataclasses.replace(CARD, input_shape=(1, 8, 8))
    assert decode(png(pixels()[0]), grey).shape == (1, 8, 8)
    assert decode(png(pixels()[0], "JPEG"), CARD).shape == (3, 8, 8)


def test_other_sizes_are_resized_only_if_asked_for():
    large = png(torch.zeros(3, 20, 30, dtype=torch.uint8))
    with pytest.raises(RequestError, match=r"image has 30x20 pixels, and must have 8x8"):
        decode(large, CARD)
    assert decode(large, CARD, resize=True).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is no PNG or JPEG file"),
        (b"hello", "is no PNG or JPEG file"),
        (png(pixels()[0])[:60], "is damaged"),
        (png(pixels()[0], "BMP"), "is no PNG or JPEG file"),
    ],
)
def test_what_is_no_image_is_refused(data, told):
    with pytest.raises(RequestError, match=told):
        decode(data, CARD)


def test_colours_with_transparency_are_decoded_as_in_training():
    """A warning of Pillow about them was taken for an error: an image was called damaged."""
    out = io.BytesIO()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(out, "PNG", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = decode(out.getvalue(), CARD)
    assert got[:, 0, 0].tolist() == [40, 50, 60]


def test_photos_and_16_bit_images_are_those_that_training_sees(tmp_path):
    """Both lay on their side or were white here: each place had a decoding of its own."""
    upright = np.zeros((8, 6, 3), np.uint8)
    upright[:4] = 220
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(tmp_path / "photo.png", exif=tag)
    deep = np.arange(48, dtype=np.uint16).reshape(8, 6) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    card = dataclasses.replace(CARD, input_shape=(3, 8, 6))
    for name, expected in (("photo.png", upright.transpose(2, 0, 1)), ("deep.png", deep >> 8)):
        trained = _decode(str(tmp_path / name), _Form(3, None))
        assert np.array_equal(trained, np.broadcast_to(expected, (3, 8, 6)))
        served = decode((tmp_path / name).read_bytes(), card)
        assert np.array_equal(served, trained)
    with pytest.raises(RequestError, match="has 6x8 pixels, and must have 8x6"):
        swapped = dataclasses.replace(CARD, input_shape=(3, 6, 8))
        decode((tmp_path / "photo.png").read_bytes(), swapped)


def test_an_animation_is_refused():
    out = io.BytesIO()
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(RequestError, match="image: holds 2 pictures"):
        decode(out.getvalue(), CARD)


@pytest.mark.parametrize("width", [9_000, 10_500, 20_000])  # Pillow itself warns, and refuses
def test_a_small_file_with_a_huge_image_is_refused_before_it_is_decoded(width):
    out = io.BytesIO()
    Image.new("1", (width, 9_000)).save(out, "PNG")
    assert len(out.getvalue()) < 1 << 20
    with pytest.raises(RequestError, match="more than 64,000,000 pixels"):
        decode(out.getvalue(), CARD, resize=True)


# --------------------------------------------------------------------------------------------------
# The protocol


def read(tree, raw=b"", **more):
    head = json.dumps(tree).encode()
    length = str(len(head)) if raw else None
    return v2.read(head + raw, length, CARD, max_rows=16, **more)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_all_forms_of_a_tensor_are_the_same_images(rows, seed):
    x = pixels(rows, seed)
    expected = normalise(x.numpy(), CARD)
    shape = [rows, 3, 8, 8]
    raw = b"".join(struct.pack("<I", len(f)) + f for f in map(png, x))
    flat = expected.flatten().tolist()
    forms = [
        read(tensor("UINT8", shape, x.tolist())),
        read(tensor("UINT8", shape, x.flatten().tolist())),
        read(tensor("UINT8", shape, binary_data_size=x.numel()), x.numpy().tobytes()),
        read(tensor("FP32", shape, flat)),
        read(tensor("FP32", shape, binary_data_size=4 * len(flat)), expected.tobytes()),
        read(tensor("BYTES", [rows], binary_data_size=len(raw)), raw),
        read(tensor("BYTES", [rows], [base64.b64encode(png(i)).decode() for i in x])),
    ]
    for inference in forms:
        assert np.array_equal(inference.images, expected)


ONE = [1, 3, 8, 8]
WRONG = [
    ([], "the body must be a JSON object"),
    ({}, "inputs: must be a list of one tensor"),
    ({"inputs": [1]}, "inputs: must be a list of one tensor"),
    ({"inputs": [{"name": "image"}]}, "inputs: 'image': must be 'input'"),
    (tensor("FP64", ONE), "datatype='FP64': must be FP32, UINT8 or BYTES"),
    (tensor("FP32", None), "shape=None"),
    (tensor("FP32", []), "must be [n, 3, 8, 8] for FP32"),
    (tensor("FP32", [True, 3, 8, 8]), "must be a list of whole numbers above 0"),
    (tensor("FP32", [10**18, 3, 8, 8]), "must have at most 16 images"),
    (tensor("FP32", [1, 3, 9, 8]), "must be [n, 3, 8, 8] for FP32"),
    (tensor("FP32", [0, 3, 8, 8]), "above 0"),
    (tensor("FP32", ONE), "data: must be a list of numbers"),
    (tensor("FP32", ONE, [1.0]), "data: has 1 numbers: must be 192"),
    (tensor("FP32", ONE, [0.0] * 193), "more than 192 numbers"),
    (tensor("FP32", ONE, [[[[[[[[[[0]]]]]]]]]]), "nested too deeply"),
    (tensor("FP32", ONE, ["x"] * 192), "'x': must be a number of FP32"),
    (tensor("FP32", ONE, [1e300] * 192), "not finite"),
    (tensor("FP32", ONE, [10**400] * 192), "data"),
    (tensor("UINT8", ONE, [256] * 192), "256: must be a number of UINT8"),
    (tensor("UINT8", ONE, [0.5] * 192), "0.5: must be a number of UINT8"),
    (tensor("BYTES", [1], ["?"]), "must be files in base64"),
    (tensor("BYTES", [1], [7]), "must be files in base64"),
    (tensor("BYTES", [2], ["aGk="]), "has 1 elements: must be 2"),
    (tensor("BYTES", [1], ["aGk="]), "image 0 (2 bytes) is no PNG or JPEG file"),
    (tensor("FP32", ONE, [0.0] * 192, binary_data_size=4), "must be the 0 bytes behind JSON"),
    (tensor("FP32", ONE, [0.0] * 192) | {"id": 7}, "id: must be a text"),
    (tensor("FP32", ONE, [0.0] * 192) | {"outputs": [{"name": "x"}]}, "outputs: 'x'"),
    (tensor("FP32", ONE, [0.0] * 192) | {"outputs": 1}, "outputs: must be a list"),
    (
        tensor("FP32", ONE, [0.0] * 192)
        | {"outputs": [{"name": "scores", "parameters": {"classification": -1}}]},
        "classification=-1",
    ),
    (tensor("FP32", ONE, [0.0] * 192) | {"parameters": []}, None),
    (tensor("FP32", ONE, [0.0] * 192) | {"parameters": [1]}, "parameters: must be an object"),
]


@pytest.mark.parametrize(("tree", "told"), WRONG)
def test_a_wrong_request_is_told_what_is_wrong(tree, told):
    if told is None:
        assert read(tree).images.shape == (1, 3, 8, 8)
        return
    with pytest.raises(RequestError) as caught:
        read(tree)
    assert told in str(caught.value)
    assert 400 <= caught.value.status < 500


@pytest.mark.parametrize(
    ("shape", "raw", "told"),
    [
        ([1], b"abc", "ends within a length"),
        ([1], struct.pack("<I", 2**32 - 1) + b"abc", "says 4294967295 bytes"),
        ([1], struct.pack("<I", 0) * 2, "other than 1 elements"),
        ([2], struct.pack("<I", 0), "other than 2 elements"),
    ],
)
def test_raw_files_with_wrong_lengths_are_refused(shape, raw, told):
    with pytest.raises(RequestError, match=told):
        read(tensor("BYTES", shape, binary_data_size=len(raw)), raw)


@pytest.mark.parametrize("length", ["-1", "1e3", "999999", "x", "9" * 5000])
def test_a_wrong_length_of_the_json_is_refused(length):
    with pytest.raises(RequestError, match=v2.HEADER_LENGTH):
        v2.read(b"{}", length, CARD, max_rows=1)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 10_000, b'{"inputs": NaN}'])
def test_what_is_no_json_is_refused(body):
    with pytest.raises(RequestError):
        v2.read(body, None, CARD, max_rows=1)


@pytest.mark.parametrize("fast", [True, False])
def test_an_id_that_is_no_unicode_is_given_back_as_it_came(monkeypatch, fast):
    """orjson does not write half of a surrogate pair: such a request was answered by 500."""
    if fast:
        pytest.importorskip("orjson")
    else:
        monkeypatch.setattr(tensor_json, "orjson", None)
    inference = read(tensor("FP32", ONE, [0.0] * 192) | {"id": "\ud800"})
    body, _ = v2.write(inference, np.zeros((1, 4), np.float32), CARD, "classifier", {})
    assert json.loads(body)["id"] == inference.id == "\ud800"


FORMS = [
    [0.5] * 192, [3] * 192, [[[[1.5] * 8] * 8] * 3], [-0.0, 2**60, 1e-320] * 64, [True] * 192,
    [0.5] * 191 + [None], [0.5] * 191 + [[0.5]], [2**64] * 192, [1e400] * 192, [0.5] * 191, [],
    [0.5] * 193, {"a": 1}, "x", [-1] * 192, [255] * 192, [255.0] * 192,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["FP32", "UINT8"])
@pytest.mark.parametrize("data", FORMS, ids=repr)
def test_numbers_in_json_have_one_reading_with_simdjson_and_without(kind, data, monkeypatch):
    """The same bits or the same words, whichever libraries of the extra `serve` are there."""
    pytest.importorskip("simdjson")
    bodies = [json.dumps({"id": "a", **tensor(kind, ONE, data)}).encode()]
    bodies.append(bodies[0].replace(b'"id": "a"', b'"id": "\\ud800"'))  # is left to the others
    bodies.append(bodies[0].replace(b'"inputs":', b'"inputs": [], "inputs":'))  # the last counts
    for body in bodies:
        told = []
        for fast in (True, False):
            with monkeypatch.context() as patched:
                if not fast:
                    patched.setattr(array_json, "simdjson", None)
                try:
                    found = v2.read(body, None, CARD, max_rows=16)
                    told.append((found.images.dtype, found.images.tobytes(), found.id))
                except RequestError as error:
                    told.append((error.status, str(error)))
        assert told[0] == told[1]


def test_a_refused_request_leaves_nothing_to_the_next_one():
    """simdjson's parser is used again, which it refuses while anything refers to its document."""
    pytest.importorskip("simdjson")
    good = json.dumps(tensor("FP32", ONE, [0.5] * 192)).encode()
    for bad in (*(json.dumps(tensor("FP32", ONE, data)).encode() for data in FORMS), b"{", b"[1]"):
        with suppress(RequestError):
            v2.read(bad, None, CARD, max_rows=16)
        assert isinstance(array_json.with_array(good, 8)["inputs"][0]["data"], np.ndarray)


def test_objects_of_many_keys_and_long_texts_are_left_to_others(monkeypatch):
    """Keys were looked for one by one from the first on, which a request could make last, and of
    some very long texts pysimdjson ended its process: only short ones of few keys are its own."""
    pytest.importorskip("simdjson")
    request = tensor("FP32", ONE, [0.5] * 192)
    few, many = ({f"key{i}": i for i in range(n)} for n in (30, 300))
    assert array_json.with_array(json.dumps(request | few).encode(), 8) is not None
    within = {"inputs": [request["inputs"][0] | many]}
    for tree in (request | many, within, within | few):
        text = json.dumps(tree).encode()
        assert array_json.with_array(text, 8) is None
        assert v2.read(text, None, CARD, max_rows=16).images.tobytes() == b"\0\0\0?" * 192
    text = json.dumps(request | {"parameters": many}).encode()  # read in one go
    assert array_json.with_array(text, 8)["parameters"] == many
    monkeypatch.setattr(array_json, "_MOST_BYTES", len(text) - 1)
    assert array_json.with_array(text, 8) is None


def test_what_is_known_of_a_head_is_never_that_of_another():
    """JSON in front of raw tensors is kept by its bytes: a client repeats it."""
    known = v2.known_heads(CARD, 16)
    raw = np.arange(192, dtype="<f4").tobytes()
    shape = [1, *CARD.input_shape]

    def ask(about, raw=raw):
        head = json.dumps(tensor("FP32", shape, binary_data_size=len(raw)) | about).encode()
        return v2.read(head + raw, str(len(head)), CARD, max_rows=16, known=known)

    first = ask({"id": "a"})
    other = ask({"id": "b"}, raw=np.ones(192, "<f4").tobytes())
    again = ask({"id": "a"})
    assert (first.id, other.id, again.id) == ("a", "b", "a")
    assert again.images.tobytes() == first.images.tobytes() == raw
    assert other.images.tobytes() == np.ones(192, "<f4").tobytes()
    for _ in range(2):  # the head is right, and the bytes behind it are not
        with pytest.raises(RequestError, match="must be the 188 bytes behind JSON"):
            head = json.dumps(tensor("FP32", shape, binary_data_size=768) | {"id": "a"}).encode()
            v2.read(head + raw[:-580], str(len(head)), CARD, max_rows=16, known=known)
        with pytest.raises(RequestError, match="outputs: 'x'"):
            ask({"outputs": [{"name": "x"}]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["name", "shape", "datatype", "data", "parameters", "inputs", "outputs"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(json_values, st.binary(max_size=40), st.integers(0, 40))
def test_no_request_raises_anything_but_its_refusal(tree, raw, cut):
    body = json.dumps({"inputs": [tree], "outputs": tree}).encode() + raw
    for length in (None, str(max(0, len(body) - cut))):
        with pytest.raises(RequestError):
            v2.read(body, length, CARD, max_rows=4)


# --------------------------------------------------------------------------------------------------
# Batches


def test_requests_that_wait_are_computed_together_and_answered_apart():
    engine = Sums()
    engine.go.clear()
    batcher = Batcher(engine, BatchLimits(max_batch=4, max_delay_ms=0.0))
    x = np.random.default_rng(0).random((7, 3, 8, 8), np.float32)
    futures = [batcher.submit(x[:1])]
    until(lambda: engine.batches)
    futures += [batcher.submit(x[i : i + 1]) for i in range(1, 4)] + [batcher.submit(x[4:7])]
    engine.go.set()
    served = [future.result(30) for future in futures]
    assert engine.batches == [1, 3, 3]  # a request is never divided
    scores = np.concatenate([answer.scores for answer in served])
    assert np.allclose(scores[:, 1], x.sum((1, 2, 3)), rtol=1e-5)
    assert [answer.batch for answer in served] == [1, 3, 3, 3, 3]
    assert batcher.close(10) == 0
    assert batcher.waiting == 0


def test_a_quick_batch_is_computed_by_who_took_it_in_and_others_by_threads():
    engine, here = Sums(), threading.get_ident()
    computed_by = []
    answer = engine.answer

    def noted(*given):
        computed_by.append(threading.get_ident())
        return answer(*given)

    engine.answer = noted
    batcher = Batcher(engine, BatchLimits(max_batch=4))
    engine.quick = True
    futures = [batcher.submit(images_of(2), wake=False) for _ in range(3)]
    assert batcher.work_off() and not batcher.work_off()
    assert [future.result(0).batch for future in futures] == [4, 4, 2]
    assert computed_by == [here, here]
    engine.quick = False
    slow = batcher.submit(images_of(2), wake=False)
    assert not batcher.work_off()
    assert slow.result(30).batch == 2
    engine.quick = True
    pieces = batcher.submit(images_of(6), wake=False)  # what comes in pieces is for threads
    assert not batcher.work_off()
    assert pieces.result(30).batch == 6
    assert here not in computed_by[2:] and batcher.close(10) == 0


def test_a_request_that_is_alone_is_answered_at_once():
    engine, few, many = Sums(), images_of(2), images_of(6)
    batcher = Batcher(engine, BatchLimits(max_batch=4))
    assert batcher.at_once(few) is None
    engine.quick = True
    served = batcher.at_once(few)
    assert served.by == "sums" and served.batch == 2 and served.queue_ms == 0.0
    assert np.array_equal(served.scores, Sums().answer(few).scores)
    assert batcher.at_once(many) is None
    engine.error = RuntimeError("out of paper")
    with pytest.raises(RequestError, match="RuntimeError: out of paper"):
        batcher.at_once(few)
    engine.error = None
    assert batcher.at_once(few).by == "sums"
    assert batcher.close(10) == 0
    assert batcher.at_once(few) is None


def test_nothing_is_computed_in_the_loop_while_a_thread_computes():
    engine = Sums()
    batcher = Batcher(engine, BatchLimits(max_batch=4))
    engine.quick = True
    engine.go.clear()
    first = batcher.submit(images_of(1))
    until(lambda: engine.batches == [1])
    assert batcher.at_once(images_of(1)) is None
    others = [batcher.submit(images_of(1), wake=False) for _ in range(2)]
    assert not batcher.work_off() and engine.batches == [1]
    engine.go.set()
    assert [one.result(30).batch for one in (first, *others)] == [1, 2, 2]
    assert batcher.close(10) == 0


def test_a_full_queue_refuses_and_what_waits_is_still_answered():
    engine = Sums()
    engine.go.clear()
    batcher = Batcher(engine, BatchLimits(max_batch=1, max_delay_ms=0.0, max_queue=2))
    x = np.zeros(ONE, np.float32)
    futures = [batcher.submit(x)]
    until(lambda: engine.batches)
    futures += [batcher.submit(x), batcher.submit(x)]
    with pytest.raises(RequestError, match="2 images wait already"):
        batcher.submit(x)
    engine.go.set()
    assert all(future.result(30).by == "sums" for future in futures)
    batcher.close(10)
    with pytest.raises(RequestError, match="about to end"):
        batcher.submit(x)


def test_an_error_of_the_engine_is_told_to_its_batch_and_the_next_goes_on():
    engine = Sums()
    batcher = Batcher(engine, BatchLimits(max_delay_ms=0.0))
    engine.error = RuntimeError("out of paper")
    with pytest.raises(RequestError, match="RuntimeError: out of paper") as caught:
        batcher.submit(np.zeros(ONE, np.float32)).result(30)
    assert caught.value.status == 500
    engine.error = None
    assert batcher.submit(np.zeros(ONE, np.float32)).result(30).by == "sums"
    batcher.close(10)


def test_what_cannot_be_drained_in_time_is_failed_and_not_forgotten():
    engine = Sums()
    engine.go.clear()
    batcher = Batcher(engine, BatchLimits(max_batch=1, max_delay_ms=0.0))
    x = np.zeros(ONE, np.float32)
    first = batcher.submit(x)
    until(lambda: engine.batches)
    second = batcher.submit(x)
    assert batcher.close(0.05) == 1
    with pytest.raises(RequestError, match="ended before"):
        second.result(0)
    engine.go.set()
    assert first.result(30).by == "sums"


# --------------------------------------------------------------------------------------------------
# The endpoint


def test_a_large_request_lets_others_in_between_its_pieces():
    """Small requests waited for the whole forward of a large one: a second for 256 images."""
    engine = Sums()
    engine.go.clear()
    batcher = Batcher(engine, BatchLimits(max_batch=4, max_delay_ms=0.0))
    large, other, small = (images_of(rows) for rows in (18, 5, 2))
    futures = [batcher.submit(large)]
    until(lambda: engine.batches == [4])  # its first piece is in work
    futures += [batcher.submit(images) for images in (other, small, small)]
    assert batcher.waiting == 18 + 5 + 2 + 2
    engine.go.set()
    served = [future.result(30) for future in futures]
    assert engine.batches == [4, 4, 4, 4, 4, 2, 4, 1]
    for images, one in zip((large, other, small, small), served, strict=True):
        assert np.array_equal(one.scores, Sums().answer(images).scores)
    assert [one.batch for one in served] == [18, 5, 4, 4]
    assert batcher.close(30) == 0 and batcher.waiting == 0


class Changing(Sums):
    """An engine whose variant changes after each of some pieces, whatever it is asked."""

    def __init__(self, changes):
        super().__init__()
        self.changes, self.wanted = changes, []

    def answer(self, images, pressure=CALM, by=""):
        self.wanted.append(by)
        answer = super().answer(images, pressure)
        number = sum(change < len(self.batches) for change in self.changes)
        return dataclasses.replace(answer, by=f"v{number}", scores=answer.scores + 1000 * number)


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ([], [4, 4, 2]),
        ([1], [4, 4, 4, 4, 2]),
        ([2], [4, 4, 2, 4, 4, 2]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [4, 4, 4, 4, 4, 4, 10]),
    ],
)
def test_one_variant_answers_all_pieces_of_a_request(changes, batches):
    engine = Changing(changes)
    batcher = Batcher(engine, BatchLimits(max_batch=4, max_delay_ms=0.0))
    images = images_of(10)
    served = batcher.submit(images).result(30)
    assert engine.batches == batches
    expected = Sums().answer(images).scores + 1000 * int(served.by[1:])
    assert np.array_equal(served.scores, expected)
    assert batcher.close(30) == 0


def test_an_error_in_a_piece_is_told_to_its_request_alone():
    engine = Sums()
    batcher = Batcher(engine, BatchLimits(max_batch=4, max_delay_ms=0.0))
    engine.error = ModelError("no weights")
    with pytest.raises(RequestError, match="no weights"):
        batcher.submit(images_of(9)).result(30)
    engine.error = None
    assert batcher.submit(images_of(9)).result(30).batch == 9
    assert batcher.close(30) == 0 and batcher.waiting == 0


def test_what_is_in_pieces_when_the_endpoint_ends_is_told_so():
    engine = Sums()
    engine.go.clear()
    batcher = Batcher(engine, BatchLimits(max_batch=4, max_delay_ms=0.0))
    futures = [batcher.submit(images_of(9)) for _ in range(2)]
    until(lambda: engine.batches)
    assert batcher.close(0.1) == 2
    engine.go.set()
    for future in futures:
        with pytest.raises(RequestError, match="the endpoint ended before"):
            future.result(30)


def test_it_tells_what_it_is(endpoint):
    paths = ["/v2/health/live", "/v2/health/ready", "/v2/models/classifier/versions/1/ready"]
    assert [call(endpoint, "GET", path)[0] for path in paths] == [200] * 3
    about = json.loads(call(endpoint, "GET", "/v2")[1])
    assert about["extensions"] == ["binary_tensor_data", "classification"]
    model = json.loads(call(endpoint, "GET", "/v2/models/classifier/versions/1")[1])
    assert model["inputs"][0]["shape"] == [-1, 3, 8, 8]
    assert [output["name"] for output in model["outputs"]] == ["scores", "probabilities", "label"]
    for method, path, status, told in [
        ("GET", "/v2/models/other", 404, "model 'other' is not here; 'classifier' is"),
        ("GET", "/v2/models/classifier/versions/2", 404, "version '2' is not here"),
        ("GET", "/v2/model", 404, "/v2/model is not here"),
        ("GET", INFER, 405, "GET is not for"),
    ]:
        got, body, _ = call(endpoint, method, path)
        assert got == status
        assert told in json.loads(body)["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_the_client_of_triton_gets_the_outputs_of_the_variant(endpoint, portfolio, binary):
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    with closing(triton.InferenceServerClient(endpoint.address[7:])) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("classifier", "1")
        (found,) = client.get_model_metadata("classifier")["inputs"]
        given_ = triton.InferInput(found["name"], x.shape, found["datatype"])
        given_.set_data_from_numpy(x, binary_data=binary)
        outputs = [
            triton.InferRequestedOutput("scores", binary_data=binary),
            triton.InferRequestedOutput("label", binary_data=binary),
            triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2),
        ]
        result = client.infer("classifier", [given_], outputs=outputs, request_id="42")
        usual = client.infer("classifier", [given_])
    response = result.get_response()
    by = response["parameters"]["variant"]
    with torch.inference_mode():
        scores = portfolio.module(by)(torch.from_numpy(x))
    assert np.array_equal(result.as_numpy("scores"), scores.numpy())
    assert response["id"] == "42"
    labels = [CARD.classes[i] for i in scores.argmax(1).tolist()]
    text = [item.decode() if binary else item for item in result.as_numpy("label")]
    assert text == labels
    best = result.as_numpy("probabilities")
    assert best.shape == (3, 2)
    first = best[0, 0].decode() if binary else best[0, 0]
    value, index, name = first.split(":")
    assert (name, int(index)) == (labels[0], CARD.classes.index(labels[0]))
    probabilities = scores.softmax(1)
    assert float(value) == pytest.approx(float(probabilities.max(1).values[0]), abs=1e-6)
    assert np.allclose(usual.as_numpy("probabilities"), probabilities.numpy())


def test_the_client_of_triton_is_told_its_mistakes(endpoint):
    with closing(triton.InferenceServerClient(endpoint.address[7:])) as client:
        given_ = triton.InferInput("input", [1, 3, 9, 9], "FP32")
        given_.set_data_from_numpy(np.zeros((1, 3, 9, 9), np.float32))
        with pytest.raises(InferenceServerException, match="must be \\[n, 3, 8, 8\\] for FP32"):
            client.infer("classifier", [given_])
        right = triton.InferInput("input", [1, 3, 8, 8], "FP32")
        right.set_data_from_numpy(np.zeros((1, 3, 8, 8), np.float32))
        with pytest.raises(InferenceServerException, match="Content-Encoding: gzip"):
            client.infer("classifier", [right], request_compression_algorithm="gzip")
        assert client.infer("classifier", [right]).as_numpy("scores").shape == (1, 4)


def test_an_image_file_may_be_sent_as_it_is(endpoint):
    image = pixels()[0]
    status, body, headers = call(endpoint, "POST", INFER, png(image), {"Content-Type": "image/png"})
    tree = json.loads(body)
    assert status == 200
    assert headers["fedsys-variant"] == tree["parameters"]["variant"] == "parent"
    assert tree["parameters"]["meets_objective"] is True
    raw = tensor("UINT8", ONE, binary_data_size=192)
    _, other = infer(endpoint, raw, image.numpy().tobytes())
    assert other["outputs"] == tree["outputs"]


def test_wrong_images_are_refused_and_the_endpoint_goes_on(endpoint):
    small = png(torch.zeros(3, 5, 5, dtype=torch.uint8))
    for data, told in ((small, "5x5 pixels"), (b"no image", "is no PNG or JPEG file")):
        status, body, _ = call(endpoint, "POST", INFER, data, {"Content-Type": "image/png"})
        assert status == 400
        assert told in json.loads(body)["error"]
    assert infer(endpoint, tensor("FP32", ONE, [0.0] * 192))[0] == 200


def test_a_body_of_1_gb_is_refused_without_taking_memory(endpoint):
    process, block = psutil.Process(), bytes(1 << 20)
    peak = [0]

    def blocks():
        for number in range(1024):
            if number % 64 == 0:
                peak[0] = max(peak[0], process.memory_info().rss)
            yield block

    before = process.memory_info().rss
    headers = {"Content-Length": str(1 << 30)}
    status, body, got = call(endpoint, "POST", INFER, blocks(), headers)
    assert status == 413
    assert "1,073,741,824 bytes or more: must be at most" in json.loads(body)["error"]
    assert got["Connection"] == "close"
    assert peak[0] - before < 64 << 20
    assert infer(endpoint, tensor("FP32", ONE, [0.0] * 192))[0] == 200


def test_an_answer_is_bounded_as_the_request_is(endpoint):
    """A body of 16 MB could ask for one output 900,000 times: tens of gigabytes of answer."""
    wanted = [{"name": "scores"}] * 1000
    status, tree = infer(endpoint, tensor("FP32", ONE, [0.0] * 192) | {"outputs": wanted})
    assert status == 400
    assert tree["error"] == "outputs: 'scores': must be asked for once"


def test_large_answers_are_the_same_as_small_ones():
    """Answers of many numbers are written in a thread of their own."""
    engine = Sums()
    options = dataclasses.replace(ANYWHERE, max_batch=2048, max_rows=2048)
    with closing(Endpoint(engine, options)) as endpoint:
        rows = torch.arange(2000 * 192, dtype=torch.float32).reshape(2000, 3, 8, 8) / 1e6
        body = tensor("FP32", [2000, 3, 8, 8], binary_data_size=rows.numel() * 4)
        _, tree = infer(endpoint, body, rows.numpy().tobytes())
        scores = {out["name"]: out for out in tree["outputs"]}["scores"]
        assert scores["shape"] == [2000, 4]
        expected = Sums().answer(rows.numpy()).scores
        assert np.array_equal(np.float32(scores["data"]).reshape(2000, 4), expected)


def test_an_engine_that_cannot_answer_is_not_ready():
    engine = Sums()
    with closing(Endpoint(engine, ANYWHERE)) as endpoint:
        assert call(endpoint, "GET", "/v2/health/ready")[0] == 200
        engine.ready = False
        status, body, _ = call(endpoint, "GET", "/v2/health/ready")
        assert (status, json.loads(body)) == (503, {"ready": False})
        assert call(endpoint, "GET", "/v2/health/live")[0] == 200


def test_a_client_that_asks_before_it_sends_too_much_is_refused_before(endpoint):
    """It was told to go on (100 Continue), and refused when it had sent its gigabytes."""
    host, port = endpoint.address.removeprefix("http://").split(":")
    head = (
        "POST /v2/models/classifier/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        "Content-Length: 99999999999\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as peer:
        peer.sendall(head.encode())
        said = b"".join(iter(lambda: peer.recv(1000), b""))
    assert said.startswith(b"HTTP/1.1 413 ") and b"must be at most" in said


def test_a_body_without_a_length_is_bounded_as_well(endpoint):
    place = endpoint.address.removeprefix("http://").split(":")
    with closing(socket.create_connection((place[0], int(place[1])), 30)) as peer:
        start = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        peer.sendall(start.encode())
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        for _ in range(20):
            peer.sendall(chunk)
        peer.sendall(b"0\r\n\r\n")
        assert peer.makefile("rb").readline().startswith(b"HTTP/1.1 413")


def test_metrics_and_status_tell_what_happened(endpoint):
    infer(endpoint, tensor("FP32", ONE, [0.0] * 192))
    infer(endpoint, {})
    text = call(endpoint, "GET", "/metrics")[1].decode()
    assert 'fedsys_serving_images_total{by="parent"}' in text
    assert 'fedsys_serving_requests_total{status="400"}' in text
    assert 'fedsys_serving_variant{variant="parent"} 1.0' in text
    assert "fedsys_serving_waiting_images 0.0" in text
    status = json.loads(call(endpoint, "GET", "/status")[1])
    assert status["variant"] == "parent"
    assert status["answers"]["parent"] >= 1
    assert status["reason"]


def test_an_objective_that_nothing_meets_is_answered_by_the_smallest_and_said(portfolio):
    options = dataclasses.replace(ANYWHERE, objective=ObjectiveConfig(p95_ms=1e-6))
    with closing(Endpoint(PortfolioEngine(portfolio, options), options)) as endpoint:
        _, tree = infer(endpoint, tensor("FP32", ONE, [0.0] * 192))
        assert tree["parameters"]["variant"] == "tenth"
        assert tree["parameters"]["meets_objective"] is False
        status = json.loads(call(endpoint, "GET", "/status")[1])
        assert "none meets" in status["reason"]


def test_one_variant_can_be_asked_for(portfolio):
    options = dataclasses.replace(ANYWHERE, variant="half")
    with closing(Endpoint(PortfolioEngine(portfolio, options), options)) as endpoint:
        _, tree = infer(endpoint, tensor("FP32", ONE, [0.0] * 192))
        assert tree["parameters"]["variant"] == "half"
    with pytest.raises(ConfigError, match="variant=hlaf: must be one of"):
        PortfolioEngine(portfolio, dataclasses.replace(ANYWHERE, variant="hlaf"))


def test_a_request_that_takes_too_long_is_given_up():
    engine = Sums()
    engine.go.clear()
    options = dataclasses.replace(ANYWHERE, timeout_s=0.2, drain_s=5.0)
    with closing(Endpoint(engine, options)) as endpoint:
        status, tree = infer(endpoint, tensor("FP32", ONE, [0.0] * 192))
        assert status == 504
        assert "serving.timeout_s=0.2" in tree["error"]
        engine.go.set()
    assert engine.closed


def test_a_body_that_does_not_come_is_given_up():
    options = dataclasses.replace(ANYWHERE, timeout_s=0.2)
    with closing(Endpoint(Sums(), options)) as endpoint:
        host, port = endpoint.address.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), 30)) as peer:
            peer.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
            assert peer.makefile("rb").readline().startswith(b"HTTP/1.1 408")


def test_numbers_that_are_not_finite_are_an_error_in_json():
    engine = Sums()
    with closing(Endpoint(engine, ANYWHERE)) as endpoint:
        status, tree = infer(endpoint, tensor("FP32", ONE, [3e38] * 192))
    assert status == 500
    assert "not finite" in tree["error"]


def test_requests_in_work_are_answered_when_it_closes():
    engine = Sums()
    engine.go.clear()
    endpoint = Endpoint(engine, ANYWHERE)
    got = []
    asking = threading.Thread(
        target=lambda: got.append(infer(endpoint, tensor("FP32", ONE, [0.0] * 192)))
    )
    asking.start()
    until(lambda: engine.batches)
    closing_ = threading.Thread(target=endpoint.close)
    closing_.start()
    engine.go.set()
    asking.join(30)
    closing_.join(30)
    assert got[0][0] == 200
    assert engine.closed
    with pytest.raises(ConnectionError):
        infer(endpoint, {})


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "http://", "http://x", "http://127.0.0.1:99999", "https://h:1"]
)
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(ConfigError, match=r"serving\.address"):
        listen(address)


def test_a_port_that_is_taken_is_said():
    taken, address = listen("http://127.0.0.1:0")
    with closing(taken), pytest.raises(ConfigError, match="cannot be listened on"):
        listen(address)


# --------------------------------------------------------------------------------------------------
# Switching behind it


def test_every_request_is_answered_or_failed_while_variants_change(portfolio):
    """Over real HTTP, in threads; each answer must be that of the variant that it names."""
    engine = PortfolioEngine(portfolio, ANYWHERE)
    x = pixels(1, 5)
    right = {}
    with torch.inference_mode():
        for name in ("parent", "half", "tenth"):
            taken = torch.from_numpy(normalise(x.numpy(), CARD))
            right[name] = portfolio.module(name)(taken).flatten().tolist()
    stop = threading.Event()
    issued, answered, failed, wrong = [0] * 3, [0] * 3, [0] * 3, []
    seen = set()
    with closing(Endpoint(engine, ANYWHERE)) as endpoint:

        def ask(number: int) -> None:
            tree = tensor("UINT8", ONE, x.flatten().tolist())
            while not stop.is_set():
                issued[number] += 1
                status, got = infer(endpoint, tree)
                if status != 200:
                    failed[number] += 1
                    continue
                answered[number] += 1
                by = got["parameters"]["variant"]
                seen.add(by)
                if not np.allclose(got["outputs"][0]["data"], right[by], rtol=1e-5, atol=1e-6):
                    wrong.append(by)

        askers = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for asker in askers:
            asker.start()
        for number, name in enumerate(["half", "tenth", "parent"] * 3):
            engine._switcher.switch(name, beside=bool(number % 2))
            enough = sum(answered) + 2
            until(lambda n=enough: sum(answered) >= n)
        stop.set()
        for asker in askers:
            asker.join()
    assert sum(issued) == sum(answered) + sum(failed)
    assert sum(failed) == 0 and not wrong
    assert seen == {"parent", "half", "tenth"}


def test_an_endpoint_that_cannot_begin_leaves_its_address_free():
    """Its socket stayed open until a garbage collection, which told of it in some other test."""

    class NoCard(Sums):
        @property
        def card(self):
            raise ModelError("there is no card")

    taken, address = listen("http://127.0.0.1:0")
    taken.close()
    before = threading.active_count()
    with pytest.raises(ModelError, match="no card") as held:
        Endpoint(NoCard(), dataclasses.replace(ANYWHERE, address=address))
    free, _ = listen(address)
    free.close()
    until(lambda: threading.active_count() == before)
    assert held.tb is not None  # its frames kept the socket


# --------------------------------------------------------------------------------------------------
# Commands


def test_a_damaged_portfolio_is_refused_at_the_start(portfolio_folder, tmp_path, capsys):

    copy = tmp_path / "copy"
    shutil.copytree(portfolio_folder, copy)
    weights = copy / "variants" / "half" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["serve", f"portfolio={copy}", "serving.address=http://127.0.0.1:0"]) == 1
    assert f"{weights} is damaged: its checksum does not fit" in capsys.readouterr().err


def test_a_portfolio_that_takes_no_images_is_refused(portfolio):
    about = dataclasses.replace(portfolio.about, input_shape=(10,))
    with pytest.raises(ModelError, match="are no images"):
        PortfolioEngine(dataclasses.replace(portfolio, about=about), ANYWHERE)


@pytest.mark.parametrize(
    ("call_", "told"),
    [
        (["serve"], "portfolio=None: must name a folder"),
        (["serve", "portfolio=nowhere"], "portfolio=nowhere: must be a folder"),
        (["serve", "serving.max_batch=0"], "serving.max_batch=0: must be at least 1"),
        (["serve", "serving.objective.margin=2"], "serving.objective.margin=2.0: must be in"),
        (["serve", "serving.max_bacht=1"], "serving.max_bacht"),
        (["query"], "input=None: must name an image"),
        (["query", "input="], "input=: must name an image"),
        (["query", "input=nowhere.png"], "input=nowhere.png: must be an image"),
    ],
)
def test_wrong_calls_are_one_error(call_, told, capsys):
    assert main(call_) == 2
    assert told in capsys.readouterr().err


def test_the_folder_that_prune_prints_names_its_portfolio(portfolio_folder, tmp_path):
    run = tmp_path / "09-38-22-prune"
    shutil.copytree(portfolio_folder, run / "portfolio")
    for named in (run, run / "portfolio"):
        config = parse(compose_text(f"portfolio={named}"))
        assert Portfolio.load(serve._folder(config)).folder == run / "portfolio"


def test_query_asks_about_a_file_and_a_folder(endpoint, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(pixels()[0]))
    at = f"serving.address={endpoint.address}"
    assert main(["query", f"input={tmp_path / 'a.png'}", at, "json=true"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert result["class"] == max(result["probabilities"], key=result["probabilities"].get)
    assert result["variant"] == "parent"
    assert result["ms"] > 0
    (tmp_path / "b.jpg").write_bytes(b"no image")
    assert main(["query", f"input={tmp_path}", at, "json=true"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert rows[0]["class"] == result["class"]
    assert "is no PNG or JPEG file" in rows[1]["error"]
    assert main(["query", f"input={tmp_path / 'b.jpg'}", at]) == 1
    assert "b.jpg: image 0 (8 bytes) is no PNG" in capsys.readouterr().err
    assert main(["query", f"input={tmp_path / 'a.png'}", at]) == 0
    assert f"{result['class']} " in capsys.readouterr().out


def test_query_says_that_nobody_is_there(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(pixels()[0]))
    taken, address = listen("http://127.0.0.1:0")
    taken.close()
    call_ = [f"input={tmp_path / 'a.png'}", f"serving.address={address}", "serving.wait_s=0"]
    assert main(["query", *call_]) == 1
    told = capsys.readouterr().err
    assert f"no endpoint is ready at {address}" in told
    assert "fedsys serve portfolio=DIR" in told


def test_what_is_seen_is_told_also_where_one_variant_alone_answers(portfolio_folder):
    """No loop looked then: signals stayed those of the start, and every request took memory."""
    call_ = [sys.executable, "-m", "fedsys.main", "serve", f"portfolio={portfolio_folder}",
             "serving.address=http://127.0.0.1:0", "serving.variant=half", "serving.interval_s=0.1",
             "json=true"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(call_, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["ready"]["address"]
        there, seen = SimpleNamespace(address=address), {}
        patience = time.monotonic() + 60
        while not seen.get("p95_ms") and time.monotonic() < patience:
            _, tree = infer(there, tensor("FP32", ONE, [0.0] * 192))
            assert tree["parameters"]["variant"] == "half"
            seen = json.loads(call(there, "GET", "/status")[1])["signals"]
        server.send_signal(signal.SIGTERM)
    assert seen["p95_ms"] > 0
    assert seen["arrival_rate"] > 0


def test_serve_drains_when_it_is_terminated(portfolio_folder, tmp_path):
    """Requests come before and after the signal: each is answered, or its client knows."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call_ = [sys.executable, "-m", "fedsys.main", "serve", f"portfolio={portfolio_folder}",
             "serving.address=http://127.0.0.1:0", "json=true"]  # fmt: skip
    server = subprocess.Popen(
        call_, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout is not None
    place = json.loads(server.stdout.readline())["ready"]["address"].removeprefix("http://")
    body = json.dumps(tensor("FP32", ONE, [0.0] * 192))
    issued, answered, failed = [0] * 3, [0] * 3, [0] * 3

    def ask(number: int) -> None:
        while not failed[number]:
            issued[number] += 1
            try:
                with closing(http.client.HTTPConnection(place, timeout=60)) as connection:
                    connection.request("POST", INFER, body)
                    response = connection.getresponse()
                    tree = json.loads(response.read())
            except (OSError, http.client.HTTPException):
                failed[number] += 1
                continue
            known = response.status == 200 and "outputs" in tree
            answered[number] += known
            failed[number] += not known

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for asker in askers:
        asker.start()
    until(lambda: sum(answered) >= 20)
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=60)
    for asker in askers:
        asker.join(60)
    assert server.returncode == 0, err
    assert sum(issued) == sum(answered) + sum(failed)
    assert failed == [1, 1, 1]  # the first failure ends each
    result = json.loads(out.splitlines()[-1])
    assert sum(result["answers"].values()) >= sum(answered)
    assert "finishing the requests in work" in err
