from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fedsys.errors import ConfigError
from fedsys.planning.jobs import Exchange, Job, Turn
from fedsys.planning.timeline import play
from fedsys.training.schedule import micro_batch_bounds, operations
from fedsys.transport.network import Network, finish_time
from tests.planning.recurrences import iteration_s

SECONDS = st.floats(0.001, 3.0)


def job(stages, *, kind="pipelined", depth=2, latency=0.0, name="a", **options):
    """Stages: rows (forward, up, edge, down, backward) in seconds, at 8 bits per second."""
    turns = []
    for operation, piece in operations(kind, len(stages), depth, tail=False):
        f, u, s, d, b = stages[piece]
        if operation == "forward":
            turns.append(Turn("forward", piece, f, Exchange(u, s, d)))
        else:
            turns.append(Turn("backward", piece, b))
    return Job(name, tuple(turns), Network(8.0, 8.0, latency), **options)


def lanes(events):
    """Return the events of each resource in order of time."""
    found = {}
    for event in sorted(events, key=lambda e: (e.start_s, e.end_s)):
        found.setdefault(event.resource, []).append(event)
    return found


def closed(stages, **options):
    return float(iteration_s(*np.array(stages, dtype=float).T, **options))


def table(max_size=7):
    return st.lists(st.tuples(*[SECONDS] * 5), min_size=1, max_size=max_size)


@settings(max_examples=60, deadline=None)
@given(table(), st.sampled_from([0.0, 0.25]), st.integers(1, 8))
def test_the_simulator_equals_the_closed_form_for_one_device(stages, latency, depth):
    for kind, limit in (("sequential", 1), ("pipelined", None), ("bounded", depth)):
        played = play([job(stages, kind=kind, depth=depth, latency=latency)])
        expected = closed(stages, latency_s=latency, depth=limit)
        assert played.seconds == pytest.approx(expected, rel=1e-12)


@given(table(1), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_one_piece_takes_the_sum_of_all_stages(stages, latency):
    played = play([job(stages, latency=latency, device_update_s=0.5)])
    assert played.seconds == pytest.approx(sum(stages[0]) + 2 * latency + 0.5)


@pytest.mark.parametrize("busiest", range(5))
def test_many_pieces_take_as_long_as_the_busiest_resource(busiest):
    whole = np.full(5, 0.4)
    whole[busiest] = 3.0
    device = whole[0] + whole[4]
    limit = max(device, *whole[1:4])
    excess = []
    for count in (10, 100, 1000):
        stages = np.tile(whole / count, (count, 1))
        excess.append(closed(stages) / limit - 1)
    assert excess[0] > excess[1] > excess[2] >= 0 or max(excess) < 1e-9
    assert excess[2] < 0.01


def test_a_device_does_not_compute_forward_and_backward_at_once():
    # Forward and backward take 1 s each: what lets them overlap predicts 1.16 s
    stages = np.tile(np.array([1.0, 0.2, 0.2, 0.2, 1.0]) / 10, (10, 1))
    assert closed(stages) == pytest.approx(2.0)


def test_settings_with_fewer_pieces_are_padded_with_zeros():
    rows = np.zeros((2, 4, 5))
    rows[0] = 0.3
    rows[1, :2] = [0.1, 0.7, 0.2, 0.3, 0.4]
    for depth in (None, 1, 2):
        both = iteration_s(*np.moveaxis(rows, 2, 0), 0.1, depth=depth)
        assert both[1] == pytest.approx(closed(rows[1, :2], latency_s=0.1, depth=depth))
        assert both[0] == pytest.approx(closed(rows[0], latency_s=0.1, depth=depth))


def test_the_edge_serves_in_order_of_arrival_and_ties_by_index():
    late = job([(0.5, 1.0, 2.0, 1.0, 0.0)], name="late")
    first = job([(0.0, 1.0, 2.0, 1.0, 0.0)], name="first")
    tied = job([(0.0, 1.0, 2.0, 1.0, 0.0)], name="tied")
    played = play([late, first, tied])
    edge = [(e.job, e.start_s) for e in played.events if e.resource == "edge:0"]
    assert edge == [(1, 1.0), (2, 3.0), (0, 5.0)]
    assert played.ends_s == (8.0, 4.0, 6.0)
    assert play([late, first, tied]) == played


def test_two_workers_serve_two_sessions_but_never_one_session_twice():
    two = [job([(0.0, 0.0, 2.0, 0.0, 0.0)] * 2, name=name) for name in "ab"]
    assert play(two).seconds == 8.0
    played = play(two, workers=[2])
    assert played.seconds == 4.0
    assert played.idle([2])["edge:0"] == 0.0


@settings(max_examples=25, deadline=None)
@given(st.lists(table(4), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 2))
def test_company_never_makes_a_device_faster_and_resources_hold_one_event(tables, steps, workers):
    jobs = [
        job(t, name=str(i), iterations=steps, load_s=0.2, edge_update_s=0.1)
        for i, t in enumerate(tables)
    ]
    played = play(jobs, workers=[workers])
    for alone, together in zip(jobs, played.ends_s, strict=True):
        assert together >= play([alone]).seconds - 1e-9
    for resource, events in lanes(played.events).items():
        if workers == 1 or not resource.startswith("edge"):
            for before, after in itertools.pairwise(events):
                assert before.end_s <= after.start_s + 1e-9
    busy = played.busy()
    for i, t in enumerate(tables):
        work = sum(row[0] + row[4] for row in t) + 0.2
        assert busy[f"device:{i}"] == pytest.approx(steps * work)
        assert busy[f"up:{i}"] == pytest.approx(steps * sum(row[1] for row in t))


@settings(max_examples=25, deadline=None)
@given(table(4), table(4))
def test_the_critical_path_leads_from_the_start_to_the_end_without_a_gap(one, other):
    played = play([job(one, name="a"), job(other, name="b", iterations=2, edge_update_s=0.3)])
    path = played.critical_path()
    assert path[0].start_s == 0.0 and path[-1].end_s == played.seconds
    for before, after in itertools.pairwise(path):
        assert after.start_s == pytest.approx(before.end_s)


def test_loading_fills_the_waits_and_its_rest_comes_after():
    stages = [(1.0, 1.0, 1.0, 1.0, 1.0)]
    assert play([job(stages, load_s=3.0)]).seconds == 5.0
    assert play([job(stages, load_s=4.5)]).seconds == 6.5


def test_a_label_private_piece_goes_to_the_edge_twice():
    turns = []
    seconds = {"forward": 1.0, "tail": 0.5, "backward": 2.0}
    for name, piece in operations("sequential", 2, 1, tail=True):
        exchange = None if name == "backward" else Exchange(0.25, 0.5, 0.25)
        turns.append(Turn(name, piece, seconds[name], exchange))
    played = play([Job("a", tuple(turns), Network(8.0, 8.0))])
    assert played.seconds == pytest.approx(2 * (3.5 + 2.0))


def test_a_changing_rate_is_followed_as_by_shaped_links():
    network = Network(trace=((0.0, 8.0, 8.0), (2.0, 80.0, 8.0)))
    turns = (Turn("forward", 0, 1.0, Exchange(21.0, 0.0, 0.0)), Turn("backward", 0, 0.0))
    played = play([Job("a", turns, network)])
    assert played.seconds == finish_time(1.0, 21.0, network.up) == 4.0


def test_the_model_is_fetched_before_and_returned_after():
    turns = (Turn("forward", 0, 1.0), Turn("backward", 0, 2.0))
    one = Job("a", turns, Network(8.0, 16.0, 0.5), fetch_bytes=4.0, return_bytes=3.0, iterations=2)
    assert play([one]).seconds == pytest.approx(2.0 + 0.5 + 6.0 + 3.0 + 0.5)


def test_the_last_mini_batch_may_be_smaller():
    def stages(size):
        return [(0.1 * (b - a),) * 5 for a, b in micro_batch_bounds(size, 4)]

    assert len(stages(3)) == 3
    assert play([job(stages(10))]).seconds == pytest.approx(closed(stages(10)))


def test_no_jobs_take_no_time():
    assert play([]).seconds == 0.0
    assert play([]).critical_path() == ()


def test_jobs_that_cannot_be_told_apart_are_refused():
    one = job([(1.0,) * 5])
    with pytest.raises(ConfigError, match="different names"):
        play([one, one])
    with pytest.raises(ConfigError, match=r"jobs\.a"):
        play([job([(1.0,) * 5], iterations=0)])
