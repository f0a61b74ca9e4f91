import math
import struct
import zlib

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.errors import FrameError
from fedsys.transport.wire import (
    ALIGNMENT,
    DTYPES,
    Assembler,
    Frame,
    Limits,
    checksum,
    decode,
    encode,
    encode_parts,
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def some_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8))


def of_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    raw = some_bytes(math.prod(shape) * dtype.itemsize)
    if dtype == torch.bool:
        raw &= 1
    return raw.view(dtype).reshape(shape)


def through(x: torch.Tensor) -> torch.Tensor:
    return decode(encode(Frame("t", {}, {"x": x}))).tensors["x"]


def packed(header: object) -> bytes:
    return msgpack.packb(header, unicode_errors="surrogatepass")  # Hypothesis draws such texts


def with_header(header: object, payload: bytes = b"", /, **changes: object) -> bytes:
    text = header if isinstance(header, bytes) else packed(header)
    fields = {"magic": b"FSYS", "version": 1, "flags": 0, "header": len(text), "crc": None}
    fields |= {"payload": len(payload)} | changes
    names = ("magic", "version", "flags", "header", "payload")
    stated = struct.pack("<4sHHIQ", *(fields[name] for name in names))
    crc = zlib.crc32(text, zlib.crc32(stated)) if fields["crc"] is None else fields["crc"]
    return stated + struct.pack("<I", crc) + text + payload


def with_entry(*entry: object, payload: bytes = b"") -> bytes:
    return with_header({"kind": "t", "meta": {}, "tensors": [list(entry)]}, payload)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_every_dtype_arrives_with_the_same_bits_and_strides(name, shape):
    x = of_dtype(DTYPES[name], shape)
    y = through(x)
    assert same_bits(x, y)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 4), (1, 1, 1, 1)])
def test_channels_last_arrives_as_channels_last(shape):
    x = torch.arange(math.prod(shape)).float().reshape(shape).to(memory_format=torch.channels_last)
    y = through(x)
    assert torch.equal(x, y)
    assert y.stride() == x.stride()
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_slice_of_channels_last_stays_channels_last():
    x = torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)[1:3]
    y = through(x)
    assert torch.equal(x, y)
    assert y.stride() == x.stride()


@given(st.permutations(range(5)), st.lists(st.integers(1, 4), min_size=5, max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_permutation_keeps_values_and_the_strides_that_matter(order, shape):
    x = torch.arange(math.prod(shape)).reshape(shape).permute(order)
    y = through(x)
    assert torch.equal(x, y)
    assert [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] == [
        s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1
    ]


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.tensor(2.0).expand(3, 4),
        torch.rand(2, 6, 4, 4).to(memory_format=torch.channels_last)[:, :3],
        torch.view_as_complex(torch.rand(4, 2)).conj(),
        torch.rand(3, requires_grad=True),
        torch.nn.Parameter(torch.rand(2, 2)),
    ],
    ids=["strided", "expanded", "channel slice", "conjugate", "with gradient", "parameter"],
)
def test_views_arrive_dense_and_detached_with_equal_values(x):
    y = through(x)
    assert torch.equal(x, y)
    assert not y.requires_grad
    assert y.untyped_storage().nbytes() >= y.numel() * y.itemsize


def test_meta_values_and_order_of_tensors_are_kept():
    meta = {"i": 3, "f": 0.1, "inf": math.inf, "s": "ü\n", "b": True, "n": None, "l": [1, [2]]}
    meta["d"] = {"x": 1}
    names = ["b", "a", "layers.0.weight"]
    got = decode(encode(Frame("step", meta, {n: torch.ones(1) for n in names})))
    assert got.kind == "step"
    assert got.meta == meta
    assert list(got.tensors) == names
    assert math.isnan(decode(encode(Frame("x", {"loss": math.nan}))).meta["loss"])


def test_decoded_tensors_are_aligned_writable_and_independent():
    source = {"a": torch.arange(5.0), "b": torch.arange(7, dtype=torch.uint8)}
    data = encode(Frame("t", {}, source))
    got = decode(data).tensors
    assert all(x.data_ptr() % ALIGNMENT == 0 for x in got.values())
    version = got["b"]._version
    got["a"].mul_(2)
    assert got["b"]._version == version
    assert torch.equal(got["a"], source["a"] * 2)
    assert torch.equal(got["b"], source["b"])
    assert torch.equal(decode(data).tensors["a"], source["a"])


def test_parts_of_dense_tensors_are_views_of_their_memory():
    x = torch.zeros(4096)
    parts = encode_parts(Frame("t", {}, {"x": x}))
    x[0] = 1.0
    assert any(len(p) == x.nbytes and np.frombuffer(p, np.float32)[0] == 1.0 for p in parts)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_size_give_the_same_frame(data):
    source = {"x": some_bytes(700), "y": torch.arange(9)}
    encoded = encode(Frame("t", {"i": 1}, source))
    cuts = data.draw(st.lists(st.integers(0, len(encoded)), max_size=8).map(sorted))
    assembler, frame = Assembler(), None
    for start, stop in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        assert frame is None or start == stop
        frame = assembler.feed(encoded[start:stop]) if frame is None else frame
    assert frame is not None
    assert all(torch.equal(frame.tensors[n], source[n]) for n in source)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Frame("no spaces"), "kind="),
        (Frame(""), "kind="),
        (Frame("t", {"x": torch.ones(1)}), "is not plain"),
        (Frame("t", {1: 2}), "must be a string"),  # type: ignore[dict-item]
        (Frame("t", {}, {"a\n": torch.ones(1)}), "no printable name"),
        (Frame("t", {}, {"x": torch.eye(2).to_sparse()}), "must be dense"),
        (Frame("t", {}, {"x": torch.empty(2, device="meta")}), "must be dense"),
        (Frame("t", {"x": "y" * 300_000}), "Limits.header_bytes"),
    ],
)
def test_a_frame_that_cannot_be_sent_says_why(frame, words):
    with pytest.raises(FrameError, match=words):
        encode(frame)


LIMITS = Limits(frame_bytes=1000, tensor_bytes=500, tensors=3, header_bytes=512)


@pytest.mark.parametrize(
    ("tensors", "limit"),
    [
        ({"x": torch.zeros(501, dtype=torch.uint8)}, "tensor_bytes"),
        ({n: torch.zeros(400, dtype=torch.uint8) for n in "abc"}, "frame_bytes"),
        ({n: torch.zeros(1) for n in "abcd"}, "at most 3"),
        ({"x" * 600: torch.zeros(1)}, "header_bytes"),
    ],
)
def test_both_sides_hold_the_limits(tensors, limit):
    frame = Frame("t", {}, tensors)
    with pytest.raises(FrameError, match=limit):
        encode(frame, LIMITS)
    with pytest.raises(FrameError, match=limit):
        decode(encode(frame), limits=LIMITS)


def test_an_oversized_frame_is_refused_by_its_preamble_alone():
    encoded = encode(Frame("t", {}, {"x": torch.zeros(2000)}))
    with pytest.raises(FrameError, match="frame_bytes"):
        Assembler(LIMITS).feed(encoded[:24])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends after 0 of 24"),
        (b"GET / HTTP/1.1\r\nHost: edge\r\n", "not a frame of fedsys"),
        (with_header({}, version=2), "version 2"),
        (with_header({}, flags=1), "flags 0x1"),
        (with_header({}, crc=0), "checksum of the header"),
        (with_header({}, header=300_000), "Limits.header_bytes"),
        (with_header({}, payload=1 << 40), "Limits.frame_bytes"),
        (with_header(b"\x81"), "not MessagePack"),
        (with_header(msgpack.packb({}) * 2), "not MessagePack"),
        (with_header(b"\xc1"), "not MessagePack"),
        (with_header(b"\x91" * 2000), "not MessagePack"),
        (with_header([]), "lacks kind"),
        (with_header({"kind": "t", "meta": {}}), "lacks kind"),
        (with_header({"kind": "a b", "meta": {}, "tensors": []}), "kind='a b'"),
        (with_header({"kind": "t", "meta": {}, "tensors": [1]}), "six fields"),
        (with_header({"kind": "t", "meta": {}, "tensors": []}, b"x"), "payload of 1"),
        (with_entry(1, "int8", [1], [], 1, 0), "no printable name"),
        (with_entry("\ud800", "int8", [1], [], 1, 0), "not MessagePack"),
        (with_entry("a\n", "int8", [1], [], 1, 0), "no printable name"),
        (with_entry("x", "object", [1], [], 8, 0), "unknown"),
        (with_entry("x", ["int8"], [1], [], 1, 0), "unknown"),
        (with_entry("x", "int8", [-1], [], 1, 0), "sizes"),
        (with_entry("x", "int8", [1.0], [], 1, 0), "sizes"),
        (with_entry("x", "int8", [True], [], 1, 0), "sizes"),
        (with_entry("x", "int8", "1", [], 1, 0), "short list"),
        (with_entry("x", "int8", [1] * 17, [], 1, 0), "short list"),
        (with_entry("x", "int8", [2, 2], [0, 0], 4, 0), "does not fit the shape"),
        (with_entry("x", "int8", [2, 2], [0], 4, 0), "does not fit the shape"),
        (with_entry("x", "int8", [0, 2**62], [], 0, 0), "too large to address"),
        (with_entry("x", "int8", [2**40, 2**40], [], 2**63, 0), "too large to address"),
        (with_entry("x", "int8", [3], [], 4, 0), "do not fit"),
        (with_entry("x", "int8", [3], [], None, 0), "must be integers"),
        (with_entry("x", "int8", [64], [], 64, 1, payload=bytes(64)), "checksum of its data"),
        (
            with_entry("x", "bool", [64], [], 64, zlib.crc32(b"\2" * 64), payload=b"\2" * 64),
            "boolean must be 0 or 1",
        ),
        (
            with_header({"kind": "t", "meta": {}, "tensors": [["x", "int8", [0], [], 0, 0]] * 2}),
            "two tensors of one name",
        ),
        (encode(Frame("t")) + b"x", "1 bytes follow"),
        (encode(Frame("t", {}, {"x": torch.ones(3)}))[:-1], "ends after"),
    ],
)
def test_bytes_that_are_no_frame_are_refused_with_the_reason(data, words):
    with pytest.raises(FrameError, match=words):
        decode(data)


@pytest.mark.parametrize("size", [1, 64, 4095, 4096, 8191, 8192, 8193, 50_000])
def test_any_single_changed_byte_changes_the_checksum(size):
    data = bytearray(some_bytes(size).numpy().tobytes())
    before = checksum(data)
    for at in {0, size // 2, size - 1, *range(0, size, 997)}:
        data[at] ^= 0x40
        assert checksum(data) != before
        data[at] ^= 0x40


def test_a_garbled_page_changes_the_checksum():
    data = bytearray(some_bytes(40_000).numpy().tobytes())
    before = checksum(data)
    data[5000:9096] = some_bytes(4096, seed=1).numpy().tobytes()
    assert checksum(data) != before


def parses_or_is_refused(data: bytes, original: Frame) -> bool:
    """Return whether `data` parsed; then it holds what was sent (only padding may differ)."""
    try:
        got = decode(data, limits=Limits(frame_bytes=1 << 16, header_bytes=1 << 12))
    except FrameError:
        return False
    assert (got.kind, got.meta) == (original.kind, original.meta)
    assert all(same_bits(got.tensors[n], x) for n, x in original.tensors.items())
    return True


SAMPLE = Frame(
    "forward",
    {"session": "s1", "step": 3, "micro": [0, 4]},
    {
        "x": torch.arange(24.0).reshape(1, 2, 3, 4),
        "y": torch.tensor([True, False]),
        "n": torch.ones(()),
    },
)


@given(st.binary(max_size=400))
@settings(max_examples=500, deadline=None)
def test_random_bytes_never_raise_anything_but_frame_error(data):
    assert not parses_or_is_refused(data, SAMPLE)
    assert not parses_or_is_refused(b"FSYS\1\0\0\0" + data, SAMPLE)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)
entries = st.tuples(
    st.text(max_size=4) | plain_values,
    st.sampled_from([*DTYPES, "object"]) | plain_values,
    st.lists(st.integers(-1, 4), max_size=4) | plain_values,
    st.permutations([0, 1]) | st.just([]) | plain_values,
    st.integers(0, 64) | plain_values,
    st.just(0) | plain_values,
).map(list)


@given(
    st.fixed_dictionaries(
        {
            "kind": st.just("t") | plain_values,
            "meta": st.just({}) | plain_values,
            "tensors": st.lists(entries | plain_values, max_size=3) | plain_values,
        }
    ),
    st.binary(max_size=128),
)
@settings(max_examples=300, deadline=None)
def test_a_forged_header_with_a_right_checksum_never_raises_anything_but_frame_error(header, tail):
    try:
        got = decode(with_header(header, tail))
    except FrameError:
        return
    assert all(
        x.numel() == 0 or checksum(x.view(torch.uint8).numpy().data) for x in got.tensors.values()
    )


def test_a_hundred_thousand_damaged_frames_are_refused_or_equal():
    whole = encode(SAMPLE)
    draw = np.random.default_rng(7)
    parsed = 0
    for _ in range(100_000):
        data = bytearray(whole)
        match draw.integers(4):
            case 0:
                data = data[: draw.integers(len(data))]
            case 1:
                data += bytes(int(draw.integers(1, 9)))
            case 2:
                data[draw.integers(len(data))] ^= 1 << draw.integers(8)
            case _:
                at = int(draw.integers(len(data)))
                noise = draw.bytes(int(draw.integers(1, 40)))
                data[at : at + len(noise)] = noise
        parsed += parses_or_is_refused(bytes(data), SAMPLE)
    assert parsed < 40_000
