"""The closed forms against the simulator of rounds, which plays every piece."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import alone_s, together_s
from fedsys.planning.costs import Crossing, MachineCosts, Messaging
from fedsys.planning.timeline import play
from fedsys.planning.workload import Device, Menu, StageTimes, Workload, job_of
from fedsys.transport.network import Network

BATCH = 12
UNITS = 3
COUNTS = (1, 2, 3, 4, 6, 12)  # they divide the batch

seconds = st.floats(0.001, 1.0)
units = st.tuples(*[seconds] * UNITS)


def machines(workers=1):
    return st.builds(
        MachineCosts,
        st.just("m"),
        st.just((1,)),
        st.tuples(units),
        st.tuples(units),
        units,
        operation_s=seconds,
        load_s=st.floats(0, 0.5),
        messaging=st.builds(Messaging, seconds, st.just({"int8": 1e-4})),
        workers=st.just(workers),
    )


networks = st.builds(Network, st.floats(1e3, 1e6), st.floats(1e3, 1e6), st.sampled_from([0.0, 0.1]))
choices = st.builds(
    Assignment,
    st.integers(1, UNITS),
    st.integers(0, 1),
    st.sampled_from(["fp32", "int8"]),
    st.sampled_from(["fp32", "int8"]),
    st.sampled_from(COUNTS),
)


@st.composite
def loads(draw, most=4):
    count = draw(st.integers(1, most))
    devices = [Device(str(i), draw(machines()), draw(networks), BATCH) for i in range(count)]
    edges = [draw(machines(draw(st.integers(1, 3)))) for _ in range(2)]
    crossings = tuple(Crossing(n, 1) for n in (300, 100, 10))
    return Workload(
        crossings, (40, 80, 8), (1, 2), BATCH, tuple(devices), tuple(edges), COUNTS, exchange=False
    )


def stacked(load, plan):
    each = [Menu(load, [c]).stages(d) for d, c in zip(load.devices, plan, strict=True)]
    fields = StageTimes.__dataclass_fields__
    return StageTimes(**{f: np.array([[getattr(s, f)[0] for s in each]]) for f in fields})


def in_order(load, schedule):
    kind, depth = schedule
    return dataclasses.replace(load, schedule=kind, depth=depth)


schedules = st.sampled_from(
    [("pipelined", 1), ("sequential", 7), *(("bounded", depth) for depth in (1, 2, 3, 5))]
)


def played(load, plan):
    jobs = [job_of(load, d, c, iterations=1) for d, c in zip(load.devices, plan, strict=True)]
    return np.array(play(jobs, [e.workers for e in load.edges]).ends_s)


@settings(max_examples=40, deadline=None)
@given(loads(most=1), schedules, st.data())
def test_the_closed_form_for_one_device_equals_the_simulator(load, schedule, data):
    load = in_order(load, schedule)
    plan = [data.draw(choices)]
    expected = played(load, plan)
    assert alone_s(stacked(load, plan), load.in_flight)[0] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(loads(), schedules, st.data())
def test_several_devices_on_shared_edges_take_as_long_as_in_the_simulator(load, schedule, data):
    load = in_order(load, schedule)
    plan = [data.draw(choices) for _ in load.devices]
    edge = np.array([[choice.edge for choice in plan]])
    workers = [e.workers for e in load.edges]
    got = together_s(stacked(load, plan), edge, workers, load.in_flight)[0]
    assert got == pytest.approx(played(load, plan), rel=1e-9)
    assert (got >= alone_s(stacked(load, plan), load.in_flight)[0] - 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(loads(), schedules, st.data())
def test_plans_that_are_timed_together_take_as_long_as_by_themselves(load, schedule, data):
    load = in_order(load, schedule)
    plans = data.draw(st.lists(st.tuples(*[choices] * len(load.devices)), min_size=2, max_size=6))
    rows = [stacked(load, plan) for plan in plans]
    fields = StageTimes.__dataclass_fields__
    both = StageTimes(**{f: np.concatenate([getattr(s, f) for s in rows]) for f in fields})
    edge = np.array([[choice.edge for choice in plan] for plan in plans])
    got = together_s(both, edge, [e.workers for e in load.edges], load.in_flight)
    for row, plan in zip(got, plans, strict=True):
        assert row == pytest.approx(played(load, plan), rel=1e-9)


@pytest.mark.parametrize("schedule", [("pipelined", 1), ("sequential", 1), ("bounded", 2)])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_devices_of_one_kind_whose_moments_coincide(workers, schedule):
    # Ties: every arrival of a device coincides with those of all others
    one = MachineCosts("m", (1,), ((0.5,) * 3,), ((0.5,) * 3,), (0.0,) * 3, workers=workers)
    devices = tuple(Device(str(i), one, Network(1e4, 1e4), BATCH) for i in range(4))
    load = Workload(
        tuple(Crossing(n, 1) for n in (300, 100, 10)), (0,) * 3, (1, 2), BATCH, devices, (one,),
        exchange=False,
    )  # fmt: skip
    load, plan = in_order(load, schedule), [Assignment(1, micro_batches=4)] * 4
    edge = np.zeros((1, 4), dtype=int)
    got = together_s(stacked(load, plan), edge, [workers], load.in_flight)[0]
    assert got == pytest.approx(played(load, plan), rel=1e-9)
