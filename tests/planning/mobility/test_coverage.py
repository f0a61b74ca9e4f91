"""At which edge server a device is: against the same rule, one moment after the other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.planning.mobility.coverage import Coverage, spread, stays
from fedsys.planning.mobility.tracks import Track
from fedsys.planning.mobility.waypoint import RandomWaypoint

LINE = Coverage(np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([60.0, 60.0]))


def track(*xs, every=1.0):
    return Track(np.arange(len(xs)) * every, np.array([(x, 0.0) for x in xs]))


def drive(speed=10.0, until=200.0):
    return track(*np.arange(0.0, until + speed, speed))


def test_a_device_goes_over_where_another_edge_is_nearer_by_the_hysteresis():
    found = stays(drive(), LINE, 20.0, 0.0)
    # Between 50 m, where both are equally far, and 60 m, where the first one ends
    assert [(stay.from_s, stay.edge) for stay in found] == [(0.0, 0), (7.0, 1), (17.0, None)]
    assert [(s.from_s, s.edge) for s in stays(drive(), LINE, 5.0, 0.0)][1] == (6.0, 1)


def test_wobbling_in_the_middle_moves_nobody():
    points = [50 + (-1) ** i * 4 for i in range(40)]
    assert len(stays(track(*points), LINE, 20.0, 0.0)) == 1
    assert len(stays(track(*points), LINE, 0.0, 0.0)) == 40


def test_a_trend_foresees_what_a_sudden_turn_does_not():
    steady = stays(drive(), LINE, 20.0, 3.0)[1]
    assert steady.foreseen_s == 3.0
    jump = stays(track(0, 0, 0, 0, 100, 100), LINE, 20.0, 3.0)[1]
    assert (jump.from_s, jump.edge, jump.foreseen_s) == (4.0, 1, 0.0)
    assert stays(drive(), LINE, 20.0, 0.0)[1].foreseen_s == 0.0


def test_a_gap_is_a_stay_at_no_edge():
    far = Coverage(np.array([[0.0, 0.0], [200.0, 0.0]]), np.array([50.0, 50.0]))
    found = stays(drive(), far, 20.0, 3.0)
    assert [(stay.from_s, stay.edge) for stay in found] == [(0.0, 0), (6.0, None), (15.0, 1)]
    assert found[2].foreseen_s == 0.0  # nobody can announce it where nobody hears


def test_edges_without_places_are_spread_evenly():
    square = np.array([[0.0, 0.0], [600.0, 600.0]])
    points = {tuple(point) for point in spread(square, 4).points}
    assert points == {(150, 150), (450, 150), (150, 450), (450, 450)}
    street = np.array([[0.0, 0.0], [900.0, 10.0]])
    assert spread(street, 3).points[:, 0].tolist() == [150, 450, 750]
    for edges in range(1, 18):
        made = spread(square, edges)
        assert len(made.points) == edges and (made.radius_m == math.inf).all()
    assert len(spread(np.zeros((2, 2)), 3).points) == 3  # devices that all stand still


def brute(path, coverage, hysteresis):
    """The rule in words, moment by moment."""
    found, edge = [], "nowhere yet"
    for at, point in zip(path.times_s, path.points, strict=True):
        away = [math.dist(point, place) for place in coverage.points]
        within = [e for e, d in enumerate(away) if d <= coverage.radius_m[e]]
        nearest = min(within, key=lambda e: (away[e], e), default=None)
        if edge in within and away[edge] - away[nearest] <= hysteresis:
            continue
        if nearest != edge:
            found.append((at, nearest))
            edge = nearest
    return found


_POINTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40),
    _POINTS,
    st.sampled_from([3.0, 8.0, math.inf]),
    st.sampled_from([0.0, 2.5, 10.0]),
    st.sampled_from([0.0, 2.0, 5.0]),
)
def test_it_is_the_rule_whatever_the_way(way, places, radius, hysteresis, foresee):
    path = Track(np.arange(len(way), dtype=float), np.array(way, dtype=float))
    coverage = Coverage(np.array(places, dtype=float), np.full(len(places), radius))
    found = stays(path, coverage, hysteresis, foresee)
    assert [(stay.from_s, stay.edge) for stay in found] == brute(path, coverage, hysteresis)
    begins = [stay.from_s for stay in found]
    for before, stay in zip(begins, found[1:], strict=False):
        assert 0 <= stay.foreseen_s <= stay.from_s - before


@given(st.integers(0, 2**40), st.integers(0, 50), st.floats(1, 900), st.floats(1, 900))
def test_where_a_walker_is_does_not_depend_on_how_far_one_looks(seed, client, near, far):
    walk = RandomWaypoint(seed, (0.0, 0.0), (1000.0, 500.0), (5.0, 15.0), (0.0, 30.0))
    one, other = sorted(
        (walk.track(client, near), walk.track(client, far)), key=lambda t: len(t.times_s)
    )
    count = len(one.times_s)
    assert np.array_equal(one.points, other.points[:count])
    assert (other.points >= 0).all() and (other.points <= [1000, 500]).all()
    steps = np.hypot(*np.diff(other.points, axis=0).T)
    assert steps.max(initial=0.0) <= 15.0 + 1e-9 and other.times_s[-1] >= max(near, far) - 1


def test_walkers_differ_and_a_seed_repeats_them():
    walk = [RandomWaypoint(s, (0.0, 0.0), (1e3, 1e3), (5.0, 15.0), (0.0, 9.0)) for s in (0, 1)]
    ends = {tuple(w.track(c, 100.0).points[-1]) for w in walk for c in range(4)}
    assert len(ends) == 8
    assert pytest.approx(walk[0].track(2, 60.0).points) == walk[0].track(2, 60.0).points
