"""Losses and metrics by name and of one's own: closed forms, and sums over pieces."""

import math
import sys

import pytest
import torch
from torch.nn import functional as F

from clients.local import train_metrics
from fedsys.config.task import KINDS, WHOLE, TaskConfig, check
from fedsys.errors import ConfigError
from fedsys.runs import resume
from fedsys.training.plain import RunningScore, score_of
from fedsys.training.schedule import micro_batch_bounds
from fedsys.training.tasks import CLASSIFICATION, task_of
from tests.own_work import determination

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


# --------------------------------------------------------------------------------------------------
# Metrics that are no mean over examples

SPREAD = f"task.metric={{_target_:{OWN}.Spread,name:spread,higher:false}}"
DETERMINATION = f"task.metric={{_target_:{OWN}.determination,name:rsq,whole:true}}"


def scored(task, outputs, targets, size):
    """Score what is made of inputs that are the outputs, in mini-batches."""
    batches = zip(outputs.split(size), targets.split(size), strict=True)
    return score_of(lambda x: x, batches, torch.device("cpu"), task)


@pytest.mark.parametrize("size", [7, 3, 1])
def test_a_metric_of_a_whole_part_is_that_of_all_at_once_whatever_the_mini_batches(size, configure):
    outputs, targets = CASES["regression"]
    errors = (outputs - targets)[:, :1]
    task = task_of(configure("task=regression", SPREAD))
    found = scored(task, outputs[:, :1], targets[:, :1], size)
    assert found.accuracy == pytest.approx(float(errors.max() - errors.min()))
    assert found.loss == pytest.approx(float(errors.square().mean()), rel=1e-6)
    assert found == scored(task, outputs[:, :1], targets[:, :1], size), "it starts anew"
    by_function = task_of(configure("task=regression", DETERMINATION))
    expected = determination(outputs.double(), targets.double())
    assert scored(by_function, outputs, targets, size).accuracy == pytest.approx(expected)
    assert math.isnan(scored(task, outputs[:0], targets[:0], size).accuracy)


def test_nothing_is_said_of_it_while_mini_batches_are_trained(configure):
    config = configure("task=regression", SPREAD)
    tally = RunningScore(task_of(config), torch.device("cpu"))
    tally.add(*CASES["regression"], torch.tensor(0.5), 7)
    score = tally.score(1)
    assert math.isnan(score.accuracy) and score.loss == 0.5
    assert set(train_metrics(score, config, 0, 1.0)) == {
        "num-examples", "train_loss", "steps", "client_seconds"
    }  # fmt: skip
    assert "train_mae" in train_metrics(score, configure("task=regression"), 0, 1.0)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (SPREAD.replace("false", "true"), "must be false, as tests.own_work.Spread says"),
        (f"task.metric={{_target_:{OWN}.shares,name:s,whole:true}}", "average=macro"),
        (f"task.metric={{_target_:{OWN}.steep,name:s}}", "task.metric.whole=true"),
        (f"task.metric={{_target_:{OWN}.Words,name:s}}", "must be a function"),
    ],
)
def test_a_metric_that_does_not_suit_is_refused_with_the_way_out(metric, told, configure):
    with pytest.raises(ConfigError) as refused:
        scored(task_of(configure("task=regression", metric)), *CASES["regression"], 4)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "metric"), [(kind, metric) for kind in KINDS for metric in WHOLE[kind]]
)
def test_those_of_torchmetrics_have_names_and_do_not_depend_on_mini_batches(
    kind, metric, configure
):
    """Accuracy of logits that are all between 0 and 1 was 50 % one by one, and 100 % at once."""
    pytest.importorskip("torchmetrics")
    task = task_of(configure(f"task={kind}", f"task.metric={metric}"))
    outputs, targets = CASES[kind]
    if kind != "regression":
        outputs = outputs.sigmoid()  # as if they were probabilities
    found = [scored(task, outputs, targets, size).accuracy for size in (7, 2, 1)]
    assert found[0] == found[1] == found[2] and math.isfinite(found[0])
    if metric == "perplexity":
        loss = scored(task, outputs, targets, 7).loss
        assert found[0] == pytest.approx(math.exp(loss), rel=1e-6)


def test_r2_of_large_targets_is_computed_in_float64(configure):
    """In float32 it is 0 for a model that is right to 0.01 around 100,000."""
    pytest.importorskip("torchmetrics")
    targets = torch.arange(16.0)[:, None] + 65536
    own = "task.metric={_target_:torchmetrics.R2Score,name:rsq}"
    for given in ("task.metric=r2", own):
        task = task_of(configure("task=regression", given))
        assert scored(task, targets + 2**-6, targets, 16).accuracy == pytest.approx(1.0, abs=1e-3)


def test_f1_is_that_of_its_definition(configure):
    pytest.importorskip("torchmetrics")
    outputs, targets = CASES["classification"]
    guessed, each = outputs.argmax(1), []
    for k in range(4):
        hits = int(((guessed == k) & (targets == k)).sum())
        each.append(2 * hits / int((guessed == k).sum() + (targets == k).sum()))
    task = task_of(configure("task.metric=f1"))
    assert scored(task, outputs, targets, 4).accuracy == pytest.approx(sum(each) / 4)


OTHER = "task.loss={_target_:torch.nn.functional.cross_entropy}"
"""Of no test before, as tasks are kept."""


def test_without_torchmetrics_its_names_say_what_to_install(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(
        ConfigError, match=r"task\.metric=iou: needs torchmetrics.*fedsys\[metrics\]"
    ):
        task_of(configure("task=segmentation", "task.metric=iou", OTHER))


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
        # nothing was learned, without a word
        ("task.loss={_target_:tests.own_work.detached}", "leave .detach()"),
        # were "none of 2 clients succeeded; RuntimeError", with no word of the loss
        ("task.loss={_target_:tests.own_work.crossed}", "of (7, 2) and (7, 2) it raises Runtime"),
        ("task.metric={_target_:tests.own_work.crossed,name:s}", "task.metric=tests.own_work.cro"),
    ],
)
def test_functions_that_do_not_suit_are_told_when_they_are_called(option, told, configure):
    config = configure("task=regression", option)
    with pytest.raises(ConfigError) as refused:
        task = task_of(config)
        outputs, targets = CASES["regression"]
        task.loss(outputs.clone().requires_grad_(), targets, 1.0)
        task.total(outputs, targets)
    assert told in str(refused.value)


def test_errors_are_of_numbers_whatever_is_learned_of_them():
    for kind in ("regression", "multilabel"):
        for metric in ("mae", "mse"):
            check(TaskConfig(kind, "huber", metric))


def test_what_is_shown_of_a_task_needs_no_library():
    assert TaskConfig("regression").loss_unit == "mean squared error"
    assert TaskConfig("regression", "huber").loss_unit == "huber"
    assert TaskConfig().usual and not TaskConfig("next_token").usual
