import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsys.runs.trees import NotKeepable, array_sha256, decode, encode, keepable
from fedsys.transport import records

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
KEYS = st.text(max_size=5) | st.integers(-9, 9)
TREES = st.recursive(
    PLAIN,
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(KEYS, t, max_size=3)
    ),
    max_leaves=8,
)
DTYPES = st.sampled_from(["float64", "float32", "float16", "int64", "int8", "uint8", "bool"])


def there_and_back(value):
    arrays = {}
    text = json.dumps(encode(value, arrays))
    return decode(json.loads(text), arrays)


@settings(max_examples=80, deadline=None)
@given(TREES)
def test_plain_trees_come_back_as_they_were(tree):
    back = there_and_back(tree)
    assert back == tree
    assert repr(back) == repr(tree)  # 1, 1.0 and True are equal, but not the same
    assert keepable(tree)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
def test_arrays_come_back_to_the_bit_and_can_be_written_to(array):
    back = there_and_back(array)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.writeable


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 5e-324])
def test_unusual_floats_come_back_to_the_bit(value):
    assert np.float64(there_and_back(value)).tobytes() == np.float64(value).tobytes()


def test_a_scalar_of_numpy_keeps_its_type_because_sums_depend_on_it():
    back = there_and_back({"t": np.float64(0.1), "n": np.int32(3)})
    assert type(back["t"]) is np.float64
    assert type(back["n"]) is np.int32


def test_tensors_and_records_come_back():
    tensor = torch.arange(6.0).reshape(2, 3).t()
    record = records.record_of({"b": np.ones(2), "a": np.zeros((), "int64")})
    back = there_and_back([tensor, record])
    assert torch.equal(back[0], tensor)
    assert list(back[1]) == ["b", "a"]
    assert all(back[1][name].data == record[name].data for name in record)


def test_equal_arrays_are_kept_once():
    arrays = {}
    encode([np.ones(3), np.ones(3), {"again": np.ones(3)}], arrays)
    assert len(arrays) == 1


def test_a_hash_depends_on_type_shape_and_bytes_but_not_on_strides():
    ones = np.ones((2, 3), "float32")
    others = [ones.reshape(3, 2), ones.astype("float64"), ones * 2, ones.view("int32")]
    assert len({array_sha256(a) for a in (ones, *others)}) == 5
    assert array_sha256(np.asfortranarray(ones)) == array_sha256(ones)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, object()]}, r"value\['a'\]\[1\] is of type object"),
        ({1.5: 2}, "value has a key of type float"),
        (np.array(["text"]), "value is an array of <U4"),
        (np.ones(2, "complex64"), "value is an array of complex64"),
        (torch.ones(2, dtype=torch.bfloat16), "value is a tensor of torch.bfloat16"),
        ({1, 2}, "value is of type set"),
    ],
)
def test_what_has_no_form_is_refused_by_name(value, words):
    with pytest.raises(NotKeepable, match=words):
        encode(value, {})


def test_a_value_of_an_unknown_kind_is_not_read():
    with pytest.raises(ValueError, match="unknown kind 'code'"):
        decode({"code": "1"}, {})
