"""The oracle: what who knows the truth would have done, and what it costs to ask."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fedsys.planning import oracle as oracles
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import Crossing, MachineCosts
from fedsys.planning.oracle import MOST_DEVICES, Oracle, regret
from fedsys.planning.planner import options
from fedsys.planning.virtual_clock import VirtualClock, virtual_round
from fedsys.planning.workload import Device, Workload
from fedsys.transport.network import Network

ONE = MachineCosts("m", (1,), ((0.1, 0.2, 0.3),), ((0.2, 0.4, 0.6),), (0.0,) * 3)
EDGE = ONE.slower(0.05)
CROSSINGS = tuple(Crossing(n, 1) for n in (300, 100, 10))
WHOLE = Assignment(3, micro_batches=1)


def load_of(*networks, examples=8):
    devices = [Device(str(i), ONE, network, examples) for i, network in enumerate(networks)]
    return Workload(CROSSINGS, (40, 80, 8), (1, 2), 4, tuple(devices), (EDGE,), (1, 2))


@pytest.mark.parametrize("rates", [(1e4, 1e6), (2e3, 5e4), (1e6, 1e6)])
def test_nothing_that_could_be_chosen_is_faster_on_the_clock(rates):
    load = load_of(*(Network(rate, rate, 0.01) for rate in rates))
    best = Oracle().best(load)
    every = [
        virtual_round(load, choices).seconds
        for choices in itertools.product(options(load), repeat=len(rates))
    ]
    assert best.seconds == pytest.approx(min(every), rel=5e-3)  # formulas are that near the clock
    assert "optimum" in best.how
    assert best.played == virtual_round(load, best.choices)


def test_rates_are_those_of_the_round_and_not_of_its_beginning():
    """A link that fails soon after the round has begun is not worth offloading to."""
    failing = Network(1e6, 1e6, trace=((0.0, 1e6, 1e6), (0.5, 100.0, 100.0)))
    own = virtual_round(load_of(failing), [WHOLE])
    best = Oracle().best(load_of(failing), 0.0, ([WHOLE], own))
    assert best.choices == (WHOLE,)
    steady = Oracle().best(load_of(Network(1e6, 1e6)))
    assert steady.choices[0].cut < 3
    later = Network(1e6, 1e6, trace=((0.0, 1e6, 1e6), (0.5, 100.0, 100.0), (50.0, 1e6, 1e6)))
    assert Oracle().best(load_of(later), 50.0).choices == steady.choices


def test_own_choices_are_taken_where_none_better_are_found():
    load = load_of(Network(1e6, 1e6))
    better = virtual_round(load, [Assignment(1, micro_batches=2)])
    best = Oracle().best(load, 0.0, ([Assignment(2, micro_batches=2)], better))
    found = Oracle().best(load)
    assert best.seconds == min(better.seconds, found.seconds)
    fast = dataclasses.replace(better, seconds=1e-3)
    own = Oracle().best(load, 0.0, ([WHOLE], fast))
    assert own.choices == (WHOLE,) and "own choices" in own.how
    assert regret(fast.seconds, own.seconds) == 0.0


def test_choices_that_are_as_good_up_to_rounding_are_not_the_oracles():
    """What the plot showed as the oracle's changed every few rounds, where nothing had changed."""
    load = load_of(Network(1e6, 1e6))
    found = Oracle().best(load)
    own = dataclasses.replace(found.played, seconds=found.seconds * (1 - 1e-13))
    best = Oracle().best(load, 0.0, ([WHOLE], own))
    assert best.choices == found.choices
    assert regret(own.seconds, best.seconds) == 0.0


def test_a_round_like_an_earlier_one_is_not_searched_again(monkeypatch):
    asked = []

    def counted(load, *given, **named):
        asked.append(load)
        return plan(load, *given, **named)

    plan = oracles.plan
    monkeypatch.setattr(oracles, "plan", counted)
    oracle, load = Oracle(), load_of(Network(1e5, 1e5))
    first = oracle.best(load, 0.0)
    assert oracle.best(load, 17.0) is first  # nothing depends on the moment
    assert len(asked) == 1
    changed = load_of(Network(2e5, 1e5))
    assert oracle.best(changed) is not first
    trace = load_of(Network(trace=((0.0, 1e5, 1e5), (10.0, 1e3, 1e3))))
    before = len(asked)
    oracle.best(trace, 0.0)
    oracle.best(trace, 20.0)
    assert len(asked) >= before + 2


def test_large_fleets_are_planned_as_auto_does_and_very_large_ones_not_at_all():
    some = Oracle().best(load_of(*[Network(1e5, 1e5)] * 9))
    assert some.how.startswith("as policy=auto, for 9 devices")
    assert Oracle().best(load_of(*[Network(1e5, 1e5)] * (MOST_DEVICES + 1))) is None


def test_whoever_must_offload_is_compared_with_offloading():
    slow = load_of(Network(100.0, 100.0))
    assert Oracle().best(slow).choices == (WHOLE,)
    assert Oracle(offload=True).best(slow).choices[0].cut < 3


def test_the_clock_plays_what_is_alike_once_and_as_ever():
    clock, load = VirtualClock(), load_of(Network(1e5, 1e5))
    choices = [Assignment(1, micro_batches=2)]
    first = clock.play(load, choices, 3.0)
    assert first == virtual_round(load, choices, 3.0)
    assert clock.play(load, choices, 5.0) is first
    assert clock.play(load, [WHOLE], 5.0) is not first
    trace = load_of(Network(trace=((0.0, 1e5, 1e5), (10.0, 1e3, 1e3))))
    assert clock.play(trace, choices, 0.0).seconds < clock.play(trace, choices, 20.0).seconds
