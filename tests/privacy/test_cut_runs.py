"""Runs with privacy=cut: the bits of an unsplit model with the same release inside."""

import math

import pytest
import torch
from torch import nn

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.identity import state_sha256
from fedsys.models.layers import layered, split
from fedsys.privacy.labels import randomised
from fedsys.privacy.promises import round_promise
from fedsys.privacy.release import Noise, Release
from fedsys.randomness import Address
from fedsys.training import federation, optimizers
from fedsys.training import plain as training

SMALL = [
    "data=synthetic", "data.examples=60", "data.test_examples=10", "data.validation=0.1",
    "model.width=4", "model.hidden=16", "model.norm=group", "client.batch_size=10",
    "client.epochs=1", "rounds=2", "num_clients=1", "policy=fixed", "policy.cut=1",
    "privacy=cut", "privacy.epsilon=50",
]  # fmt: skip


def reference(config, noise=None, labels_of=lambda labels: labels):
    """Train one client unsplit, with the release between its units."""
    from clients.local import own_batches

    fed = federation.federation(config)
    model = federation.build_model(config, fed.dataset)
    noise = noise or Noise(
        config.privacy.clip_norm,
        round_promise(config, [len(fed.parts[0])]).noise,
        config.privacy.noise,
    )
    for round_ in range(1, config.rounds + 1):
        front, back = split(layered(model, fed.dataset.input_shape), 1)
        released = nn.Sequential(front, Release(noise), back)
        optimizer = optimizers.make_optimizer(model.parameters(), config.client, config.client.lr)
        address = Address(config.seed, 0, round_)
        training.train(
            released, optimizer, own_batches(config, 0, address), address,
            micro_batches=config.schedule.micro_batches, clip_norm=config.client.clip_norm,
        )  # fmt: skip
    return state_sha256(model.state_dict())


ROWS = [
    [],
    ["privacy.noise=laplace", "link=tcp"],
    ["schedule=pipelined", "schedule.micro_batches=3", "link=grpc"],
    ["schedule=bounded", "schedule.micro_batches=4", "client.clip_norm=0.5"],
    ["privacy.clip_norm=0.5", "privacy.label_epsilon=2", "schedule=pipelined"],
    ["privacy.noise_multiplier=0.3", "privacy.epsilon=5000", "num_edges=2"],
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row) or "plain")
def test_split_training_with_noise_gives_the_bits_of_an_unsplit_model_with_it(
    row, configure, carry_out
):
    config = configure(*SMALL, *row)
    got = carry_out(config)
    assert got.sha256 == reference(config)
    assert got.rows[-1]["epsilon"] <= config.privacy.epsilon


@pytest.mark.parametrize("what", ["link_cut", "edge_killed"])
def test_what_is_done_again_releases_the_same_bits_and_spends_nothing_more(
    what, configure, carry_out
):
    """A step that is done again has the noise that it had, so nobody learns anything new."""
    given = [*SMALL, "num_edges=2", f"faults={what}"]
    plain, struck = carry_out(configure(*SMALL, "num_edges=2")), carry_out(configure(*given))
    assert struck.faults
    assert struck.sha256 == plain.sha256
    assert [r["epsilon"] for r in struck.rows] == [r["epsilon"] for r in plain.rows]


def test_without_a_bound_and_without_noise_the_model_is_that_of_plain_training(
    configure, carry_out
):
    """The bound is above every norm, and the noise too small for a float: they change no bit."""
    config = configure(*SMALL)
    plain = carry_out(configure(*[o for o in SMALL if not o.startswith("privacy")]))
    assert reference(config, Noise(math.inf, 0.0)) == plain.sha256
    assert reference(config, Noise(1e30, 1e-300)) == plain.sha256
    assert reference(config) != plain.sha256


def test_labels_are_told_once_for_all_rounds(configure):
    from clients.local import own_batches

    config = configure(*SMALL, "privacy.label_epsilon=1", "num_clients=2")
    fed = federation.federation(config)
    truth = configure(*SMALL, "num_clients=2")

    def told(config, round_):
        found = {}
        for x, y in own_batches(config, 1, Address(config.seed, 1, round_)):
            found |= {
                image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)
            }
        return found

    first = told(config, 1)
    assert first == told(config, 2)
    true = told(truth, 1)
    assert first.keys() == true.keys() and first != true
    own = fed.dataset.train.labels[torch.from_numpy(fed.parts[1])]
    expected = randomised(own, 1.0, fed.dataset.num_classes, Address(config.seed, 1))
    assert sorted(first.values()) == sorted(expected.tolist())


def test_secret_noise_is_another_in_each_run(configure, carry_out):
    config = configure(*SMALL, "privacy.secure=true")
    assert carry_out(config).sha256 != carry_out(config).sha256


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["strategy.fraction_evaluate=1.0"], "strategy.fraction_evaluate=1.0"),
        (["model.norm=batch"], "model.norm=group"),
        (["privacy.delta=0.1"], "must be below 1/"),
        (["privacy.epsilon=0"], "privacy.epsilon=0"),
        (["privacy.noise=uniform"], "privacy.noise=uniform"),
        (["privacy.label_epsilon=0"], "privacy.label_epsilon=0"),
        (["privacy.label_epsilon=1", "client.label_private=true"], "is for labels that leave"),
        (["privacy.label_epsilon=1", "privacy.secure=true"], "would spend it again"),
        (["privacy.noise_multiplier=0.1", "privacy.epsilon=1"], "is spent before the first round"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_data_are_used(
    overrides, told, configure, carry_out
):
    with pytest.raises(ConfigError) as refused:
        carry_out(configure(*SMALL, *overrides))
    assert told in str(refused.value)


def test_a_device_that_is_not_told_how_much_noise_to_add_sends_nothing(configure):
    from clients.device_half import DeviceHalf

    half = DeviceHalf.__new__(DeviceHalf)
    half._config = configure(*SMALL)
    half._settings = type("Told", (), {"noise": 0.0})()
    with pytest.raises(RuntimeFailure, match="how much noise"):
        half._release()
