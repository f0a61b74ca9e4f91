"""Draws of noise and samples: repeatable by address, unknown with a key, of the right law."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedsys.privacy.noise import Addressed, Secret, poisson_sample, source_of
from fedsys.randomness import Address

SHAPE = torch.Size((40, 500))
SOURCES = {"address": Addressed(Address(3, 1, 2)), "system": Secret(bytes(32))}


@pytest.mark.parametrize("name", SOURCES)
def test_noise_is_standard_normal_and_a_function_of_purpose_step_and_name(name):
    source = SOURCES[name]
    drawn = source.normal("privacy", 4, "fc.weight", SHAPE)
    assert drawn.shape == SHAPE and drawn.dtype == torch.float32
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.equal(drawn, source.normal("privacy", 4, "fc.weight", SHAPE))
    others = [("other", 4, "fc.weight"), ("privacy", 5, "fc.weight"), ("privacy", 4, "fc.bias")]
    for other in others:
        correlation = np.corrcoef(drawn.flatten(), source.normal(*other, SHAPE).flatten())[0, 1]
        assert abs(correlation) < 0.03


def test_noise_by_address_differs_by_seed_client_and_round():
    drawn = {
        tuple(Addressed(Address(*where)).normal("privacy", 0, "w", torch.Size((3,))).tolist())
        for where in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]
    }
    assert len(drawn) == 4


def test_the_key_of_the_system_is_another_one_each_time_and_shown_to_nobody():
    one, other = source_of(Address(0), secure=True), source_of(Address(0), secure=True)
    assert one.key != other.key and len(one.key) == 32
    assert one.key.hex() not in repr(one) and str(one.key) not in repr(one)
    assert source_of(Address(0), secure=False) == source_of(Address(0), secure=False)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,)])
def test_the_secret_source_has_values_for_any_shape(shape):
    assert Secret(bytes(32)).normal("privacy", 0, "w", torch.Size(shape)).shape == shape


@pytest.mark.parametrize("name", SOURCES)
def test_a_poisson_sample_takes_each_example_by_a_draw_of_its_own(name):
    source, count, rate = SOURCES[name], 50, 0.2
    samples = [poisson_sample(source, step, count, rate) for step in range(400)]
    assert all((np.diff(sample) > 0).all() for sample in samples)
    sizes = np.array([len(sample) for sample in samples])
    assert abs(sizes.mean() - count * rate) < 0.6  # four deviations
    assert sizes.var() == pytest.approx(count * rate * (1 - rate), rel=0.3)  # not a fixed size
    often = np.bincount(np.concatenate(samples), minlength=count) / len(samples)
    assert np.abs(often - rate).max() < 0.09
    assert len(poisson_sample(source, 0, count, 1.0)) == count
