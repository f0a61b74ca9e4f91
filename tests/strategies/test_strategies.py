import dataclasses
import gc
import json
import random
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsys.config import options_of
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.identity import arithmetic
from fedsys.randomness import Address
from fedsys.training.plain import Score
from fedsys.transport import records
from strategies import Roster, Sampling, build
from strategies import roster as roster_module
from strategies.buffers import with_type
from strategies.roster import IDENTIFY
from strategies.rounds import play
from strategies.sampling import choose

pytestmark = pytest.mark.usefixtures("identity", "quick_collections")

ALL = options_of("strategy")


@pytest.fixture(scope="module")
def quick_collections():
    """Some of Flower's strategies collect garbage once per reply; spare them torch's objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Nodes(Grid):
    """A grid that answers at once, in any order, for nodes with random ids."""

    def __init__(self, client, count, *, seed=0):
        self.client, self.random = client, random.Random(seed)
        ids = self.random.sample(range(10, 10**15), count)
        self.partition_of: Mapping[int, int] = {node: k for k, node in enumerate(ids)}
        self.asked: list[list[int]] = []
        self.absent: set[int] = set()

    def get_node_ids(self):
        return sorted(n for n, k in self.partition_of.items() if k not in self.absent)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{id(messages)}-{number}"
        self.asked.append([self.partition_of[m.metadata.dst_node_id] for m in messages])
        replies = [self._reply(m) for m in messages]
        self.random.shuffle(replies)
        return [r for r in replies if r is not None]

    def push_messages(self, messages):
        self.answers: dict[str, Message] = {}
        for number, message in enumerate(messages):
            assert message.metadata.message_type == IDENTIFY
            message.metadata.__dict__["_message_id"] = f"question-{number}"
            self.answers[message.metadata.message_id] = self._identity(message)
        return list(self.answers)

    def pull_messages(self, message_ids):
        return [self.answers.pop(i) for i in message_ids]

    def _identity(self, message):
        k = self.partition_of[message.metadata.dst_node_id]
        answer = ConfigRecord({"partition-id": k})
        return Message(RecordDict({"identity": answer}), reply_to=message)

    def _reply(self, message):
        k = self.partition_of[message.metadata.dst_node_id]
        content = self.client(k, message.content)
        if content is None:
            return None
        if isinstance(content, str):
            error = Message(Error(1, content), reply_to=message)
            error.metadata.__dict__["_src_node_id"] = 1  # as Flower's engine answers for a node
            return error
        return Message(content, reply_to=message)

    def create_message(self, *args, **kwargs):
        raise AssertionError("not used")

    set_run = run = create_message


def network():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    generator = Address(5).torch("test")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def trained(k: int, name: str, array):
    """Return what client `k` makes of an array."""
    if name.endswith("num_batches_tracked"):
        return array + np.int64(3 * k + 1)
    draw = Address(1, client=k).numpy(name).random(array.shape).astype(array.dtype)
    return (array * np.float32(0.5) + draw * np.float32(0.3)).astype(array.dtype)


def client(k: int, content: RecordDict) -> RecordDict:
    arrays = records.arrays_of(content.array_records["arrays"])
    new = {name: trained(k, name, a) for name, a in arrays.items()}
    metrics = {"num-examples": 10 * (k + 1), "train_loss": 0.5 + k, "steps": 2}
    return RecordDict({"arrays": records.record_of(new), "metrics": MetricRecord(metrics)})


def round_of(strategy, grid, arrays, number=1):
    """Play one round and return the new arrays."""
    messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
    replies = grid.send_and_receive(messages)
    return strategy.aggregate_train(number, replies)[0]


def numpy_of(record):
    return {name: a.copy() for name, a in records.arrays_of(record).items()}


@pytest.fixture
def make(configure):
    """Return a function that builds a strategy by its name, and its first arrays."""

    def build_by_name(name, *overrides):
        own = [o.removeprefix("strategy.") for o in overrides if o.startswith("strategy.")]
        others = [o for o in overrides if not o.startswith("strategy.")]
        config = configure(f"strategy={name}", *others)
        given = {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in own)}
        config = dataclasses.replace(config, strategy={**config.strategy, **given})
        model = network()
        return build(config, model, Roster()), records.to_record(model.state_dict())

    return build_by_name


# --------------------------------------------------------------------------------------------------
# What holds for every strategy


@pytest.mark.parametrize("name", ALL)
def test_an_aggregate_has_the_names_order_types_and_shapes_of_the_model(make, name):
    strategy, arrays = make(name)
    grid = Nodes(client, 8)
    for number in (1, 2):
        new = round_of(strategy, grid, arrays, number)
        assert [(n, a.dtype, a.shape) for n, a in new.items()] == [
            (n, a.dtype, a.shape) for n, a in arrays.items()
        ]
        assert all(np.isfinite(a).all() for a in numpy_of(new).values())
        assert not np.array_equal(records.view(new["0.weight"]), records.view(arrays["0.weight"]))
        arrays = new


@pytest.mark.parametrize("name", ALL)
def test_replies_in_any_order_from_any_node_ids_give_the_same_bits(make, name):
    results = []
    for seed in (1, 2, 3):
        strategy, arrays = make(name, "strategy.fraction_train=0.5")
        grid = Nodes(client, 8, seed=seed)
        for number in (1, 2, 3):
            arrays = round_of(strategy, grid, arrays, number)
        results.append(({n: a.tobytes() for n, a in numpy_of(arrays).items()}, grid.asked))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", ALL)
def test_buffers_stay_within_what_the_clients_have_seen(make, name):
    strategy, arrays = make(name)
    grid = Nodes(client, 8)
    for number in (1, 2):
        new = round_of(strategy, grid, arrays, number)
        for buffer in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            before = records.view(arrays[buffer])
            seen = np.stack([trained(k, buffer, before) for k in range(8)])
            slack = 1e-5 * np.abs(seen).max()
            value = records.view(new[buffer])
            assert (value >= seen.min(0) - slack).all() and (value <= seen.max(0) + slack).all()
        arrays = new


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_writes_into_nothing_that_others_hold(make, name):
    strategy, arrays = make(name)
    sent = numpy_of(arrays)
    kept = []

    def remembering(k, content):
        reply = client(k, content)
        held = dict(reply.array_records["arrays"])
        kept.append((held, {n: a.data for n, a in held.items()}))
        return reply

    round_of(strategy, Nodes(remembering, 8), arrays)
    assert all(np.array_equal(a, sent[n]) for n, a in numpy_of(arrays).items())
    assert all(a.data == data[n] for held, data in kept for n, a in held.items())


@pytest.mark.parametrize("name", ALL)
def test_a_lost_client_is_named_and_the_others_go_on(make, name):
    def failing(k, content):
        return {2: "OSError: disk", 5: None}.get(k, client(k, content))

    strategy, arrays = make(name)
    assert round_of(strategy, Nodes(failing, 8), arrays) is not None
    assert strategy.lost == {2: "OSError: disk", 5: "no reply"}


@pytest.mark.parametrize("name", ALL)
def test_the_process_wide_generators_decide_nothing(make, name):
    results = []
    for seed in (1, 2):
        state = random.getstate()
        random.seed(seed)
        try:
            strategy, arrays = make(name, "strategy.fraction_train=0.5")
            results.append(numpy_of(round_of(strategy, Nodes(client, 8), arrays)))
        finally:
            random.setstate(state)
    assert all(np.array_equal(a, results[1][n]) for n, a in results[0].items())


# --------------------------------------------------------------------------------------------------
# Closed forms


def stacked(arrays, name, clients=range(8)):
    before = records.view(arrays[name])
    return np.stack([trained(k, name, before) for k in clients])


def test_fedavg_is_the_mean_weighted_by_examples(make):
    strategy, arrays = make("fedavg")
    new = round_of(strategy, Nodes(client, 8), arrays)
    weights = np.arange(1, 9) / 36
    for name, array in numpy_of(new).items():
        mean = np.tensordot(weights, stacked(arrays, name).astype(np.float64), 1)
        if name.endswith("num_batches_tracked"):
            assert array == np.rint(mean)
        else:
            np.testing.assert_allclose(array, mean, rtol=1e-6)


def test_integer_buffers_are_rounded_half_to_even():
    values = np.array([0.5, 1.5, 2.5, -0.5, 1e15 + 0.5])
    rounded = with_type(values, np.dtype("int64"))
    assert rounded.dtype == np.int64 and rounded.tolist() == [0, 2, 2, 0, 10**15]


def test_fedprox_tells_the_clients_its_mu(make):
    seen = []

    def noting(k, content):
        seen.append(dict(content.config_records["config"]))
        return client(k, content)

    strategy, arrays = make("fedprox", "strategy.proximal_mu=0.25")
    round_of(strategy, Nodes(noting, 8), arrays, 3)
    assert seen == [{"proximal-mu": 0.25, "server-round": 3}] * 8


def test_fedmedian_and_fedtrimmedavg_are_those_of_numpy_and_scipy(make):
    from scipy.stats import trim_mean

    rules = {"fedmedian": np.median, "fedtrimmedavg": partial(trim_mean, proportiontocut=0.2)}
    for name, rule in rules.items():
        strategy, arrays = make(name)
        new = round_of(strategy, Nodes(client, 8), arrays)
        expected = rule(stacked(arrays, "2.weight"), axis=0)
        np.testing.assert_allclose(records.view(new["2.weight"]), expected, rtol=1e-6)


def test_fedavgm_adds_up_the_mean_updates_with_its_momentum(make):
    strategy, first = make("fedavgm", "strategy.server_momentum=0.5")
    grid = Nodes(client, 8)
    second = round_of(strategy, grid, first, 1)
    third = round_of(strategy, grid, second, 2)
    weights, name = np.arange(1, 9) / 36, "0.weight"
    old = records.view(first[name]).astype(np.float64)
    update = np.tensordot(weights, stacked(first, name), 1) - old
    np.testing.assert_allclose(records.view(second[name]), old + update, rtol=1e-5)
    momentum = 0.5 * update + np.tensordot(weights, stacked(second, name), 1) - (old + update)
    np.testing.assert_allclose(records.view(third[name]), old + update + momentum, rtol=1e-5)


def test_fedadam_steps_parameters_and_averages_running_statistics(make):
    strategy, arrays = make("fedadam", "strategy.eta=0.1", "strategy.tau=0.01")
    new = round_of(strategy, Nodes(client, 8), arrays)
    weights = np.arange(1, 9) / 36
    old = records.view(arrays["0.weight"]).astype(np.float64)
    delta = np.tensordot(weights, stacked(arrays, "0.weight"), 1) - old
    rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)  # Flower counts the first round as 2
    stepped = old + rate * 0.1 * delta / (np.sqrt(0.01 * delta**2) + 0.01)
    np.testing.assert_allclose(records.view(new["0.weight"]), stepped, rtol=1e-5)
    mean = np.tensordot(weights, stacked(arrays, "1.running_var"), 1)
    np.testing.assert_allclose(records.view(new["1.running_var"]), mean, rtol=1e-6)


def test_krum_takes_one_clients_model_and_its_float_buffers_together(make):
    strategy, arrays = make("krum")
    new = round_of(strategy, Nodes(client, 8), arrays)
    floats = [n for n in arrays if not n.endswith("num_batches_tracked")]
    chosen = {
        name: [k for k in range(8) if np.array_equal(records.view(new[name]), of[k])]
        for name in floats
        for of in [stacked(arrays, name)]
    }
    assert all(len(who) == 1 for who in chosen.values())
    assert len({who[0] for who in chosen.values()}) == 1


def test_qfedavg_without_q_is_the_plain_mean(make):
    strategy, arrays = make("qfedavg", "strategy.q=0")
    new = round_of(strategy, Nodes(client, 8), arrays)
    mean = stacked(arrays, "0.weight").mean(0)
    np.testing.assert_allclose(records.view(new["0.weight"]), mean, rtol=1e-5)


def test_tied_parameters_are_all_parameters(configure):
    model = network()
    model.add_module("3", nn.Linear(3, 4))
    model[3].weight = model[0].weight
    strategy = build(configure("strategy=fedadam"), model, Roster())
    new = round_of(strategy, Nodes(client_of_tied, 3), records.to_record(model.state_dict()))
    assert np.array_equal(records.view(new["0.weight"]), records.view(new["3.weight"]))


def client_of_tied(k, content):
    reply = client(k, content)
    reply.array_records["arrays"]["3.weight"] = reply.array_records["arrays"]["0.weight"]
    return reply


# --------------------------------------------------------------------------------------------------
# Who takes part


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 5),
    st.integers(0, 2**40),
    st.integers(1, 50),
)
def test_a_sample_is_a_sorted_function_of_seed_and_round(n, fraction, least, seed, number):
    count = Sampling(fraction, min_train_nodes=least).count(n, train=True)
    assert min(n, least) <= count <= n and abs(max(count, n * fraction) - n * fraction) <= least + 1
    here = Address(seed, round=number)
    chosen = choose(list(range(n)), count, here, "sample-train")
    assert chosen == sorted(set(chosen)) and len(chosen) == count
    assert chosen == choose(list(range(n)), count, here, "sample-train")


def test_rounds_and_seeds_draw_differently_and_fairly():
    draws = [choose(range(20), 5, Address(0, round=r), "sample-train") for r in range(1, 401)]
    assert len({tuple(d) for d in draws}) > 350
    counts = np.bincount(np.concatenate(draws), minlength=20)
    assert counts.sum() == 2000 and (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.75)).all()
    assert draws[0] != choose(range(20), 5, Address(1, round=1), "sample-train")


def test_training_and_evaluation_ask_their_shares(make):
    strategy, arrays = make(
        "fedavg", "strategy.fraction_train=0.5", "strategy.fraction_evaluate=0.25"
    )
    grid = Nodes(client, 8)
    train = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    evaluate = list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid))
    assert (len(train), len(evaluate)) == (4, 2)
    assert {m.metadata.message_type for m in train} == {"train"}
    assert {m.metadata.message_type for m in evaluate} == {"evaluate"}


def test_without_a_share_nobody_evaluates(make):
    strategy, arrays = make("fedavg")
    assert list(strategy.configure_evaluate(1, arrays, ConfigRecord(), Nodes(client, 8))) == []


def test_evaluations_are_averaged_by_examples(make):
    def judge(k, content):
        metrics = {"num-examples": k + 1, "eval_loss": float(k), "eval_accuracy": 0.5}
        return RecordDict({"metrics": MetricRecord(metrics)})

    strategy, arrays = make("fedavg", "strategy.fraction_evaluate=1.0")
    grid = Nodes(judge, 3)
    replies = grid.send_and_receive(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid))
    metrics = strategy.aggregate_evaluate(1, replies)
    assert dict(metrics) == pytest.approx({"eval_loss": (0 + 2 + 6) / 6, "eval_accuracy": 0.5})


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("fraction_train=1.5", r"strategy\.fraction_train=1\.5: must be in \(0, 1\]"),
        ("fraction_train=0", r"strategy\.fraction_train=0: must be in \(0, 1\]"),
        ("fraction_evaluate=-0.1", r"strategy\.fraction_evaluate=-0\.1: must be in \[0, 1\]"),
        ("fraction_train=many", r"strategy\.fraction_train=many: must be in \(0, 1\]"),
        ("min_train_nodes=0", r"strategy\.min_train_nodes=0: must be a whole number above 0"),
        ("min_train_nodes=1.5", r"strategy\.min_train_nodes=1\.5: must be a whole number"),
        ("buffers=step", r"strategy\.buffers=step: must be one of aggregate, average"),
        ("eta=1", r"strategy\.eta: FedAvg has no such parameter; .*it has fraction_train"),
        ("min_available_nodes=3", r"strategy\.min_available_nodes=3: must not be set"),
        ("_target_=fedsys.nothing", r"strategy\._target_=fedsys\.nothing: cannot be imported"),
        ("_target_=builtins.dict", r"strategy\._target_=builtins\.dict: must build a flwr"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(make, override, rule):
    with pytest.raises(ConfigError, match=rule):
        make("fedavg", f"strategy.{override}")


@pytest.mark.parametrize(
    ("name", "override", "rule"),
    [
        ("fedadam", "eta=fast", r"strategy\.eta=fast: must be of type float"),
        ("fedadam", "eta=.inf", r"strategy\.eta=inf: must be a finite number"),
        ("fedtrimmedavg", "beta=0.7", r"strategy: FedTrimmedAvg refuses .*\[0, 0\.5\)"),
        ("krum", "num_malicious_nodes=0.5", r"num_malicious_nodes=0\.5: must be of type int"),
    ],
)
def test_an_argument_of_flowers_strategy_is_checked_too(make, name, override, rule):
    with pytest.raises(ConfigError, match=rule):
        make(name, f"strategy.{override}")


class Loyal(Strategy):
    """A user's strategy without any of FedAvg's arguments: takes the first reply."""

    def __init__(self, greeting: str = "hello"):
        self.greeting = greeting

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, node, "train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round, replies):
        return next(iter(replies)).content["arrays"], MetricRecord({})

    def configure_evaluate(self, server_round, arrays, config, grid):
        return []

    def aggregate_evaluate(self, server_round, replies):
        return None

    def summary(self):
        pass


def test_a_users_strategy_needs_no_argument_of_flowers(configure, monkeypatch):
    import strategies

    monkeypatch.setattr(strategies, "Loyal", Loyal, raising=False)
    config = configure("strategy._target_=strategies.Loyal", "+strategy.greeting=ave")
    model = network()
    strategy = build(config, model, Roster())
    arrays = records.to_record(model.state_dict())
    new = round_of(strategy, Nodes(client, 8), arrays)
    assert np.array_equal(records.view(new["0.bias"]), stacked(arrays, "0.bias")[0])
    assert strategy.inner.inner.greeting == "ave"


# --------------------------------------------------------------------------------------------------
# Who is there


def test_only_nodes_that_are_new_are_asked_who_they_are():
    grid, roster = Nodes(client, 4), Roster()
    grid.absent = {3}
    assert list(roster.refresh(grid)) == [0, 1, 2]
    grid.absent = {0}
    present = roster.refresh(grid)
    assert list(present) == [1, 2, 3]
    assert [grid.partition_of[node] for node in present.values()] == [1, 2, 3]


def test_a_node_whose_sums_have_other_bits_is_pointed_out_once():
    class Mixed(Nodes):
        def _identity(self, message):
            reply = super()._identity(message)
            other = {"torch": "1.0"} if self.partition_of[message.metadata.dst_node_id] else {}
            told = json.dumps(arithmetic() | other)
            reply.content["identity"]["arithmetic"] = told
            return reply

    said = []
    grid, roster = Mixed(client, 2), Roster(say=said.append)
    for _ in range(2):
        assert list(roster.refresh(grid)) == [0, 1]
    (text,) = said
    assert "(partition-id 1) computes with torch 1.0 instead of" in text
    assert "machine" not in text


@pytest.mark.parametrize("told", ["", "{", "[1]", "null", '{"torch": null}'])
def test_a_node_that_tells_nonsense_of_its_arithmetic_takes_part_and_counts_as_unknown(told):
    """What a node told was parsed without a guard: one bad reply ended the run of all."""

    class Odd(Nodes):
        def _identity(self, message):
            reply = super()._identity(message)
            reply.content["identity"]["arithmetic"] = told
            return reply

    said = []
    assert list(Roster(say=said.append).refresh(Odd(client, 1))) == [0]
    (text,) = said
    assert "(partition-id 0) computes with torch " in text


def test_a_node_that_does_not_answer_is_asked_again(monkeypatch):
    """Flower holds an answer back until the node gets another message, if its last run ended."""

    class Holding(Nodes):
        def __init__(self):
            super().__init__(client, 2)
            self.questions, self.slow = [], self.get_node_ids()[0]

        def push_messages(self, messages):
            for message in messages:
                message.metadata.__dict__["_message_id"] = f"question-{len(self.questions)}"
                self.questions.append(message)
            return [m.metadata.message_id for m in messages]

        def pull_messages(self, message_ids):
            to_slow = [q for q in self.questions if q.metadata.dst_node_id == self.slow]
            held = {q.metadata.message_id for q in to_slow} if len(to_slow) < 2 else set()
            asked = {q.metadata.message_id: q for q in self.questions}
            return [self._identity(asked[i]) for i in message_ids if i not in held]

    monkeypatch.setattr(roster_module, "AGAIN_S", 0.2)
    monkeypatch.setattr(roster_module, "POLL_S", 0.02)
    grid = Holding()
    assert list(Roster(2, wait_s=5.0).assemble(grid)) == [0, 1]
    assert len(grid.questions) == 3


def test_a_node_that_never_says_who_it_is_is_named(monkeypatch):
    class Mute(Nodes):
        def pull_messages(self, message_ids):
            return []

    monkeypatch.setattr(roster_module, "ANSWER_S", 0.1)
    monkeypatch.setattr(roster_module, "POLL_S", 0.02)
    grid = Mute(client, 1)
    (node,) = grid.get_node_ids()
    with pytest.raises(RuntimeFailure, match=f"are 0 .* node {node} does not say who it is: see"):
        Roster(1, wait_s=0.1).assemble(grid)


def test_two_nodes_with_one_partition_are_refused():
    grid = Nodes(client, 2)
    grid.partition_of = dict.fromkeys(grid.partition_of, 1)
    with pytest.raises(RuntimeFailure, match=r"partition-id=1: .*nodes \d+ and \d+ have it; give"):
        Roster().assemble(grid)


def test_nobody_there_says_so(make):
    strategy, arrays = make("fedavg")
    with pytest.raises(RuntimeFailure, match="no client is connected; start at least one node"):
        round_of(strategy, Nodes(client, 0), arrays)


# --------------------------------------------------------------------------------------------------
# Clients that fail


def test_each_lost_client_has_its_own_reason(make):
    def failing(k, content):
        return {0: None, 1: "ValueError: x", 2: "OSError: y"}.get(k, client(k, content))

    strategy, arrays = make("fedavg")
    round_of(strategy, Nodes(failing, 8), arrays)
    assert strategy.lost == {0: "no reply", 1: "ValueError: x", 2: "OSError: y"}


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("OSError: disk", RuntimeFailure), ("ConfigError: client.lr=x: must", ConfigError)],
)
def test_when_all_fail_the_reason_of_the_first_is_told(make, reason, kind):
    strategy, arrays = make("fedavg")
    with pytest.raises(kind, match=f"train: none of 8 clients succeeded; {reason}"):
        round_of(strategy, Nodes(lambda k, _: reason if k else None, 8), arrays)
    with pytest.raises(RuntimeFailure, match="none of 8 clients succeeded; no reply at all"):
        round_of(strategy, Nodes(lambda k, _: None, 8), arrays)


def played(strategy, arrays, grid, rounds=1):
    results = []
    last = play(
        strategy,
        grid,
        arrays,
        first=1,
        last=rounds,
        timeout_s=1.0,
        judge=lambda _: Score(0.5, 0.75, 4),
        done=results.append,
    )
    return last, results


def test_rounds_report_what_happened_in_them(make):
    def failing(k, content):
        return "OSError: y" if k == 2 else client(k, content)

    strategy, arrays = make("fedavg")
    last, results = played(strategy, arrays, Nodes(failing, 4), rounds=2)
    assert [r.number for r in results] == [1, 2] and last is results[1].arrays
    row = results[0].row
    assert (row["clients"], row["examples"], row["steps"]) == (3, 10 + 20 + 40, 6)
    assert (row["val_loss"], row["val_accuracy"]) == (0.5, 0.75)
    assert row["train_loss"] == pytest.approx((10 * 0.5 + 20 * 1.5 + 40 * 3.5) / 70)
    size = sum(len(a.data) for a in arrays.values())
    assert (row["bytes_down"], row["bytes_up"]) == (4 * size, 3 * size)
    assert results[0].lost == {2: "OSError: y"}
    parts = [v for k, v in row.items() if k.startswith("seconds_")]
    assert len(parts) == 6 and all(v >= 0 for v in parts)


def test_a_strategy_that_never_makes_a_model_is_refused_at_once(make):
    strategy, arrays = make("bulyan")
    with pytest.raises(ConfigError, match=r"strategy=Bulyan: needs more than the 2 replies"):
        played(strategy, arrays, Nodes(client, 2))


def test_replies_are_averaged_by_names_whatever_their_order(make):
    """Bulyan adds up by position: weight and bias of a layer that one client pruned were mixed.

    A module has its weight behind its bias after torch.nn.utils.prune.remove.
    """

    def pruned(k, content):
        reply = client(0, content)
        if k % 2:
            backwards = reversed(records.arrays_of(reply["arrays"]).items())
            reply["arrays"] = records.record_of(dict(backwards))
        return reply

    for name in ("bulyan", "fedmedian", "krum", "fedavg"):
        strategy, arrays = make(name)
        alike = round_of(strategy, Nodes(lambda k, content: client(0, content), 5), arrays, 1)
        strategy, arrays = make(name)
        mixed = round_of(strategy, Nodes(pruned, 5), arrays, 1)
        assert list(mixed) == list(alike) == list(arrays)
        for key, array in records.arrays_of(alike).items():
            np.testing.assert_array_equal(records.arrays_of(mixed)[key], array)


def test_a_strategy_that_lacks_lost_clients_keeps_the_model_of_the_round_before(make):
    strategy, arrays = make("bulyan")
    grid = Nodes(lambda k, content: client(k, content) if k < 2 else None, 3)
    last, results = played(strategy, arrays, grid)
    assert last is arrays and set(results[0].lost) == {2}


# --------------------------------------------------------------------------------------------------
# State that clients leave behind


def test_the_state_of_a_client_comes_back_to_its_partition_only(make):
    seen: list[tuple[int, object]] = []

    def stateful(k, content):
        kept = content.array_records.get("optimizer")
        before = None if kept is None else records.view(kept["x"]).tolist()
        seen.append((k, before))
        reply = client(k, content)
        reply["optimizer"] = records.record_of({"x": np.array([k, (before or [0, 0])[1] + 1])})
        return reply

    strategy, arrays = make("fedavg", "client.keep_optimizer=true", "strategy.fraction_train=0.5")
    rounds_of: dict[int, int] = {}
    grid = Nodes(stateful, 8)
    for number in range(1, 9):
        seen.clear()
        arrays = round_of(strategy, grid, arrays, number)
        assert isinstance(arrays, ArrayRecord)
        for k, before in seen:
            assert before == ([k, rounds_of[k]] if k in rounds_of else None)
            rounds_of[k] = rounds_of.get(k, 0) + 1
    assert min(rounds_of.values()) >= 2


def test_wrappers_pass_on_what_they_do_not_change(make):
    calls = []
    strategy, _ = make("fedavg", "client.keep_optimizer=true")
    strategy.inner.inner.inner = SimpleNamespace(summary=lambda: calls.append(1))
    strategy.summary()
    assert calls == [1]
    assert isinstance(make("fedavg")[0].inner.inner, FedAvg)
