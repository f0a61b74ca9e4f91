from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsys.errors import ConfigError
from fedsys.models import skeleton
from fedsys.models.layers import layered
from fedsys.planning.arms import Arms
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import (
    FRAME_BYTES,
    Crossing,
    MachineClass,
    MachineCosts,
    Messaging,
    crossings,
    frame_bytes,
    state_bytes,
    tensor_bytes,
)
from fedsys.planning.learning.knowing import table_of
from fedsys.planning.options import machines_of, run_workload
from fedsys.planning.workload import Menu, job_of
from fedsys.training.federation import federation, layers_of
from fedsys.transport.codecs import CODECS, encode_activation
from fedsys.transport.wire import Frame, encode_parts

VGG5 = {"_target_": "fedsys.models.vgg.vgg5"}


@pytest.fixture(scope="module")
def vgg5():
    return layered(skeleton(VGG5, input_shape=(3, 32, 32), num_classes=10), (3, 32, 32))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(25, 8, 6, 6), (1, 8, 2, 2), (3, 10), (100, 10)])
def test_bytes_are_those_that_the_codec_makes(codec, shape):
    crossing = Crossing(math.prod(shape[1:]), shape[1])
    tensors, _ = encode_activation(torch.ones(shape), codec)
    expected = sum(t.nbytes for t in tensors.values())
    assert tensor_bytes(crossing, shape[0], codec) == expected


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_a_frame_are_those_of_the_wire_within_two_hundred(codec):
    x = torch.ones(5, 8, 6, 6)
    tensors, meta = encode_activation(x, codec)
    tensors["labels"] = torch.zeros(5, dtype=torch.int64)
    meta |= {"step": 12, "piece": 3, "batch": 100, "needs_gradient": True}
    real = sum(memoryview(p).nbytes for p in encode_parts(Frame("activation", meta, tensors)))
    assert abs(frame_bytes(Crossing(288, 8), 5, codec, labels=True) - real) < 200


def test_crossings_are_the_tensors_after_the_units(vgg5):
    sizes = crossings(vgg5)
    assert len(sizes) == len(vgg5)
    for unit, crossing in zip(vgg5.units, sizes, strict=True):
        assert tensor_bytes(crossing, 7, "fp32") == 7 * unit.bytes_out
        assert frame_bytes(crossing, 7, "fp32") == 7 * unit.bytes_out + FRAME_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_of_the_state_are_those_of_parameters_and_buffers(dtype):
    """They were 4 for each parameter: BatchNorm's statistics and other types were left out."""
    model = skeleton(VGG5, input_shape=(3, 32, 32), num_classes=10).to(dtype)
    layers = layered(model, (3, 32, 32))
    assert sum(state_bytes(layers)) == sum(t.nbytes for t in model.state_dict().values())
    conv1 = [t.nbytes for name, t in model.state_dict().items() if name.startswith("conv1.")]
    assert state_bytes(layers)[0] == sum(conv1)


def test_a_tensor_that_several_units_use_counts_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    layers = layered(nn.Sequential(first, nn.ReLU(), second), (8,))
    assert layers.shared and sum(state_bytes(layers)) == 4 * (64 + 8 + 8)


def test_a_class_takes_its_time_by_multiply_accumulates(vgg5):
    costs = MachineClass("pi", macs_per_s=1e9, backward_ratio=2.5, params_per_s=1e8).costs(vgg5)
    work = sum(unit.macs for unit in vgg5.units)
    assert costs.seconds(1) == pytest.approx((work / 1e9, 2.5 * work / 1e9))
    assert costs.seconds(50, 0, 2)[0] == pytest.approx(50 * costs.seconds(1, 0, 2)[0])
    assert len(costs) == len(vgg5)


def test_seconds_between_measured_sizes_are_interpolated_and_beyond_in_proportion():
    costs = MachineCosts(
        "pi", (2, 10), ((1.0, 0.0), (3.0, 2.0)), ((2.0, 0.0), (6.0, 0.0)), (0.1, 0.1),
        operation_s=0.5,
    )  # fmt: skip
    assert costs.seconds(6) == pytest.approx((3.0 + 0.5, 4.0 + 0.5))
    assert costs.seconds(6, 1, 2) == pytest.approx((1.0 + 0.5, 0.5))
    assert costs.seconds(1, 0, 1) == pytest.approx((0.5 + 0.5, 1.0 + 0.5))
    assert costs.seconds(20)[0] == pytest.approx(10.0 + 0.5)
    assert costs.seconds(6, 1, 1) == (0.0, 0.0)
    assert costs.slower(2.0).seconds(6)[0] == pytest.approx(7.0)


def test_messages_cost_by_number_and_by_byte():
    messaging = Messaging(1e-3, {"int8": 1e-9})
    assert messaging.seconds(1e6, "int8") == pytest.approx(2e-3)
    assert messaging.seconds(1e6, "fp32") == 1e-3


def test_a_class_is_read_from_plain_values():
    made = MachineClass.of("pi", {"macs_per_s": 1e9, "message_s": 0.1, "byte_s": {"fp16": 1e-9}})
    assert made == MachineClass("pi", 1e9, messaging=Messaging(0.1, {"fp16": 1e-9}))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, r"pi\.macs_per_s=None"),
        ({"macs_per_s": 0}, r"pi\.macs_per_s=0: must be more than 0"),
        ({"macs_per_s": "fast"}, "must be a number"),
        ({"macs_per_s": 1, "macs_pers": 1}, "did you mean 'macs_per_s'"),
        ({"macs_per_s": 1, "message_s": -1}, "message_s=-1"),
        ({"macs_per_s": 1, "byte_s": {"fp8": 1}}, "byte_s=fp8"),
        ({"macs_per_s": 1, "backward_ratio": math.inf}, r"pi\.backward_ratio=inf"),
    ],
)
def test_a_fleet_file_that_cannot_be_used_is_refused(values, names):
    with pytest.raises(ConfigError, match=names):
        MachineClass.of("pi", values)


def test_costs_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="a value for each size and unit"):
        MachineCosts("pi", (1,), ((1.0,),), ((1.0, 2.0),), (0.0,))
    with pytest.raises(ConfigError, match="ascending from 1"):
        MachineCosts("pi", (4, 1), ((1.0,),) * 2, ((1.0,),) * 2, (0.0,))
    with pytest.raises(ConfigError, match="0 or more"):
        MachineCosts("pi", (1,), ((-1.0,),), ((1.0,),), (0.0,))
    with pytest.raises(ConfigError, match="workers=0"):
        MachineCosts("edge", (1,), ((1.0,),), ((1.0,),), (0.0,), workers=0)
    with pytest.raises(ConfigError, match=r"policy\.codec=fp8"):
        tensor_bytes(Crossing(1, 1), 1, "fp8")


OF_TASKS = {
    "classification": ("drawings", "model=cnn", 8),
    "multilabel": ("labels", "model=mlp", 3 * 4),
    "regression": ("rows", "model=mlp", 4),
    "segmentation": ("pictures", "model=own model._target_=tests.own_work.Segments", 8 * 8 * 8),
    "next_token": ("Sentences", "model=gpt model.width=8 model.depth=2 model.heads=2", 8 * 8),
}


@pytest.mark.parametrize("task", OF_TASKS)
def test_what_is_to_be_learned_counts_as_it_is_sent(task, configure):
    """It was 8 bytes for each example, whatever was learned: of next tokens, those of one token."""
    data, model, expected = OF_TASKS[task]
    given = ("data=own", f"data._target_=tests.own_work.{data}", "data.partition.kind=iid")
    config = configure(*given, f"task={task}", *model.split(), "fleet=pi_lab", "network=wifi")
    dataset = federation(config).dataset
    layers = layers_of(config, dataset)
    cut, rows = layers.cuts[0], 5
    activation = torch.ones(rows, *layers.units[cut - 1].out_shape)
    tensors, meta = encode_activation(activation, "fp32")
    tensors["labels"] = dataset.train.labels[:rows]
    assert tensors["labels"].nbytes == rows * expected
    real = sum(memoryview(p).nbytes for p in encode_parts(Frame("activation", meta, tensors)))
    load = run_workload(config, layers, machines_of(config, layers), [rows])
    told = frame_bytes(load.crossings[cut - 1], rows, "fp32", labels=True)
    assert abs(told - real) < 250
    load = replace(load, batch_size=rows, micro_batches=(1,), cuts=(cut,))
    job = job_of(load, load.devices[0], Assignment(cut))
    assert job.turns[0].exchange.up_bytes == told
    stages = Menu(load, [Assignment(cut)]).stages(load.devices[0])
    assert stages.up[0] * load.devices[0].network.up_bits_s == pytest.approx(8 * told)
    assert Arms.of(load, layers).up_bits[0] == 8 * told
    assert table_of(load, [0.5, 1.0], (cut, len(layers))).up_bits[0, 0] == 8 * told
