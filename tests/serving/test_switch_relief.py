import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.serving.switch.policy import (
    Objective,
    PassTime,
    Profile,
    Signals,
    Standing,
    decide,
    predict_ms,
)
from fedsys.serving.switch.relief import Backlog, relieve, standbys, tails_of

MB = 1_000_000


def profile(name, accuracy, ms, mb):
    """Batches of 4 take twice as long as single examples."""
    return Profile(
        name, accuracy, mb * MB, 2 * mb * MB, (PassTime(1, ms, ms), PassTime(4, 2 * ms, 2 * ms))
    )


LARGE = profile("large", 0.9, 20.0, 60)
MIDDLE = profile("middle", 0.8, 8.0, 6)
SMALL = profile("small", 0.6, 2.0, 2)
GOAL = Objective(p95_ms=50.0, margin=0.0, max_batch=4)


@pytest.mark.parametrize(
    ("rows", "waited_ms", "behind", "rate", "slow", "expected"),
    [
        (1, 0, 0, 0, 1, ("large", True)),
        (4, 0, 0, 0, 1, ("large", True)),  # 40 ms
        (4, 11, 0, 0, 1, ("middle", True)),  # it would be 51 ms old
        (4, 35, 0, 0, 1, ("small", True)),  # 51 with the middle one, 39 with the small one
        (4, 47, 0, 0, 1, ("small", False)),  # late whatever computes it
        (4, 7, 1, 0, 1, ("middle", True)),  # what is behind is 4 ms later: 51
        (4, 0, 8, 0, 1, ("large", True)),  # 40, then two batches of 4
        (4, 0, 12, 0, 1, ("middle", True)),
        (4, 0, 0, 300, 1, ("middle", True)),  # 12 come in 40 ms, 5 in 16 ms
        (4, 0, 0, 5000, 1, ("small", True)),  # 20 in 4 ms: 5 batches
        (1, 0, 0, 0, 2, ("large", True)),
        (4, 0, 0, 0, 2, ("middle", True)),
        (1, 0, 100, 0, 1, ("small", False)),
    ],
)
def test_the_most_accurate_that_makes_nothing_late(rows, waited_ms, behind, rate, slow, expected):
    seen = Signals(0.0, arrival_rate=rate, slowdown=slow)
    by, in_time = relieve(LARGE, (SMALL, MIDDLE), Backlog(rows, waited_ms, behind), seen, GOAL)
    assert (by.name, in_time) == expected


def test_margin_link_and_memory_count():
    def choose(objective, **signals):
        seen = Signals(0.0, slowdown=1.0, **signals)
        return relieve(LARGE, (SMALL, MIDDLE), Backlog(4), seen, objective)[0].name

    assert choose(GOAL) == "large"
    assert choose(dataclasses.replace(GOAL, margin=0.3)) == "middle"
    link = dataclasses.replace(GOAL, input_bytes=125_000)
    assert choose(link, link_mbit_s=50.0) == "middle"  # 20 ms
    assert choose(dataclasses.replace(GOAL, memory_bytes=20 * MB)) == "middle"
    assert choose(dataclasses.replace(GOAL, memory_bytes=1)) == "large"  # nothing fits: it stays


@given(
    st.integers(1, 8), st.floats(0, 200), st.integers(0, 200), st.floats(0, 1000),
    st.floats(0.5, 4), st.lists(st.sampled_from([SMALL, MIDDLE]), unique=True),
)  # fmt: skip
def test_only_what_is_in_memory_answers_and_more_pressure_never_calls_for_more(
    rows, waited, behind, rate, slow, spare
):
    def choose(waited, behind, rate):
        seen = Signals(0.0, arrival_rate=rate, slowdown=slow)
        return relieve(LARGE, spare, Backlog(rows, waited, behind), seen, GOAL)

    by, in_time = choose(waited, behind, rate)
    assert by in (LARGE, *spare)
    for more in (
        (waited + 5, behind, rate),
        (waited, behind + 4, rate),
        (waited, behind, 2 * rate),
    ):
        worse, still = choose(*more)
        assert worse.accuracy <= by.accuracy
        assert in_time or not still


@pytest.mark.parametrize(
    ("chosen", "room", "share", "expected"),
    [
        (LARGE, math.inf, 0.0, ()),
        (LARGE, math.inf, 0.05, ("small",)),
        (LARGE, math.inf, 0.14, ("small", "middle")),
        (LARGE, 120 * MB, 0.14, ()),  # the large one takes it all
        (LARGE, 123 * MB, 0.14, ("small",)),
        (SMALL, math.inf, 0.14, ("middle",)),
        (SMALL, math.inf, math.inf, ("middle", "large")),
    ],
)
def test_standbys_keep_to_their_share_and_to_the_room(chosen, room, share, expected):
    assert standbys((LARGE, SMALL, MIDDLE), chosen, room, share) == expected


def test_help_is_taken_as_far_as_it_gains_accuracy():
    none = tails_of((LARGE, SMALL, MIDDLE), None)
    assert none == {"large": 0.05, "middle": 0.05, "small": 0.05}
    helped = tails_of((LARGE, SMALL, MIDDLE), SMALL)
    assert helped == pytest.approx({"large": 1 / 3, "middle": 0.5, "small": 0.05})
    mixture = (1 - helped["large"]) * LARGE.accuracy + helped["large"] * SMALL.accuracy
    assert mixture == pytest.approx(MIDDLE.accuracy)
    unknown = dataclasses.replace(SMALL, accuracy=math.nan)
    assert tails_of((LARGE, unknown), unknown) == {"large": 0.05, "small": 0.05}


def test_what_helpers_take_over_is_no_load_of_the_variant():
    """Beside busy neighbours a variant was left that could have answered three of four requests.

    300 examples a second are 1.2 of what the middle one can do, 4 ms each, and 0.75 if the small
    one, 1 ms each, takes half of them: 0.7 right answers, where the small one alone gives 0.6.
    """
    seen = Signals(10.0, arrival_rate=300.0, slowdown=1.0)
    variants = (LARGE, MIDDLE, SMALL)
    tails = tails_of(variants, SMALL)
    standing = Standing("middle")
    _, alone = decide(standing, seen, variants, GOAL, tails)
    _, helped = decide(standing, seen, variants, GOAL, tails, SMALL)
    assert (alone.after, helped.after) == ("small", "middle")
    assert alone.predicted["middle"].p95_ms == math.inf
    assert helped.meets
    more = dataclasses.replace(seen, arrival_rate=450.0)  # 1.1 of what both can do
    assert decide(standing, more, variants, GOAL, tails, SMALL)[1].after == "small"


@given(
    st.floats(0, 1000), st.integers(0, 50), st.floats(0.5, 4), st.floats(0.05, 0.5),
    st.sampled_from([LARGE, MIDDLE, SMALL]),
)  # fmt: skip
def test_a_faster_helper_never_makes_a_prediction_worse_and_more_load_never_better(
    rate, queue, slow, tail, variant
):
    seen = Signals(0.0, arrival_rate=rate, queue=queue, slowdown=slow)
    alone = predict_ms(variant, seen, GOAL, tail)
    helped = predict_ms(variant, seen, GOAL, tail, SMALL)
    assert helped <= alone * (1 + 1e-12)
    for name, value in (("arrival_rate", rate * 1.5), ("queue", queue + 3), ("slowdown", slow * 2)):
        worse = dataclasses.replace(seen, **{name: value})
        assert predict_ms(variant, worse, GOAL, tail, SMALL) >= helped * (1 - 1e-12)
