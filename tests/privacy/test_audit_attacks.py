"""The attacks, on what is known to leak and what is known not to."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsys.errors import ModelError
from fedsys.privacy.audit_inversion import inverse_network, invert, mean_image
from fedsys.privacy.audit_labels import gradients_of, infer_labels
from fedsys.privacy.audit_membership import (
    Membership,
    by_loss,
    confidences,
    likelihood_ratio,
)
from fedsys.randomness import Address

HERE = Address(1)


def blobs(count, seed, side=8):
    """Return images of one bright square on a dark ground."""
    draw = np.random.default_rng(seed)
    images = np.full((count, 1, side, side), 0.1, dtype=np.float32)
    for image in images:
        top, left = draw.integers(0, side - 3, 2)
        image[0, top : top + 3, left : left + 3] = 0.9
    return torch.from_numpy(images)


def test_images_are_read_from_activations_that_hold_them_and_not_from_noise():
    known, victims = blobs(200, 1), blobs(50, 2)
    blind = mean_image(known, victims)
    open_ = invert(lambda x, _: x, known, victims, HERE, epochs=15, width=16)
    noise = torch.Generator().manual_seed(0)
    hidden = invert(
        lambda x, _: torch.randn(x.shape, generator=noise), known, victims, HERE, epochs=5, width=16
    )
    assert open_.ssim > 0.9 > 0.5 > hidden.ssim
    assert open_.psnr > blind.psnr + 5
    assert hidden.ssim < blind.ssim + 0.05


def test_an_attack_repeats_to_the_bit():
    known, victims = blobs(60, 1), blobs(10, 2)
    first, second = (
        invert(lambda x, _: x, known, victims, HERE, epochs=2, width=8) for _ in range(2)
    )
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize(
    ("enters", "image"),
    [
        ((3, 4, 4), (3, 32, 32)),
        ((64,), (1, 8, 8)),
        ((2, 40, 40), (3, 32, 30)),
        ((5, 1, 1), (1, 9, 7)),
    ],
)
def test_images_come_out_of_any_shape(enters, image):
    made = inverse_network(enters, image, HERE, 8)(torch.randn(2, *enters))
    assert made.shape == (2, *image)
    assert bool(((made >= 0) & (made <= 1)).all())


def test_tokens_are_refused():
    with pytest.raises(ModelError, match="vectors and maps"):
        inverse_network((5, 16), (3, 32, 32), HERE)


def head(classes=4, features=16):
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(features, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(classes, features, generator=draw))
    return linear.eval()


def test_gradients_are_those_of_a_mini_batch():
    back, z = head(), torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(10) % 4
    whole = z.clone().requires_grad_()
    F.cross_entropy(back(whole), labels).backward()
    torch.testing.assert_close(gradients_of(back, z, labels, batch=10), whole.grad)
    assert all(p.grad is None for p in back.parameters())


def told(labels):
    """Return how well labels are told by gradients of others, and by activations: both of noise."""
    draw = torch.Generator().manual_seed(2)
    z, truth = torch.randn(400, 16, generator=draw), torch.arange(400) % 4
    gradients = gradients_of(head(), z, truth if labels is None else labels)
    return [infer_labels(seen, truth.numpy(), 4) for seen in (gradients, z)]


def test_gradients_tell_labels_where_activations_do_not():
    gradient, activation = told(None)
    assert gradient > 0.95
    assert 0.4 < activation < 0.6


def test_gradients_of_other_labels_tell_nothing():
    gradient, _ = told(torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(5)))
    assert 0.4 < gradient < 0.6


def test_examples_whose_labels_are_known_do_not_count():
    labels = np.arange(20) % 2
    seen = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    seen[10:] = torch.where(torch.from_numpy(labels[10:])[:, None] == 1, 1.0, -1.0)
    seen[:10] = seen[10:]
    assert infer_labels(seen, labels, 2) == 1.0
    assert math.isnan(infer_labels(seen[:10], labels[:10], 2))


def trained(models=8, examples=300, gap=2.0, seed=0):
    """Return confidences that are higher by `gap` in models that had the example."""
    draw = np.random.default_rng(seed)
    members = draw.random((models, examples)) < 0.5
    hard = 3 * draw.standard_normal(examples)
    return hard + gap * members + draw.standard_normal((models, examples)), members


def test_likelihood_ratios_see_what_the_loss_does_not():
    """Examples differ more in how hard they are than by who was trained on them."""
    confidence, members = trained()
    ratio = likelihood_ratio(confidence, members)
    loss = by_loss(np.log1p(np.exp(-confidence)), members)
    assert ratio.auc > 0.8 > 0.7 > loss.auc > 0.5
    assert ratio.tpr > loss.tpr


@pytest.mark.parametrize("models", [4, 8])
def test_nothing_is_seen_where_there_is_nothing(models):
    """With equal numbers of models with and without each example, the others' told the one's."""
    confidence, members = trained(models, 2000, gap=0.0)
    assert 0.47 < likelihood_ratio(confidence, members).auc < 0.53


def test_confidences_are_the_logits_of_the_true_class():
    p = np.array([[0.01, 0.5, 0.999]])
    np.testing.assert_allclose(confidences(-np.log(p)), np.log(p / (1 - p)), rtol=1e-9)
    assert np.isfinite(confidences(np.array([[0.0, 1e3]]))).all()


def test_members_have_the_smaller_loss():
    losses, members = np.array([[0.1, 0.2, 0.9, 0.8]]), np.array([[True, True, False, False]])
    assert by_loss(losses, members) == Membership(1.0, 1.0)
