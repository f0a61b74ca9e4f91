"""Client-level privacy: what an update's norm covers, equal weights, and the direction of the norm.

The clipping is Flower's; the oracle here is the arithmetic of McMahan et al., written out.
"""

import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx
from torch import nn

from fedsys.errors import ConfigError
from fedsys.privacy.adaptive import next_norm, split_noise
from fedsys.transport import records
from fedsys.transport.messages import ARRAYS, METRICS, NUM_EXAMPLES
from strategies import Roster, build
from strategies.around import find, innermost
from strategies.buffers import TypedBuffers
from strategies.private_clients import FLOWERS, PrivateClients, check_client_run, drowned

START = {"w": np.zeros((3, 2), dtype=np.float32), "b": np.ones(2, dtype=np.float32)}


def reply(update, examples, node):
    arrays = {name: (START[name] + update[name]).astype(np.float32) for name in START}
    content = RecordDict(
        {
            ARRAYS: records.record_of(arrays),
            METRICS: MetricRecord({NUM_EXAMPLES: examples, "train_loss": 0.5}),
        }
    )
    message = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(content, reply_to=message)


def update(scale, seed=0):
    draw = np.random.default_rng(seed)
    made = {name: draw.standard_normal(array.shape) for name, array in START.items()}
    norm = math.sqrt(sum(float((v**2).sum()) for v in made.values()))
    return {name: scale * v / norm for name, v in made.items()}


@pytest.fixture
def averaged(configure, identity):
    """Return a function that averages updates privately in round 1, and the strategy."""

    def of(updates, examples=None, noise=0.0, strategy=None, server_round=1, **options):
        given = [f"privacy.{k}={v}" for k, v in options.items()]
        config = configure("privacy=client", *given)
        made = strategy or PrivateClients(FedAvg(), config)
        told = ConfigRecord({"noise": noise})
        made._multiplier = noise
        made._sent = START
        made._flower.current_arrays = records.record_of(START)
        made._flower.clipping_norm = made.clip_norm
        assert told["noise"] == noise
        examples = examples or [1] * len(updates)
        replies = [reply(u, n, i) for i, (u, n) in enumerate(zip(updates, examples, strict=True))]
        aggregate, metrics = made.aggregate_train(server_round, replies)
        assert "train_loss" not in metrics  # what clients tell of themselves is not protected
        return records.arrays_of(aggregate), made

    return of


def test_updates_are_clipped_by_the_norm_over_all_parameters_and_count_alike(averaged):
    """Flower's wrapper weighted by examples: 99 to 1 gave 0.995 of one client."""
    long, short = update(5.0, 1), update(0.3, 2)
    got, _ = averaged([long, short], examples=[99, 1])
    for name in START:
        expected = START[name] + (long[name] / 5.0 + short[name]) / 2
        np.testing.assert_allclose(got[name], expected, atol=1e-6)


def test_one_client_changes_the_mean_by_the_clipping_norm_over_their_number(averaged):
    others = [update(s, i) for i, s in enumerate((0.2, 3.0, 40.0))]
    with_it, _ = averaged([*others, update(1e4, 9)])
    without, _ = averaged([*others, update(0.0, 9)])
    moved = math.sqrt(sum(float(((with_it[n] - without[n]) ** 2).sum()) for n in START))
    assert moved == pytest.approx(1.0 / 4, rel=1e-4)


def test_a_client_that_did_not_train_does_not_lose_the_round(averaged):
    """Flower's wrapper divides by the norm of the update: ZeroDivisionError."""
    got, _ = averaged([update(0.0), update(0.0)])
    for name in START:
        np.testing.assert_allclose(got[name], START[name], atol=1e-7)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e25])
def test_an_update_without_bounds_is_clipped_and_the_others_count(averaged, broken):
    """A regression that diverged on one client ended for all: no factor makes NaN a bounded number.

    Flower's norm is also infinite where float32 does not hold the squares, as 1e25.
    """
    wild = {name: np.full(array.shape, broken) for name, array in START.items()}
    got, _ = averaged([wild, update(0.3, 2)])
    none, _ = averaged([update(0.0), update(0.3, 2)])
    away = math.sqrt(sum(float(((got[name] - none[name]) ** 2).sum()) for name in START))
    assert away == pytest.approx(0.5 if broken == 1e25 else 0.0, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "parameters", "said"),
    [
        (("num_clients=8",), 640_000, "is 100 times as long.*from 800 clients in a round"),
        (("num_clients=8", "strategy.fraction_train=0.5"), 640_000, "is 200 times.*from 4 clients"),
        (("num_clients=800",), 640_000, None),
        (("num_clients=100", "privacy.where=device"), 10_000, "is 10 times.*from 10,000 clients"),
    ],
)
def test_noise_that_is_longer_than_any_mean_is_said(overrides, parameters, said, configure):
    warned = drowned(configure("privacy=client", *overrides), 1.0, parameters)
    assert bool(re.search(said, warned)) if said else warned == ""


def test_noise_has_the_deviation_of_equal_weights_and_an_address(averaged):
    still = [update(0.0)] * 4
    rounds = []
    for number in range(1, 150):
        got, _ = averaged(still, noise=2.0, server_round=number)
        rounds.append(np.concatenate([(got[n] - START[n]).ravel() for n in START]))
    values = np.stack(rounds)
    assert values.std() == pytest.approx(2.0 * 1.0 / 4, rel=0.08)
    again, _ = averaged(still, noise=2.0, server_round=7)
    np.testing.assert_array_equal(again["w"], rounds[6][:6].reshape(3, 2) + START["w"])


def test_secret_noise_is_another_each_time(averaged):
    first, _ = averaged([update(0.0)] * 2, noise=1.0, secure="true")
    other, _ = averaged([update(0.0)] * 2, noise=1.0, secure="true")
    assert not np.array_equal(first["w"], other["w"])


def test_the_norm_follows_the_quantile_in_the_direction_of_the_paper(averaged):
    """Flower's adaptive wrapper runs away from the quantile: 0.905 where all are clipped."""
    assert next_norm(1.0, within=0.0, quantile=0.5) == pytest.approx(math.exp(0.1))
    assert next_norm(1.0, within=1.0, quantile=0.5) == pytest.approx(math.exp(-0.1))
    clients = [update(3.0, i) for i in range(100)]
    _, strategy = averaged(clients, noise=0.5, clipping="adaptive")
    assert strategy.clip_norm > 1.0
    for number in range(2, 20):
        averaged(clients, noise=0.5, strategy=strategy, server_round=number, clipping="adaptive")
    assert 2.2 < strategy.clip_norm < 3.8


def test_noise_on_the_count_is_paid_for_by_more_on_the_updates():
    multiplier, deviation = split_noise(1.0, 100)
    assert deviation == 5.0
    assert multiplier**-2 + (2 * deviation) ** -2 == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"privacy\.clipping=fixed"):
        split_noise(1.0, 5)


@pytest.mark.parametrize("strategy", [FedAdam, FedMedian], ids=["fedadam", "fedmedian"])
def test_aggregates_whose_accounting_does_not_hold_are_refused(strategy, configure):
    with pytest.raises(ConfigError, match="must average as FedAvg does"):
        check_client_run(configure("privacy=client"), strategy(), nn.Linear(2, 2))


@pytest.mark.parametrize("name", FLOWERS)
def test_wrappers_of_flower_for_privacy_are_refused_with_the_reason(name, configure, identity):
    """Named as the strategy, they failed over an argument of the sampling."""
    config = configure(f"strategy._target_=flwr.serverapp.strategy.{name}")
    with pytest.raises(ConfigError, match=r"must not be chosen: it .*privacy=client"):
        build(config, nn.Linear(2, 2), Roster(2))


@pytest.mark.parametrize(
    ("mod", "reason"),
    [(fixedclipping_mod, "only Flower's own wrapper"), (adaptiveclipping_mod, "own wrapper"),
     (LocalDpMod(1.0, 1.0, 1.0, 1e-5), "nobody adds rounds up")],
    ids=["fixed", "adaptive", "local"],
)  # fmt: skip
def test_mods_of_flower_for_privacy_are_refused_in_every_run(mod, reason, configure, monkeypatch):
    own = types.ModuleType("own_app")
    own.app = ClientApp(mods=[mod])
    monkeypatch.setitem(sys.modules, "own_app", own)
    with pytest.raises(ConfigError, match=reason):
        build(configure("apps.client=own_app:app"), nn.Linear(2, 2), Roster(2))


def test_buffers_and_scores_of_clients_are_refused(configure):
    with_statistics = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match=r"model\.norm=group"):
        check_client_run(configure("privacy=client"), FedAvg(), with_statistics)
    scored = configure("privacy=client", "strategy.fraction_evaluate=0.5")
    with pytest.raises(ConfigError, match="fraction_evaluate"):
        check_client_run(scored, FedAvg(), nn.Linear(2, 2))
    check_client_run(configure("privacy=client"), FedProx(), nn.Linear(2, 2))


@pytest.mark.parametrize("where", ["server", "device"])
def test_shared_and_frozen_parameters_are_refused(where, configure):
    """Noise changed what was frozen, and made two of what was one."""
    config = configure("privacy=client", f"privacy.where={where}")
    frozen, shared = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    frozen[0].weight.requires_grad_(False)
    shared[1].weight = shared[0].weight
    with pytest.raises(ConfigError, match=r"model=0\.weight: is frozen"):
        check_client_run(config, FedAvg(), frozen)
    with pytest.raises(ConfigError, match=r"model=1\.weight: is shared with 0\.weight"):
        check_client_run(config, FedAvg(), shared)


def test_wrappers_find_each_other_through_that_of_flower(configure):
    inner = FedAvg()
    around = TypedBuffers(PrivateClients(inner, configure("privacy=client")), frozenset(START))
    assert innermost(around) is inner
    assert isinstance(find(around, PrivateClients), PrivateClients)
    assert isinstance(records.record_of(START), ArrayRecord) and torch.ones(1).item() == 1
