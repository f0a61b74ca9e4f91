"""Noise on the devices: what leaves them is clipped and noisy, and what that costs is exact."""

import math

import pytest
import torch
from torch import nn

from fedsys.errors import ConfigError
from fedsys.privacy.budget import PrivacyLedger
from fedsys.privacy.cut import gaussian_delta
from fedsys.privacy.local import release_update
from fedsys.privacy.noise import Addressed
from fedsys.privacy.promises import round_promise
from fedsys.randomness import Address
from strategies import PrivateRounds
from strategies.around import find
from strategies.private_clients import PrivateClients

LOCAL = [
    "data=synthetic", "data.examples=60", "data.test_examples=10", "data.validation=0.1",
    "model.width=4", "model.hidden=16", "client.batch_size=10", "client.epochs=1",
    "rounds=2", "num_clients=3", "privacy=client", "privacy.where=device",
]  # fmt: skip


def left_of(update, noise=0.0, round_=1):
    """Return what leaves a device of an update of a 4 x 3 layer, less where it began."""
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(update)
    source = Addressed(Address(0, 1, round_))
    release_update(model, start, clip_norm=2.0, noise=noise, source=source)
    return torch.cat([(p - start[n]).flatten() for n, p in model.named_parameters()]).detach()


def test_an_update_leaves_with_the_norm_it_had_or_the_largest_there_is():
    for update, norm in ((0.1, 0.1 * math.sqrt(15)), (3.0, 2.0), (1e30, 2.0), (0.0, 0.0)):
        assert float(left_of(update).norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("update", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_as_none_and_with_noise(update):
    assert float(left_of(update).abs().max()) == 0.0
    assert torch.isfinite(left_of(update, noise=1.0)).all()


def test_noise_has_its_deviation_and_is_another_in_each_round():
    drawn = torch.cat([left_of(0.0, noise=1.5, round_=n) for n in range(200)])
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.05)
    assert torch.equal(left_of(0.0, 1.0, 3), left_of(0.0, 1.0, 3))


def test_its_epsilon_is_that_of_a_gaussian_mechanism_whose_neighbours_are_two_norms_apart(
    configure,
):
    """Balle and Wang, ICML 2018, theorem 8: k releases are one of a shift of 2 sqrt(k) / noise."""
    promise = round_promise(configure(*LOCAL, "privacy.epsilon=4"), [20] * 3)
    for rounds in (1, 2):
        shift = 2 * math.sqrt(rounds) / promise.noise
        assert gaussian_delta(promise.cost(rounds), shift) == pytest.approx(1e-5, rel=0.02)
    assert promise.spent(PrivacyLedger().charged(1, [0]).charged(2, [0])) <= 4.0
    central = round_promise(
        configure(*LOCAL, "privacy.epsilon=4", "privacy.where=server"), [20] * 3
    )
    assert promise.noise == pytest.approx(2 * central.noise)


def test_a_run_says_what_it_promises_and_tells_nothing_beside_its_models(configure, carry_out):
    """With any strategy: what is made of models that have left spends nothing more."""
    done = carry_out(configure(*LOCAL, "strategy=fedadam", "client.batch_size=5"))
    assert find(done.strategy, PrivateClients) is None
    claim = find(done.strategy, PrivateRounds).claim()
    assert 7.9 < claim.epsilon <= 8.0
    assert "replaced by any others" in claim.sentence() and "no exception" in claim.sentence()
    assert all("train_loss" not in row and math.isfinite(row["epsilon"]) for row in done.rows)
    assert all(torch.isfinite(tensor).all() for tensor in done.state.values())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policy=fixed", r"privacy\.where=device: must be server with policy=fixed.*policy=none"),
        ("privacy.clipping=adaptive", r"must be fixed with privacy\.where=device"),
        ("client.keep_optimizer=true", r"client\.keep_optimizer=True: must be false"),
        ("strategy.fraction_evaluate=0.5", "tell their scores"),
        ("privacy.where=edge", r"privacy\.where=edge: must be one of server, device"),
    ],
)
def test_what_would_leave_devices_without_noise_is_refused(override, said, configure, carry_out):
    with pytest.raises(ConfigError, match=said):
        carry_out(configure(*LOCAL, override))
