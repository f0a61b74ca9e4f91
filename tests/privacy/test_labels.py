import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from fedsys.privacy.labels import randomised, truth_probability
from fedsys.randomness import Address

HERE = Address(1)


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (1.0, 10), (3.0, 10), (8.0, 100)])
def test_the_truth_and_a_lie_differ_in_probability_by_what_is_claimed(epsilon, classes):
    truth = truth_probability(epsilon, classes)
    lie = (1 - truth) / (classes - 1)
    assert truth / lie == pytest.approx(math.exp(epsilon))


def test_the_truth_is_told_as_often_as_it_says_and_lies_are_all_alike():
    labels = torch.full((20_000,), 3)
    told = randomised(labels, 1.0, 5, HERE)
    counts = np.bincount(told.numpy(), minlength=5)
    assert binomtest(int(counts[3]), 20_000, truth_probability(1.0, 5)).pvalue > 0.01
    assert chisquare(np.delete(counts, 3)).pvalue > 0.01


def test_the_same_labels_are_told_again_and_others_by_others():
    labels = torch.arange(1000) % 10
    again = randomised(labels, 1.0, 10, HERE)
    assert torch.equal(again, randomised(labels, 1.0, 10, HERE))
    assert not torch.equal(again, randomised(labels, 1.0, 10, Address(2)))


def test_without_a_bound_the_truth_is_told():
    labels = torch.arange(10)
    assert randomised(labels, math.inf, 10, HERE) is labels
    assert torch.equal(randomised(labels, 60.0, 10, HERE), labels)
