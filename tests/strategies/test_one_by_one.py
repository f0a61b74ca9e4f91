"""Replies that are added up as they arrive: the same bits, and memory that does not grow."""

import dataclasses
import weakref

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedsys.config import Apps, FaultsConfig
from fedsys.errors import RuntimeFailure
from fedsys.faults import Fault
from fedsys.identity import state_sha256
from fedsys.runtime.apps import load_client
from fedsys.runtime.local import AHEAD, FIRST_NODE_ID, LocalGrid
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.transport import records
from strategies import Roster, build
from strategies.one_by_one import OneByOne, about_memory, at_once_because, one_by_one
from strategies.rounds import play
from strategies.running_mean import BLOCK, RunningMean

SMALL = (
    "data=synthetic", "data.examples=120", "num_clients=4", "rounds=2", "client.epochs=1",
    "model=cnn", "model.width=4", "model.hidden=16", "client.batch_size=10",
)  # fmt: skip

SHAPES = [(), (1,), (3, 2), (BLOCK + 3,), (0,)]
TYPES = ["float32", "float64", "float16", "int64", "bool"]


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    st.sampled_from(SHAPES),
    st.sampled_from(TYPES),
    st.integers(0, 2**32),
)
@pytest.mark.usefixtures("identity")
def test_the_mean_is_that_of_flower_to_the_bit(weights, shape, dtype, seed):
    random = np.random.default_rng(seed)
    states = [(random.standard_normal(shape) * 100).astype(dtype) for _ in weights]
    mean = RunningMean(sum(weights))
    replies = []
    for state, weight in zip(states, weights, strict=True):
        mean.add({"w": state}, weight)
        content = {"a": records.record_of({"w": np.asarray(state)})}
        content["m"] = MetricRecord({"num-examples": weight})
        asked = Message(RecordDict(), 1, "train")
        replies.append(Message(RecordDict(content), reply_to=asked))
    arrays, _ = FedAvg().aggregate_train(1, replies)
    theirs = records.view(arrays["w"])
    assert mean.arrays["w"].dtype == theirs.dtype
    assert mean.arrays["w"].tobytes() == theirs.tobytes()
    assert mean.weight == sum(weights)


def played(config, *, one_by_one_, client=None, workers=2, processes=False):
    """Play the rounds; return hash, rows, and who was lost."""
    fed = federation.federation(config)
    model = federation.trained_model(config, fed.dataset)
    client = client or load_client(config.apps.client)
    results = []
    run_config = {"hydra-config": config.text}
    with LocalGrid(
        client, config.num_clients, workers=workers, run_config=run_config, processes=processes
    ) as grid:
        strategy = build(config, model, Roster(config.num_clients), dataset=fed.dataset)
        adding = one_by_one(config, grid, strategy, [len(part) for part in fed.parts])
        assert isinstance(adding, OneByOne)
        arrays = play(
            strategy, grid, records.to_record(model.state_dict()), first=1, last=config.rounds,
            timeout_s=60.0, judge=lambda _: training.Score(0.0, 0.0, 1), done=results.append,
            adding=adding if one_by_one_ else None,
        )  # fmt: skip
    rows = [{k: v for k, v in r.row.items() if "seconds" not in k} for r in results]
    return state_sha256(records.from_record(arrays)), rows, [r.lost for r in results]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("strategy=fedadam", "client.keep_optimizer=true", "strategy.fraction_train=0.7"),
        ("strategy=fedavgm", "strategy.buffers=average", "model.norm=batch"),
        ("strategy=fedprox", "pruning=magnitude", "pruning.steps=1", "pruning.sparsity=0.5"),
    ],
)
def test_models_and_figures_are_the_same_as_with_all_replies_at_once(configure, identity, more):
    config = configure(*SMALL, *more)
    assert played(config, one_by_one_=True) == played(config, one_by_one_=False)


def losing(*lost):
    """Return the client app, in which clients fail in a round: pairs of client and round."""
    app = load_client("clients.app:app")
    asked = []

    def client(message, context):
        k = int(context.node_config["partition-id"])
        round_ = int(message.content.config_records["config"]["server-round"])
        asked.append((k, round_))
        if (k, round_) in lost:
            raise RuntimeError(f"no memory left for {k}")
        return app(message, context)

    return client, asked


def test_a_lost_client_costs_time_and_the_model_is_that_of_the_others(configure, identity):
    """Its weight was counted on, so every product was one of the wrong factor."""
    config = configure(*SMALL, "rounds=3")
    lost = [(1, 1), (1, 2), (3, 3)]
    client, asked = losing(*lost)
    ours = played(config, one_by_one_=True, client=client)
    assert ours == played(config, one_by_one_=False, client=losing(*lost)[0])
    assert ours[2] == [
        {1: "RuntimeError: no memory left for 1"},
        {1: "RuntimeError: no memory left for 1"},
        {3: "RuntimeError: no memory left for 3"},
    ]
    # Client 1 was lost before, so nobody is asked twice in round 2; in round 3 it is there again,
    # and 3, which weighs as much, is not.
    rounds = [(k, round_) for round_ in (1, 2, 3) for k in range(4)]
    assert sorted(asked) == sorted([*rounds, (0, 1), (2, 1), (3, 1)])


def test_where_all_are_lost_it_is_an_error_as_before(configure, identity):
    config = configure(*SMALL)
    client, _ = losing(*((k, 1) for k in range(4)))
    for one in (True, False):
        with pytest.raises(RuntimeFailure, match=r"none of 4 clients succeeded; .*no memory left"):
            played(config, one_by_one_=one, client=client)


@pytest.mark.usefixtures("identity")
def test_no_more_replies_are_held_for_more_clients():
    alive: list[weakref.ref[ArrayRecord]] = []

    def client(message, context):
        record = records.record_of({"w": np.zeros(1000, np.float32)})
        alive.append(weakref.ref(record))
        return Message(RecordDict({"arrays": record}), reply_to=message)

    most = 0
    with LocalGrid(client, 60, workers=2) as grid:
        messages = [Message(RecordDict(), FIRST_NODE_ID + k, "train") for k in range(60)]
        for k, reply in enumerate(grid.in_order(messages)):
            assert reply.metadata.src_node_id == FIRST_NODE_ID + k
            most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 60
    assert most <= AHEAD + 2 + 1


def test_whatever_needs_all_replies_says_so(configure, identity):
    config = configure(*SMALL)
    strategy, krum = built(config), built(configure(*SMALL, "strategy=krum"))
    assert at_once_because(config, strategy) == ""
    assert at_once_because(config, krum) == "strategy Krum needs all replies at once"
    changed = {
        "split training": {"policy": {"kind": "fixed"}},
        "privacy": {"privacy": dataclasses.replace(config.privacy, mechanism="record")},
        "faults": {"faults": FaultsConfig(list=(Fault("device_killed", 1, 0),))},
        "my.app:app": {"apps": Apps(client="my.app:app")},
    }
    with LocalGrid(lambda m, c: m, 4) as grid:
        assert one_by_one(config, grid, strategy, [1] * 4) is not None
        for word, change in changed.items():
            other = dataclasses.replace(config, **change)
            reason = at_once_because(other, strategy)
            assert word in reason
            assert one_by_one(other, grid, strategy, [1] * 4) is None
            assert about_memory(other, grid, strategy, 10) == []
            line = f"the replies of 4 clients take 4,000 MB: {reason}"
            assert about_memory(other, grid, strategy, 10**9) == [line]
        assert about_memory(config, grid, strategy, 10**9) == []


def built(config):
    fed = federation.federation(config)
    model = federation.trained_model(config, fed.dataset)
    return build(config, model, Roster(4), dataset=fed.dataset)
