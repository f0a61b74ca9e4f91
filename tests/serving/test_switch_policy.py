import dataclasses
import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsys.errors import ModelError
from fedsys.pruning import portfolio
from fedsys.serving.switch.policy import (
    How,
    Objective,
    PassTime,
    Profile,
    Signals,
    Standing,
    decide,
    predict_ms,
    profile_of,
    smallest,
    tail_wait_ms,
)

MB = 1_000_000


def profile(name: str, accuracy: float, ms: float, mb: int, batches: tuple[int, ...] = (1, 8)):
    """A variant whose batches of 8 cost half as much for each example."""
    rows = tuple(
        PassTime(b, ms * b * (1 if b == 1 else 0.5), 1.2 * ms * b * (1 if b == 1 else 0.5))
        for b in batches
    )
    return Profile(name, accuracy, mb * MB, 2 * mb * MB, rows)


LARGE = profile("large", 0.95, 20.0, 60)
MIDDLE = profile("middle", 0.90, 8.0, 20)
SMALL = profile("small", 0.80, 2.0, 5)
THREE = (SMALL, LARGE, MIDDLE)
CALM = Objective(p95_ms=50.0, dwell_s=5.0, down_dwell_s=0.5, margin=0.2)

milliseconds = st.floats(0.5, 200.0)
profiles = st.lists(
    st.builds(
        profile,
        st.uuids().map(str),
        st.floats(0.1, 1.0),
        milliseconds,
        st.integers(1, 500),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda v: v.name,
)
signals = st.builds(
    Signals,
    time_s=st.floats(0, 1e4),
    arrival_rate=st.floats(0, 500),
    queue=st.integers(0, 50),
    slowdown=st.none() | st.floats(0.5, 8),
    free_memory=st.none() | st.integers(0, 2_000 * MB),
    cpu_load=st.floats(0, 1),
    link_mbit_s=st.none() | st.floats(0.1, 1e4),
)
objectives = st.builds(
    Objective,
    p95_ms=milliseconds,
    memory_bytes=st.none() | st.integers(MB, 2_000 * MB),
    margin=st.floats(0, 0.5),
    max_batch=st.sampled_from([1, 8]),
    input_bytes=st.sampled_from([0, 3072]),
)


def test_the_most_accurate_that_meets_the_objective_answers():
    for rate, expected in ((1.0, "large"), (40.0, "middle"), (300.0, "small")):
        seen = Signals(0.0, arrival_rate=rate)
        standing, decision = decide(Standing(), seen, THREE, CALM)
        assert (standing.current, decision.after, decision.meets) == (expected, expected, True)
        assert CALM.p95_ms >= decision.predicted[expected].p95_ms


def test_where_none_meets_the_objective_the_smallest_answers_and_says_so():
    hard = dataclasses.replace(CALM, p95_ms=0.01)
    standing, decision = decide(Standing(), Signals(0.0), THREE, hard)
    assert decision.after == "small"
    assert not decision.meets and not standing.meets
    assert "none meets p95 0.01 ms: the smallest answers" in decision.reason
    _, again = decide(standing, Signals(100.0), THREE, hard)
    assert again.how is How.STAY
    assert "it is the smallest" in again.reason


def test_slow_links_count():
    link = dataclasses.replace(CALM, input_bytes=125_000)  # 1 Mbit
    assert decide(Standing(), Signals(0.0), THREE, link)[1].after == "large"
    slow = Signals(0.0, link_mbit_s=24.0)
    assert predict_ms(SMALL, slow, link) == pytest.approx(1000 / 24 + 2.4)
    assert decide(Standing(), slow, THREE, link)[1].after == "small"


def test_load_of_others_counts_until_the_slowdown_is_measured():
    busy = Signals(0.0, cpu_load=0.9)
    assert predict_ms(LARGE, busy, CALM) == pytest.approx(2 * predict_ms(
        LARGE, Signals(0.0), CALM
    ))  # fmt: skip
    measured = dataclasses.replace(busy, slowdown=1.0)
    assert predict_ms(LARGE, measured, CALM) == predict_ms(LARGE, Signals(0.0), CALM)


def test_a_variant_that_is_helped_may_carry_more():
    seen = Signals(0.0, arrival_rate=20.0)
    assert decide(Standing(), seen, THREE, CALM)[1].after == "middle"
    assert decide(Standing(), seen, THREE, CALM, {"large": 0.4})[1].after == "large"
    more = Signals(0.0, arrival_rate=50.0)  # it can do no more than 50 in any case
    assert decide(Standing(), more, THREE, CALM, {"large": 0.4})[1].after == "middle"


def test_batches_carry_a_load_that_single_examples_do_not():
    rate = Signals(0.0, arrival_rate=80.0)
    loose = dataclasses.replace(CALM, p95_ms=500.0)
    assert predict_ms(LARGE, rate, loose) == math.inf
    assert predict_ms(LARGE, rate, dataclasses.replace(loose, max_batch=8)) < 500


def test_without_room_for_two_the_old_one_stops_first():
    standing = Standing("small", since_s=-100.0)
    roomy = Signals(0.0, free_memory=200 * MB)
    assert decide(standing, roomy, THREE, CALM)[1].how is How.HOT
    tight = Signals(0.0, free_memory=145 * MB - SMALL.peak_bytes + 5 * MB)
    free = dataclasses.replace(tight, free_memory=140 * MB)
    assert decide(standing, free, THREE, CALM)[1].after == "large"
    narrow = dataclasses.replace(tight, free_memory=47 * MB)
    decision = decide(standing, narrow, THREE, CALM)[1]
    assert (decision.after, decision.how) == ("middle", How.HOT)
    cold = dataclasses.replace(tight, free_memory=39 * MB)
    decision = decide(standing, cold, THREE, CALM)[1]
    assert (decision.after, decision.how) == ("middle", How.COLD)


def test_memory_that_is_short_does_not_wait_for_a_dwell_time():
    standing = Standing("large", since_s=10.0)
    tight = dataclasses.replace(CALM, memory_bytes=50 * MB)
    _, decision = decide(standing, Signals(10.01), THREE, tight)
    assert decision.after == "middle"
    assert "large needs 120,000,000 bytes of 50,000,000" in decision.reason


def test_a_variant_of_unknown_accuracy_comes_last():
    unknown = dataclasses.replace(LARGE, name="unknown", accuracy=math.nan)
    assert decide(Standing(), Signals(0.0), (unknown, SMALL), CALM)[1].after == "small"


@given(profiles, signals, objectives)
def test_what_is_chosen_is_feasible_or_nothing_is(variants, seen, objective):
    standing, decision = decide(Standing(), seen, variants, objective)

    def feasible(v: Profile) -> bool:
        room = min(objective.memory_bytes or math.inf, seen.free_memory or math.inf)
        if seen.free_memory == 0:
            room = 0
        return v.peak_bytes <= room and predict_ms(v, seen, objective) <= objective.p95_ms

    chosen = next(v for v in variants if v.name == decision.after)
    good = [v for v in variants if feasible(v)]
    assert standing.current == decision.after
    assert decision.meets == bool(good)
    if good:
        assert chosen in good
    else:
        assert chosen == smallest(variants)
        assert "the smallest answers" in decision.reason


@given(profiles, st.lists(signals, min_size=2, max_size=15), objectives, st.floats(0, 5))
def test_the_memory_budget_is_kept_at_every_decision(variants, seen, objective, dwell):
    objective = dataclasses.replace(objective, dwell_s=dwell)
    standing = Standing()
    for moment in sorted(seen, key=lambda s: s.time_s):
        before = next((v for v in variants if v.name == standing.current), None)
        room = objective.memory_bytes or math.inf
        if moment.free_memory is not None:
            room = min(room, moment.free_memory + (before.peak_bytes if before else 0))
        standing, decision = decide(standing, moment, variants, objective)
        chosen = next(v for v in variants if v.name == decision.after)
        if any(v.peak_bytes <= room for v in variants) and decision.meets:
            assert chosen.peak_bytes <= room
        if chosen.peak_bytes > room:
            assert not decision.meets
            assert chosen == smallest(variants) or before is chosen


@given(profiles, st.lists(signals, min_size=2, max_size=15), objectives)
def test_no_switch_comes_before_its_dwell_time(variants, seen, objective):
    standing, last = Standing(), -math.inf
    ranks = {v.name: v.accuracy for v in variants}
    for moment in sorted(seen, key=lambda s: s.time_s):
        standing, decision = decide(standing, moment, variants, objective)
        if decision.before is None or decision.how is How.STAY:
            last = moment.time_s if decision.before is None else last
            continue
        short = not decision.predicted[decision.before].fits
        if not short:
            assert moment.time_s - last >= objective.down_dwell_s
            if (
                ranks[decision.after] > ranks[decision.before]
                and decision.predicted[decision.before].p95_ms <= objective.p95_ms
            ):
                assert moment.time_s - last >= objective.dwell_s
        last = moment.time_s


@settings(max_examples=60, deadline=None)
@given(profiles, signals, objectives, st.integers(0, 2**32 - 1))
def test_noise_within_the_margin_makes_no_flapping(variants, base, objective, seed):
    """Rate, queue and slowdown vary by up to a factor sqrt(1 + margin) to both sides."""
    assume(objective.margin >= 0.01)
    draw = random.Random(seed)
    reach = math.sqrt(1 + objective.margin) * (1 - 1e-9)
    objective = dataclasses.replace(objective, dwell_s=0.0, down_dwell_s=0.0)
    standing = Standing()
    entered: list[str] = []
    for step in range(60):
        factor = reach ** draw.uniform(-1, 1)
        moment = dataclasses.replace(
            base,
            time_s=float(step),
            arrival_rate=base.arrival_rate * factor,
            slowdown=(base.slowdown or 1.0) * reach ** draw.uniform(-1, 1),
            free_memory=None,
        )
        standing, decision = decide(standing, moment, variants, objective)
        if decision.how is not How.STAY:
            entered.append(decision.after)
    good = [name for name in entered if name != smallest(variants).name]
    assert len(good) == len(set(good))


@given(st.floats(0.01, 100), st.floats(0, 0.99), st.floats(0, 0.99))
def test_waiting_grows_with_the_load(service, a, b):
    low, high = sorted((a, b))
    assert 0 <= tail_wait_ms(low, service) <= tail_wait_ms(high, service)


@pytest.mark.parametrize("busy", [0.5, 0.7, 0.85])
def test_the_waiting_time_is_that_of_a_queue_that_is_played(busy):
    """Lindley's recursion with exponential gaps and service 1, and so without any formula."""
    draw = random.Random(3)
    wait, waits = 0.0, []
    for _ in range(100_000):
        wait = max(0.0, wait + 1.0 - draw.expovariate(busy))
        waits.append(wait)
    played = sorted(waits)[int(0.95 * len(waits))]
    assert tail_wait_ms(busy, 1.0) == pytest.approx(played, rel=0.15)


def test_profiles_take_the_latency_of_the_nearest_number_of_threads():
    rows = tuple(
        portfolio.Latency(batch, threads, 10.0 * batch / threads, 12.0 * batch / threads, 5)
        for threads in (1, 2)
        for batch in (8, 1)
    )
    variant = portfolio.Variant("a", 0.9, 1, 1, 100, 50, rows)
    found = profile_of(variant, 4)
    assert found.latency == (PassTime(1, 5.0, 6.0), PassTime(8, 40.0, 48.0))
    assert found.peak_bytes == 100  # never less than what the weights take
    with pytest.raises(ModelError, match="variant a of the portfolio has no measured latency"):
        profile_of(dataclasses.replace(variant, latencies=()), 1)
