"""Pruning between rounds: schedules, masks on their way, and what a round leaves behind."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clients.local import own_batches
from fedsys.config import parse, with_values
from fedsys.config import pruning as settings
from fedsys.config.pruning import PruningConfig
from fedsys.errors import ConfigError, ModelError
from fedsys.models import build
from fedsys.models.graph import trace
from fedsys.pruning.dense import architecture
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.scores import group_norm
from fedsys.pruning.sparsify import gradual, left_alone, one_shot
from fedsys.randomness import Address
from fedsys.training import federation, optimizers
from fedsys.training import plain as training
from fedsys.training.masks import Masks, held
from fedsys.training.optimizers import make_optimizer
from fedsys.training.penalty import Penalty, channel_scales, norms_behind, output_layers
from fedsys.transport import records
from strategies.around import find
from strategies.pruned import Pruned
from tests.pruning.rewinding import Ticket, levels

SHAPE = (1, 8, 8)


def network(name="small.cnn", norm="batch", **arguments):
    spec = {"_target_": f"fedsys.models.{name}", "norm": norm, "init": None, **arguments}
    return build(spec, input_shape=SHAPE, num_classes=10, seed=1)


# --------------------------------------------------------------------------------------------------
# The schedule


def test_prunings_come_between_rounds():
    pruning = PruningConfig("magnitude", start=2, steps=3, every=2)
    assert [settings.prunings_before(pruning, r) for r in range(1, 10)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]
    assert settings.last_pruning(pruning, 9) == 7


def test_levels_repeat_the_learning_rates_behind_the_round_that_they_rewind_to(configure):
    config = configure("pruning=iterative", "pruning.rewind=2", "pruning.rounds_per_level=3")
    seen = range(1, 9)
    assert [settings.prunings_before(config.pruning, r) for r in seen] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [settings.position(config.pruning, r, config.rounds) for r in seen] == [
        *((1, 5), (2, 5)),  # until the weights that all levels start from
        *((3, 5), (4, 5), (5, 5)),
        *((3, 5), (4, 5), (5, 5)),
    ]
    assert [r for r in seen if settings.ends_level(config.pruning, r)] == [5, 8]


schedules = st.builds(
    PruningConfig,
    method=st.just("magnitude"),
    start=st.integers(0, 4),
    steps=st.integers(1, 5),
    every=st.integers(1, 3),
    rounds_per_level=st.integers(0, 4),
    rewind=st.integers(0, 3),
)


@given(schedules, st.integers(1, 30))
def test_the_last_pruning_is_the_last(pruning, rounds):
    try:
        settings.check_rounds(pruning, rounds)
    except ConfigError:
        assert rounds < (
            pruning.rewind + 1 if pruning.rewinds else settings.last_pruning(pruning, 1)
        )
        return
    counts = [settings.prunings_before(pruning, r) for r in range(1, rounds + 1)]
    assert counts == sorted(counts)
    last = settings.last_pruning(pruning, rounds)
    assert counts[last - 1 :] == [counts[-1]] * (rounds - last + 1)
    assert last == 1 or counts[-1] == 0 or counts[last - 2] == counts[-1] - 1
    if not pruning.rewinds:
        assert counts[-1] == pruning.steps


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 6, "start": 4}, "pruning.steps=6: must end within rounds=9.*before round 10"),
        ({"rounds_per_level": 2, "rewind": 9}, "rounds=9: must be above pruning.rewind=9"),
        ({"sparsity": (0.5, 0.9)}, "must be one number for fedsys train"),
    ],
)
def test_a_schedule_that_does_not_fit_the_rounds_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        settings.check_rounds(PruningConfig("magnitude", **values), 9)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("method", "magnitud", "did you mean 'magnitude'"),
        ("scope", "layers", "did you mean 'layer'"),
        ("sparsity", 1.0, r"must be in \[0, 1\)"),
        ("sparsity", (0.9, 0.5), "ascending"),
        ("share", 0.0, "must be above 0"),
        ("steps", 0, "must be at least 1"),
        ("group_lasso", -1.0, "must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(key, value, words):
    with pytest.raises(ConfigError, match=words):
        settings.check(replace(PruningConfig("magnitude"), **{key: value}))


# --------------------------------------------------------------------------------------------------
# Masks on their way


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 2**32))
def test_packed_masks_are_those_that_were_packed(shape, seed):
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    masks = Masks({"w": draws < 0.5})
    packed = masks.packed()
    assert packed["w"].nbytes == math.ceil(draws.numel() / 8)
    assert Masks.unpacked(packed, {"w": draws, "other": draws}) == masks


@pytest.mark.parametrize("data", [torch.zeros(2, dtype=torch.uint8), torch.zeros(1)])
def test_packed_masks_that_do_not_fit_are_refused(data):
    with pytest.raises(ModelError, match="the mask of w does not fit"):
        Masks.unpacked({"w": data}, {"w": torch.zeros(8)})
    with pytest.raises(ModelError, match="the mask of v does not fit"):
        Masks.unpacked({"v": data}, {"w": torch.zeros(8)})


# --------------------------------------------------------------------------------------------------
# Channels that die on purpose


@pytest.mark.parametrize(("norm", "behind"), [("batch", 2), ("group", 2), ("none", 0)])
def test_the_penalty_is_the_gradient_of_a_sum_of_norms(norm, behind):
    model = network(norm=norm, width=4, hidden=16)
    graph = trace(model)
    assert len(norms_behind(graph)) == behind
    assert output_layers(graph) == ("fc2.linear",)
    named = dict(model.named_parameters())
    named["fc1.linear.weight"].data[3] = 0.0  # a dead channel: its gradient is taken to be zero
    expected = torch.zeros(())
    for layer in ("conv1.conv", "conv2.conv", "fc1.linear"):
        scale = named.get(f"{norms_behind(graph).get(layer)}.weight")
        rows = named[f"{layer}.weight"].flatten(1)
        norms = scale.abs() if scale is not None else rows[rows.abs().sum(1) > 0].norm(dim=1)
        expected = expected + 0.3 * norms.sum()
    gradients = torch.autograd.grad(expected, list(named.values()), materialize_grads=True)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    Penalty.of(graph, 0.3).add_to_gradients(named)
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_channel_scales_are_those_of_the_network_without_batchnorm():
    model = network(width=4, hidden=16)
    conv, norm = model.conv1.conv, model.conv1.norm
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 1.0, 9.0, 0.25]))
    scales = channel_scales(trace(model))
    fused = torch.nn.utils.fuse_conv_bn_eval(copy.deepcopy(conv).eval(), norm.eval())
    scaled = conv.weight.abs() * scales["conv1.conv"].view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled, fused.weight.abs())


def test_group_norms_are_relative_to_the_mean_of_the_layer_and_joint_in_a_group():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    model[1].weight.data = torch.tensor([[6.0, 8.0], [3.0, 4.0]])
    alone = group_norm(model)
    assert alone["0.weight"][:, 0].tolist() == [2.0, 0.0]  # 5 and 0 per √2; the mean is half of 5
    torch.testing.assert_close(alone["1.weight"][:, 1], torch.tensor([4 / 3, 2 / 3]))
    both = group_norm(model, groups=[("0", "1")], scales={"1": torch.tensor([1.0, 2.0])})
    # squares 25 + 100 and 0 + 100 of four weights each
    first, second = math.sqrt(125 / 4), math.sqrt(100 / 4)
    mean = (first + second) / 2
    expected = torch.tensor([first / mean, second / mean])
    torch.testing.assert_close(both["0.weight"][:, 0], expected)
    torch.testing.assert_close(both["1.weight"][:, 0], expected)


def test_whole_channels_die_but_for_the_classes():
    model = network(width=8, hidden=32)
    masks = Masks.dense(model, left_alone(model, None, (1, 8, 8)))
    masks = one_shot("group_norm", model, 0.6, masks=masks, keep_channels=1)
    figures = masks.figures()
    split = [layer for layer in figures.layers if 0 < layer.kept < layer.weights]
    whole = sum(layer.dead_channels for layer in split)
    # at most the channel at the threshold, and those of which the best weight had to stay, are cut
    assert "fc2.linear.weight" not in masks
    assert whole / sum(layer.channels for layer in split) > 0.4
    assert shrink(model, SHAPE, masks=masks).report.parameters < 0.35 * sum(
        p.numel() for p in model.parameters()
    )


# --------------------------------------------------------------------------------------------------
# Rounds


@pytest.fixture
def settings_of(configure):
    """Return a function from overrides to a small run."""

    def made(*overrides, **values):
        more = "data.examples=60 data.test_examples=10 num_clients=3 client.epochs=1"
        base = configure("data=synthetic", "model=cnn", *more.split(), *overrides)
        return parse(with_values(base.text, model={"width": 4, "hidden": 16}, **values))

    return made


def zeros(result):
    """Return the masks of a run, whose weights must be zero where they prune, and only there."""
    masks = find(result.strategy, Pruned).kept()
    for name, mask in masks.items():
        assert torch.equal(result.state[name] == 0, ~mask), name
    return masks


@pytest.mark.parametrize(
    "options",
    [
        ("strategy=fedavg", "client.weight_decay=0.01"),
        ("strategy=fedprox", "strategy.fraction_train=0.7"),
        ("strategy=fedadam", "client.optimizer=adamw", "client.keep_optimizer=true"),
        ("strategy=fedavgm", "strategy.server_momentum=0.9", "client.keep_optimizer=true"),
    ],
    ids=lambda options: options[0],
)
def test_what_is_pruned_is_zero_and_no_more_under_every_strategy(settings_of, carry_out, options):
    config = settings_of(*options, "rounds=4", "pruning=magnitude", "pruning.sparsity=0.8",
                         "pruning.steps=2")  # fmt: skip
    result = carry_out(config)
    figures = zeros(result).figures()
    assert "fc2.linear.weight" not in [layer.name for layer in figures.layers]
    counts = [0, *(round(s * figures.weights) for s in gradual(0.8, 2))]
    expected = [counts[i] / figures.weights for i in (0, 1, 2, 2)]
    assert [row["sparsity"] for row in result.rows] == pytest.approx(expected, abs=1e-12)


def test_the_penalty_ends_with_the_last_pruning(configure):
    config = configure("pruning=group_norm", "pruning.steps=2", "pruning.every=2",
                       "pruning.group_lasso=0.5")  # fmt: skip
    assert [settings.penalty_weight(config.pruning, r, config.rounds) for r in range(1, 6)] == [
        0.5,
        0.5,
        0.5,
        0.0,
        0.0,
    ]
    assert settings.penalty_weight(configure("pruning=none").pruning, 1, 10) == 0.0
    # A run of levels that is continued has further prunings: its rounds must not change with that.
    levels = configure("pruning=iterative", "pruning.group_lasso=0.5", "rounds=2")
    assert settings.penalty_weight(levels.pruning, 2, levels.rounds) == 0.5


def test_masks_cost_an_eighth_of_a_byte_for_a_weight(settings_of, carry_out):
    plain = carry_out(settings_of("rounds=1"))
    pruned = carry_out(settings_of("rounds=1", "pruning=random"))
    weights = find(pruned.strategy, Pruned).kept().figures().weights
    more = pruned.rows[0]["bytes_down"] - plain.rows[0]["bytes_down"]
    headers = 3 * 3 * 128
    assert 3 * weights / 8 <= more <= 3 * weights / 8 + headers + 9
    assert pruned.rows[0]["bytes_up"] == plain.rows[0]["bytes_up"]


def test_one_client_that_prunes_by_levels_is_iterative_pruning_with_rewinding(
    settings_of, carry_out
):
    config = settings_of(
        "num_clients=1", "rounds=7", "pruning=iterative", "pruning.rounds_per_level=2",
        "pruning.share=0.3", "client.lr_schedule.kind=exponential", "client.momentum=0.0",
        "data.partition.kind=iid",
    )  # fmt: skip
    result = carry_out(config)

    # The same by the plain loop of `tests.pruning.rewinding`, which knows no rounds.
    fed = federation.federation(config)
    model = federation.build_model(config, fed.dataset)

    def train(model, round_):
        place = settings.position(config.pruning, round_, config.rounds)
        lr = optimizers.learning_rate(config.client.lr, config.client.lr_schedule, *place)
        optimizer = make_optimizer(model.parameters(), config.client, lr)
        address = Address(config.seed, 0, round_)
        training.train(model, optimizer, own_batches(config, 0, address), address)

    def train_level(model, ticket):
        with held(ticket.masks, model):
            for round_ in (2 + 2 * ticket.level, 3 + 2 * ticket.level):
                train(model, round_)

    train(model, 1)
    start = Ticket.start(model, ["fc2"])
    *_, last = levels(start, model, train_level, last=2, sparsity_per_level=0.3)
    assert zeros(result) == last.ticket.masks
    assert all(torch.equal(result.state[name], last.weights[name]) for name in result.state)


def test_levels_take_the_state_of_server_and_clients_back_too(settings_of, carry_out):
    config = settings_of(
        "strategy=fedadam", "client.optimizer=adam", "client.keep_optimizer=true", "rounds=3",
        "pruning=iterative", "pruning.rounds_per_level=1", "client.batch_size=10",
    )  # fmt: skip
    result = carry_out(config)
    pruned = find(result.strategy, Pruned)
    assert pruned.prunings == 1
    # Round 1, then level 0 in round 2, which is taken back, and level 1 in round 3.
    steps = [records.view(s["fc2.linear.bias|step"]) for s in pruned.inner.states.values()]
    assert sum(steps) == result.rows[0]["steps"] + result.rows[2]["steps"]
    moments = pruned.origin_state["KeptState.TypedBuffers.FedAdam"]["m_t"]
    assert "fc2.linear.bias" in moments


def test_a_round_that_makes_no_model_prunes_nothing(settings_of, carry_out):
    faults = [{"kind": "device_killed", "round": 1, "who": 1, "position": "before", "step": 0}]
    config = settings_of(
        "strategy=krum", "strategy.num_malicious_nodes=0", "rounds=2", "pruning=random",
        "pruning.sparsity=0.5", "num_clients=3", faults={"list": faults},
    )  # fmt: skip
    result = carry_out(config)
    assert "sparsity" not in result.rows[0] or result.lost[0]
    assert result.rows[1]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    zeros(result)


def test_a_mask_that_would_kill_a_layer_ends_the_run_and_names_it(settings_of, carry_out):
    with pytest.raises(ModelError, match="would leave none"):
        carry_out(settings_of("rounds=2", "pruning=random", "pruning.sparsity=0.9999"))


def test_frozen_parameters_stay_and_batchnorm_adapts(settings_of, carry_out):
    config = settings_of(
        "num_clients=1", "rounds=1", "client.frozen=true", "client.weight_decay=0.1",
        "data.partition.kind=iid",
    )  # fmt: skip
    before = federation.build_model(config, federation.federation(config).dataset)
    after = carry_out(config).state
    for name, parameter in before.named_parameters():
        assert torch.equal(after[name], parameter), name
    changed = [n for n, b in before.named_buffers() if not torch.equal(after[n], b)]
    assert {name.rpartition(".")[2] for name in changed} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


def test_a_variant_is_trained_split_and_whole_to_the_same_bits(settings_of, carry_out, tmp_path):
    model = network(width=8, hidden=32)
    masks = one_shot("group_norm", model, 0.5, leave=["fc2"], keep_channels=1)
    architecture.save(shrink(model, SHAPE, masks=masks).model, tmp_path)
    config = settings_of("model=variant", "rounds=1")
    spec = {"path": str(tmp_path)}

    def of(**values):
        tree = with_values(config.text, model=None)
        base = {"_target_": "fedsys.pruning.variant.variant", "norm": "batch", "init": None}
        return parse(with_values(tree, model=base | spec, **values))

    whole = carry_out(of())
    halves = carry_out(of(policy={"kind": "fixed", "cut": 2, "codec": "fp32"}))
    start = federation.build_model(of(), federation.federation(config).dataset).state_dict()
    assert halves.sha256 == whole.sha256
    assert whole.state.keys() == start.keys()
    assert not torch.equal(whole.state["conv1.conv.weight"], start["conv1.conv.weight"])


@pytest.mark.parametrize(
    ("shape", "classes", "words"),
    [
        ((3, 8, 8), 10, "for images of shape"),
        (SHAPE, 7, "for 7 classes"),
    ],
)
def test_a_variant_for_something_else_is_refused(tmp_path, shape, classes, words):
    model = network(width=4, hidden=16)
    architecture.save(shrink(model, SHAPE).model, tmp_path)
    spec = {"_target_": "fedsys.pruning.variant.variant", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=words):
        build(spec, input_shape=shape, num_classes=classes, seed=0)


def test_a_variant_that_is_not_there_is_refused(tmp_path):
    spec = {"_target_": "fedsys.pruning.variant.variant", "path": str(tmp_path / "x")}
    with pytest.raises(ConfigError, match=r"model.path=.*must be the folder of a variant"):
        build(spec, input_shape=SHAPE, num_classes=10, seed=0)
