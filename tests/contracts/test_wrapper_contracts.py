"""What every wrapper promises: what it does not change passes through as it is."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

import strategies
from fedsys.runtime import grids, simulation
from fedsys.runtime.grid_around import GridAround
from strategies.around import Around, find, innermost


class Recorded(Strategy):
    """Answers each call with an object of its own, and writes down what it was given."""

    def __init__(self):
        self.calls, self.answers = [], {}

    def _answer(self, name, *given):
        self.calls.append((name, *given))
        return self.answers.setdefault(name, object())

    def summary(self):
        self._answer("summary")

    def configure_train(self, server_round, arrays, config, grid):
        return self._answer("configure_train", server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        return self._answer("aggregate_train", server_round, replies)

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self._answer("configure_evaluate", server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        return self._answer("aggregate_evaluate", server_round, replies)


CALLS = {
    "configure_train": (3, ArrayRecord(), ConfigRecord(), object()),
    "aggregate_train": (3, [object()]),
    "configure_evaluate": (3, ArrayRecord(), ConfigRecord(), object()),
    "aggregate_evaluate": (3, [MetricRecord()]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_strategy_around_another_passes_on_each_call_and_its_answer(name, depth):
    inner = strategy = Recorded()
    for _ in range(depth):
        strategy = Around(strategy)
    answer = getattr(strategy, name)(*CALLS[name])
    assert answer is inner.answers[name]
    [(called, *given)] = inner.calls
    assert called == name
    assert all(got is meant for got, meant in zip(given, CALLS[name], strict=True))


WRAPPERS = [
    value
    for name in strategies.__all__
    if isinstance(value := getattr(strategies, name), type) and issubclass(value, Strategy)
]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_every_wrapper_of_the_project_is_one_of_the_same_kind(kind):
    assert issubclass(kind, Around)
    assert isinstance(kind.STATE, tuple)
    inner = Recorded()
    wrapper = kind.__new__(kind)
    Around.__init__(wrapper, inner)
    wrapper.summary()
    assert inner.calls == [("summary",)]


def test_layers_are_found_by_kind_from_the_outside():
    class Other(Around):
        pass

    inner = FedAvg()
    deep = Other(inner)
    strategy = Around(Other(Around(deep)))
    assert find(strategy, Other) is strategy.inner
    assert find(strategy.inner.inner, Other) is deep
    assert find(strategy, FedAvg) is inner
    assert find(Around(inner), Other) is None
    assert innermost(strategy) is inner and innermost(inner) is inner


class RecordedGrid(Grid):
    """Answers each call with an object of its own, and writes down what it was given."""

    def __init__(self):
        self.calls, self.answers, self._run = [], {}, object()

    def _answer(self, name, *given):
        self.calls.append((name, *given))
        return self.answers.setdefault(name, [])

    def set_run(self, run):
        self._run = run

    @property
    def run(self):
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise AssertionError("Flower's grids warn when they are asked for a message")

    def get_node_ids(self):
        return self._answer("get_node_ids")

    def get_nodes(self):
        return self._answer("get_nodes")

    def push_messages(self, messages):
        return self._answer("push_messages", *messages)

    def pull_messages(self, message_ids):
        return self._answer("pull_messages", *message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        return self._answer("send_and_receive", *messages, timeout)


def message():
    return Message(RecordDict(), 5, "train")


GRID_CALLS = {
    "get_node_ids": lambda grid, one: grid.get_node_ids(),
    "get_nodes": lambda grid, one: grid.get_nodes(),
    "push_messages": lambda grid, one: grid.push_messages([one]),
    "pull_messages": lambda grid, one: grid.pull_messages(["id"]),
    "send_and_receive": lambda grid, one: grid.send_and_receive([one], timeout=3.0),
}


@pytest.mark.parametrize("name", GRID_CALLS)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_grid_around_another_passes_on_each_call_and_its_answer(identity, name, depth):
    inner = grid = RecordedGrid()
    for _ in range(depth):
        grid = GridAround(grid)
    one = message()
    answer = GRID_CALLS[name](grid, one)
    assert answer is inner.answers[name]
    given = {"push_messages": (one,), "pull_messages": ("id",), "send_and_receive": (one, 3.0)}
    assert inner.calls == [(name, *given.get(name, ()))]


GRIDS = {
    "around": GridAround,
    "attentive": grids.AttentiveGrid,
    "annotated": lambda inner: grids.AnnotatedGrid(inner, "note", ConfigRecord({"a": 1})),
    "chosen": lambda inner: grids.ChosenNodes(inner, [7, 5]),
    "engine": lambda inner: simulation.EngineGrid(inner, {7: 0, 5: 1}, lambda: None),
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_around_another_has_its_run_and_makes_messages_itself(identity, name):
    inner = RecordedGrid()
    grid = GRIDS[name](inner)
    assert isinstance(grid, GridAround) and grid.inner is inner
    assert grid.run is inner.run
    run = object()
    grid.set_run(run)
    assert grid.run is inner.run is run
    made = grid.create_message(RecordDict({"a": ConfigRecord({"b": 2})}), "train", 5, "3", 60.0)
    assert made.content.config_records["a"]["b"] == 2
    told = made.metadata
    assert (told.message_type, told.dst_node_id, told.group_id) == ("train", 5, "3")
    assert told.ttl == 60.0


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_around_another_sends_what_it_is_given_and_returns_what_it_finds(identity, name):
    inner, one = RecordedGrid(), message()
    inner.answers = {
        "push_messages": ["id"],
        "pull_messages": [Message(RecordDict(), reply_to=one)],
    }
    grid = GRIDS[name](inner)
    assert list(grid.push_messages([one])) == ["id"]
    [reply] = grid.pull_messages(["id"])
    assert reply is inner.answers["pull_messages"][0]
    assert [(call, len(given)) for call, *given in inner.calls] == [
        ("push_messages", 1),
        ("pull_messages", 1),
    ]


def test_a_grid_of_chosen_nodes_shows_the_same_in_every_way():
    grid = grids.ChosenNodes(RecordedGrid(), [7, 5])
    assert list(grid.get_node_ids()) == [7, 5]
    assert list(grid.get_nodes()) == [NodeInfo(node_id=7), NodeInfo(node_id=5)]
