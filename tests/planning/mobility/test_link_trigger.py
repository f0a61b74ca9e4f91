"""When a device leaves a link, and that it does not go to and fro: the rule, and modelled links."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.config import MobilityConfig, compose_text, parse
from fedsys.errors import ConfigError
from fedsys.planning.mobility.link_trigger import LinkLimits, LinkWatch, observed
from fedsys.planning.mobility.network_led import WatchedLinks
from fedsys.planning.mobility.sources import source_of

LIMITS = LinkLimits(10e6, hysteresis=0.5, steady_s=2.0, foresee_s=0.0)


def dues(limits, seen, watch=None):
    """Return what is due, second by second, by rates in Mbit/s and latencies in milliseconds."""
    found, watch = [], watch or LinkWatch()
    for second, one in enumerate(seen):
        rate, latency = one if isinstance(one, tuple) else (one, 0.0)
        watch, due = observed(watch, limits, float(second), 1e6 * rate, latency / 1e3)
        found.append(due)
    return found


def leaves(limits, seen):
    return [second for second, due in enumerate(dues(limits, seen)) if due == "leave"]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([20, 20, 20, 20], []),
        ([20, 9, 9, 9, 9, 9, 9], [3]),  # after two seconds, and then it stays
        ([9, 9, 20, 9, 9, 20, 9, 9], []),  # never for two seconds
        ([9, 9, 9, 11, 9, 11, 9, 11, 9, 9, 9], [2]),  # above it is not good again
        ([9, 9, 9, 16, 16, 16, 9, 9, 9], [2, 8]),  # this is
        ([9, 9, 9, 16, 16, 9, 16, 16, 9, 9, 9], [2]),  # not for long enough
    ],
)
def test_a_device_leaves_a_link_that_is_poor_for_a_while_and_once(seen, expected):
    assert leaves(LIMITS, seen) == expected


def test_a_latency_is_judged_as_a_rate_is():
    slow = replace(LIMITS, below_bits_s=0.0, above_s=0.03)
    good, poor, better = (5, 10), (5, 40), (5, 25)
    assert leaves(slow, [good, poor, poor, poor, better, better, better, poor, poor, poor]) == [3]
    assert leaves(slow, [poor, poor, poor, good, good, good, poor, poor, poor]) == [2, 8]
    assert slow.in_words(math.inf, 0.04) == "its link took 40.0 ms, more than 30"


def test_a_move_is_foreseen_when_the_trend_or_the_link_says_so_and_taken_back():
    limits = replace(LIMITS, foresee_s=3.0, steady_s=3.0)
    falling = [30, 26, 22, 18, 14, 12, 9, 9, 9, 9]
    assert dues(limits, falling) == ["", "", "", "foresee", "", "", "", "", "", "leave"]
    assert dues(limits, [30, 30, 9, 9, 30, 30, 30]) == ["", "", "foresee", "", "remain", "", ""]


@given(st.lists(st.floats(0.1, 40.0), min_size=1, max_size=120))
def test_between_two_moves_a_link_was_good_for_a_while(rates):
    """So one that wavers about the threshold moves nobody twice."""
    limits = replace(LIMITS, foresee_s=2.0)
    moved = leaves(limits, rates)
    for first, second in pairwise(moved):
        between = "".join("g" if rate >= 15 else "." for rate in rates[first:second])
        assert "ggg" in between
    for second in moved:
        assert all(rate < 10 for rate in rates[second - 2 : second + 1])


NET = (
    "policy=fixed num_edges=3 num_clients=2 rounds=4 mobility=network "
    "mobility.seconds_per_round=20 mobility.foresee_s=0"
)


def made(more):
    return source_of(parse(compose_text(f"{NET} {more}")), 3)


def moves_in(source, rounds):
    edges = ["a", "b", "c"]
    found = [move for number in range(1, rounds + 1) for move in source.moves(number, [0], edges)]
    return [(move.round, move.at, move.edge, move.how) for move in found]


def test_modelled_links_say_when_devices_go_on_to_the_next_edge_server():
    trace = "[[0, 50, 50], [25, 2, 50], [45, 50, 50], [70, 50, 2]]"
    source = made(f"network=wifi 'network.trace={trace}'")
    assert moves_in(source, 4) == [(2, 0.4, 1, "announced"), (4, 0.65, 2, "announced")]
    places = [source.places(number, [0, 1], ["a", "b", "c"])[0] for number in (1, 2, 3, 4, 5)]
    assert places == [0, 0, 1, 1, 2]
    (move,) = source.moves(2, [0], ["a", "b", "c"])
    assert move.why == "its link carried 2.0 Mbit/s, less than 10"


def test_a_modelled_move_is_sent_ahead_from_its_first_sign_on():
    trace = "[[0, 50, 50], [25, 2, 50]]"
    source = made(f"network=wifi 'network.trace={trace}' mobility.foresee_s=5")
    (move,) = source.moves(2, [0], ["a", "b", "c"])
    assert (move.how, move.notice) == ("foreseen", pytest.approx(3 / 20))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "must say what links carry"),
        ("network=wifi mobility.below_mbit_s=null", "must say when a link is poor"),
        ("network=wifi mobility.hysteresis=-1", "must not be negative"),
        ("network=wifi 'network.trace=[[0, 5, 5]]' network.trace_by=rounds", "must be seconds"),
    ],
)
def test_links_of_which_nothing_is_known_are_refused(more, words):
    with pytest.raises(ConfigError, match=words):
        made(more)


def test_a_watched_device_begins_where_it_ended_and_leaves_no_link_twice_that_stayed_poor():
    source = made("network.emulate=true")
    assert isinstance(source, WatchedLinks)
    move = {"client": 0, "round": 1, "target": "c", "why": "poor", "good_again": False}
    source.ended = [move]
    assert source.places(2, [0, 1], ["a", "b", "c"]) == {0: 2, 1: 1}
    assert (source.is_armed(0), source.is_armed(1)) == (False, True)
    source.ended = [{**move, "good_again": True}]
    assert source.is_armed(0)
    assert MobilityConfig(kind="network").active
