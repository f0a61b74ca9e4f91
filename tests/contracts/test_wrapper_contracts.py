"""What every wrapper promises: what it does not change passes through as it is."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Strategy

import strategies
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
