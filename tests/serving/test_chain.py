import itertools
import threading

import numpy as np
import pytest
import torch

from fedsys.errors import ConfigError, ModelError, RuntimeFailure, SecurityError
from fedsys.identity import arithmetic
from fedsys.models import layered
from fedsys.partition import remote_host
from fedsys.partition.conditions import Observer
from fedsys.partition.controller import MoveRules
from fedsys.partition.host import HostLimits, HostServer, Spawned
from fedsys.partition.planner import solve
from fedsys.partition.problem import Host, Problem
from fedsys.partition.remote_host import RemoteHost
from fedsys.planning.costs import MachineClass
from fedsys.serving.chain import Chain, ChainEngine, ChainOptions
from fedsys.serving.chain_control import ChainControl
from fedsys.serving.chain_parts import StageBuilder, UnitParts
from fedsys.serving.routes import label_of, partition_of
from fedsys.transport.network import Network
from fedsys.transport.security import Authority
from tests.serving.chains import CARD, NAMES, SHAPE, chain_of_three, cut, images, model, three_hosts

CUTS = [(0, 0), (0, 5), (5, 5), (1, 2), (1, 1), (2, 5), (0, 3)]


@pytest.fixture(scope="module")
def net():
    return model()


def scores(net, x):
    with torch.inference_mode():
        return net(x)


def test_every_division_gives_the_bits_of_the_whole_model(net):
    x = images()
    with chain_of_three(net) as (engine, _):
        for cuts in CUTS:
            engine.move(cut(*cuts))
            assert np.array_equal(engine.answer(x).scores, scores(net, x)), cuts
            assert engine.partition.cuts == cuts


@pytest.mark.parametrize("name", ["mobilenet_v2", "googlenet"])
def test_models_with_branches_are_described_and_built_elsewhere(name):
    if name == "googlenet":
        from fedsys.config import compose_text, parse
        from fedsys.models import build

        config = parse(compose_text(f"model={name}"))
        shape = (3, 64, 64)
        net = build(config.model, input_shape=shape, num_classes=10, seed=0).eval()
    else:
        net, shape = model(name), SHAPE
    layers = layered(net, shape)
    parts, builder = UnitParts(layers, shape), StageBuilder()
    bounds = [0, layers.cuts[len(layers.cuts) // 3], layers.cuts[2 * len(layers.cuts) // 3]]
    x = y = torch.randn(2, *shape)
    for first, last in zip(bounds, [*bounds[1:], len(layers)], strict=True):
        described = parts.of(first, last)
        tensors = {name: described.tensors[d] for name, d in described.names.items()}
        assert described.shapes == (tuple(y.shape[1:]),)
        y = scores(builder.build(described.body, tensors), y)
    assert torch.equal(y, scores(net, x))


def test_a_label_stands_for_one_partition():
    for partition in (cut(1, 2), cut(1, 2, codec="int8"), cut(0, 0)):
        assert partition_of(label_of(partition)) == partition


def test_a_codec_at_the_cuts_changes_answers_as_little_as_it_says(net):
    x = images()
    with chain_of_three(net, cut(1, 2, codec="fp16")) as (engine, _):
        got = engine.answer(x).scores
    assert not np.array_equal(got, scores(net, x))
    assert np.allclose(got, scores(net, x), atol=1e-2)


@pytest.mark.parametrize("way", ["beside", "pause", "process", "warm"])
def test_no_request_is_lost_or_wrong_while_cuts_change_under_load(net, way):
    x, stop, wrong, done = images(), threading.Event(), [], []
    expected, started, ended, numbers = scores(net, x), [], [], itertools.count()

    def spawn():  # a host in this process: `fedsys host` starts others (test_chain_processes)
        name = f"memory://started-{next(numbers)}"
        server = HostServer("started", name, StageBuilder(), control_token="secret")
        started.append(name)
        return Spawned(name, lambda: (ended.append(name), server.stop()))

    with chain_of_three(net, way=way, spawn=spawn) as (engine, servers):
        if way == "warm":
            engine.prepare([cut(*cuts) for cuts in CUTS])

        def ask():
            while not stop.is_set():
                try:
                    same = np.array_equal(engine.answer(x).scores, expected)
                    (done if same else wrong).append(1)
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            costs = [engine.move(cut(*cuts)) for cuts in CUTS * 2]
        finally:
            stop.set()
        for thread in threads:
            thread.join(60)
        assert wrong == [] and len(done) >= 1
        assert engine.status()["moves"] == len(costs)
        if way == "warm":
            assert all(cost.prepare_ms == 0 for cost in costs[len(CUTS) :])  # told once
        if way == "process":
            assert all(server.status()["computed"] == 0 for server in servers)
            assert len(started) - len(ended) == sum(
                1 for row in engine.status()["chain"] if row["units"]
            )
        if way == "beside":
            kept = sum(p.nbytes for p in net.parameters()) * 1.1
            assert all(server.store.nbytes <= kept for server in servers)
    assert sorted(ended) == sorted(started)


def test_an_observer_that_fails_costs_no_answer(net, caplog):
    """Every request failed with its error, though the hosts had answered."""

    def broken(*told):
        raise ZeroDivisionError("of the observer")

    x = images()
    with chain_of_three(net, passed=broken) as (engine, _):
        assert np.array_equal(engine.answer(x).scores, scores(net, x))
    assert "of the observer" in caplog.text


def test_units_that_a_host_has_already_are_not_sent_again(net):
    with three_hosts() as (_, remotes):
        parts = UnitParts(layered(net, SHAPE), SHAPE)
        described = parts.of(0, 3)
        first = remotes[0].send_tensors(described.tensors)
        assert first == sum(t.nbytes for t in described.tensors.values())
        assert remotes[0].send_tensors(described.tensors) == 0
        wider = parts.of(0, 4).tensors
        more = sum(t.nbytes for d, t in wider.items() if d not in described.tensors)
        assert remotes[0].send_tensors(wider) == more > 0


def test_a_host_that_is_lost_is_named_and_a_partition_without_it_answers(net):
    x = images()
    with chain_of_three(net) as (engine, servers):
        engine.answer(x)
        servers[1].stop()
        with pytest.raises(RuntimeFailure, match=r"edge|lost"):
            engine.answer(x)
        engine.move(cut(2, 2))  # the edge computes nothing
        assert np.array_equal(engine.answer(x).scores, scores(net, x))


def test_what_cannot_be_built_leaves_the_old_cuts_answering(net):
    with chain_of_three(net) as (engine, servers):
        servers[2].stop()
        with pytest.raises(RuntimeFailure, match="cloud"):
            engine.move(cut(0, 1))
        assert engine.partition.cuts == (1, 2)
        with pytest.raises(ConfigError, match=r"partition.cuts=\[2, 1\]: must be 2 of 0, 1, 2"):
            engine.move(cut(2, 1))


def test_slowed_links_take_the_time_of_their_network(net):
    networks = (Network(8e6, 8e6, 0.02), None, Network(8e5, 8e6, 0.01))
    with three_hosts() as (_, remotes):
        options = ChainOptions(networks=networks)
        chain = Chain(remotes, UnitParts(layered(net, SHAPE), SHAPE), options=options)
        seen = []
        engine = ChainEngine(chain, CARD, cut(1, 2), passed=lambda *told: seen.append(told[1]))
        engine.answer(images(1))
        sent, part = seen[-1].bytes, seen[-1].parts[1]
        assert seen[-1].link_s >= 0.04 + 8 * sent / 8e6
        assert part["link_s"] >= 0.02 + 8 * part["bytes"] / 8e5
        engine.close()


def remote(server, **more):
    return RemoteHost("hosts.list[0]", "device", server.address, **{"token": "secret", **more})


def test_hosts_that_do_not_fit_are_refused_by_their_entry(monkeypatch):
    server = HostServer("device", "memory://unfit", StageBuilder(), control_token="secret")
    with pytest.raises(
        ConfigError, match=r"address=memory://unfit.*accepts this end.*token.*may not"
    ):
        remote(server, token="other")
    other = {**arithmetic(), "instruction set": "ABACUS"}
    monkeypatch.setattr("fedsys.partition.host.arithmetic", lambda: other)
    with pytest.raises(ConfigError, match=r"hosts.list\[0\].arithmetic=.*ABACUS.*other_arithmetic"):
        remote(server)
    remote(server, other_arithmetic=True).close()
    monkeypatch.setattr(remote_host, "package_version", lambda package: "99.0")
    with pytest.raises(ConfigError, match=r"hosts.list\[0\].version=.*must be 99.0.*same version"):
        remote(server)
    server.stop()
    with pytest.raises(ConfigError, match=r"memory://unfit: must be that of a host that answers"):
        remote(server)


def test_a_host_without_memory_says_what_it_would_need(net):
    limits = HostLimits(memory_bytes=1000)
    server = HostServer("device", "memory://tiny", StageBuilder(), control_token="secret",
                        limits=limits)  # fmt: skip
    parts = UnitParts(layered(net, SHAPE), SHAPE)
    with pytest.raises(RuntimeFailure, match=r"device at memory://tiny: host.memory_mb=0.001"):
        remote(server).send_tensors(parts.of(0, 3).tensors)
    server.stop()


def test_a_body_that_describes_no_units_is_refused():
    with pytest.raises(ModelError, match="describes no units"):
        StageBuilder().build(b"{", {})
    with pytest.raises(ModelError):
        StageBuilder().build(b'{"layers": {"a": ["System", {}]}, "constants": []}', {})


def test_hosts_over_mutual_tls_answer_their_controller_only(net):
    authority = Authority.create()
    own = authority.issue("edge", ["127.0.0.1"], role="both")
    server = HostServer(
        "edge", "tcp://127.0.0.1:0", StageBuilder(), credentials=own, controller="server"
    )
    both = HostServer(
        "cloud", "tcp://127.0.0.1:0", StageBuilder(), credentials=own, controller="server"
    )
    controller, stranger = authority.issue("server"), authority.issue("stranger")
    try:
        with pytest.raises((ConfigError, SecurityError)):
            remote(server, credentials=stranger)
        hosts = [remote(s, credentials=controller) for s in (server, both)]
        chain = Chain(hosts, UnitParts(layered(net, SHAPE), SHAPE), credentials=controller)
        engine = ChainEngine(chain, CARD, cut(2))
        x = images()
        assert np.array_equal(engine.answer(x).scores, scores(net, x))
        engine.close()
    finally:
        server.stop()
        both.stop()


def test_cuts_follow_a_link_that_becomes_slow_and_answers_stay_the_same(net):
    """The controller sees only what requests tell."""
    x = images(1)
    layers = layered(net, SHAPE)
    slow = MachineClass("device", 2e8).costs(layers), MachineClass("edge", 1e12).costs(layers)
    hosts = tuple(Host(n, c) for n, c in zip(NAMES, (*slow, slow[1]), strict=True))
    fast, crawling = Network(1e9, 1e9, 0.0), Network(2e4, 1e6, 0.0)
    problem = Problem.of(layers, SHAPE, hosts, (fast, fast))
    first = solve(problem)
    assert first is not None and first.cuts[0] < len(layers)
    with three_hosts() as (_, remotes):
        options = ChainOptions(networks=(None, crawling, None))
        chain = Chain(remotes, UnitParts(layers, SHAPE), options=options)
        observer = Observer(problem)
        engine = ChainEngine(chain, CARD, cut(1, 5), passed=observer.seen)
        rules = MoveRules(margin=0.1, dwell_s=0.0)
        control = ChainControl(engine, problem, rules, observer)
        for _ in range(3):
            engine.answer(x)
        assert control.step()["verdict"] == "move" and engine.partition.cuts[0] != 1
        assert control.last["conditions"]["up_mbit_s"][0] < 1
        assert np.array_equal(engine.answer(x).scores, scores(net, x))
        assert len(control.records) == 1
        engine.close()


def test_a_host_that_takes_no_last_word_is_left_at_once():
    """A host that stood still held recovery up for five seconds: its link wants to say goodbye."""

    class Stubborn:
        def __init__(self):
            self.asked, self.may_end = threading.Event(), threading.Event()

        def close(self):
            self.asked.set()
            assert self.may_end.wait(60)

    with three_hosts() as (_, remotes):
        link, remotes[0]._link = remotes[0]._link, Stubborn()
        stubborn = remotes[0]._link
        remotes[0].lose()
        assert stubborn.asked.wait(60) and remotes[0]._link is None
        stubborn.may_end.set()
        link.close()
