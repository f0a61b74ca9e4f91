"""Inputs of several tensors: rows, devices, shapes on the wire, and what goes beside a tensor."""

import pytest
import torch
from torch import nn

from fedsys.errors import FrameError
from fedsys.transport.several import (
    Several,
    arguments,
    beside,
    beside_of,
    checked_shape,
    examples_of,
    is_several,
    said,
    shape_of,
)

BOTH = Several((torch.arange(12).reshape(4, 3), torch.zeros(4, 2, 2, dtype=torch.bool)))


class Two(nn.Module):
    def forward(self, a, b=None):
        return a


class One(nn.Module):
    def forward(self, pair):
        return pair


class Any(nn.Module):
    def forward(self, *more):
        return more


def test_rows_of_all_are_taken_together():
    assert len(BOTH) == 4 and len(BOTH[1:3]) == 2
    chosen = BOTH.index_select(0, torch.tensor([3, 0]))
    assert chosen.tensors[0].tolist() == [[9, 10, 11], [0, 1, 2]]
    assert BOTH[torch.tensor([True, False, False, True])].tensors[1].shape == (2, 2, 2)
    assert BOTH.to("meta").contiguous().tensors[0].is_meta


def test_a_shape_says_types_and_comes_back_from_the_wire():
    shape = shape_of(BOTH)
    assert shape == (("int64", 3), ("bool", 2, 2)) and is_several(shape)
    assert checked_shape([list(form) for form in shape]) == shape
    assert checked_shape([3, 32, 32]) == (3, 32, 32) and not is_several((3, 32, 32))
    assert shape_of(examples_of(shape, 7, "meta")) == shape
    assert said(shape) == "3 (int64) and 2x2 (bool)" and said((3, 8, 8)) == "3x8x8"


NO_SHAPES = [
    *([], [0], [True], [1.0], ["int64"], [["int64", 0]], [["object", 3]], [[3]], [[]], "abc", None),
    *([[["int64"], 2]], [3, ["int64"]], [["int64", 1]] * 9, [1] * 9, [["bool", *[1] * 9]]),
]


@pytest.mark.parametrize("wrong", NO_SHAPES)
def test_what_is_no_shape_is_refused(wrong):
    with pytest.raises(FrameError, match="must be a shape"):
        checked_shape(wrong)


def test_a_model_is_called_with_arguments_or_with_a_tuple():
    assert arguments(Two(), BOTH) == BOTH.tensors == arguments(Any(), BOTH)
    assert arguments(One(), BOTH) == (BOTH.tensors,)
    assert arguments(Two(), BOTH.tensors[0]) == (BOTH.tensors[0],)


def test_what_goes_beside_a_tensor_is_checked_where_it_arrives():
    sent, shape = beside(BOTH, [1]), shape_of(BOTH)
    assert torch.equal(beside_of(sent, shape, [1], 4)[0], BOTH.tensors[1])
    assert beside(BOTH.tensors[0], []) == {} and beside_of({}, (), (), 4) == ()
    for wrong in ({}, {"input1": BOTH.tensors[1][:3]}, {"input1": BOTH.tensors[1].float()}):
        with pytest.raises(FrameError, match="input 1: must be bool of shape"):
            beside_of(wrong, shape, [1], 4)
