import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.transport.patience import FIRST_S, LEAST_S, MOST_S, Allowance, Patience

seconds = st.floats(1e-4, 1e3)


def test_before_the_first_round_trip_the_limit_is_that_of_rfc_6298():
    assert Patience().limit_s == FIRST_S == 1.0


def test_the_first_round_trips_give_what_rfc_6298_says():
    patience = Patience(least_s=0.0)
    patience.saw(2.0)
    assert patience.limit_s == 2.0 + 4 * 1.0  # SRTT = R, RTTVAR = R / 2
    patience.saw(4.0)
    # RTTVAR = 3/4 · 1 + 1/4 · |2 - 4|, SRTT = 7/8 · 2 + 1/8 · 4
    assert patience.limit_s == 2.25 + 4 * 1.25


@given(st.lists(seconds, min_size=1))
def test_a_limit_is_never_shorter_than_the_least(round_trips):
    patience = Patience()
    for one in round_trips:
        patience.saw(one)
        assert patience.limit_s >= LEAST_S


@given(seconds, st.integers(40, 60))
def test_steady_round_trips_bring_the_limit_down_to_them(one, count):
    patience = Patience(least_s=0.0)
    for _ in range(count):
        patience.saw(one)
    assert one <= patience.limit_s <= 1.01 * one


@given(st.lists(seconds, min_size=1), st.integers(1, 200))
def test_each_limit_in_vain_doubles_the_next_up_to_the_most(round_trips, misses):
    patience = Patience()
    for one in round_trips:
        patience.saw(one)
    base = patience.limit_s
    for _ in range(misses):
        before = patience.limit_s
        patience.missed()
        assert patience.limit_s == pytest.approx(max(before, min(2 * before, MOST_S)))
    patience.saw(round_trips[-1])
    assert patience.limit_s <= max(base, LEAST_S, 8 * max(round_trips))


def test_an_attempt_that_was_cut_short_does_not_make_the_limit_longer():
    patience = Patience()
    for _ in range(9):
        patience.failed(0.001)
    assert patience.limit_s == FIRST_S
    patience.failed(FIRST_S)
    assert patience.limit_s == 2 * FIRST_S


def test_an_allowance_is_shared_by_all_who_wait_and_runs_while_they_do():
    now = [0.0]
    allowance = Allowance(10.0, lambda: now[0])
    with allowance.spending():
        now[0] += 3
        assert allowance.left_s == 7
        with allowance.spending():  # another thread: both wait
            now[0] += 2
            assert allowance.left_s == 3
    assert allowance.left_s == 3
    now[0] += 100  # nobody waits
    assert allowance.left_s == 3
    with allowance.spending():
        now[0] += 100
    assert allowance.left_s == 0
    with allowance.spending():
        allowance.renew()
        now[0] += 4
        assert allowance.left_s == 6
    assert allowance.left_s == 6
