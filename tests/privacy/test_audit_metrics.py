import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from fedsys.errors import ModelError
from fedsys.privacy.audit_metrics import (
    auc,
    one_against_rest,
    psnr,
    ssim,
    true_positives_at,
)


def pair(shape, seed):
    draw = np.random.default_rng(seed)
    image = draw.random(shape)
    other = np.clip(image + 0.2 * draw.standard_normal(shape), 0, 1)
    return tuple(torch.from_numpy(x)[None] for x in (image, other))


# by scikit-image 0.26: structural_similarity(data_range=1.0, channel_axis=0, win_size=7 or 5) and
# peak_signal_noise_ratio(data_range=1.0)
SCIKIT_IMAGE = [
    ((3, 32, 32), 0, 0.8212621204721061, 14.963688656208243),
    ((1, 8, 8), 1, 0.8158176381134872, 14.68073270392237),
    ((1, 6, 9), 2, 0.7923052758096094, 15.431121456362236),
]


@pytest.mark.parametrize(("shape", "seed", "likeness", "decibels"), SCIKIT_IMAGE)
def test_ssim_and_psnr_are_those_of_scikit_image(shape, seed, likeness, decibels):
    image, other = pair(shape, seed)
    assert float(ssim(image, other)) == pytest.approx(likeness, abs=1e-12)
    assert float(psnr(image, other)) == pytest.approx(decibels, abs=1e-9)


def test_the_ssim_of_constant_images_is_that_of_their_means():
    light, dark = torch.full((1, 1, 8, 8), 0.8), torch.full((1, 1, 8, 8), 0.2)
    expected = (2 * 0.8 * 0.2 + 0.01**2) / (0.8**2 + 0.2**2 + 0.01**2)
    assert float(ssim(light, dark)) == pytest.approx(expected, rel=1e-6)


def test_an_image_is_like_itself_and_bounded_by_its_peak():
    image, _ = pair((3, 16, 16), 5)
    assert float(ssim(image, image)) == pytest.approx(1.0)
    assert math.isinf(float(psnr(image, image)))
    assert float(ssim(255 * image, 255 * image.flip(3), peak=255.0)) == pytest.approx(
        float(ssim(image, image.flip(3)))
    )


@pytest.mark.parametrize(
    ("one", "two"), [((1, 1, 8, 8), (1, 1, 8, 9)), ((1, 1, 2, 8), (1, 1, 2, 8)), ((8, 8), (8, 8))]
)
def test_images_that_cannot_be_compared_are_refused(one, two):
    with pytest.raises(ModelError, match="one shape"):
        ssim(torch.zeros(one), torch.zeros(two))


few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@given(few, few)
@settings(deadline=None)
def test_the_area_is_the_share_of_pairs_in_order(positives, negatives):
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auc(positives, negatives) == pytest.approx(np.mean(pairs))


@given(few, few, st.sampled_from([0.0, 0.001, 0.1, 0.25, 0.5, 0.999]))
@settings(deadline=None)
def test_true_positives_are_read_from_the_curve_of_scikit_learn(positives, negatives, rate):
    truth = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    scores = np.r_[positives, negatives]
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert true_positives_at(positives, negatives, rate) == pytest.approx(
        true[false <= rate + 1e-12].max()
    )


def test_nothing_is_said_of_one_kind_alone():
    assert math.isnan(auc(np.array([1.0]), np.array([])))
    assert math.isnan(true_positives_at(np.array([]), np.array([1.0]), 0.1))
    assert math.isnan(one_against_rest(np.ones((3, 2)), np.zeros(3, dtype=np.int64)))


def test_classes_that_are_not_there_do_not_count():
    scores = np.array([[3.0, 0.0, 1.0], [2.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    assert one_against_rest(scores, np.array([0, 0, 1])) == 1.0
