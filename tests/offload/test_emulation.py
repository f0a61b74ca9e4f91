"""Machines that are stood for: moments follow from moments, whatever the waits really took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.config import parse, with_values
from fedsys.errors import ConfigError
from fedsys.offload import emulation
from fedsys.offload.emulation import LATE_S, Pace, SessionPace, Workers
from fedsys.planning.costs import MachineCosts, Messaging
from fedsys.training.federation import layered_model

COSTS = MachineCosts("slow", (1,), ((0.1, 0.2),), ((0.3, 0.4),), (0.01, 0.02), load_s=0.05)
seconds = st.floats(0.001, 2.0)


class Time:
    """A clock whose sleeps end late by what is given."""

    def __init__(self, late=0.0):
        self.now, self._late = 100.0, late

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds + self._late


def paced(late=0.0):
    time = Time(late)
    return Pace(COSTS, clock=time, sleep=time.sleep), time


@given(st.lists(seconds, min_size=1, max_size=30), st.floats(0.0, 0.9 * LATE_S))
def test_waits_that_end_late_do_not_add_up(operations, late):
    pace, time = paced(late)
    for operation in operations:
        pace.begin()
        pace.end(operation)
    assert pace.now() == pytest.approx(100.0 + sum(operations))
    assert time.now == pytest.approx(pace.now(), abs=LATE_S)
    assert pace.late_s == 0.0


def test_an_operation_begins_when_what_it_needs_has_arrived_not_when_it_was_noticed():
    pace, time = paced()
    time.now = 103.0
    assert pace.begin(102.5) == (100.0, 100.0)
    assert pace.end(1.0) == (102.5, 103.5)
    assert time.now == 103.5


def test_what_is_owed_is_paid_while_waiting_and_the_rest_at_the_end():
    pace, _ = paced()
    pace.owe(0.5)
    assert pace.begin(100.2) == (100.0, pytest.approx(100.2))
    assert pace.end(1.0) == (pytest.approx(100.2), pytest.approx(101.2))
    assert pace.settle() == (pytest.approx(101.2), pytest.approx(101.5))
    assert pace.settle() == (pytest.approx(101.5), pytest.approx(101.5))


def test_what_is_late_for_real_is_said_and_the_next_operation_catches_up():
    pace, time = paced()
    pace.begin()
    time.now += 0.7  # the real work
    assert pace.end(0.5) == (100.0, 100.5)
    assert pace.late_s == pytest.approx(0.2)
    assert pace.real() == 100.7
    pace.begin()
    assert pace.end(0.5) == (100.5, 101.0)
    assert time.now == pytest.approx(101.0)


def test_without_costs_nothing_is_waited_for():
    time = Time()
    pace = Pace(clock=time, sleep=time.sleep)
    pace.owe(5.0)
    time.now = 101.0
    pace.begin(100.5)
    time.now = 103.0
    assert pace.end(7.0) == (101.0, 103.0)
    assert time.now == 103.0


@given(
    st.lists(st.tuples(st.floats(0.0, 9.0), seconds), min_size=1, max_size=30), st.integers(1, 4)
)
def test_workers_are_never_more_than_there_are_and_none_rests_while_work_waits(jobs, count):
    workers = Workers("edge", clock=Time())
    jobs = sorted(jobs)
    taken = [workers.take(at, work, count) for at, work in jobs]
    for (at, work), (began, ended) in zip(jobs, taken, strict=True):
        assert began >= at
        assert ended == began + work
        busy = [b for b, e in taken if b <= began < e]
        assert len(busy) <= count
        if began > at:  # somebody made it wait until this very moment
            assert any(e == began for _, e in taken)


def test_a_session_charges_its_edge_for_work_and_messages_and_says_when_it_did_what():
    time = Time()
    costs = MachineCosts("edge", (1,), ((0.1, 0.2),), ((0.3, 0.4),), (0.01, 0.02),
                         messaging=Messaging(0.5, {"fp32": 0.001}))  # fmt: skip
    workers = Workers("edge", clock=time, sleep=time.sleep)
    pace = SessionPace(
        workers, costs, first=1, last=2, down_bytes=lambda rows: 100.0 * rows, clock=time
    )
    pace.begin(101.0, 250, 2, both=True, forward=True)
    pace.turn()
    # two messages of 0.5, 450 bytes, and two examples through the second unit
    assert pace.end() == [101_000_000, 101_000_000, 101_400_000, 103_650_000]
    assert time.now == pytest.approx(103.65)
    pace.update()
    assert time.now == pytest.approx(103.67)


def test_emulation_needs_machines_to_stand_for(configure):
    config = configure("data=synthetic_32x32", "model=vgg5", "fleet.emulate=true")
    layers = layered_model(config, (3, 32, 32), 10)
    with pytest.raises(ConfigError, match="fleet=pi_lab"):
        emulation.device_costs(config, layers, 0)
    fleet = configure("data=synthetic_32x32", "model=vgg5", "fleet=pi_lab", "fleet.emulate=true")
    assert emulation.device_costs(fleet, layers, 5).name.endswith(
        "pi4"
    )  # five, then from the first


def test_split_and_whole_training_take_the_time_of_the_fleet_and_give_the_same_model(
    configure, carry_out
):
    base = configure("data=synthetic", "model=cnn", "fleet=nominal", "schedule=pipelined")
    values = {
        "num_clients": 2,
        "rounds": 1,
        "client": {"epochs": 1, "batch_size": 10},
        "data": {"examples": 60, "test_examples": 10, "shape": [1, 8, 8]},
        "fleet": {"devices": ["pi3"], "emulate": True},
        "schedule": {"micro_batches": 2},
        "model": {"width": 4, "hidden": 16},
    }
    whole = carry_out(parse(with_values(base.text, **values)))
    policy = {"kind": "fixed", "cut": 2, "codec": "fp32"}
    split = carry_out(parse(with_values(base.text, **values, policy=policy)))
    assert whole.sha256 == split.sha256
    # each forward and each backward of a Raspberry Pi 3 takes two milliseconds at least
    for run in (whole, split):
        assert run.rows[0]["client_seconds"] >= run.rows[0]["steps"] / 2 * 2 * 2 * 2e-3
