"""What a request takes on a route adds up from the parts of those that were measured."""

import random

import pytest
import torch

from fedsys.models import layered
from fedsys.partition.pipeline import Passed
from fedsys.serving.recovery.route_latency import RouteLatencies
from fedsys.serving.route_times import RouteTimes
from fedsys.serving.routes import Route, route_of, working
from tests.serving.chains import SHAPE, cut, model
from tests.serving.recovery.failing import problem_for

NAMES = ("device", "edge", "cloud")


@pytest.fixture(scope="module")
def problem():
    return problem_for(layered(model(), SHAPE), NAMES)


def request(problem, label, factor=1.0, call_s=0.002, hop_s=0.001, entry_s=0.003, slower=None):
    """Return a request as hosts would tell it that obey a law, and its seconds."""
    partition, parts, total = route_of(label).partition, [], entry_s + 0.0005
    places = list(working(partition, len(problem)))
    for place, (host, first, last) in enumerate(places):
        units = problem.hosts[host].costs.seconds(1, first, last)[0]
        compute = call_s + factor * (slower or {}).get(host, 1.0) * units
        part = {"host": NAMES[host], "queue_s": 0.0, "compute_s": compute}
        total += compute
        if place + 1 < len(places):
            there = problem.path(host, places[place + 1][0])
            nbytes = problem.bytes_at(last, "fp32")
            network = 8 * nbytes / there.up_bits_s + 8 * problem.answer_bytes / there.down_bits_s
            part["link_s"] = network + 2 * there.latency_s + hop_s
            total += part["link_s"]
        parts.append(part)
    return Passed(torch.zeros(1, 10), parts, entry_s, 0, label), total


def told(problem, labels, **law):
    times = RouteTimes()
    for label in labels:
        for _ in range(5):
            passed, took = request(problem, label, **law)
            times.noted(label, passed, 1, took)
    known = RouteLatencies(lambda way: problem, times)
    known.learn()
    return known, times


def test_a_route_that_was_not_used_is_the_sum_of_parts_of_those_that_were(problem):
    law = {"factor": 400.0, "slower": {1: 3.0}}
    known, _ = told(problem, ["1/2", "2/3", "1/5", "0/2", "3/5"], **law)
    for label in ("2/4", "1/3", "0/3", "2/5"):
        took, measured = known.seconds(label)
        assert not measured
        assert took == pytest.approx(request(problem, label, **law)[1], rel=0.05), label
    errors = known.held_out()
    assert errors.routes == 5
    assert errors.mean < 0.1


def test_what_was_measured_wins_and_requests_of_clients_before_rehearsals(problem):
    known, times = told(problem, ["1/2"])
    _, took = request(problem, "1/2")
    assert known.seconds("1/2") == (pytest.approx(took), True)
    passed, usual = request(problem, "2/3")
    times.rehearsed("2/3", [(passed, 0.5 * usual)] * 3)
    times.rehearsed("1/2", [(passed, 0.5 * took)] * 3)  # in rehearsal all takes half of the time
    known.learn()
    assert known.seconds("2/3") == (pytest.approx(usual), True)
    for _ in range(3):
        times.noted("2/3", passed, 1, 9.0)
    assert known.seconds("2/3") == (9.0, True)


def test_few_requests_and_larger_ones_say_nothing_of_one_image():
    times, passed = RouteTimes(), Passed(torch.zeros(1, 10), [], 0.0, 0)
    for _ in range(2):
        times.noted("1/2", passed, 1, 1.0)
    assert times.took_s("1/2") is None
    for seconds in (5.0, 6.0, 7.0):
        times.noted("1/2", passed, 4, seconds)
    assert times.took_s("1/2") == 6.0  # nothing smaller is known
    times.noted("1/2", passed, 1, 2.0)
    assert times.took_s("1/2") == 1.0
    assert times.took_s("2/2") is None


def test_with_nothing_measured_a_route_is_what_its_problem_says(problem):
    known = RouteLatencies(lambda way: problem, RouteTimes())
    draw = random.Random(1)
    for _ in range(5):
        first = draw.randint(1, 4)
        label = Route(cut(first, draw.randint(first, 5))).label
        cost = known.expected(label)
        whole = sum(s for _, s in cost.stages) + sum(cost.hops) + cost.ahead_s
        assert known.seconds(label) == (pytest.approx(whole), False)
    assert known.held_out().mean is None
