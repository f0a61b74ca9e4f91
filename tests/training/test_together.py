"""Many clients trained at once: what each gets alone, but for the last bits."""

import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from fedsys.config import ClientConfig, parse, with_values
from fedsys.errors import ConfigError
from fedsys.randomness import Address
from fedsys.runtime.apps import load_client, load_together
from fedsys.runtime.local import FIRST_NODE_ID, LocalGrid
from fedsys.training import federation, optimizers, together
from fedsys.training import plain as training
from fedsys.transport import records
from strategies import Roster, build

SIZES = [(4, 4, 3), (4, 4, 3), (4,), (4, 2, 4, 4)]
"""Examples in the mini-batches of each client."""


def clients():
    generator = torch.Generator().manual_seed(0)
    return [
        [
            (
                torch.randn((size, 6), generator=generator),
                torch.randint(0, 3, (size,), generator=generator),
            )
            for size in sizes
        ]
        for sizes in SIZES
    ]


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 3))
    model[3].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("client", "mu"),
    [
        (ClientConfig(lr=0.1, momentum=0.9, weight_decay=0.01), 0.0),
        (ClientConfig(lr=0.01, optimizer="adam"), 0.0),
        (ClientConfig(lr=0.1, momentum=0.0), 0.5),
    ],
)
def test_each_client_is_trained_as_if_it_were_alone(client, mu):
    start = {n: t.clone() for n, t in model_of().state_dict().items()}
    results = together.train(
        model_of(),
        [start] * len(SIZES),
        clients(),
        lambda parameters: optimizers.make_optimizer(parameters, client, client.lr),
        proximal_mu=mu,
    )
    for k, (state, score) in enumerate(results):
        model = model_of()
        optimizer = optimizers.make_optimizer(model.parameters(), client, client.lr)
        anchor = training.Proximal.at(model, mu) if mu else None
        alone = training.train(model, optimizer, clients()[k], Address(0), anchor=anchor)
        assert list(state) == list(start)
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)
        assert (score.examples, score.steps) == (alone.examples, alone.steps)
        assert score.accuracy == pytest.approx(alone.accuracy)
        assert score.loss == pytest.approx(alone.loss, rel=1e-4)


def test_a_client_without_an_example_stays_as_it_was():
    start = {n: t.clone() for n, t in model_of().state_dict().items()}
    [(moved, _), (kept, score)] = together.train(
        model_of(), [start, start], [clients()[0], []],
        lambda parameters: torch.optim.SGD(parameters, 0.1),
    )  # fmt: skip
    assert not torch.equal(moved["0.weight"], start["0.weight"])
    assert torch.equal(kept["0.weight"], start["0.weight"])
    assert score.steps == 0


def test_models_that_draw_or_keep_statistics_are_refused():
    together.check_model(model_of(), 4)
    together.check_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), 4)
    with pytest.raises(ConfigError, match=r"1 \(Dropout\) draws"):
        together.check_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), 4)
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        together.check_model(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 4)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match="two names"):
        together.check_model(tied, 4)


SMALL = (
    "data=synthetic", "data.examples=150", "num_clients=5", "client.epochs=2", "model=mlp",
    "model.hidden=16", "client.batch_size=10",
)  # fmt: skip


def test_a_run_trains_so_and_where_one_fails_each_is_alone(configure, identity, monkeypatch):
    config = configure(*SMALL)
    batched = parse(with_values(config.text, runtime={"batched_clients": 2}))
    found = [replies(one) for one in (config, batched)]
    for alone, many in zip(*found, strict=True):
        for name, tensor in records.from_record(alone["arrays"]).items():
            there = records.from_record(many["arrays"])[name]
            torch.testing.assert_close(there, tensor, rtol=1e-3, atol=1e-5)
        assert dict(many["metrics"]).keys() == dict(alone["metrics"]).keys()
        assert many["metrics"]["steps"] == alone["metrics"]["steps"]
        assert dict(many["observation"]).keys() == dict(alone["observation"]).keys()
    calls = []
    monkeypatch.setattr(together, "train", lambda *a, **k: calls.append(1) or 1 / 0)
    failing = replies(batched)
    assert calls
    for alone, one in zip(found[0], failing, strict=True):  # to the bit
        assert all(one["arrays"][n].data == a.data for n, a in alone["arrays"].items())


def replies(config):
    fed = federation.federation(config)
    model = federation.trained_model(config, fed.dataset)
    strategy = build(config, model, Roster(5), dataset=fed.dataset)
    options = {"together": load_together(config), "at_once": config.runtime.batched_clients}
    run_config = {"hydra-config": config.text}
    client = load_client(config.apps.client)
    with LocalGrid(client, 5, workers=1, run_config=run_config, **options) as grid:
        arrays = records.to_record(model.state_dict())
        asked = strategy.configure_train(1, arrays, ConfigRecord(), grid)
        answers = list(grid.send_and_receive(asked))
    assert [a.metadata.src_node_id - FIRST_NODE_ID for a in answers] == [0, 1, 2, 3, 4]
    return [answer.content for answer in answers]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("policy=fixed", {"policy": {"kind": "fixed"}}),
        ("client.clip_norm=1.0", {"client": {"clip_norm": 1.0}}),
        ("client.keep_optimizer=True", {"client": {"keep_optimizer": True}}),
        ("runtime.pool=processes", {"runtime": {"pool": "processes"}}),
    ],
)
def test_what_looks_at_more_than_one_client_has_is_refused(configure, name, values):
    base = configure(*SMALL)
    together.check_config(parse(with_values(base.text, runtime={"batched_clients": 3})))
    text = with_values(base.text, **values)
    changed = parse(with_values(text, runtime={"batched_clients": 3}))
    with pytest.raises(ConfigError, match=f"batched_clients=3: does not go with {name}"):
        together.check_config(changed)
    with pytest.raises(ConfigError, match="must be at least 1"):
        parse(with_values(base.text, runtime={"batched_clients": 0}))
