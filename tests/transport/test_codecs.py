import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsys.errors import ConfigError, FrameError, ModelError
from fedsys.transport.codecs import CODECS, LEAST_PER_SCALE, decode_activation, encode_activation
from fedsys.transport.wire import Frame, decode, encode


def there_and_back(x, codec, **options):
    tensors, meta = encode_activation(x, codec, **options)
    frame = decode(encode(Frame("t", meta, tensors)))
    return decode_activation(frame.tensors, frame.meta)


def floats(bound: float):
    values = st.floats(-bound, bound, width=32)
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, max_side=6)
    return arrays.arrays(np.float32, shapes, elements=values).map(
        lambda a: torch.from_numpy(np.ascontiguousarray(a))
    )


any_floats = floats(float(np.float32(1e37)))
bounded = settings(max_examples=150, deadline=None)


@given(any_floats)
@bounded
def test_fp32_keeps_every_bit(x):
    y = there_and_back(x, "fp32")
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@given(floats(65504.0))
@bounded
def test_fp16_is_within_its_stated_error(x):
    y = there_and_back(x, "fp16")
    error = (x.double() - y.double()).abs()
    assert (error <= (x.double().abs() * 2**-11).clamp(min=2**-25)).all()


@given(any_floats)
@bounded
def test_bf16_is_within_its_stated_error(x):
    y = there_and_back(x, "bf16")
    error = (x.double() - y.double()).abs()
    assert (error <= x.double().abs() * 2**-8 + 2**-133).all()


@given(any_floats, st.integers(0, 3))
@bounded
def test_int8_is_within_half_a_step_of_its_channel(x, dim):
    y = there_and_back(x, "int8", channel_dim=dim)
    own = x.dim() > dim and x.numel() >= LEAST_PER_SCALE * x.shape[dim]
    others = [d for d in range(x.dim()) if d != dim or not own]
    top = x.double().abs().amax(others, keepdim=True)
    error = (x.double() - y.double()).abs()
    assert (error <= top / 127 * (0.5 + 2**-15) + 2e-36).all()


def test_int8_gives_the_levels_of_a_hand_made_case():
    x = torch.tensor([[1.27, -0.5], [0.635, 0.0], [-1.27, 0.25], [0.0, 0.5]]).repeat(2, 1)
    tensors, meta = encode_activation(x, "int8")
    assert tensors["x"][:4].tolist() == [[127, -127], [64, 0], [-127, 64], [0, 127]]
    assert torch.allclose(tensors["scale"], torch.tensor([0.01, 0.5 / 127]))
    assert meta == {"codec": "int8", "dtype": "float32", "dim": 1}


def test_each_channel_has_its_own_scale_and_a_channel_of_zeros_stays_zero():
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    x[:, 1] *= 1e-6
    x[:, 2] = 0.0
    y = there_and_back(x, "int8")
    assert ((x - y).abs().amax((0, 2, 3)) <= x.amax((0, 2, 3)) / 250).all()
    assert torch.equal(y[:, 2], torch.zeros(4, 5, 5))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_type_shape_and_memory_format_come_back(codec, dtype):
    for shape in [(), (0,), (5,), (2, 3), (16, 3), (2, 0, 4, 4), (3, 4, 5, 6)]:
        x = torch.ones(shape).to(dtype)
        y = there_and_back(x, codec)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert torch.allclose(x.double(), y.double(), rtol=2**-8)
    x = torch.rand(3, 4, 5, 6).to(memory_format=torch.channels_last).to(dtype)
    assert there_and_back(x, codec).stride() == x.stride()


@pytest.mark.parametrize(("codec", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)])
def test_a_frame_has_the_bytes_that_the_table_says(codec, size):
    x = torch.rand(10, 8, 16, 16)
    tensors, _ = encode_activation(x, codec)
    scales = 4 * 8 if codec == "int8" else 0
    assert sum(t.nbytes for t in tensors.values()) == x.numel() * size + scales


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16"])
def test_nan_and_infinities_are_kept(codec):
    y = there_and_back(torch.tensor([math.nan, math.inf, -math.inf, 1.0]), codec)
    assert y[0].isnan()
    assert y[1:].tolist() == [math.inf, -math.inf, 1.0]


def test_fp16_limits_finite_values_beyond_its_range():
    y = there_and_back(torch.tensor([1e6, -1e6, 65504.0, 65520.0, math.inf]), "fp16")
    assert y.tolist() == [65504.0, -65504.0, 65504.0, 65504.0, math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_refuses_what_it_cannot_hold(bad):
    x = torch.zeros(8, 2, 3)
    x[3, 1, 2] = bad
    with pytest.raises(ModelError, match="NaN or an infinity"):
        encode_activation(x, "int8")


def test_an_unknown_codec_is_refused():
    with pytest.raises(ConfigError, match=r"policy\.codec=int4: must be one of fp32"):
        encode_activation(torch.zeros(1), "int4")


LEVELS = torch.zeros(2, 3, dtype=torch.int8)
META = {"codec": "int8", "dtype": "float32", "dim": 1}


@pytest.mark.parametrize(
    ("tensors", "meta", "words"),
    [
        ({}, {"codec": "fp32"}, "no activation"),
        ({"x": LEVELS}, {}, "no activation"),
        ({"x": LEVELS}, {"codec": "zip"}, "no activation"),
        ({"x": LEVELS}, {"codec": "fp16", "dtype": "float32"}, "has the type"),
        ({"x": LEVELS.half()}, {"codec": "fp16", "dtype": "object"}, "not a type"),
        ({"x": LEVELS}, META, "lacks levels"),
        ({"x": LEVELS.float(), "scale": torch.ones(3)}, META, "lacks levels"),
        ({"x": LEVELS, "scale": torch.ones(3)}, META | {"dim": None}, "lacks levels"),
        ({"x": LEVELS, "scale": torch.ones(())}, META, "lacks levels"),
        ({"x": LEVELS, "scale": torch.ones(2)}, META, "2 scales do not fit"),
        ({"x": LEVELS, "scale": torch.ones(3)}, META | {"dim": 2}, "3 scales do not fit"),
        ({"x": LEVELS, "scale": torch.ones(3)}, META | {"dim": -3}, "3 scales do not fit"),
        ({"x": LEVELS, "scale": torch.ones(3).double()}, META, "3 scales do not fit"),
    ],
)
def test_a_forged_activation_is_refused(tensors, meta, words):
    with pytest.raises(FrameError, match=words):
        decode_activation(tensors, meta)
