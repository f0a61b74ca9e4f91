import io
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fedsys.errors import ModelError
from fedsys.transport import records

DTYPES = ["float16", "float32", "float64", "complex64", "bool", "uint8", "int8", "int16", "int64"]


def saved(array):
    """Return the bytes that NumPy itself writes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3))


# --------------------------------------------------------------------------------------------------
# Bytes


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([*DTYPES, ">f4", ">i8"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
def test_arrays_have_the_bytes_of_numpy_save_and_come_back(array):
    encoded = records.encode(array)
    assert encoded.data == saved(array)
    assert (encoded.dtype, encoded.shape) == (str(array.dtype), array.shape)
    back = records.view(encoded)
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert back.tobytes() == encoded.numpy().tobytes()
    assert not back.flags.writeable


def test_flower_reads_what_we_write_and_we_read_what_flower_writes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(records.encode(array).numpy(), array)
    assert np.array_equal(records.view(Array(array)), array)


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.arange(10)[::-2]])
def test_strides_are_straightened_when_written_and_foreign_orders_are_read(array):
    assert np.array_equal(records.view(records.encode(array)), array)
    foreign = Array(str(array.dtype), array.shape, "numpy.ndarray", saved(array))
    assert np.array_equal(records.view(foreign), array)
    assert not records.view(foreign).flags.writeable


def test_python_objects_are_never_written_or_read():
    with pytest.raises(ModelError, match="must hold numbers"):
        records.encode(np.array([object()]))
    buffer = io.BytesIO()
    np.save(buffer, np.array([print]), allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps(print)):
        array = Array("object", (1,), "numpy.ndarray", data)
        with pytest.raises(ModelError, match="do not hold it"):
            records.view(array)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("float32", (2, 3), saved(np.zeros((2, 3), np.float32))[:-1]),
        ("float32", (2, 3), saved(np.zeros((2, 3), np.float32)) + b"1234"),
        ("float32", (2, 3), b""),
        ("no-such-type", (2,), b"abc"),
    ],
)
def test_bytes_that_do_not_fit_name_the_array(dtype, shape, data):
    record = ArrayRecord({"conv.weight": Array(dtype, shape, "numpy.ndarray", data)})
    with pytest.raises(ModelError, match=r"^conv\.weight: .*bytes do not hold it"):
        records.arrays_of(record)


def test_another_serialisation_is_refused():
    with pytest.raises(ModelError, match="serialisation type 'pickle'"):
        records.view(Array("float32", (1,), "pickle", b"1234"))


# --------------------------------------------------------------------------------------------------
# States


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "complex64", "bool", "uint8", "int32", "int64"]
)
def test_a_state_of_any_type_comes_back_to_the_bit_in_memory_of_its_own(dtype):
    kind = getattr(torch, dtype)
    state = {
        "matrix": torch.arange(24).reshape(2, 3, 4).to(kind),
        "scalar": torch.tensor(3).to(kind),
        "empty": torch.empty(0, 3, dtype=kind),
        "strided": torch.arange(24).reshape(2, 3, 4).to(kind).transpose(0, 2),
        "last": torch.ones(1, 2, 3, 4).to(kind).contiguous(memory_format=torch.channels_last),
    }
    record = records.to_record(state)
    back = records.from_record(record)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == kind and torch.equal(back[name], tensor)
    back["matrix"].fill_(0)
    assert torch.equal(records.from_record(record)["matrix"], state["matrix"])


def test_a_type_that_numpy_does_not_know_is_named():
    with pytest.raises(ModelError, match=r"fc\.bias: torch\.bfloat16 cannot be sent"):
        records.to_record({"fc.bias": torch.zeros(2, dtype=torch.bfloat16)})


def test_a_record_is_independent_of_the_tensors_it_was_made_from(model):
    record = records.to_record(model.state_dict())
    before = records.from_record(record)
    with torch.no_grad():
        model[2].weight.fill_(7)
    assert torch.equal(records.from_record(record)["2.weight"], before["2.weight"])


def test_loading_fills_parameters_and_buffers_in_place(model):
    state = {name: torch.full_like(t, 3) for name, t in model.state_dict().items()}
    pointers = {name: t.data_ptr() for name, t in model.state_dict().items()}
    model.to(memory_format=torch.channels_last)
    records.load_into(model, records.to_record(state))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert model.state_dict()["1.running_var"].data_ptr() == pointers["1.running_var"]
    assert all(p.requires_grad for p in model.parameters())


def test_loading_names_every_difference_and_changes_nothing(model):
    state = {name: torch.full_like(t, 3) for name, t in model.state_dict().items()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    del state["0.bias"]
    state["2.weight"] = torch.zeros(3, 5)
    state["head.weight"] = torch.zeros(1)
    state["1.num_batches_tracked"] = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ModelError) as caught:
        records.load_into(model, records.to_record(state))
    assert str(caught.value).partition(": ")[2].split("; ") == [
        "0.bias is missing",
        "head.weight is unexpected",
        "2.weight has shape [3, 5] instead of [3, 4]",
        "1.num_batches_tracked is float64, which torch.int64 cannot hold",
    ]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --------------------------------------------------------------------------------------------------
# Sharing


def vandalise(content):
    """Write wherever a client can write; return how often that was refused."""
    refused = 0
    arrays = content.array_records["arrays"]
    array = arrays["w"]
    array.numpy()[:] = -1
    torch.from_numpy(array.numpy()).fill_(-2)
    records.from_record(arrays)["w"].fill_(-3)
    for name, value in (("data", b""), ("shape", (0,)), ("dtype", "int8"), ("stype", "x")):
        try:
            setattr(array, name, value)
        except AttributeError:
            refused += 1
    try:
        records.view(array)[:] = -4
    except ValueError:
        refused += 1
    arrays["w"] = records.encode(np.array([-5.0]))
    arrays["new"] = records.encode(np.array([-6.0]))
    settings_ = content.config_records["config"]
    settings_["lr"] = -1.0
    settings_["milestones"].append(9)
    content.metric_records["metrics"]["losses"][0] = -1.0
    content["extra"] = ConfigRecord({})
    del content["metrics"]
    return refused


def test_what_one_receiver_writes_no_other_sees():
    sent = RecordDict(
        {
            "arrays": records.record_of({"w": np.arange(3.0)}),
            "config": ConfigRecord({"lr": 0.1, "milestones": [1, 2]}),
            "metrics": MetricRecord({"losses": [0.5]}),
        }
    )
    shared = records.sealed(sent)
    vandal, other = records.own_copy(shared), records.own_copy(shared)
    assert vandalise(vandal) == 5
    for content in (other, records.own_copy(shared), sent):
        assert set(content) == {"arrays", "config", "metrics"}
        assert list(content.array_records["arrays"]) == ["w"]
        assert content.array_records["arrays"]["w"].numpy().tolist() == [0.0, 1.0, 2.0]
        assert dict(content.config_records["config"]) == {"lr": 0.1, "milestones": [1, 2]}
        assert dict(content.metric_records["metrics"]) == {"losses": [0.5]}


def test_sealing_and_viewing_share_the_bytes():
    record = records.record_of({"w": np.arange(3.0)})
    sealed = records.sealed(RecordDict({"arrays": record})).array_records["arrays"]
    for shared in (sealed, records.readable(record), records.writable(record)):
        assert shared["w"].data is record["w"].data
    assert not records.readable(record)["w"].numpy().flags.writeable
    assert records.writable(record)["w"].numpy().flags.writeable
    assert records.writable(sealed)["w"] is sealed["w"]


def test_the_size_of_a_content_is_that_of_its_arrays():
    record = records.record_of({"w": np.arange(3.0), "b": np.zeros(0)})
    content = RecordDict({"arrays": record, "config": ConfigRecord({"a": 1})})
    assert records.size_of(content) == len(saved(np.arange(3.0))) + len(saved(np.zeros(0)))
