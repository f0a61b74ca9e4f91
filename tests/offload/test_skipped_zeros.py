"""Gradients that come without what a ReLU at the cut makes zero: the same model, fewer bytes."""

import pytest

from fedsys.config import parse, with_values
from strategies.around import find
from strategies.offload import Offload

VALUES = {
    "num_clients": 2,
    "rounds": 2,
    "num_edges": 1,
    "client": {"epochs": 1, "batch_size": 10, "lr": 0.1},
    "data": {"examples": 40, "test_examples": 10, "shape": [3, 16, 16]},
    "policy": {"kind": "fixed", "cut": 1},
    "schedule": {"micro_batches": 2, "kind": "pipelined"},
}


@pytest.fixture
def trained(configure, carry_out):
    """Return a function that trains with ``link.skip_zero_gradients`` as given."""

    def train(skip, *overrides, **values):
        base = configure("data=synthetic", "model=vgg5", *overrides)
        told = with_values(base.text, **VALUES)
        more = {"link": {"kind": "memory", "skip_zero_gradients": skip}} | values
        return carry_out(parse(with_values(told, **more)))

    return train


def both(trained, *overrides, **values):
    """Train with and without; return the bytes down of both, the models being the same."""
    skipping = trained("always", *overrides, **values)
    usual = trained("never", *overrides, **values)
    assert skipping.sha256 == usual.sha256
    assert skipping.figures["bytes_up"] == pytest.approx(usual.figures["bytes_up"], rel=0.01)
    return skipping.figures["bytes_down"], usual.figures["bytes_down"]


@pytest.mark.parametrize(
    "codec",
    [
        "fp32",
        "fp16",
        "bf16",
        "int8",
        {"up": "int8", "down": "fp32"},
        {"up": "fp16", "down": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [1, 3])
def test_the_model_is_that_of_whole_gradients(trained, codec, cut):
    """With int8 up, small activations become zeros at the edge; their gradients must still come."""
    skipped, usual = both(trained, policy={"kind": "fixed", "cut": cut, "codec": codec})
    assert skipped < 0.98 * usual


@pytest.mark.parametrize(
    "values",
    [
        {"client": {"kernels": "fused"}},
        {"client": {"precision": "bf16"}},
        {"client": {"label_private": True}},
        {"client": {"memory_format": "channels_last"}},
        {"client": {"optimizer": "adam", "clip_norm": 0.1, "lr": 0.003}},
    ],
    ids=str,
)
def test_in_other_arithmetic_too(trained, values):
    client = VALUES["client"] | values["client"]
    skipped, usual = both(trained, client=client)
    assert skipped < 0.98 * usual


def test_gradients_of_examples_are_clipped_alike(trained):
    privacy = {"mechanism": "record", "epsilon": 1e6, "clip_norm": 0.5, "noise_multiplier": 0.7}
    skipped, usual = both(trained, "model.norm=group", privacy=privacy | {"accountant": "rdp"})
    assert skipped < 0.98 * usual


def test_a_cut_that_is_not_behind_a_relu_is_left_as_it_is(trained):
    skipped, usual = both(
        trained, "model=mobilenet_v2", "model.width=0.25", policy={"kind": "fixed", "cut": 3}
    )
    assert skipped == usual


def test_noise_at_the_cut_leaves_no_zeros(trained):
    privacy = {"mechanism": "cut", "epsilon": 50, "clip_norm": 1.0}
    skipped, usual = both(trained, "model.norm=group", privacy=privacy)
    assert skipped == usual


def test_policies_are_told_what_share_was_sent(trained):
    """They count whole gradients until they know better."""
    got, usual = (find(trained(skip).strategy, Offload).seen_of(0) for skip in ("always", "never"))
    assert usual.gradient_share == 1.0
    assert got.gradient_share == pytest.approx(got.bytes_down / usual.bytes_down, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "network", "skips"),
    [
        ("memory", {}, False),
        ("tcp", {}, True),
        ("grpc", {}, True),
        ("memory", {"up_mbit_s": 1e4, "down_mbit_s": 1e4, "emulate": True}, True),
    ],
)
def test_by_itself_it_is_done_where_a_byte_costs_time(trained, kind, network, skips):
    usual = trained("never")
    values = {"link": {"kind": kind}} | ({"network": network} if network else {})
    got = trained("auto", **values)
    assert got.sha256 == usual.sha256
    assert (got.figures["bytes_down"] < 0.98 * usual.figures["bytes_down"]) == skips
