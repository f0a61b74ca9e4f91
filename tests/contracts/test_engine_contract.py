"""What every engine behind the endpoint promises, whatever computes the answers."""

import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsys.config.serving import ServingConfig
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.batching import Batcher, BatchLimits
from fedsys.serving.portfolio import PortfolioEngine
from tests.serving.chains import chain_of_three, model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "portfolio"


@contextmanager
def portfolio():
    found = Portfolio.load(GOLDEN)
    engine = PortfolioEngine(found, ServingConfig(variant="parent", threads=1))
    try:
        yield engine, found.module("parent")
    finally:
        engine.close()


@contextmanager
def memory_chain():
    net = model()
    with chain_of_three(net) as (engine, _):
        yield engine, net


@contextmanager
def tcp_chain():
    net = model()
    with chain_of_three(net, address="tcp://127.0.0.1:0") as (engine, _):
        yield engine, net


ENGINES = {"portfolio": portfolio, "chain in memory": memory_chain, "chain over TCP": tcp_chain}


@pytest.fixture(params=ENGINES)
def engine(request):
    with ENGINES[request.param]() as made:
        yield made


def batch(engine, rows=3):
    draws = np.random.default_rng(rows)
    return draws.standard_normal((rows, *engine.card.input_shape), np.float32)


def test_scores_are_those_of_the_whole_model_to_the_bit(engine):
    made, net = engine
    for rows in (1, 3):
        x = batch(made, rows)
        with torch.inference_mode():
            assert np.array_equal(made.answer(x).scores, net(torch.from_numpy(x)))


def test_an_answer_says_who_gave_it_in_plain_values(engine):
    made, _ = engine
    answer = made.answer(batch(made))
    assert answer.by and answer.scores.dtype == np.float32
    assert all(isinstance(value, str | int | float | bool) for value in answer.facts.values())


def test_it_is_ready_and_its_status_is_plain(engine):
    made, _ = engine
    made.answer(batch(made))
    assert made.ready and made.lanes >= 1
    json.dumps(made.status())
    assert isinstance(made.status()["variant"], str)


def test_what_does_not_fit_fails_alone(engine):
    made, net = engine
    with pytest.raises(Exception, match=r".+"):
        made.answer(np.zeros((1, 7, 3, 3), np.float32))
    x = batch(made)
    with torch.inference_mode():
        assert np.array_equal(made.answer(x).scores, net(torch.from_numpy(x)))


def test_many_threads_get_each_their_own_answer(engine):
    made, net = engine
    batcher = Batcher(made, BatchLimits(max_batch=1, max_delay_ms=0.0))
    inputs = [batch(made, 1) + index for index in range(24)]
    with torch.inference_mode():
        expected = [net(torch.from_numpy(x)) for x in inputs]
    found = [None] * len(inputs)

    def ask(start):
        for index in range(start, len(inputs), 4):
            found[index] = batcher.submit(inputs[index]).result(60).scores

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    batcher.close(10)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
