"""Clipped sums of gradients: against Opacus, and against gradients that are taken one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsys.models import build
from fedsys.privacy.gradients import ExampleGradients, factors, rounded
from fedsys.privacy.layers import by_example, rule_of
from fedsys.privacy.update import summed_backward
from fedsys.randomness import Address, drawing, rows


def clipped(model, pieces, clip_norm, *, dtype=torch.float32):
    """Return clipped sums by parameter, and the norms, as fedsys computes them."""
    model = copy.deepcopy(model).to(dtype).train()
    examples = ExampleGradients([model], clip_norm)
    first = 0
    with drawing(Address(0), 0, sum(len(y) for _, y in pieces)):
        for piece, (x, y) in enumerate(pieces):
            with rows(first, first + len(y)), examples.recording(piece, len(y)):
                summed_backward(model(x.to(dtype) if x.is_floating_point() else x), y)
            first += len(y)
    squares = examples.squares()
    examples.finish(squares)
    return {n: p.grad for n, p in model.named_parameters()}, squares


def one_by_one(model, x, y, clip_norm):
    """Return clipped sums by a backward for each example, in float64."""
    model = copy.deepcopy(model).double().train()
    x = x.double() if x.is_floating_point() else x
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(y)):
        model.zero_grad(set_to_none=True)
        with drawing(Address(0), 0, len(y)), rows(i, i + 1):
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for name, p in model.named_parameters():
            total[name] += p.grad * min(1.0, clip_norm / (norm.item() + 1e-6))
    return total


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.table(x)).tanh()).mean(1)


class Scale(nn.Module):
    """A layer that no rule knows."""

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, shape))

    def forward(self, x):
        return (x * self.scale.view(-1, 1, 1)).sin()


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 64, 3, dilation=2, bias=False), nn.ReLU(), Scale(64),
        nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(256, 16), nn.Linear(16, 3),
    )  # fmt: skip


def lengthwise():
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), nn.GELU(),
        nn.ConvTranspose1d(6, 5, 2), nn.Linear(6, 3), nn.Flatten(), nn.Linear(15, 3),
    )  # fmt: skip


def drawn(*shape):
    return torch.randn(shape, generator=Address(1).torch("x"))


MODELS = {
    "convolutions": (convolutions, drawn(9, 4, 11, 11)),
    "words": (Words, torch.tensor([[0, 1, 1, 2], [3, 2, 6, 3], [5, 5, 5, 5], [1, 0, 0, 4]])),
    "lengthwise": (lengthwise, drawn(5, 4, 5)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clip_norm", [0.05, 1e3])
def test_sums_are_those_of_gradients_that_are_clipped_one_by_one(name, clip_norm):
    make, x = MODELS[name]
    torch.manual_seed(0)
    model, y = make(), torch.arange(len(x)) % 3
    expected = one_by_one(model, x, y, clip_norm)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-5)):
        whole, _ = clipped(model, [(x, y)], clip_norm, dtype=dtype)
        pieces, _ = clipped(model, [(x[:3], y[:3]), (x[3:], y[3:])], clip_norm, dtype=dtype)
        for key, value in expected.items():
            size = value.norm().item() + 1e-12
            assert (whole[key] - value).norm().item() <= tolerance * size, key
            assert (pieces[key] - value).norm().item() <= tolerance * size, key


def of_opacus(model, x, y, clip_norm, dtype):
    """Return clipped sums by parameter, as the hooks of Opacus compute them."""
    opacus = pytest.importorskip("opacus")
    hooked = opacus.GradSampleModule(copy.deepcopy(model).to(dtype), loss_reduction="sum")
    F.cross_entropy(hooked(x.to(dtype)), y, reduction="sum").backward()
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(hooked.parameters(), 1.0), noise_multiplier=0.0, max_grad_norm=clip_norm,
        expected_batch_size=len(y),
    )  # fmt: skip
    optimizer.clip_and_accumulate()
    return {name: p.summed_grad for name, p in hooked._module.named_parameters()}


def distances(sums, exact):
    return {name: (sums[name].double() - value).norm().item() for name, value in exact.items()}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of Opacus
def test_they_are_those_of_opacus_on_vgg5():
    """The sums are alike to 1e-6 where both compute in float64: some 1e-10 were seen.

    In float32 what autograd gives each is rounded, to 3e-6 of a bias of the first convolution even
    without clipping. Rounding is relative to what is added up, here gradients whose norms are 2;
    their sum is seven times shorter than they are together. Relative to that sum 1e-6 was missed by
    1 %, so this test once asked for 2e-6 of each parameter, which still holds, and said nothing of
    the method: Opacus' own float32 is four times as far from its float64.
    """
    clip_norm, spec = 2.0, {"_target_": "fedsys.models.vgg.vgg5", "norm": "group"}
    model = build(spec, input_shape=(3, 32, 32), num_classes=10, seed=0)
    x, y = drawn(12, 3, 32, 32), torch.arange(12) % 10
    exact = of_opacus(model, x, y, clip_norm, torch.float64)
    ours, _ = clipped(model, [(x, y)], clip_norm, dtype=torch.float64)
    for name, distance in distances(ours, exact).items():
        assert distance <= 1e-6 * exact[name].norm(), name
    rounded_, squares = clipped(model, [(x, y)], clip_norm)
    assert (factors(squares, clip_norm) < 1).all()  # so each of what is added up has the norm 2
    added_up = clip_norm * len(y)
    distance, theirs = (
        distances(sums, exact)
        for sums in (rounded_, of_opacus(model, x, y, clip_norm, torch.float32))
    )
    assert sum(d**2 for d in distance.values()) ** 0.5 <= 1e-6 * added_up
    assert sum(d**2 for d in distance.values()) < sum(d**2 for d in theirs.values())
    for name in exact:
        assert distance[name] <= 2e-6 * exact[name].norm(), name


def test_the_parts_of_a_split_model_clip_by_the_bits_of_the_whole():
    torch.manual_seed(0)
    model, x, y = convolutions(), *(t[:6] for t in (MODELS["convolutions"][1], torch.arange(6) % 3))
    whole, squares = clipped(model, [(x, y)], 0.1)
    for cut in (1, 4, 7):
        front, back = copy.deepcopy(model)[:cut], copy.deepcopy(model)[cut:]
        halves = ExampleGradients([front], 0.1), ExampleGradients([back], 0.1)
        with drawing(Address(0), 0, 6), halves[0].recording(0, 6):
            z = front(x)
        sent = z.detach().requires_grad_()
        with drawing(Address(0), 0, 6), halves[1].recording(0, 6):
            summed_backward(back(sent.clone()), y)
        z.backward(sent.grad)
        total = halves[0].squares() + halves[1].squares()
        assert torch.equal(total, squares)
        for half in halves:
            half.finish(total)
        grads = [p.grad for p in (*front.parameters(), *back.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(grads, whole.values(), strict=True))


def test_layers_have_rules_of_their_own_and_others_are_differentiated_by_example():
    assert rule_of(Scale(3)) is by_example is rule_of(nn.Conv1d(1, 1, 1))
    own = [nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.LayerNorm(1)]
    assert by_example not in map(rule_of, [*own, nn.Embedding(1, 1)])


def test_no_gradient_of_an_example_is_kept_where_it_would_be_large():
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 100), nn.Linear(100, 3))
    examples = ExampleGradients([model], 1.0)
    with examples.recording(0, 5):
        summed_backward(model(drawn(5, 4, 10, 10)), torch.zeros(5, dtype=torch.int64))
    examples.squares()
    assert not any(record.kept for piece in examples._pieces.values() for record in piece.values())


def test_an_example_without_a_finite_gradient_adds_nothing_and_spoils_nothing():
    torch.manual_seed(0)
    model, (x, y) = convolutions(), (MODELS["convolutions"][1].clone(), torch.arange(9) % 3)
    expected, _ = clipped(model, [(x[1:], y[1:])], 0.1)
    x[0] = float("inf")
    found, squares = clipped(model, [(x, y)], 0.1)
    assert factors(squares, 0.1)[0] == 0.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_norm_is_within_its_bound_after_clipping_however_large():
    for norm in (1e-9, 0.5, 1.0, 1.0000001, 3.0, 1e4, 1.2e4, 1e30):
        (factor,) = factors(
            rounded(torch.tensor([norm**2], dtype=torch.float64), 1.0), 1.0
        ).tolist()
        assert 0.0 <= factor * norm <= 1.0
        assert norm > 0.999 or factor == 1.0


def test_modules_are_as_before_when_it_is_over():
    model = convolutions()
    examples = ExampleGradients([model], 1.0)
    examples.close()
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
