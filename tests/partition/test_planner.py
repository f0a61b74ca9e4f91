import dataclasses
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsys.config.partition import OBJECTIVES
from fedsys.errors import ConfigError
from fedsys.partition.evaluation import evaluate
from fedsys.partition.planner import alone_on, contradiction, pareto, plan_partition, solve
from fedsys.partition.problem import Constraints, Host, Partition, Problem
from fedsys.partition.solvers import broken, every, exhaustive
from fedsys.partition.tables import Tables
from fedsys.planning.costs import FRAME_BYTES, Crossing, MachineCosts, Messaging
from fedsys.transport.network import Network
from tests.partition.problems import problems

CLOSE = {"rel": 1e-9, "abs": 1e-12}


def machine(name: str, *seconds: float, **more) -> MachineCosts:
    nothing = (0.0,) * len(seconds)
    return MachineCosts(name, (1,), (seconds,), (seconds,), nothing, **more)


def small(**more) -> Problem:
    """Two units of 1 s on the device and 0.1 s on the server, 1,000 bytes between them."""
    crossing = (Crossing(2000, 1), Crossing(250, 1), Crossing(10, 1))
    hosts = (Host("device", machine("d", 1.0, 1.0)), Host("server", machine("s", 0.1, 0.1)))
    networks = (Network(8000.0, 80_000.0, 0.01),)
    return Problem(("a", "b"), (0, 1, 2), crossing, (100, 200), hosts, networks, **more)


def test_a_request_costs_the_sum_that_one_would_write_down():
    cost = evaluate(small(), Partition((1,), ("fp32",)))
    sent, answer = 1000 + FRAME_BYTES, 40 + FRAME_BYTES
    expected = 1.0 + sent / 1000 + 0.02 + 0.1 + answer / 10_000
    assert cost.latency_s == pytest.approx(expected, **CLOSE)
    assert cost.bottleneck_s == pytest.approx(sent / 1000, **CLOSE)
    assert cost.sent_bytes == sent + answer
    assert [p.memory_bytes for p in cost.portions] == [100 + 9000, 200 + 1040]


def test_waiting_is_that_of_a_queue_with_random_arrivals_and_equal_service():
    """M/D/1: u/(2(1-u)) of the service, u being the share of time in use (Pollaczek, Khinchine)."""
    cost = evaluate(small(requests_per_s=0.5), Partition((2,), ("fp32",)))
    assert math.isinf(cost.latency_s)  # 2 s for a request, of which one arrives every 2 s
    cost = evaluate(small(requests_per_s=0.25), Partition((2,), ("fp32",)))
    assert cost.latency_s == pytest.approx(2.0 + 2.0 * 0.5 / (2 * 0.5), **CLOSE)


def test_messages_cost_their_time_at_both_ends_there_and_back():
    message = Messaging(0.01, {"fp32": 1e-4})
    hosts = tuple(
        dataclasses.replace(h, costs=dataclasses.replace(h.costs, messaging=message))
        for h in small().hosts
    )
    plain = evaluate(small(), Partition((1,), ("fp32",)))
    cost = evaluate(dataclasses.replace(small(), hosts=hosts), Partition((1,), ("fp32",)))
    both = 2 * (0.01 + 1e-4 * (1000 + FRAME_BYTES)) + 2 * (0.01 + 1e-4 * (40 + FRAME_BYTES))
    assert cost.latency_s == pytest.approx(plain.latency_s + both, **CLOSE)


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from(OBJECTIVES))
def test_every_solver_finds_what_trying_all_partitions_finds(problem, objective):
    oracle = exhaustive(problem, objective)
    for solver in ("auto", "dynamic", *(("scan",) if len(problem.hosts) == 2 else ())):
        found = solve(problem, objective, solver)
        assert (found is None) == (oracle is None)
        if found is not None and oracle is not None:
            cost, best = evaluate(problem, found), evaluate(problem, oracle)
            assert cost.value(objective) == pytest.approx(best.value(objective), **CLOSE)
            assert not broken(problem, found)
            assert cost.latency_s <= problem.constraints.time_limit_s * (1 + 1e-9)
            if objective == "throughput" and math.isinf(problem.constraints.time_limit_s):
                assert cost.latency_s <= best.latency_s * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("objectives", [("throughput", "bytes"), ("bytes", "energy")])
def test_what_cannot_keep_up_is_not_on_the_frontier(objectives):
    """All on the device sends nothing, and stood there though requests waited for ever."""
    found = pareto(small(requests_per_s=0.5), objectives)
    assert [choice.partition.cuts for choice in found] == [(1,)]


@settings(max_examples=60, deadline=None)
@given(problems(most_units=4, most_hosts=3), st.permutations(OBJECTIVES))
def test_the_frontier_is_what_trying_all_partitions_leaves(problem, objectives):
    first, second, *_ = objectives
    points = [
        (cost.value(first), cost.value(second))
        for partition in every(problem)
        for cost in (evaluate(problem, partition),)
        if cost.latency_s <= problem.constraints.time_limit_s and math.isfinite(cost.latency_s)
    ]
    expected = sorted(
        {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    )
    unlimited = dataclasses.replace(problem.constraints, time_limit_s=math.inf)
    assume(problem.constraints == unlimited or "latency" in (first, second))
    found = [(c.cost.value(first), c.cost.value(second)) for c in pareto(problem, (first, second))]

    def near(x, y):
        return all(a == pytest.approx(b, rel=1e-9, abs=1e-9) for a, b in zip(x, y, strict=True))

    assert all(any(near(f, e) for e in expected) for f in found)
    assert all(any(near(f, e) for f in found) for e in expected)


@settings(max_examples=60, deadline=None)
@given(problems(most_units=4))
def test_tables_hold_what_a_partition_costs(problem):
    """Solvers add up tables; people are shown evaluations."""
    tables = Tables(problem)
    alone = tables.portion(0, None, None)
    whole = alone_on(problem, 0)
    if not broken(problem, whole):
        cost = evaluate(problem, whole)
        assert alone.latency[0, -1] == pytest.approx(cost.latency_s, **CLOSE)
        assert alone.energy[0, -1] == pytest.approx(cost.energy_j, **CLOSE)


def test_alternatives_obey_and_are_not_better_and_the_whole_model_stands_beside():
    plan = plan_partition(dataclasses.replace(small(), networks=(Network(4e4, 8e4, 0.01),)))
    assert plan.best.partition.cuts == (1,) and plan.best.cost.latency_s < 2.4
    values = [choice.cost.latency_s for choice in plan.alternatives]
    assert values == sorted(values) and values[0] > plan.best.cost.latency_s
    assert [choice.partition.cuts for choice in plan.whole] == [(2,), (0,)]


CONTRADICTIONS = [
    (Constraints(must={0: 1, 1: 0}), ["partition.must.a=server", "partition.must.b=device"], []),
    (
        Constraints(must={1: 0}, must_not=frozenset({(1, 0), (0, 1)})),
        ["partition.must.b=device", "partition.must_not.device=[b]"],
        ["server"],
    ),
    (Constraints(time_limit_s=0.5), ["partition.time_limit_ms=500"], ["must"]),
    (
        Constraints(must_not=frozenset({(1, 0)}), upload_bytes={0: 1000.0}),
        ["partition.must_not.device=[b]", "partition.upload_mb (0.001 MB from device)"],
        ["time_limit"],
    ),
]


@pytest.mark.parametrize(("rules", "named", "unnamed"), CONTRADICTIONS)
def test_constraints_that_contradict_each_other_are_named_and_no_others(rules, named, unnamed):
    with pytest.raises(ConfigError) as caught:
        plan_partition(small(constraints=rules))
    assert all(words in str(caught.value) for words in named)
    assert not any(words in str(caught.value) for words in unnamed)


def test_hosts_that_cannot_hold_the_model_are_named_with_their_memory():
    hosts = tuple(dataclasses.replace(host, memory_bytes=150.0) for host in small().hosts)
    with pytest.raises(ConfigError, match=r"memory_mb of device .* and memory_mb of server"):
        plan_partition(dataclasses.replace(small(), hosts=hosts))


def test_energy_needs_the_power_of_a_host():
    with pytest.raises(ConfigError, match=r"partition.objective=energy.*power_w"):
        plan_partition(small(), "energy")


@settings(max_examples=40, deadline=None)
@given(problems(most_units=4, most_hosts=3))
def test_a_contradiction_names_a_smallest_set(problem):
    assume(solve(problem) is None)
    assert "no partition" in contradiction(problem)
