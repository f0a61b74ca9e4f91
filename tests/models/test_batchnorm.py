import copy

import pytest
import torch
from torch import nn

from fedsys.models import convert_norm
from fedsys.models.batchnorm import BatchMoments, DeferredBatchNorm
from fedsys.models.graph import trace
from fedsys.pruning.dense.architecture import load, save
from fedsys.randomness import Address, drawing, rows
from fedsys.training.schedule import micro_batch_bounds

SIZES = (11, 7, 6, 9)
SHAPES = {"maps": (3, 5, 5), "features": (3,), "tokens": (3, 6)}


def batches(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [5 + 2 * torch.randn(n, *shape, generator=generator, dtype=dtype) for n in SIZES]


def pair(shape, dtype=torch.float64, **options):
    """Return torch's BatchNorm and the deferred one, with the same parameters."""
    made = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](3, **options)
    made = made.to(dtype)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return made, DeferredBatchNorm.like(copy.deepcopy(made))


def in_pieces(module, x, m, step=0, upto=None):
    outputs = []
    with drawing(Address(0), step, len(x)):
        for start, stop in list(micro_batch_bounds(len(x), m))[:upto]:
            with rows(start, stop):
                outputs.append(module(x[start:stop]))
    return torch.cat(outputs)


def assert_same_buffers(a, b):
    for name, buffer in a.named_buffers():
        torch.testing.assert_close(dict(b.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_running_statistics_are_those_of_mini_batches_and_outputs_those_of_pieces(
    shape, m, momentum
):
    torchs, ours = pair(shape, momentum=momentum)
    by_piece = copy.deepcopy(torchs)
    for step, x in enumerate(batches(shape)):
        torchs(x)
        got = in_pieces(ours, x, m, step)
        assert torch.equal(got, in_pieces(by_piece, x, m, step))
    assert_same_buffers(torchs, ours)
    assert int(ours.num_batches_tracked) == len(SIZES)
    # what is repaired: torch's own has moved m times a step, to values of the pieces
    assert int(by_piece.num_batches_tracked) == m * len(SIZES)
    assert not torch.allclose(by_piece.running_var, torchs.running_var, rtol=1e-3)


def test_one_piece_goes_the_way_of_torch_with_the_same_bits():
    torchs, ours = pair((3, 5, 5), torch.float32)
    for x in batches((3, 5, 5), torch.float32):
        assert torch.equal(torchs(x), in_pieces(ours, x, 1))
        assert torch.equal(torchs(x), ours(x))  # outside of a step too
    assert all(torch.equal(a, b) for a, b in zip(torchs.buffers(), ours.buffers(), strict=True))


def test_gradients_are_those_of_the_pieces():
    torchs, ours = pair((3, 5, 5))
    x = batches((3, 5, 5))[0]
    for module in (torchs, ours):
        in_pieces(module, x, 3).square().mul(
            torch.arange(11.0)[:, None, None, None]
        ).sum().backward()
    assert torch.equal(torchs.weight.grad, ours.weight.grad)


def test_a_step_that_is_begun_again_counts_once():
    """An edge server went in the middle of a step, and both halves repeat it."""
    torchs, ours = pair((3,))
    x = batches((3,))[0]
    in_pieces(ours, x + 100, 3, upto=2)
    in_pieces(ours, x, 3)
    torchs(x)
    assert_same_buffers(torchs, ours)


def test_evaluation_uses_the_statistics_and_leaves_them_in_the_middle_of_a_step_too():
    _, ours = pair((3,))
    x, z = batches((3,))[:2]
    with drawing(Address(0), 0, len(x)):
        with rows(0, 6):
            ours(x[:6])
        before = [b.clone() for b in ours.buffers()]
        assert torch.equal(ours.eval()(z), pair((3,))[0].eval()(z))
        assert all(torch.equal(a, b) for a, b in zip(before, ours.buffers(), strict=True))
        with rows(6, 11):
            ours.train()(x[6:])
    torchs, _ = pair((3,))
    torchs(x)
    assert_same_buffers(torchs, ours)


def test_a_layer_that_is_called_twice_moves_twice_as_torchs_does():
    torchs, ours = pair((3,))
    for x in batches((3,)):
        torchs(2 * x)
        torchs(x - 7)
        with drawing(Address(0), 0, len(x)):
            for start, stop in micro_batch_bounds(len(x), 3):
                with rows(start, stop):
                    ours(2 * x[start:stop])
                    ours(x[start:stop] - 7)
    assert_same_buffers(torchs, ours)


def test_an_input_without_channels_is_refused():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        pair((3,))[1](torch.zeros(3))


def test_any_model_can_be_converted_traced_and_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU())
    names = list(model.state_dict())
    convert_norm(model, "deferred")
    assert isinstance(model[1], DeferredBatchNorm)
    assert list(model.state_dict()) == names
    unchanged = nn.BatchNorm2d(4, track_running_stats=False)  # has nothing to defer
    assert type(convert_norm(nn.Sequential(unchanged), "deferred")[0]) is nn.BatchNorm2d
    traced = trace(model)
    in_pieces(traced, torch.randn(6, 3, 8, 8), 2)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(save(traced, tmp_path / "v"))(x), model.eval()(x))


def test_moments_of_half_precision_are_not_rounded_to_it():
    """Pieces under autocast took running means and variances of eight bits."""
    x = (30 + 0.5 * torch.randn(64, 3, 4, 4, generator=Address(0).torch("x"))).bfloat16()
    seen = BatchMoments.of(x[:32]) + BatchMoments.of(x[32:])
    wide = x.double()
    assert torch.allclose(seen.mean, wide.mean((0, 2, 3)), rtol=1e-6)
    variance = wide.var((0, 2, 3), correction=0)
    assert torch.allclose(seen.deviations / seen.count, variance, rtol=1e-4)
