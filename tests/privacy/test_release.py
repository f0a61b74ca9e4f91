import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from fedsys.errors import ModelError
from fedsys.privacy.noise import Addressed, Secret
from fedsys.privacy.release import Noise, Release, clipped, release_from
from fedsys.randomness import Address, drawing, rows

HERE = Address(seed=1, client=2, round=3)


def activations(rows_=6, shape=(4, 3, 3), scale=1.0):
    draw = torch.Generator().manual_seed(0)
    return scale * torch.randn(rows_, *shape, generator=draw)


@pytest.mark.parametrize(("kind", "order"), [("gaussian", 2), ("laplace", 1)])
def test_each_example_is_clipped_by_its_own_norm(kind, order):
    z = activations() * torch.tensor([0.01, 0.1, 1, 10, 0, 1e6]).view(-1, 1, 1, 1)
    held = clipped(z, Noise(2.0, 1.0, kind))
    norms = torch.linalg.vector_norm(held.flatten(1), ord=order, dim=1)
    assert bool((norms <= 2.0 * (1 + 1e-6)).all())
    for own, before in zip(held, z, strict=True):
        if float(torch.linalg.vector_norm(before, ord=order)) <= 2.0:
            assert torch.equal(own, before)
        else:
            torch.testing.assert_close(own / own.norm(), before / before.norm())


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])
def test_a_row_that_no_factor_bounds_leaves_as_zeros_and_the_others_as_they_are(broken):
    """NaN left the device as NaN, whatever noise was added to it: who receives it can tell."""
    z = activations(3, (5,), 0.1)
    z[1, 2] = broken
    z.requires_grad_()
    held = clipped(z, Noise(2.0, 1.0))
    assert torch.equal(held[[0, 2]], z[[0, 2]]) and not bool(held[1].any())
    held.sum().backward()
    assert z.grad.tolist() == [[1.0] * 5, [0.0] * 5, [1.0] * 5]


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_the_gradient_passes_the_clipping_as_it_is_and_the_noise_as_a_constant(kind):
    z = activations(3, (5,)).double().requires_grad_()

    def released(x):
        with drawing(HERE, 0, 3):
            return Release(Noise(1.5, 0.3, kind))(x)

    assert torch.autograd.gradcheck(released, (z,))
    unclipped = activations(2, (5,), 1e-3).requires_grad_()
    with drawing(HERE, 0, 2):
        Release(Noise(1.5, 0.3, kind))(unclipped).sum().backward()
    assert torch.equal(unclipped.grad, torch.ones_like(unclipped))


def test_an_activation_of_zeros_has_a_gradient():
    z = torch.zeros(2, 4, requires_grad=True)
    clipped(z, Noise(1.0, 0.0)).sum().backward()
    assert torch.equal(z.grad, torch.ones(2, 4))


def test_without_a_bound_and_without_noise_nothing_changes_to_the_bit():
    z = activations()
    assert Release(Noise(math.inf, 0.0))(z) is z


def test_pieces_of_a_mini_batch_have_their_rows_of_its_noise():
    z, release = activations(), Release(Noise(1.0, 2.0))
    with drawing(HERE, 4, 6):
        whole = release(z)
    with drawing(HERE, 4, 6):
        parts = []
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            with rows(start, stop):
                parts.append(release(z[start:stop]))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("address", "step"),
    [(HERE, 5), (Address(1, 2, 4), 4), (Address(1, 3, 3), 4), (Address(2, 2, 3), 4)],
)
def test_each_step_of_each_round_of_each_client_has_noise_of_its_own(address, step):
    z, release = torch.zeros(6, 8), Release(Noise(1.0, 2.0))
    with drawing(HERE, 4, 6):
        here = release(z)
    with drawing(address, step, 6):
        there = release(z)
    assert not np.intersect1d(here.numpy(), there.numpy()).size


def test_examples_of_a_step_have_different_noise():
    with drawing(HERE, 0, 500):
        seen = Release(Noise(1.0, 2.0))(torch.zeros(500, 8))
    assert len(np.unique(seen.numpy())) > 3990


@pytest.mark.parametrize("source", [Addressed(HERE), Secret()], ids=["addressed", "secret"])
@pytest.mark.parametrize(("kind", "law"), [("gaussian", "norm"), ("laplace", "laplace")])
def test_noise_is_of_the_law_and_scale_that_is_accounted(kind, law, source):
    noise = Noise(4.0, 0.5, kind)
    drawn = noise.draw(source, "test", 0, (200, 100)).flatten().numpy()
    assert kstest(drawn, law, args=(0.0, 2.0)).pvalue > 1e-4


def test_models_are_evaluated_as_they_are():
    z = activations()
    assert Release(Noise(1.0, 2.0)).eval()(z) is z


def test_noise_needs_an_address():
    with pytest.raises(ModelError, match="drawing"):
        nn.Sequential(Release(Noise(1.0, 2.0)))(activations())


def test_a_module_releases_in_training_alone_and_keeps_its_names():
    front = nn.Linear(4, 4)
    names = list(front.state_dict())
    release_from(front, Release(Noise(1.0, 2.0)))
    assert list(front.state_dict()) == names
    z = torch.ones(3, 4)
    with drawing(HERE, 0, 3):
        released = front(z)
    assert not torch.equal(released, front.eval()(z))
    assert torch.equal(front(z), nn.functional.linear(z, front.weight, front.bias))


def test_secret_noise_is_the_same_within_a_round_and_another_in_the_next():
    z, release = torch.zeros(3, 4), Release(Noise(1.0, 2.0), Secret())
    with drawing(HERE, 0, 3):
        first = release(z)
    with drawing(HERE, 0, 3):
        assert torch.equal(first, release(z))
    with drawing(HERE, 0, 3):  # a mini-batch is drawn for once
        assert not torch.equal(first, Release(Noise(1.0, 2.0), Secret())(z))
