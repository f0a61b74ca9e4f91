import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedsys.errors import ModelError
from fedsys.randomness import (
    SERVER,
    Address,
    KeyedDropout,
    check_keyed,
    drawing,
    key_modules,
    rows,
    seeded_default_generator,
)

HERE = Address(seed=1, client=2, round=3)
INT64 = st.integers(-(2**63), 2**63 - 1)


def mask(address=HERE, step=0, *, name="drop", p=0.5, shape=(8, 4), spread="element"):
    """Return what a dropout layer does to ones."""
    layer = KeyedDropout(name, p, spread)
    with drawing(address, step, shape[0]):
        return layer(torch.ones(shape))


# --------------------------------------------------------------------------------------------------
# Addresses


@settings(max_examples=50, deadline=None)
@given(INT64, INT64, INT64, INT64, st.text(), st.text())
def test_a_seed_is_a_function_of_its_address_and_fits_in_63_bits(
    seed, client, round_, step, purpose, name
):
    seed_of = Address(seed, client, round_).seed_for(purpose, step, name)
    assert seed_of == Address(seed, client, round_).seed_for(purpose, step, name)
    assert 0 <= seed_of < 2**63


def test_every_part_of_an_address_changes_the_seed():
    seeds = [
        Address(0).seed_for("a"),
        Address(1).seed_for("a"),
        Address(0, client=0).seed_for("a"),
        Address(0, round=1).seed_for("a"),
        Address(0).seed_for("b"),
        Address(0).seed_for("a", step=1),
        Address(0).seed_for("a", name="n"),
        Address(0, client=1, round=0).seed_for("a"),
        Address(0, client=0, round=1).seed_for("a"),
        Address(0).seed_for("ab"),
        Address(0).seed_for("a", name="b"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert Address(0) == Address(0, client=SERVER, round=0)


def test_a_seed_is_the_documented_hash():
    import hashlib

    message = b"".join(n.to_bytes(8, "little", signed=True) for n in (7, -1, 2, 5)) + b"shuffle\0fc"
    digest = hashlib.blake2b(message, digest_size=8).digest()
    assert Address(7, round=2).seed_for("shuffle", 5, "fc") == int.from_bytes(digest, "little") >> 1


def test_generators_of_one_address_draw_the_same_and_of_two_differ():
    one, same, other = (Address(s).numpy("x").random(5) for s in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    one, same, other = (torch.rand(5, generator=Address(s).torch("x")) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# --------------------------------------------------------------------------------------------------
# The process-wide generator


def test_the_default_generator_is_seeded_for_a_block_and_goes_on_as_if_nothing_had_been():
    before = torch.get_rng_state()
    with seeded_default_generator(5):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(KeyError), seeded_default_generator(5):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_do_not_touch_the_process_wide_generators():
    model = nn.Sequential(nn.Linear(4, 4), KeyedDropout("d", 0.5))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    mask()
    check_keyed(model, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


# --------------------------------------------------------------------------------------------------
# Masks


def test_a_mask_changes_with_seed_client_round_step_and_name():
    masks = [
        mask(shape=(16, 16)),
        mask(Address(9, 2, 3), shape=(16, 16)),
        mask(Address(1, 9, 3), shape=(16, 16)),
        mask(Address(1, 2, 9), shape=(16, 16)),
        mask(step=9, shape=(16, 16)),
        mask(name="other", shape=(16, 16)),
    ]
    assert len({m.numpy().tobytes() for m in masks}) == len(masks)
    assert torch.equal(masks[0], mask(shape=(16, 16)))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(["element", "channel", "example", "batch"]))
def test_micro_batches_in_any_order_use_their_rows_of_one_mask(data, spread):
    size = data.draw(st.integers(1, 9))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=size)))
    bounds = [0, *(c for c in cuts if c < size), size]
    spans = data.draw(st.permutations(list(itertools.pairwise(bounds))))
    x = torch.randn(size, 3, 2, generator=HERE.torch("test"))
    layer = KeyedDropout("drop", 0.5, spread)
    with drawing(HERE, 4, size):
        whole = layer(x)
    pieces = torch.empty_like(x)
    with drawing(HERE, 4, size):
        for start, stop in spans:
            with rows(start, stop):
                pieces[start:stop] = layer(x[start:stop])
    assert torch.equal(pieces, whole)


def test_masks_do_not_depend_on_the_thread_or_on_other_layers():
    expected = {name: mask(name=name) for name in "abcd"}
    barrier = threading.Barrier(4)

    def draw(name):
        barrier.wait(timeout=30)
        return mask(name=name)

    with ThreadPoolExecutor(4) as pool:
        drawn = dict(zip("dcba", pool.map(draw, "dcba"), strict=True))
    assert all(torch.equal(drawn[name], expected[name]) for name in "abcd")


def test_a_step_of_one_thread_is_unknown_to_another():
    with ThreadPoolExecutor(1) as pool, drawing(HERE, 0, 4):
        lost = pool.submit(KeyedDropout("drop", 0.5), torch.ones(4, 2))
        with pytest.raises(ModelError, match="needs an address"):
            lost.result()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_zeroes_a_share_of_p_and_keeps_the_mean(p):
    drawn = mask(p=p, shape=(1000, 200))
    n, scale = drawn.numel(), 1 / (1 - p)
    zeros = int((drawn == 0).sum())
    assert abs(zeros - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert drawn.unique().tolist() == pytest.approx([0.0, scale])
    flat = drawn.flatten().double()
    correlation = float(torch.corrcoef(torch.stack([flat[1:], flat[:-1]]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("spread", "varies"),
    [("element", (0, 1, 2)), ("channel", (0, 1)), ("example", (0,)), ("batch", ())],
)
def test_a_draw_reaches_as_far_as_its_spread_says(spread, varies):
    drawn = mask(shape=(16, 8, 6), spread=spread)
    for dim in range(3):
        first = drawn.narrow(dim, 0, 1).expand_as(drawn)
        assert torch.equal(drawn, first) == (dim not in varies)


def test_p_of_zero_and_one_need_no_draw():
    assert torch.equal(mask(p=0.0), torch.ones(8, 4))
    assert torch.equal(mask(p=1.0), torch.zeros(8, 4))


def test_a_module_called_twice_in_a_forward_draws_anew_and_the_same_in_micro_batches():
    layer = KeyedDropout("drop", 0.5)
    x = torch.ones(8, 16)
    with drawing(HERE, 0, 8):
        with rows(0, 8):
            first, second = layer(x), layer(x)
        with rows(4, 8):
            again = layer(x[4:]), layer(x[4:])
    assert not torch.equal(first, second)
    assert torch.equal(again[0], first[4:]) and torch.equal(again[1], second[4:])


def test_evaluation_changes_nothing_and_needs_no_address():
    x = torch.randn(4, 4, generator=HERE.torch("x"))
    assert torch.equal(KeyedDropout("drop", 0.5).eval()(x), x)


def test_steps_nest_and_end():
    with drawing(HERE, 0, 8):
        inner = mask(step=1)
        outer = KeyedDropout("drop", 0.5)(torch.ones(8, 4))
    assert torch.equal(outer, mask(step=0)) and torch.equal(inner, mask(step=1))
    with pytest.raises(ModelError, match="drop: dropout in training mode needs an address"):
        KeyedDropout("drop", 0.5)(torch.ones(8, 4))


def test_rows_that_were_not_announced_are_an_error_with_the_way_out():
    with (
        drawing(HERE, 0, 8),
        pytest.raises(ModelError, match=r"drop: got 3 rows where the step said 8; announce"),
    ):
        KeyedDropout("drop", 0.5)(torch.ones(3, 4))
    with pytest.raises(ModelError, match=r"rows: must be used inside drawing"), rows(0, 1):
        pass


# --------------------------------------------------------------------------------------------------
# Models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.wide = nn.Dropout2d(0.2)
        self.again = self.body[2]

    def forward(self, x):
        return self.again(self.body(x))


def test_keyed_models_keep_the_names_of_their_state_and_their_mode():
    plain = Net().eval()
    names = list(plain.state_dict())
    model = key_modules(plain)
    assert model is plain and list(model.state_dict()) == names
    assert (model.body[2].name, model.body[2].p) == ("body.2", 0.3)
    assert (model.wide.name, model.wide.spread) == ("wide", "channel")
    assert model.again is model.body[2] and not model.again.training
    assert not any(isinstance(m, nn.Dropout | nn.Dropout2d) for m in model.modules())


def test_stochastic_depth_of_torchvision_is_keyed_by_row_or_by_batch():
    from torchvision.ops import StochasticDepth

    model = key_modules(nn.ModuleDict({m: StochasticDepth(0.2, m) for m in ("row", "batch")}))
    assert {name: m.spread for name, m in model.items()} == {"row": "example", "batch": "batch"}
    assert isinstance(key_modules(nn.Dropout(0.5)), KeyedDropout)


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.mix(x, x, x)[0]


@pytest.mark.parametrize(
    ("layer", "example", "named"),
    [
        (Functional(), torch.ones(2, 4), r"1 \(Functional\)"),
        (nn.RReLU(), torch.ones(2, 4), r"1 \(RReLU\)"),
        (Attention(), torch.ones(2, 3, 4), r"1\.mix \(MultiheadAttention\)"),
        (nn.AlphaDropout(0.5), torch.ones(2, 4), r"1 \(AlphaDropout\)"),
    ],
)
def test_a_model_that_draws_from_the_process_wide_generator_is_refused_by_name(
    layer, example, named
):
    model = key_modules(nn.Sequential(nn.Linear(4, 4), layer))
    with pytest.raises(ModelError, match=f"^{named} draws from torch's process-wide generator"):
        check_keyed(model, example)
    with pytest.raises(ModelError, match="draws from torch's process-wide generator"):
        check_keyed(layer, example)


def test_the_check_leaves_modes_buffers_and_hooks_as_they_were():
    model = key_modules(Net())
    model.body[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    check_keyed(model, torch.randn(3, 4, generator=HERE.torch("x")))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
