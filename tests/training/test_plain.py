import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedsys.errors import ConfigError, ModelError
from fedsys.randomness import Address, KeyedDropout
from fedsys.training.plain import (
    Proximal,
    clip_gradients,
    device_of,
    evaluate,
    forward,
    lay_out,
    loss_of,
    pick_device,
    set_threads,
    squared_norms,
    train,
)
from fedsys.training.schedule import micro_batch_bounds

HERE = Address(seed=1, client=2, round=3)
P = 0.5


def network(*, norm=True, dropout=True, dtype=torch.float32, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            KeyedDropout("4", P) if dropout else nn.Identity(),
            nn.Linear(4 * 6 * 6, 5),
        ]
        return nn.Sequential(*layers).to(dtype)


def data(*sizes, dtype=torch.float32):
    """Return batches of these sizes."""
    generator = Address(9).torch("data")
    return [
        (
            torch.randn(n, 1, 6, 6, generator=generator).to(dtype),
            torch.randint(0, 5, (n,), generator=generator),
        )
        for n in sizes
    ]


class Given(nn.Module):
    """Dropout by a mask that somebody else holds."""

    def __init__(self):
        super().__init__()
        self.mask = torch.ones(())

    def forward(self, x):
        return x * self.mask


def plain_loop(model, optimizer, batches, m=1, first_step=0, penalty=None):
    """Train as a PyTorch tutorial does; masks and pieces are made without fedsys' code."""
    given = Given()
    if isinstance(model[4], KeyedDropout):
        model[4] = given
    model.train()
    total, correct, seen = 0.0, 0, 0
    for step, (x, y) in enumerate(batches, first_step):
        seed = HERE.seed_for("dropout", step, "4")
        uniform = torch.rand(len(y), 4 * 6 * 6, generator=torch.Generator().manual_seed(seed))
        mask = (uniform >= P).to(x.dtype) / (1 - P)
        optimizer.zero_grad()
        for rows in np.array_split(np.arange(len(y)), min(m, len(y))):
            given.mask = mask[rows]
            outputs = model(x[rows])
            loss = F.cross_entropy(outputs, y[rows])
            (loss * (len(rows) / len(y))).backward()
            total += loss.item() * len(rows)
            correct += int((outputs.argmax(1) == y[rows]).sum())
        if penalty is not None:
            penalty(model).backward()
        optimizer.step()
        seen += len(y)
    return total / seen, correct / seen


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def assert_same_bits(model, other):
    own, others = model.state_dict(), other.state_dict()
    assert list(own) == list(others)
    for name, tensor in own.items():
        assert torch.equal(tensor, others[name]), name


# --------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_training_is_the_plain_loop_to_the_bit(optimizer, m):
    ours, theirs = network(), network()
    batches = data(10, 10, 7, 14)  # seven micro-batches of 10 are unequal, of 7 single examples
    score = train(ours, OPTIMIZERS[optimizer](ours.parameters()), batches, HERE, micro_batches=m)
    loss, accuracy = plain_loop(theirs, OPTIMIZERS[optimizer](theirs.parameters()), batches, m=m)
    assert_same_bits(ours, theirs)
    assert (score.examples, score.steps, score.accuracy) == (41, 4, accuracy)
    assert score.loss == pytest.approx(loss, rel=1e-6)


def test_a_part_of_an_epoch_goes_on_where_the_part_before_ended():
    batches = data(8, 8, 5)
    whole, parts = network(), network()
    train(whole, OPTIMIZERS["momentum"](whole.parameters()), batches, HERE)
    optimizer = OPTIMIZERS["momentum"](parts.parameters())
    train(parts, optimizer, batches[:2], HERE)
    train(parts, optimizer, batches[2:], HERE, first_step=2)
    assert_same_bits(whole, parts)


@pytest.mark.parametrize("m", [2, 3, 8])
def test_micro_batches_are_the_whole_batch_up_to_rounding(m):
    batches = data(*[8] * 50, dtype=torch.float64)
    models = [network(norm=False, dtype=torch.float64) for _ in range(2)]
    for model, pieces_ in zip(models, (1, m), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, optimizer, batches, HERE, micro_batches=pieces_)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.equal(models[0][5].weight, network(dtype=torch.float64)[5].weight)


@pytest.mark.parametrize("m", [2, 3, 8])
def test_one_step_in_micro_batches_is_that_of_the_whole_batch_to_a_millionth(m):
    """More steps would say nothing: float32 rounding grows from 1e-8 to 1e-2 in 60 of them."""
    models = [network(norm=False) for _ in range(2)]
    for model, pieces_ in zip(models, (1, m), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, optimizer, data(8), HERE, micro_batches=pieces_)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_draws_of_training_depend_on_the_address():
    states = []
    for address in (HERE, HERE, Address(1, 2, 4)):
        model = network()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), data(8), address)
        states.append(model[5].weight.detach())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_no_examples_train_nothing_and_have_no_score():
    model = network()
    score = train(model, torch.optim.SGD(model.parameters(), lr=0.1), [], HERE)
    assert math.isnan(score.loss) and math.isnan(score.accuracy)
    assert (score.examples, score.steps) == (0, 0)
    assert_same_bits(model, network())
    assert math.isnan(evaluate(model, []).loss)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_pieces_are_those_of_array_split(size, m):
    expected = np.array_split(np.arange(size), min(size, m))
    assert [list(range(*p)) for p in micro_batch_bounds(size, m)] == [
        list(rows) for rows in expected
    ]


def test_weighted_losses_add_up_to_the_mean():
    outputs = torch.randn(7, 3, generator=HERE.torch("x"), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    parts = [loss_of(outputs[a:b], labels[a:b], (b - a) / 7) for a, b in micro_batch_bounds(7, 3)]
    assert float(sum(parts)) == pytest.approx(float(loss_of(outputs, labels, 1.0)), rel=1e-12)


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_an_evaluation_is_the_mean_over_examples_and_changes_nothing():
    model = network()
    model[1].running_mean.fill_(0.3)
    before = copy.deepcopy(model)
    batches = data(6, 3)
    score = evaluate(model, batches)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    outputs = copy.deepcopy(model).eval()(x)
    assert score.loss == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert score.accuracy == float((outputs.argmax(1) == y).double().mean())
    assert (score.examples, score.steps) == (9, 0)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert_same_bits(model, before)
    model.eval()
    evaluate(model, batches)
    assert not model.training


# --------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("m", [1, 3])
def test_fedprox_is_the_gradient_of_its_penalty(m):
    mu, batches = 0.7, data(6, 6, 6, dtype=torch.float64)
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    start = [p.detach().clone() for p in theirs.parameters()]

    def penalty(model):
        pairs = zip(model.parameters(), start, strict=True)
        return mu / 2 * sum((p - s).pow(2).sum() for p, s in pairs)

    anchor = Proximal.at(ours, mu)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    train(ours, optimizer, batches, HERE, micro_batches=m, anchor=anchor)
    plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), batches, m, penalty=penalty)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_anchor_stays_where_the_round_began_and_skips_what_has_no_gradient():
    model = network()
    anchor = Proximal.at(model, 1.0)
    with torch.no_grad():
        model[5].weight.add_(2.0)
    model[5].weight.grad = torch.zeros_like(model[5].weight)
    anchor.add_to_gradients(dict(model.named_parameters()))
    torch.testing.assert_close(model[5].weight.grad, torch.full_like(model[5].weight, 2.0))
    assert model[5].bias.grad is None


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 10**6))
def test_clipping_is_that_of_torch(bound, seed):
    ours, theirs = network(), network()
    generator = Address(seed).torch("gradients")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
    ours[0].bias.grad = theirs[0].bias.grad = None
    named = dict(ours.named_parameters())
    total = clip_gradients(named, bound, squared_norms(named))
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
    assert total == pytest.approx(float(expected), rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    if total > bound:
        clipped = math.sqrt(sum(squared_norms(named).values()))
        assert clipped == pytest.approx(bound, rel=1e-5)


def test_two_machines_that_know_all_norms_clip_by_one_factor():
    whole, halves = network(), network()
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=HERE.torch("g"))
        q.grad = p.grad.clone()
    named, split = dict(whole.named_parameters()), dict(halves.named_parameters())
    clip_gradients(named, 0.5, squared_norms(named))
    device = {n: p for n, p in split.items() if n.startswith("0")}
    edge = {n: p for n, p in split.items() if not n.startswith("0")}
    norms = squared_norms(edge) | squared_norms(device)
    for half in (device, edge):
        clip_gradients(half, 0.5, norms)
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_clipped_training_moves_by_no_more_than_the_bound():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), data(8), HERE, clip_norm=0.01)
    with torch.no_grad():
        moved = [p - b for p, b in zip(model.parameters(), before, strict=True)]
    assert 0.009 < torch.cat([d.flatten() for d in moved]).norm() <= 0.0100001


# --------------------------------------------------------------------------------------------------
# Batches of one example


def one_pixel():
    """Return a model whose BatchNorm sees maps of one pixel."""
    layers = [nn.Conv2d(1, 4, 6), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("size", "m"), [(1, 1), (4, 4), (3, 2)])
def test_a_variance_of_one_value_names_the_module_and_the_way_out(size, m):
    model = nn.ModuleDict({"stem": one_pixel()})["stem"]
    with pytest.raises(ModelError, match=r"1 \(BatchNorm2d\): gets one value per channel.*norm=gr"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), data(size), HERE, micro_batches=m)


def test_batches_of_one_example_train_where_maps_have_more_than_one_pixel():
    model = network()
    score = train(model, torch.optim.SGD(model.parameters(), lr=0.1), data(1, 1), HERE)
    assert score.steps == 2 and math.isfinite(score.loss)


def test_other_errors_of_a_model_pass_unchanged():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        forward(Broken(), torch.ones(1))


# --------------------------------------------------------------------------------------------------
# Devices and threads


def test_a_device_is_picked_by_what_there_is(monkeypatch):
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device("cpu").type == "cpu"
        assert pick_device("auto").type == ("cuda" if available else "cpu")
    assert pick_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"client\.device=cuda: no CUDA device .*use auto or cpu"):
        pick_device("cuda")


def test_the_device_of_a_model_is_that_of_its_tensors():
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


def test_the_layout_of_weights_decides_that_of_activations_and_no_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    before = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    for name, layout in (
        ("channels_last", torch.channels_last),
        ("contiguous", torch.contiguous_format),
    ):
        assert lay_out(model, name) is model
        assert model[1](model[0](torch.rand(2, 3, 4, 4))).is_contiguous(memory_format=layout)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_threads_are_set_for_what_follows():
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        set_threads(before)
    assert torch.get_num_threads() == before
