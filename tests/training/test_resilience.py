"""Training exits and skips: what is drawn repeats, what is frozen stays, what is said is so."""

import json

import pytest
import torch

from fedsys import data
from fedsys.errors import ConfigError, RunError
from fedsys.models import build, layered
from fedsys.models.resilient import exit_chain, resilient, skip_chain
from fedsys.randomness import Address, drawing, rows
from fedsys.runs import resilience as kept
from fedsys.runs.folder import RunFolder, state_sha256
from fedsys.runtime import run
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.resilience import ExitLosses, measure, path_macs

SHAPE = (3, 8, 8)
SMALL = (
    "data=synthetic", "model=resnet18", "model.width=4", "data.max_examples=64", "num_clients=2",
    "client.epochs=1", "client.batch_size=16", "rounds=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    spec = {"_target_": "fedsys.models.resnet.resnet18", "width": 4}
    made = build(spec, input_shape=SHAPE, num_classes=5, seed=1)
    return resilient(layered(made, SHAPE), SHAPE, 5, seed=1, boundaries=[2, 5])


def batches(count=3):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, *SHAPE, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(count)
    ]


# --------------------------------------------------------------------------------------------------
# Losses and draws


def test_the_loss_is_that_of_the_last_output_and_the_mean_of_the_exits(model):
    (x, labels), losses = batches(1)[0], ExitLosses(weight=0.5, failures=0.0, runs=model.skips(2))
    model.eval()
    with torch.no_grad():
        outputs, loss = losses(model, x, labels, 1.0)
        found = model.outputs(x)
    parts = {key: training.loss_of(scores, labels, 1.0) for key, scores in found.items()}
    assert torch.equal(outputs, found[len(model.layers)])
    expected = parts[len(model.layers)] + 0.5 * (parts[2] + parts[5]) / 2
    assert torch.allclose(loss, expected)


def test_failures_are_drawn_by_the_address_and_all_pieces_of_a_step_have_one(model):
    losses = ExitLosses(1.0, 0.5, model.skips(2))

    def drawn(seed):
        found = []
        for step in range(40):
            with drawing(Address(seed, 1, 2), step, 8):
                with rows(0, 3):
                    first = losses.skipped(3)
                with rows(3, 8):
                    assert losses.skipped(5) == first
                found.append(first)
        return found

    assert drawn(1) == drawn(1) != drawn(2)
    assert 10 < sum(run is not None for run in drawn(1)) < 30
    assert len(set(drawn(1))) > 5


def gradients(model, losses):
    x, labels = batches(1)[0]
    model.zero_grad()
    losses(model, x, labels, 1.0)[1].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_exits_learn_by_a_weight_of_their_own_and_the_model_as_before(model):
    """With 16 exits each had a sixteenth of the step: those behind early units learned nothing."""
    model.eval()
    shared = gradients(model, ExitLosses(0.5, 0.0, ()))
    own = gradients(model, ExitLosses(0.5, 0.0, (), head_weight=3.0))
    assert shared.keys() == own.keys()
    for name, value in shared.items():
        factor = 3.0 / 0.25 if name.startswith("exits.") else 1.0
        assert torch.allclose(own[name], factor * value, rtol=1e-3, atol=1e-6), name


def test_adapters_learn_in_every_mini_batch_and_nothing_else_does_by_that(model):
    """They learned in a few mini-batches of a hundred: without unit 6 a third was answered."""
    model.eval()
    without = gradients(model, ExitLosses(0.5, 0.0, ()))
    found = gradients(model, ExitLosses(0.5, 0.0, (), match=2.0))
    adapters = {n for n, _ in model.named_parameters() if n.startswith("adapters.")}
    assert adapters and adapters.isdisjoint(without)
    assert found.keys() - without.keys() == adapters
    assert all(torch.equal(found[name], value) for name, value in without.items())
    unit = model.adapted[0]
    x = batches(1)[0][0]
    there = model.tensors(x)
    made, wanted = model.adapters[str(unit)](there[unit]), there[unit + 1]
    alone = ExitLosses(0.5, 0.0, (), match=1.0)._mismatch(
        model, {u: there[u] for u in (unit, unit + 1)}
    )
    size = (wanted**2).mean().clamp_min(1.0)
    assert torch.allclose(alone, ((made - wanted) ** 2).mean() / size, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Measuring


def test_each_path_is_measured_as_its_chain_answers(model):
    found = measure(model, batches(), longest=2)
    assert [each.after for each in found.exits] == [2, 5]
    assert [each.units for each in found.skips] == list(model.skips(2))
    assert found.examples == 24
    chains = [(each, exit_chain(model, each.after)) for each in found.exits]
    chains += [(each, skip_chain(model, *each.units)) for each in found.skips]
    for each, chain in chains:
        chain.graph.eval()
        assert each.accuracy == training.evaluate(chain.graph, batches()).accuracy
        assert each.macs == sum(unit.macs for unit in chain.units)
    assert found.accuracy == training.evaluate(model, batches()).accuracy
    assert path_macs(model, 2) < path_macs(model, 5) < found.macs


# --------------------------------------------------------------------------------------------------
# Federated


def test_a_frozen_backbone_ends_as_the_training_without_exits_left_it(carry_out, configure):
    """Averaging equal parameters rounds them: clients alone could not keep the backbone."""
    frozen = ("resilience=frozen", "resilience.backbone_rounds=1", "strategy=fedavg")
    plain = carry_out(configure(*SMALL, "rounds=1"))
    ours = carry_out(configure(*SMALL, *frozen))
    own, parts = kept.divided(ours.state)
    assert all(torch.equal(own[name], value) for name, value in plain.state.items())
    assert own.keys() == plain.state.keys()
    config = configure(*SMALL, *frozen)
    first = federation.trained_model(config, federation.federation(config).dataset).state_dict()
    moved = {name for name, value in parts.items() if not torch.equal(value, first[name])}
    assert {n for n in parts if n.startswith("exits.")} <= moved


def test_a_joint_run_repeats_to_the_bit_with_any_number_of_workers(carry_out, configure):
    joint = (*SMALL, "rounds=1", "resilience=joint", "resilience.failures=0.5")
    one = carry_out(configure(*joint, "runtime.workers=1", "schedule.micro_batches=1"))
    two = carry_out(configure(*joint, "runtime.workers=2", "schedule.micro_batches=1"))
    other = carry_out(configure(*joint, "resilience.failures=0.0"))
    assert one.sha256 == two.sha256 != other.sha256


def test_a_run_leaves_its_exits_and_what_they_do(configure, tmp_path):
    more = "rounds=1", "resilience=joint", "resilience.measured=5", "resilience.pool=2"
    config = configure(*SMALL, *more, "json=true", f"run.dir={tmp_path}")
    run(config)
    result = RunFolder.open(tmp_path).info["result"]
    fed = federation.federation(config)
    shape, classes = fed.dataset.input_shape, fed.dataset.num_classes
    backbone = federation.build_model(config, fed.dataset)
    from safetensors.torch import load_file

    backbone.load_state_dict(load_file(tmp_path / "model.safetensors"))  # strict: no exit is in it
    assert state_sha256(backbone.state_dict()) == result["model_sha256"]
    found = kept.load(tmp_path, layered(backbone, shape), shape, classes)
    again = measure(found.model, data.eval_batches(fed.dataset.validation, fed.dataset), 5)
    assert again == found.scores
    assert json.loads(json.dumps(again.figures())) == {k: result[k] for k in ("exits", "skips")}
    assert result["val_accuracy"] == found.scores.accuracy

    other = build(dict(config.model), input_shape=shape, num_classes=classes, seed=5)
    with pytest.raises(RunError, match="another model"):
        kept.load(tmp_path, layered(other, shape), shape, classes)
    (tmp_path / kept.FIGURES).write_text("{")
    with pytest.raises(RunError, match="no exits can be read"):
        kept.load(tmp_path, layered(backbone, shape), shape, classes)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("policy=fixed",), "policy=.*must be none with resilience.training=joint"),
        (("pruning=group_norm",), "pruning.method=.*must be none"),
        (("privacy=record",), "privacy.mechanism=.*must be none"),
        (("resilience.pool=0",), "resilience.pool=.*must be at least 1"),
        (("resilience.failures=2",), "resilience.failures=.*must be in"),
        (("resilience=frozen", "resilience.backbone_rounds=9", "rounds=9"), "must leave rounds"),
        (("resilience.training=joined",), "did you mean"),
    ],
)
def test_what_does_not_go_with_exits_is_refused_by_name(configure, wrong, words):
    first = () if "resilience=frozen" in wrong else ("resilience=joint",)
    with pytest.raises(ConfigError, match=words):
        configure(*first, *wrong)
