"""Losses and metrics by name and of one's own: closed forms, and sums over pieces."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedsys.config.task import KINDS, TaskConfig, check
from fedsys.errors import ConfigError
from fedsys.runs import resume
from fedsys.training.schedule import micro_batch_bounds
from fedsys.training.tasks import CLASSIFICATION, task_of

OWN = "tests.own_work"
DRAW = torch.Generator().manual_seed(0)
CASES = {
    "classification": (torch.randn(7, 4, generator=DRAW), torch.arange(7) % 4),
    "multilabel": (torch.randn(7, 3, generator=DRAW), (torch.arange(21) % 2).reshape(7, 3) * 1.0),
    "regression": (torch.randn(7, 2, generator=DRAW), torch.randn(7, 2, generator=DRAW)),
    "segmentation": (
        torch.randn(7, 3, 2, 2, generator=DRAW),
        torch.arange(28).reshape(7, 2, 2) % 3,
    ),
    "next_token": (torch.randn(7, 5, 6, generator=DRAW), torch.arange(35).reshape(7, 5) % 6),
}


def test_every_kind_has_a_case():
    assert CASES.keys() == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_metrics_of_pieces_add_up_to_those_of_the_mini_batch(kind, configure):
    task = task_of(configure(f"task={kind}"))
    outputs, targets = CASES[kind]
    bounds = list(micro_batch_bounds(7, 3))
    parts = [task.loss(outputs[a:b], targets[a:b], (b - a) / 7) for a, b in bounds]
    assert float(sum(parts)) == pytest.approx(float(task.loss(outputs, targets, 1.0)), rel=1e-6)
    sums = [task.total(outputs[a:b], targets[a:b]) for a, b in bounds]
    assert sum(each.item() for each in sums) == pytest.approx(task.total(outputs, targets).item())
    assert task.nothing(torch.device("cpu")).dtype == sums[0].dtype
    whole = float(task.summed(outputs, targets))
    assert whole == pytest.approx(7 * float(task.loss(outputs, targets, 1.0)), rel=1e-6)


def test_a_metric_is_the_mean_of_a_number_for_each_example(configure):
    outputs, targets = CASES["regression"]
    mae = task_of(configure("task=regression")).total(outputs, targets) / 7
    assert float(mae) == pytest.approx(float((outputs - targets).abs().mean()), rel=1e-6)
    tokens, following = CASES["next_token"]
    hits = task_of(configure("task=next_token")).total(tokens, following) / 7
    assert float(hits) == pytest.approx(float((tokens.argmax(-1) == following).double().mean()))
    scores = torch.tensor([[2.0, -1.0, -3.0], [1.0, 1.0, 1.0]])
    truth = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    right = task_of(configure("task=multilabel")).total(scores, truth)
    assert float(right) == pytest.approx(1 + 1 / 3)


def test_an_untrained_model_of_language_has_the_entropy_of_its_vocabulary(configure):
    task = task_of(configure("task=next_token"))
    loss = task.loss(torch.zeros(2, 5, 256), torch.zeros(2, 5, dtype=torch.int64), 1.0)
    assert float(loss) == pytest.approx(math.log(256))


def test_classification_is_the_same_object_as_ever(configure):
    """Its hashes are those of before: nothing stands between it and the cross-entropy."""
    config = configure()
    assert task_of(config) is CLASSIFICATION
    outputs, labels = CASES["classification"]
    assert torch.equal(CLASSIFICATION.loss(outputs, labels, 1.0), F.cross_entropy(outputs, labels))
    assert CLASSIFICATION.total(outputs, labels).dtype == torch.int64
    assert resume.digest(config) == resume.digest(configure("task=classification"))
    own = configure(f"task.loss={{_target_:{OWN}.steep}}")
    assert resume.digest(config) != resume.digest(own)
    assert resume.digest(config) != resume.digest(configure("task=multilabel"))


def test_a_loss_of_the_users_own_may_take_the_weight_or_leave_it(configure):
    outputs, targets = CASES["regression"]
    steep = task_of(configure("task=regression", f"task.loss={{_target_:{OWN}.steep}}"))
    mean = float((outputs - targets).abs().pow(1.5).mean())
    assert float(steep.loss(outputs, targets, 0.25)) == pytest.approx(0.25 * mean)
    weighted = task_of(configure("task=regression", f"task.loss={{_target_:{OWN}.weighted}}"))
    found = float(weighted.loss(outputs, targets, 0.25))
    assert found == pytest.approx(0.25 * float(F.mse_loss(outputs, targets)))
    classes = task_of(configure("task.loss={_target_:torch.nn.functional.cross_entropy}"))
    whole = F.cross_entropy(*CASES["classification"])  # whose weight is one of classes
    assert torch.equal(classes.loss(*CASES["classification"], 0.5), whole * 0.5)
    made = "task.loss={_target_:torch.nn.HuberLoss,delta:0.5}"
    huber = task_of(configure("task=regression", made)).loss(outputs, targets, 1.0)
    assert torch.equal(huber, F.huber_loss(outputs, targets, delta=0.5))


def test_a_metric_of_the_users_own_has_a_name_and_a_direction(configure):
    own = f"task.metric={{_target_:{OWN}.worst,name:worst_error,higher:false}}"
    config = configure("task=regression", own)
    outputs, targets = CASES["regression"]
    expected = (outputs - targets).abs().amax(1).double().sum()
    assert torch.equal(task_of(config).total(outputs, targets), expected)
    assert config.task.measure.title == "worst error" and not config.task.measure.higher


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["task.kind=regressio"], "did you mean 'regression'?"),
        (["task=regression", "task.loss=msee"], "did you mean 'mse'?"),
        (["task=regression", "task.metric=accuracy"], "is not of task=regression"),
        (["task=regression", "task.metric=maee"], "did you mean 'mae'?"),
        # a class was taken off ten outputs, and the entropy of one output is 0: all was learned
        (["task.metric=mse"], "task.metric=mse: is not of task=classification; accuracy is"),
        (["task.loss=mse"], "task.loss=mse: is not of task=classification; cross_entropy is"),
        (["task=next_token", "task.metric=mae"], "is not of task=next_token; token_accuracy is"),
        (["task=regression", "task.loss=cross_entropy"], "is not of task=regression; mse is"),
        (["task.metric={_target_:tests.own_work.worst}"], "task.metric.name"),
        (["task.metric={_target_:tests.own_work.worst,name:loss}"], "that no other metric has"),
        (["task.loss={path:x}"], "must name a function or a class"),
        (["task=regression", "privacy=record"], "by the cross-entropy; privacy=none or client"),
        (["task=regression", "privacy=cut"], "cannot be with task=regression"),
        (["task=multilabel", "resilience=joint"], "trains exits by the cross-entropy"),
        (["task=regression", "pruning=snip"], "pruning=magnitude"),
        (["task.loss={_target_:tests.own_work.steep}", "privacy=record"], "task=own loss"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(given, told, configure):
    with pytest.raises(ConfigError) as refused:
        configure(*given)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("task.loss={_target_:tests.own_work.nothing}", "cannot be imported"),
        ("task.loss={_target_:tests.own_work.rows_of_losses}", "take .mean() of it"),
        ("task.metric={_target_:tests.own_work.steep,name:s}", "for each of the 7 examples"),
    ],
)
def test_functions_that_do_not_suit_are_told_when_they_are_called(option, told, configure):
    config = configure("task=regression", option)
    with pytest.raises(ConfigError) as refused:
        task = task_of(config)
        task.loss(*CASES["regression"], 1.0)
        task.total(*CASES["regression"])
    assert told in str(refused.value)


def test_errors_are_of_numbers_whatever_is_learned_of_them():
    for kind in ("regression", "multilabel"):
        for metric in ("mae", "mse"):
            check(TaskConfig(kind, "huber", metric))


def test_what_is_shown_of_a_task_needs_no_library():
    assert TaskConfig("regression").loss_unit == "mean squared error"
    assert TaskConfig("regression", "huber").loss_unit == "huber"
    assert TaskConfig().usual and not TaskConfig("next_token").usual
