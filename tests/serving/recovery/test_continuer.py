"""A chain goes on when its hosts fail: real pipelines over hosts in this process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch

from fedsys.errors import RequestError, RuntimeFailure
from fedsys.models import layered
from fedsys.models.resilient import exit_chain, exit_path, resilient, skip_chain, skip_path
from fedsys.partition import stage_rack
from fedsys.serving.recovery.building import PipelineBuilder
from fedsys.serving.recovery.candidates import ModelWays
from fedsys.serving.recovery.decision import RecoveryObjective
from fedsys.serving.routes import Route
from fedsys.serving.switch.switcher import Resident
from tests.serving.chains import SHAPE, cut, images, model
from tests.serving.recovery.failing import continuing
from tests.waiting import until

HOSTS = ("device", "edge", "cloud")


@pytest.fixture(scope="module")
def net():
    return model()


def scores(net, x):
    with torch.inference_mode():
        return net(x)


class Load:
    """Asks again and again from several threads, each time for another batch.

    It ends with its block: threads of a failed test asked for ever, and slowed what came after.
    """

    def __init__(self, engine, threads=3):
        self.engine, self.stop, self.told, self.failed = engine, threading.Event(), [], []
        self.issued = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()

    def _ask(self):
        while not self.stop.is_set():
            with self._lock:
                seed = self.issued = self.issued + 1
            try:
                answer = self.engine.answer(images(1, seed))
                self.told.append((seed, answer))
            except Exception as error:
                self.failed.append(error)

    def end(self):
        self.stop.set()
        for thread in self._threads:
            thread.join(60)
        return self.told


FAULTS = [
    ("kill", ("device",)),
    ("kill", ("edge",)),
    ("kill", ("cloud",)),
    ("pause", ("edge",)),
    ("kill", ("edge", "cloud")),
]


@pytest.mark.parametrize(("fault", "who"), FAULTS, ids=lambda value: "-".join(value))
def test_no_request_is_lost_or_wrong_when_hosts_fail_under_load(net, fault, who):
    with continuing(net, (1, 2)) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare)
        with Load(engine) as load:
            assert until(lambda: len(load.told) > 5)
            for name in who:
                getattr(fleet, fault)(name)
            before = len(load.told)
            assert until(lambda: len(load.told) > before + 10)
            told = load.end()
            assert load.failed == []
            assert len(told) == load.issued == len({seed for seed, _ in told})
            for seed, answer in told:
                assert np.array_equal(answer.scores, scores(net, images(1, seed)))
            assert told[-1][1].facts["technique"] == "repartition"
            lost = {event["host"] for event in continuer.events if event["event"] == "lost"}
            assert lost == set(who)


def test_a_host_that_is_back_is_used_again(net):
    x = images()
    with continuing(net, (1, 2)) as (engine, fleet, continuer):
        fleet.kill("edge")
        assert np.array_equal(engine.answer(x).scores, scores(net, x))
        assert until(lambda: continuer.status()["failovers"] == 1)
        fleet.start("edge")
        assert until(lambda: continuer.status()["technique"] == "none")
        assert until(lambda: engine.partition.cuts == (1, 2))
        answer = engine.answer(x)
        assert np.array_equal(answer.scores, scores(net, x))
        assert answer.facts == {"cuts": "1/2", "technique": "none", "way": "whole", "again": 0}


def test_a_host_lost_between_building_on_it_and_knowing_of_the_pipeline_stops_nothing(net):
    """Seed 2 of the schedules hung once in a while: "0/1: no answer in 20 s".

    The loss was looked for in all pipelines just before the new one was among them. So its first
    request, that of warming up, waited for an answer, and behind it what would have answered.
    """
    x = images()
    with continuing(net, (0, 1), warm=(), timeout_s=30.0) as (engine, fleet, continuer):
        lay, seen = engine.chain.lay, []

        def struck(route, passed, **more):
            module = lay(route, passed, **more)
            if not seen:
                seen.append(route.label)
                fleet.kill("device")
                assert until(lambda: continuer.status()["failovers"] == 2)
            return module

        engine.chain.lay = struck
        fleet.kill("cloud")
        assert np.array_equal(engine.answer(x).scores, scores(net, x))
        assert seen == ["5/5"]
        assert until(lambda: engine.partition.cuts == (0, 5))


def test_a_request_sent_to_a_host_that_is_lost_too_is_not_waited_for_before_it_is_sent_on(net):
    """The other way in which seed 2 hung: each waited for the other, until the request timed out.

    What builds pipelines drained the one that was left, of a request that had been sent into the
    next one; that was lost, too, and what was to answer instead was to be built by the same thread.
    """
    x = images()
    with continuing(net, (0, 1), timeout_s=30.0) as (engine, fleet, continuer):
        assert until(lambda: "5/5" in engine.switcher.spare)
        fleet.pause("device")
        fleet.kill("cloud")
        answer = engine.answer(x)
        fleet.resume("device")
        assert np.array_equal(answer.scores, scores(net, x))
        assert answer.facts["cuts"] == "0/5"
        told = [e["route"] for e in continuer.events if e["event"] == "failover"]
        assert told == ["5/5", "0/5"]


def test_a_host_lost_again_while_it_is_let_in_comes_back_later(net):
    """The second loss was ignored, as the first one was still known; then it counted as there."""
    with continuing(net, (1, 2), warm=()) as (engine, fleet, continuer):
        edge, times = engine.chain.hosts[1], []
        come_back = edge.come_back

        def struck():
            come_back()
            times.append(continuer.status()["hosts"]["edge"]["state"])
            if len(times) == 1:
                fleet.kill("edge")
                assert until(lambda: continuer.status()["hosts"]["edge"]["state"] == "lost")

        edge.come_back = struck
        fleet.kill("edge")
        assert until(lambda: continuer.status()["technique"] == "repartition" and engine.ready)
        fleet.start("edge")
        assert until(lambda: times and "edge" not in fleet.servers)
        fleet.start("edge")
        assert until(lambda: continuer.status()["technique"] == "none")
        assert until(lambda: engine.partition.cuts == (1, 2))
        assert times == ["alive", "alive"]


@pytest.mark.parametrize("reader", ["reads", "has ended"])
def test_a_request_outlives_the_pipeline_that_it_was_sent_into(net, reader):
    """On a starved machine up to 22 of 24 requests of a schedule were refused.

    "the first host is lost: the link was closed on this side": they had come to one pipeline, and
    had been sent on into the next one, which was left for the best one. As that counts only who
    came to it, it was taken down at once, with them in it. If its first host was lost as well,
    they were not even refused: they waited until their time was over.
    """
    x = images()
    with continuing(net, (1, 2), timeout_s=30.0) as (engine, _, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        home = next(module.pipeline for module in engine.live if module.label == "1/2")
        other = next(module.pipeline for module in engine.live if module.label != "1/2")
        for pipeline in (home, other):  # what is sent is on its way, and stays there
            pipeline._link.send = lambda frame: None
        if reader == "has ended":
            other._lost = lambda name, why: None  # it will be told, but not yet
            other._link.fail("cut")
            assert until(lambda: not other._open)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(engine.answer, x)
            assert until(lambda: home.in_flight == 1)
            assert home.divert(other) == 1
            del home._link.send
            engine.switcher.keep(())
            answer = asked.result(20)
        assert np.array_equal(answer.scores, scores(net, x))
        assert answer.facts["again"] == 1


def test_without_any_host_a_client_is_told_so_at_once_and_later_answered_again(net):
    x = images()
    with continuing(net, (1, 2)) as (engine, fleet, _):
        for name in HOSTS:
            fleet.kill(name)
        assert until(lambda: engine.out)
        with pytest.raises(RequestError, match="no host is left") as told:
            engine.answer(x)
        assert told.value.status == 503
        assert not engine.ready
        fleet.start("cloud")
        assert until(lambda: engine.ready)
        assert np.array_equal(engine.answer(x).scores, scores(net, x))


def test_a_host_that_leaves_is_left_out_without_a_request_that_is_sent_twice(net):
    with continuing(net, (1, 2)) as (engine, fleet, continuer), Load(engine) as load:
        assert until(lambda: len(load.told) > 5)
        assert fleet.servers["edge"].leave(20.0)
        fleet.kill("edge")
        told = load.end()
        assert load.failed == []
        assert {answer.facts["again"] for _, answer in told} == {0}
        assert continuer.status()["hosts"]["edge"]["state"] in ("leaving", "lost")


def paths(net, run=(1, 2), boundary=1):
    """Return a resilient model with its ways as chains and as modules, to be compared."""
    layers = layered(net, SHAPE)
    made = resilient(layers, SHAPE, 10, seed=1).eval()
    way, past = f"exit:{boundary}", f"skip:{run[0]}-{run[1]}"
    chains = {way: exit_chain(made, boundary), past: skip_chain(made, *run)}
    whole = {way: exit_path(made, boundary), past: skip_path(made, *run)}
    steps = len(chains[past]) - (len(layers) - (run[1] - run[0]))
    ways = ModelWays((boundary,), {run: steps}, (), {"": 0.9, way: 0.7, past: 0.8})
    return ways, chains, whole


@pytest.mark.parametrize("technique", ["exit", "skip"])
def test_a_forced_technique_answers_as_its_path_does_to_the_bit(net, technique):
    """Requests go on from what the first host holds: it computes nothing again."""
    ways, chains, whole = paths(net)
    objective = RecoveryObjective(techniques=(technique,))
    told = dict(ways=ways, chains=chains, objective=objective)
    with continuing(net, (1, 2), **told) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare)
        with Load(engine) as load:
            assert until(lambda: len(load.told) > 5)
            fleet.kill("edge")
            assert until(lambda: load.told[-1][1].facts["technique"] == technique)
            told = load.end()
            assert load.failed == []
            for seed, answer in told:
                way = answer.facts["way"]
                path = whole.get(way, net)
                assert np.array_equal(answer.scores, scores(path.eval(), images(1, seed))), way
            fleet.start("edge")
            assert until(lambda: continuer.status()["technique"] == "none")
            assert until(lambda: engine.partition.cuts == (1, 2) and not engine.route.way)


def test_the_first_host_can_neither_be_exited_before_nor_skipped(net):
    ways, chains, _ = paths(net)
    told = dict(ways=ways, chains=chains, objective=RecoveryObjective(techniques=("exit", "skip")))
    with continuing(net, (1, 2), **told) as (engine, fleet, _):
        fleet.kill("device")
        assert until(lambda: engine.out)
        with pytest.raises(RequestError, match="repartition is possible"):
            engine.answer(images())


def test_a_host_lost_while_cuts_change_is_answered_around_at_once(net):
    """The change drained for up to a minute, and what stood ready could not be switched to."""
    x = images()
    with continuing(net, (1, 2)) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        fleet.pause("cloud")
        asking = threading.Thread(target=engine.answer, args=(x,))
        asking.start()  # is held before the cloud: the change cannot drain it

        def move():
            with suppress(RuntimeFailure):  # a host may be lost that it builds on
                engine.move(cut(1, 3))

        moving = threading.Thread(target=move, daemon=True)
        moving.start()
        fleet.kill("edge")
        answer = engine.answer(x)
        assert np.array_equal(answer.scores, scores(net, x))
        asking.join(20)
        assert not asking.is_alive()
        fleet.resume("cloud")
        fleet.start("edge")
        assert until(lambda: continuer.status()["technique"] == "none" and engine.ready)


def test_a_decision_says_what_was_before_and_what_it_came_to(net):
    ways, chains, _ = paths(net)
    told = dict(ways=ways, chains=chains, objective=RecoveryObjective(techniques=("exit",)))
    with continuing(net, (1, 2), **told) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        fleet.kill("edge")
        assert until(lambda: continuer.status()["failovers"] == 1)
        for seed in range(4):
            engine.answer(images(1, seed))
        assert until(lambda: continuer.status()["event_counts"].get("proved"))
        found = {event["event"]: event for event in continuer.events}
        decided, came = found["failover"], found["proved"]
        assert (decided["accuracy_before"], decided["accuracy"]) == (0.9, 0.7)
        assert decided["before"] == "1/2" and decided["route"] == came["route"]
        assert came["measured_ms"] > 0 and came["predicted_ms"] == decided["predicted_ms"]
        exits = [c for c in decided["candidates"] if c["technique"] == "exit"]
        assert "latency" in exits[0]["measured"]  # it had been rehearsed
        errors = continuer.errors()
        assert {"latency", "build"} <= errors.keys()
        # "mean" was the error itself of some, and of others that of guessing the mean
        assert all({"ours", "samples"} <= one.keys() for one in errors.values())


def test_what_is_being_taken_up_is_something_to_do():
    """It was neither waiting any more nor begun, so that all seemed to stand ready."""
    switcher = Resident({"1/2": lambda x: x}, "1/2")
    builder = PipelineBuilder(switcher, lambda built: None)
    taken, go, end = threading.Event(), threading.Event(), threading.Event()
    take = builder._next

    def slowly():
        work = take()
        taken.set()
        assert go.wait(10)
        return work

    builder._next = slowly
    builder.carry_out(lambda: end.wait(10))
    assert taken.wait(10)
    threading.Timer(0.05, go.set).start()
    assert builder.busy
    end.set()
    assert until(lambda: not builder.busy)
    builder.close()


def test_another_objective_changes_what_stands_ready_and_decides(net):
    ways, chains, _ = paths(net)
    with continuing(net, (1, 2), ways=ways, chains=chains) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        continuer.ask(RecoveryObjective(techniques=("skip",)))
        assert until(lambda: {*engine.switcher.spare} == {"skip:1-2@1/1"})
        assert until(lambda: continuer.at_rest)
        took = continuer.rehearse_decisions(6)
        assert len(took) == 6 and all(wall > 0 for wall, _ in took)
        fleet.kill("edge")
        assert until(lambda: continuer.status()["technique"] == "skip")


def test_a_smaller_variant_stands_in_as_it_is(net):
    """The technique that CONTINUER does not have: it is of the portfolio, not of the model."""
    small = model(seed=3)
    layers = layered(small, SHAPE)
    accuracy = {"": 0.9, "small": 0.85}
    ways = ModelWays((), {}, ("small",), accuracy, frozenset(accuracy))
    objective = RecoveryObjective(techniques=("replica",))
    told = dict(ways=ways, chains={"small": layers}, objective=objective)
    with continuing(net, (1, 2), **told) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        with Load(engine) as load:
            assert until(lambda: len(load.told) > 5)
            fleet.kill("device")  # neither exit nor skip lead around the first host
            assert until(lambda: load.told[-1][1].facts["technique"] == "replica")
            told = load.end()
            assert load.failed == []
            for seed, answer in told:
                whole = net if answer.facts["way"] == "whole" else small
                assert np.array_equal(answer.scores, scores(whole, images(1, seed)))
            assert told[-1][1].by == "small"
            fleet.start("device")
            assert until(lambda: continuer.status()["technique"] == "none")


def test_a_host_that_stands_still_is_not_waited_for_when_a_stage_connects_to_it(net, monkeypatch):
    """Connecting had ten seconds, and for so long nothing else was built."""
    given, original = [], stage_rack.open_data

    def seen(*what):
        given.append(what[-1])
        return original(*what)

    monkeypatch.setattr(stage_rack, "open_data", seen)
    with continuing(net, (1, 2), connect_s=0.2, warm=()) as (engine, fleet, _):
        assert given == [0.2, 0.2]  # device to edge, edge to cloud
        fleet.pause("cloud")
        with pytest.raises(RuntimeFailure, match=r"cloud|edge"):
            engine.chain.lay(Route(cut(1, 3)), lambda *told: None)
        fleet.resume("cloud")
