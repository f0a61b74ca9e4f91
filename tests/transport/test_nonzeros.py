"""Gradients at zeros of an activation are left out of a message and filled in again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsys.errors import FrameError
from fedsys.transport.codecs import CODECS, decode_activation, encode_activation
from fedsys.transport.nonzeros import LEAST_LEFT_OUT, Nonzeros
from fedsys.transport.wire import Frame, decode, encode

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "transposed"]

SPECIAL = [0.0, -0.0, 1e-45, 1e-38, 1e-8, 2.0**-25, 6.0, 65504.0, 1e30]


@st.composite
def of_a_relu(draw):
    """Return what may leave a ReLU: nothing below zero, and many zeros."""
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, max_side=6))
    element = st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0] * 3 + SPECIAL)
    values = draw(arrays.arrays(np.float32, shape, elements=element))
    return torch.from_numpy(np.ascontiguousarray(values))


def laid_out(x, layout):
    if layout == "channels_last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()


def over_a_wire(tensors, meta):
    frame = decode(encode(Frame("t", meta, tensors)))
    return frame.tensors, frame.meta


def bits(x):
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(whole[x.element_size()])


@given(
    of_a_relu(),
    st.sampled_from(CODECS),
    st.sampled_from(CODECS),
    st.sampled_from(TYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.integers(0, 9),
)
@settings(max_examples=250, deadline=None)
def test_all_that_a_relu_lets_through_is_as_in_the_whole_gradient(z, up, down, dtype, a, b, seed):
    """Both sides know the zeros from the bits that were sent; what is not zero loses nothing.

    Codecs make zeros of small elements. Without the marks their gradients would have been left out,
    too, though the ReLU of the device lets them through.
    """
    z = laid_out(z.to(dtype).nan_to_num(posinf=1.0), a)
    gradient = laid_out(torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)), b)
    gradient = gradient.to(dtype)

    tensors, meta = encode_activation(z, up, mark=True)
    at_edge, told = over_a_wire(tensors, meta)
    usual = decode_activation(*over_a_wire(*encode_activation(z, up)))
    assert torch.equal(bits(decode_activation(at_edge, told)), bits(usual))

    written, about = encode_activation(gradient, down)
    whole = decode_activation(*over_a_wire(written, about))
    found = Nonzeros(at_edge["x"]).of(written["x"])
    if found is None:
        assert int((bits(z) == 0).sum()) <= LEAST_LEFT_OUT * z.numel()
        return
    chosen, order = found
    assert len(chosen) <= (1 - LEAST_LEFT_OUT) * z.numel()
    came, about = over_a_wire({**written, "x": chosen}, {**about, "order": order})
    filled = Nonzeros(tensors["x"]).filled(came["x"], about["order"])
    got = decode_activation({**came, "x": filled}, about)

    assert got.stride() == whole.stride()
    assert torch.equal(bits(got)[z != 0], bits(whole)[z != 0])
    assert not bits(got)[bits(tensors["x"]) == 0].any()


def test_places_are_known_in_the_layout_of_the_gradient():
    z = torch.arange(24.0).reshape(2, 3, 2, 2).relu()
    z[z % 2 == 1] = 0
    gradient = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    edge, device = Nonzeros(z), Nonzeros(z.to(memory_format=torch.channels_last))
    device.find()
    chosen, order = edge.of(gradient)
    assert order == (0, 2, 3, 1)
    assert len(chosen) == 11
    got = device.filled(chosen, list(order))
    assert torch.equal(got, torch.where(z == 0, 0, gradient))
    assert got.stride() == gradient.stride()
    assert got.data_ptr() % 64 == 0


def test_few_zeros_are_sent_with_the_rest():
    z = torch.ones(100)
    z[:4] = 0
    assert Nonzeros(z).of(torch.randn(100)) is None
    z[:5] = 0
    assert Nonzeros(z).of(torch.randn(100)) is not None


def test_nothing_but_zeros_is_nothing_to_send():
    chosen, order = Nonzeros(torch.zeros(2, 3)).of(torch.randn(2, 3))
    assert chosen.shape == (0,)
    frame = decode(encode(Frame("t", {}, {"x": chosen})))
    filled = Nonzeros(torch.zeros(2, 3)).filled(frame.tensors["x"], order)
    assert torch.equal(filled, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("chosen", "order", "said"),
    [
        (torch.zeros(3), (), r"shape \(3,\) instead of \(2,\)"),
        (torch.zeros(1), (), r"shape \(1,\) instead of \(2,\)"),
        (torch.zeros(2, 1), (), r"shape \(2, 1\) instead of"),
        (torch.zeros(2), (0, 0), "for 2 dimensions"),
        (torch.zeros(2), (0, 1, 2), "for 2 dimensions"),
    ],
)
def test_what_does_not_belong_to_the_activation_is_refused(chosen, order, said):
    with pytest.raises(FrameError, match=said):
        Nonzeros(torch.tensor([[0.0, 1.0], [2.0, 0.0]])).filled(chosen, order)


def test_int8_marks_what_it_would_round_to_zero():
    x = torch.tensor([[12.7, 0.0, 0.01, 5.0] * 2]).T.contiguous()
    plain, _ = encode_activation(x, "int8")
    tensors, meta = encode_activation(x, "int8", mark=True)
    assert plain["x"][:4, 0].tolist() == [127, 0, 0, 50]
    assert tensors["x"][:4, 0].tolist() == [127, 0, -1, 50]
    assert decode_activation(tensors, meta)[:4, 0].tolist() == pytest.approx([12.7, 0, 0, 5])
