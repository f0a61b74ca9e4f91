"""Chains whose hosts send each other several tensors."""

import dataclasses
import itertools
import random

import pytest
import torch
import torchvision

from fedsys.config import compose_text, parse
from fedsys.models import build, layered
from fedsys.models.several import finer
from fedsys.partition.evaluation import evaluate
from fedsys.partition.finer_chain import finer_chain, finer_problem, regrouped
from fedsys.partition.minimum_cut import best_division
from fedsys.partition.planner import solve
from fedsys.partition.problem import Host, Problem
from fedsys.planning.costs import MachineClass
from fedsys.serving.chain import Chain, ChainEngine, ChainOptions
from fedsys.serving.chain_parts import StageBuilder, UnitParts
from fedsys.transport.network import Network
from tests.models.test_several import Dense
from tests.partition.test_minimum_cut import Branching
from tests.serving.chains import CARD, SHAPE, cut, images, three_hosts

LARGER = (3, 32, 32)


def net_of(name):
    torch.manual_seed(0)
    if name == "dense":
        return Dense().eval()
    config = parse(compose_text(f"model=torchvision model.name={name}"))
    return build(config.model, input_shape=SHAPE, num_classes=10, seed=0).eval()


def test_a_transformer_that_checks_the_size_of_images_is_sent_to_hosts():
    """Its checks could not be named, so `bench partition` ended there and told of no model."""
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10).eval()
    layers, x = layered(net, LARGER), torch.rand(3, *LARGER)
    parts, builder = UnitParts(layers, LARGER), StageBuilder()
    with torch.inference_mode():
        expected = out = net(x)
        out = x
        for first, last in itertools.pairwise((0, 1, len(layers))):
            sent = parts.of(first, last)
            tensors = {name: sent.tensors[digest] for name, digest in sent.names.items()}
            out = builder.build(sent.body, tensors)(out)
    assert torch.equal(out, expected)


def engine_of(net, remotes, most, first=None, **more):
    chain = finer(layered(net, SHAPE), SHAPE, most)
    options = ChainOptions(**more)
    made = Chain(remotes, UnitParts(chain, SHAPE), token="secret", options=options)
    return ChainEngine(made, CARD, first or cut(chain.cuts[0], chain.cuts[-1]), "beside"), chain


def answered(engine, x):
    return torch.from_numpy(engine.answer(x.numpy()).scores)


@pytest.mark.parametrize(("name", "address"), [
    ("dense", "memory"), ("dense", "tcp://127.0.0.1:0"), ("resnet18", "tcp://127.0.0.1:0"),
])  # fmt: skip
def test_hosts_that_send_each_other_several_tensors_give_the_bits_of_the_whole_model(name, address):
    net, x, draw = net_of(name), images(), random.Random(0)
    with torch.inference_mode():
        expected = net(x)
    with three_hosts(address) as (_, remotes):
        engine, chain = engine_of(net, remotes, 5)
        several = [c for c in chain.cuts if len(chain.units[c - 1].outputs) > 1]
        pairs = list(itertools.combinations_with_replacement(several, 2))
        try:
            for cuts in draw.sample(pairs, min(6, len(pairs))):
                engine.move(cut(*cuts))
                assert torch.equal(answered(engine, x), expected), cuts
        finally:
            engine.close()


def test_each_of_several_tensors_is_written_in_the_codec():
    net, x = net_of("dense"), images()
    with three_hosts() as (_, remotes):
        engine, chain = engine_of(net, remotes, 5)
        inside = next(c for c, u in enumerate(chain.units, 1) if len(u.outputs) == 3)
        told = []
        engine._observe = lambda partition, passed, rows, took: told.append(passed)
        try:
            for codec, itemsize in (("fp32", 4), ("fp16", 2)):
                engine.move(cut(inside, inside, codec=codec))
                got = answered(engine, x)
                sent = next(part for part in told[-1].parts if "bytes" in part)["bytes"]
                assert sent == 2 * 16 * 16 * (3 + 4 + 4) * itemsize
                assert torch.allclose(got, net(x), atol=0 if codec == "fp32" else 1e-2)
        finally:
            engine.close()


def test_requests_of_a_lost_host_go_on_elsewhere_with_several_tensors():
    net, x, lost = net_of("dense"), images(), []
    with three_hosts() as (servers, remotes):
        engine, chain = engine_of(net, remotes, 5, lost=lambda host, reason: lost.append(host))
        inside = next(c for c, u in enumerate(chain.units, 1) if len(u.outputs) == 3)
        by_edge, by_cloud = cut(inside, len(chain)), cut(inside, inside)
        try:
            engine.prepare([by_edge, by_cloud])
            stood = {one.route.partition: one for one in engine.live}
            servers[2].stop()
            waiting = stood[by_cloud].pipeline.submit(x)
            old, new = (stood[p].stages[0].key for p in (by_cloud, by_edge))
            said = remotes[0].ask("divert", {"pipeline": old, "to": new, "first": inside})
            assert said.meta["requests"] in (0, 1)  # it was held, or came after
            with torch.inference_mode():
                assert torch.equal(waiting.result(10).output, net(x))
            assert "cloud" in lost
        finally:
            engine.close()


# --------------------------------------------------------------------------------------------------
# Planning


@pytest.fixture(scope="module")
def divided():
    """Return the model, its chain, that of its minimum cut, and the problem of the latter."""
    config = parse(
        compose_text(
            "hosts=device_edge partition.solver=min_cut network=4g network.up_mbit_s=1 "
            "hosts.machines.pi4.macs_per_s=1e8"
        )
    )
    net = Branching().eval()
    whole = layered(net, LARGER)
    chain = finer_chain(config, whole, LARGER)
    return config, net, whole, chain, finer_problem(config, whole, chain, LARGER)


def test_the_division_of_a_minimum_cut_is_a_cut_that_costs_what_it_says(divided):
    config, _, whole, chain, problem = divided
    division = best_division(finer_problem(config, whole, whole, LARGER), whole, LARGER)
    assert division.crossing == ("mean", "most")
    at = next(c for c, u in enumerate(chain.units, 1) if len(u.outputs) == 2)
    assert set(chain.units[at - 1].outputs) == {"mean", "most"}
    assert evaluate(problem, cut(at)).latency_s == pytest.approx(division.cost, rel=0.02)
    best = solve(problem)
    assert evaluate(problem, best).latency_s <= evaluate(problem, cut(at)).latency_s


def test_the_division_of_a_minimum_cut_runs(divided):
    _, net, _, chain, _ = divided
    at = next(c for c, u in enumerate(chain.units, 1) if len(u.outputs) == 2)
    x = torch.randn(2, *LARGER)
    with three_hosts() as (_, remotes):
        made = Chain(remotes[:2], UnitParts(chain, LARGER), token="secret")
        engine = ChainEngine(made, dataclasses.replace(CARD, input_shape=LARGER), cut(at))
        try:
            with torch.inference_mode():
                assert torch.equal(answered(engine, x), net(x))
        finally:
            engine.close()


def test_where_more_tensors_may_cross_no_plan_is_worse():
    net = net_of("resnet18")
    whole, values = layered(net, SHAPE), []
    for most in (1, 2, 3):
        chain = whole if most == 1 else finer(whole, SHAPE, most)
        costs = [MachineClass(n, rate).costs(whole) for n, rate in (("d", 1e9), ("e", 1e11))]
        hosts = [Host(c.name, regrouped(c, whole, chain, SHAPE)) for c in costs]
        problem = Problem.of(chain, SHAPE, hosts, (Network(2e7, 2e7, 1e-3),))
        assert sum(problem.hosts[0].costs.forward_s[0]) == pytest.approx(sum(costs[0].forward_s[0]))
        values.append(evaluate(problem, solve(problem)).latency_s)
    assert values[0] >= values[1] * (1 - 1e-9) >= values[2] * (1 - 2e-9)
