"""What a configuration makes of scripts, walks and traces: who is where, and moves when."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.config import MobilityConfig
from fedsys.errors import ConfigError
from fedsys.planning.mobility.coverage import Coverage
from fedsys.planning.mobility.positions import EvenRounds, Positioned, Walkers
from fedsys.planning.mobility.scripted import Scripted, movers
from fedsys.planning.mobility.sources import source_of
from fedsys.planning.mobility.tracks import Track
from fedsys.planning.moves import Move
from tests.planning.mobility.sumo_files import as_csv, as_xml, write

EDGES = ["edge-0", "edge-1", "edge-2"]


def scripted(kind, clients=4, **more):
    return Scripted(MobilityConfig(kind=kind, **more), clients, 0)


# --------------------------------------------------------------------------------------------------
# Scripts


def test_halfway_takes_every_device_on_in_every_round():
    source = scripted("halfway")
    assert source.places(1, [0, 1, 2, 3], EDGES) == {0: 0, 1: 1, 2: 2, 3: 0}
    assert source.moves(1, [1], EDGES) == (Move(1, 1, 0.5, 2),)
    assert source.places(2, [1], EDGES) == {1: 2} and source.moves(2, [1], EDGES)[0].edge == 0


def test_commuters_come_back():
    source = scripted("commuters")
    ways = [(source.places(r, [0], EDGES)[0], source.moves(r, [0], EDGES)[0].edge) for r in (1, 2)]
    assert ways == [(0, 1), (1, 0)]


def test_some_devices_move_in_some_rounds():
    source = scripted("halfway", devices=(2,), every=3, at=(0.1, 0.9), how="foreseen", piece=1)
    assert [len(source.moves(r, range(4), EDGES)) for r in (1, 2, 3, 4, 5)] == [2, 0, 0, 2, 0]
    assert [source.places(r, [0, 2], EDGES) for r in (1, 2, 4, 5)] == [
        {0: 0, 2: 2}, {0: 0, 2: 1}, {0: 0, 2: 1}, {0: 0, 2: 0},
    ]  # fmt: skip
    assert {(m.how, m.piece) for m in source.moves(1, range(4), EDGES)} == {("foreseen", 1)}


def test_a_share_of_the_devices_is_drawn_from_the_seed():
    quarter = MobilityConfig(kind="halfway", share=0.25)
    assert len(movers(quarter, 16, 0)) == 4 and movers(quarter, 16, 0) == movers(quarter, 16, 0)
    assert movers(quarter, 16, 0) != movers(quarter, 16, 1)
    assert movers(MobilityConfig(kind="halfway", devices=(5, 3)), 16, 0) == {3, 5}


@given(
    st.sampled_from(["halfway", "commuters"]), st.integers(1, 4), st.integers(1, 4),
    st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(2, 5),
)  # fmt: skip
def test_a_round_ends_where_the_next_one_begins(kind, every, clients, at, edges):
    source, names = scripted(kind, clients, every=every, at=tuple(sorted(at))), EDGES * 2
    names = names[:edges]
    for round_ in range(1, 8):
        here = dict(source.places(round_, range(clients), names))
        for move in source.moves(round_, range(clients), names):
            assert move.edge != here[move.client]
            here[move.client] = move.edge
        assert here == source.places(round_ + 1, range(clients), names)


# --------------------------------------------------------------------------------------------------
# Positions


def along(xs, places, *, rounds_s=10.0, radius=60.0, **more):
    """Return a source of one device that drives along a line, a step a second."""
    track = Track(np.arange(len(xs), dtype=float), np.array([(x, 0.0) for x in xs]))
    coverage = Coverage(np.array([(x, 0.0) for x in places]), np.full(len(places), radius))
    config = MobilityConfig(kind="trace", foresee_s=0.0, **more)
    walkers = Walkers(lambda client, until: track, coverage, 0.0, float(len(xs) - 1))
    return Positioned(config, walkers, EvenRounds(rounds_s))


def test_moves_are_told_in_shares_of_the_round_in_which_they_come():
    source = along(np.arange(0, 310, 10.0), [0, 100, 200], rounds_s=10.0)
    assert [source.places(r, [0], EDGES)[0] for r in (1, 2, 3, 4)] == [0, 1, 2, None]
    assert [(m.at, m.edge) for m in source.moves(1, [0], EDGES)] == [(0.7, 1)]
    assert [(m.at, m.edge) for m in source.moves(2, [0], EDGES)] == [(0.7, 2)]
    assert source.moves(3, [0], EDGES) == ()  # it leaves the last one, and finds none any more


def test_training_stands_still_where_no_edge_is_in_reach():
    source = along(np.arange(0, 310, 10.0), [0, 200], radius=50.0, rounds_s=10.0)
    (move,) = source.moves(1, [0], EDGES)
    assert (move.at, move.edge, move.away_s) == (pytest.approx(0.6), 1, 9.0)  # 50 m to 150 m
    assert source.gaps(1, [0]) == ()
    there_and_back = [*np.arange(0, 80, 10.0), *np.arange(80, -10, -10.0)]
    (gap,) = along(there_and_back, [0, 500], radius=50.0).gaps(1, [0])
    assert (gap.at, gap.edge, gap.away_s) == (pytest.approx(0.6), 0, 5.0)


def test_a_device_waits_for_its_first_edge_or_trains_alone():
    way = np.arange(-100, 100, 10.0)
    source = along(way, [0], radius=50.0)
    assert (source.places(1, [0], EDGES), source.waits(1, [0])) == ({0: 0}, {0: 5.0})
    alone = along(way, [0], radius=50.0, unreachable="alone")
    assert (alone.places(1, [0], EDGES), alone.waits(1, [0])) == ({0: None}, {})
    assert alone.moves(1, [0], EDGES) == () and source.moves(1, [0], EDGES) == ()


def test_foreseen_moves_say_since_when_and_unannounced_ones_do_not():
    way = np.arange(0, 200, 10.0)
    tracks = Track(np.arange(len(way), dtype=float), np.array([(x, 0.0) for x in way]))
    coverage = Coverage(np.array([(0.0, 0.0), (100.0, 0.0)]), np.full(2, 60.0))
    for how, said in (("announced", "foreseen"), ("unannounced", "unannounced")):
        config = MobilityConfig(kind="trace", foresee_s=3.0, how=how)
        walkers = Walkers(lambda client, until: tracks, coverage)
        (move,) = Positioned(config, walkers, EvenRounds(10.0)).moves(1, [0], EDGES)
        assert move.how == said and move.notice == pytest.approx(0.3)


def test_whoever_knows_rounds_better_is_followed_unless_their_length_is_said():
    class Slow:
        def begins_s(self, round_):
            return 30.0 * (round_ - 1)

        def takes_s(self, round_, client):
            return 14.0

    source = along(np.arange(0, 310, 10.0), [0, 100, 200, 300])
    source.follow(Slow())
    assert source.places(2, [0], EDGES)[0] == 3
    assert [(m.at, m.edge) for m in source.moves(1, [0], EDGES)] == [(0.5, 1)]
    said = along(np.arange(0, 310, 10.0), [0, 100, 200, 300], seconds_per_round=10.0)
    said.follow(Slow())
    assert said.places(2, [0], EDGES)[0] == 1


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=60),
    st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True),
    st.sampled_from([1.0, 2.0, 20.0]), st.sampled_from([3.0, 7.5, 40.0]), st.integers(0, 2),
)  # fmt: skip
def test_moves_go_on_in_time_from_one_edge_to_another(way, places, radius, rounds_s, hysteresis):
    source = along(way, places, radius=radius, rounds_s=rounds_s, hysteresis_m=float(hysteresis))
    for round_ in range(1, 6):
        here = source.places(round_, [0], EDGES)[0]
        found = source.moves(round_, [0], EDGES)
        events = sorted((*found, *source.gaps(round_, [0])), key=lambda m: m.at)
        assert found == source.moves(round_, [0], EDGES)
        assert all(0 <= a.at <= b.at < 1 for a, b in pairwise(events))
        assert here is not None or not events
        for move in found:
            assert move.edge != here and move.away_s >= 0
            here = move.edge


# --------------------------------------------------------------------------------------------------
# Configurations


def steps(vehicles, seconds=40):
    """Vehicles that go along the x axis one behind the other, 10 m a second."""
    return {
        float(t): [(f"v{i}", 10.0 * t - 50.0 * i, 0.0) for i in range(vehicles) if t >= i]
        for t in range(seconds)
    }


@pytest.fixture
def traced(configure, tmp_path):
    def make(*overrides, text=None, clients=2, edges=2):
        file = write(tmp_path / "fcd", text or as_xml(steps(2)))
        config = configure(
            "policy=fixed", f"num_edges={edges}", f"num_clients={clients}", "rounds=2",
            "mobility=trace", f"mobility.file={file}", *overrides,
        )  # fmt: skip
        source = source_of(config, edges)
        return source, list(source.notes)

    return make


PLACES = "fleet.places=[{x: 0, y: 0, radius_m: 120}, {x: 200, y: 0}]"


def test_vehicles_stand_for_devices_in_the_order_in_which_they_appear(traced):
    source, said = traced(PLACES)
    assert said == [] and source.places(1, [0, 1], EDGES) == {0: 0, 1: 0}
    assert [(m.client, m.edge) for m in source.moves(1, [0, 1], EDGES)] == [(0, 1), (1, 1)]
    mapped, _ = traced(PLACES, "mobility.vehicles={v1: 0, v0: 1}")
    first, other = source.moves(1, [0], EDGES)[0], mapped.moves(1, [1], EDGES)[0]
    assert (first.at, first.edge) == (other.at, other.edge)


def test_a_table_and_xml_make_the_same_moves(traced):
    ways = [traced(PLACES, text=form(steps(2)))[0] for form in (as_xml, as_csv)]
    assert ways[0].moves(1, [0, 1], EDGES) == ways[1].moves(1, [0, 1], EDGES)


def test_a_trace_lasts_all_rounds_if_nothing_else_is_said(traced):
    source, _ = traced(PLACES)
    assert source.moves(1, [0], EDGES)[0].at == pytest.approx(12 / 19.5)
    paced, _ = traced(PLACES, "mobility.seconds_per_round=24", "mobility.begin_s=0")
    assert paced.moves(1, [0], EDGES)[0].at == pytest.approx(0.5)


def test_without_places_edges_are_spread_and_it_is_said(traced):
    source, said = traced(edges=3)
    assert "3 edge servers are spread evenly over 430 x 0 m" in said[0]
    assert [m.edge for m in source.moves(1, [0], EDGES)] == [1]
    _, said = traced(text=as_xml(steps(5)))
    assert "3 of the 5 vehicles of the trace stand for no device" in said[0]
    _, said = traced("mobility.vehicles={v0: 1}")
    assert "1 devices have no vehicle" in said[1]


def degrees(vehicles):
    """The same vehicles near 13 degrees east, 52 north; a degree of longitude is 68.46 km there."""
    return {
        at: [(name, 13 + x / 68_458.3, 52 + y / 111_195.1) for name, x, y in row]
        for at, row in steps(vehicles).items()
    }


GLOBE = (
    f"fleet.places=[{{lon: 13, lat: 52, radius_m: 120}}, {{lon: {13 + 200 / 68_458.3}, lat: 52}}]"
)


def test_longitude_and_latitude_make_the_moves_that_metres_make(traced):
    globe, _ = traced(GLOBE, text=as_xml(degrees(2), places=7))
    plane, _ = traced(PLACES)
    assert globe.moves(1, [0, 1], EDGES) == plane.moves(1, [0, 1], EDGES)
    free, _ = traced("mobility.coordinates=degrees", text=as_xml(degrees(2), places=7))
    assert [m.edge for m in free.moves(1, [0], EDGES)] == [1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"clients": 3}, "a vehicle for each of the 3 devices, and has 2;.*num_clients=2"),
        ({"more": ["mobility.vehicles={w0: 1}"]}, "vehicles.w0=1: must be a vehicle of.*2 others"),
        ({"text": as_xml({0.0: []})}, "must hold vehicles, and has none"),
        ({"more": [GLOBE]}, "must be in degrees.*up to 390.*in spite of --fcd-output.geo"),
        ({"more": [PLACES, "mobility.coordinates=degrees"]}, "must be metres, as fleet.places"),
        ({"text": as_xml(degrees(2), places=7)}, "mobility.coordinates=None: must be said"),
        ({"text": as_xml({0.0: [("v0", 0, 0), ("v0", 1, 0)]})}, "must stand once in a time step"),
    ],
)
def test_what_does_not_go_together_is_refused(traced, overrides, words):
    more = overrides.pop("more", [])
    with pytest.raises(ConfigError, match=words):
        traced(*more, **overrides)


def test_walkers_need_no_file(configure):
    config = configure("policy=fixed", "num_edges=3", "mobility=waypoint", "mobility.share=0.5")
    source = source_of(config, 3)
    assert "spread evenly over 1000 x 1000 m" in source.notes[0]
    assert len(source.places(1, range(8), EDGES)) == 4
    moves = [move for r in range(1, 6) for move in source.moves(r, range(8), EDGES)]
    assert moves and {move.how for move in moves} >= {"foreseen"}
    assert source_of(configure(), 1) is None
