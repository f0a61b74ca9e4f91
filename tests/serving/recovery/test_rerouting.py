"""What goes wrong while a chain recovers: nothing of it may be the end of recovering."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fedsys.config.serving import WeightsConfig
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.models import layered
from fedsys.models.resilient import exit_chain, resilient
from fedsys.serving.recovery.building import PipelineBuilder
from fedsys.serving.recovery.candidates import ModelWays
from fedsys.serving.recovery.decision import RecoveryObjective
from fedsys.serving.switch.switcher import Loaded
from tests.serving.chains import SHAPE, cut, images, model
from tests.serving.recovery.failing import continuing
from tests.waiting import until

HOSTS = ("device", "edge", "cloud")


@pytest.fixture(scope="module")
def net():
    return model()


def same(answer, net, x):
    with torch.inference_mode():
        return np.array_equal(answer.scores, net(x))


def test_the_route_of_a_host_that_is_back_is_built_anew(net):
    """All hosts went, and the one that the route was on came back: later requests were refused.

    What stood of the route counted as standing, as no host of it was gone any more. It was neither
    built anew, as it was the one that answered, nor did anything of it answer.
    """
    x = images()
    with continuing(net, (5, 5)) as (engine, fleet, continuer):
        for name in HOSTS:
            fleet.kill(name)
        assert until(lambda: engine.out)
        fleet.start("device")
        assert until(lambda: engine.ready)
        answer = engine.answer(x)
        assert same(answer, net, x)
        assert answer.facts["cuts"] == "5/5"
        assert until(lambda: continuer.at_rest)
        assert len(engine.live) == 1


def test_what_stands_and_cannot_answer_is_built_anew():
    """A spare whose host had gone and was back stayed as it was until others were to be kept."""
    loads, dead, done = [], set(), []

    def load(name):
        loads.append(name)
        dead.discard(name)
        return lambda x: x

    switcher = Loaded(load, "a", free=lambda run: None)
    builder = PipelineBuilder(switcher, done.append, sound=lambda label: label not in dead)
    builder.keep(["b", "c"])
    assert until(lambda: not builder.busy)
    dead |= {"a", "b"}
    builder.build("a")
    assert until(lambda: not builder.busy)
    assert loads == ["a", "b", "c", "a"]
    assert switcher.spare == ("c",)
    builder.build("c")
    builder.keep(["b", "c"])
    assert until(lambda: not builder.busy)
    assert loads == ["a", "b", "c", "a", "b"]
    assert [(one.label, one.took_s > 0) for one in done] == [("a", True), ("c", False)]
    builder.close()
    switcher.close()


def test_a_switch_that_fails_is_not_the_last_attempt(net):
    """Nothing came after it: requests were held, or refused, until the next host was lost."""
    x, failed = images(), []
    with continuing(net, (1, 2)) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        switch = engine.switcher.switch

        def fails_once(name, **more):
            if failed:
                return switch(name, **more)
            failed.append(name)
            engine.switcher.keep(())  # what was to answer is there no more
            raise RuntimeFailure("there is no room")

        engine.switcher.switch = fails_once
        fleet.kill("edge")
        assert same(engine.answer(x), net, x)
        assert until(
            lambda: engine.switcher.current not in ("1/2", *failed) or len(engine.live) > 1
        )
        assert until(lambda: continuer.at_rest and engine.switcher.current != "1/2")
        assert same(engine.answer(x), net, x)
        assert continuer.status()["event_counts"]["not_built"] >= 1


def test_a_host_that_cannot_be_reached_at_first_is_let_in_later(net):
    """A failed attempt was the last one: the host answered heartbeats, and was never used again."""
    with continuing(net, (1, 2), warm=()) as (engine, fleet, continuer):
        edge, calls = engine.chain.hosts[1], []
        come_back = edge.come_back

        def at_the_second_time():
            calls.append(1)
            if len(calls) == 1:
                raise ConfigError("it does not answer yet")
            come_back()

        edge.come_back = at_the_second_time
        fleet.kill("edge")
        assert until(lambda: continuer.status()["technique"] == "repartition" and engine.ready)
        fleet.start("edge")
        assert until(lambda: continuer.status()["technique"] == "none" and len(calls) == 2)
        assert until(lambda: engine.partition.cuts == (1, 2))


def test_a_way_that_cannot_be_built_is_left_for_another_one(net):
    """It was built again and again, as it went on being the best."""
    layers = layered(net, SHAPE)
    made = resilient(layers, SHAPE, 10, seed=1).eval()
    ways = ModelWays((1,), {}, (), {"": 0.9, "exit:1": 0.7})
    more = dict(ways=ways, chains={"exit:1": exit_chain(made, 1)}, warm=())
    objective = RecoveryObjective(weights=WeightsConfig(1.0, 0.0, 0.0))
    with continuing(net, (1, 2), objective=objective, **more) as (engine, fleet, continuer):
        lay, refused = engine.chain.lay, []

        def refuses(route, passed, **told):
            if route.way == "" and "edge" not in fleet.servers:
                refused.append(route.label)
                raise RuntimeFailure("there is no room")
            return lay(route, passed, **told)

        engine.chain.lay = refuses
        fleet.kill("edge")
        assert engine.answer(images()).facts["way"] == "exit:1"
        assert refused
        del engine.chain.lay  # and when there is room, the best way is gone after all
        assert until(lambda: continuer.status()["technique"] == "repartition" and engine.ready)


def test_a_host_lost_before_it_is_known_that_cuts_were_changed_costs_no_request(net):
    """The pipeline was nobody's, as far as was known, and what was in it was refused."""
    x = images()
    with continuing(net, (1, 2), timeout_s=30.0) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        engine.moved = lambda partition: None  # it will be told, but not yet
        engine.move(cut(1, 3))
        fleet.pause("cloud")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(engine.answer, x)
            assert until(lambda: any(m.pipeline.in_flight for m in engine.live))
            fleet.kill("edge")
            assert until(lambda: continuer.status()["failovers"] > 0)
            fleet.resume("cloud")
            assert same(asked.result(20), net, x)
