import math
from itertools import chain, combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from fedsys.errors import ConfigError
from fedsys.models.layers import layered
from fedsys.partition.evaluation import evaluate
from fedsys.partition.minimum_cut import GraphStep, best_division, crossing_of, divide, steps_of
from fedsys.partition.planner import solve
from fedsys.partition.problem import Constraints, Host, Problem
from fedsys.planning.costs import MachineClass, Messaging
from fedsys.transport.network import Network

COST = st.floats(0, 10, allow_subnormal=False)


@st.composite
def graphs(draw) -> list[GraphStep]:
    steps = [GraphStep("s0", (), 0.0, 0.0, draw(COST))]
    for i in range(1, draw(st.integers(2, 6))):
        reads = draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=3))
        send = draw(st.one_of(COST, st.just(math.inf)))
        names = tuple(f"s{r}" for r in sorted(reads))
        steps.append(GraphStep(f"s{i}", names, draw(COST), draw(COST), send))
    return steps


def cost_of(steps: list[GraphStep], near: frozenset[str], back: float) -> float:
    cost = sum(step.device_s if step.name in near else step.server_s for step in steps)
    sent = {step.name: step.send_s for step in steps}
    cost += sum(sent[name] for name in crossing_of(steps, near))
    return cost + (0.0 if steps[-1].name in near else back)


def allowed(steps: list[GraphStep]):
    names = [step.name for step in steps[1:]]
    for rest in chain.from_iterable(combinations(names, n) for n in range(len(names) + 1)):
        near = frozenset([steps[0].name, *rest])
        if all(set(step.reads) <= near for step in steps if step.name in near):
            yield near


TINY = [GraphStep("s0", (), 0.0, 0.0, 0.0), GraphStep("s1", ("s0",), 0.0, 2.3e-308, 0.0)]
"""Capacities were scaled by one over all costs, which is infinite here: there was no minimum."""


@settings(max_examples=150, deadline=None)
@example(TINY, 0.0)
@given(graphs(), COST)
def test_a_minimum_cut_is_the_best_of_all_divisions_in_which_nothing_flows_back(steps, back):
    best = min(cost_of(steps, near, back) for near in allowed(steps))
    found = divide(steps, back)
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.cost == pytest.approx(cost_of(steps, frozenset(found.device), back))


class Branching(nn.Module):
    """Two branches that make little of much at once, and then compute much."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 8, 3, padding=1)
        self.mean, self.most = nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(4)
        self.one, self.other = (
            nn.Sequential(nn.Conv2d(8, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1))
            for _ in range(2)
        )
        self.end = nn.Linear(2 * 256 * 16, 10)

    def forward(self, x):
        x = self.start(x)
        both = self.one(self.mean(x)).flatten(1), self.other(self.most(x)).flatten(1)
        return self.end(torch.cat(both, 1))


def problem_for(layers, shape, up=1e6, **more) -> Problem:
    messaging = Messaging(1e-4, {"fp32": 1e-9})
    device = MachineClass("pi", 1e8, messaging=messaging, operation_s=1e-3)
    server = MachineClass("gpu", 1e12, messaging=messaging, operation_s=1e-4)
    hosts = (Host("device", device.costs(layers)), Host("server", server.costs(layers)))
    return Problem.of(layers, shape, hosts, (Network(up, up, 1e-3),), **more)


@pytest.mark.parametrize("up", [1e4, 1e6, 1e9])
def test_where_more_than_one_tensor_may_cross_it_is_never_worse_than_one_cut(up):
    layers = layered(Branching(), (3, 32, 32))
    problem = problem_for(layers, (3, 32, 32), up)
    division = best_division(problem, layers, (3, 32, 32))
    single = solve(problem)
    assert single is not None
    assert division.cost <= evaluate(problem, single).latency_s * (1 + 1e-9) + 2e-3
    steps, _ = steps_of(problem, layers, (3, 32, 32), "latency")
    near = frozenset(division.device)
    assert all(set(s.reads) <= near for s in steps if s.name in near)


def test_two_small_tensors_cross_where_every_single_one_is_large():
    layers = layered(Branching(), (3, 32, 32))
    problem = problem_for(layers, (3, 32, 32), 1e6)
    division, single = best_division(problem, layers, (3, 32, 32)), solve(problem)
    assert division.crossing == ("mean", "most")
    assert single is not None
    assert division.cost < 0.5 * evaluate(problem, single).latency_s


def test_a_minimum_cut_refuses_what_it_cannot_hold_to():
    layers = layered(Branching(), (3, 32, 32))
    for more in ({"requests_per_s": 1.0}, {"constraints": Constraints(must={0: 0})}):
        with pytest.raises(ConfigError, match=r"partition.solver=min_cut.*dynamic"):
            best_division(problem_for(layers, (3, 32, 32), **more), layers, (3, 32, 32))
