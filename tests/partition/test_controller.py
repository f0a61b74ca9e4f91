import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.partition.conditions import ChainConditions, Observer, under
from fedsys.partition.controller import MoveRules, Sight, StandingCuts, Verdict, decide_move
from fedsys.partition.evaluation import evaluate
from fedsys.partition.pipeline import Passed
from fedsys.partition.planner import solve
from fedsys.partition.problem import Constraints, Partition
from fedsys.planning.costs import FRAME_BYTES
from fedsys.transport.network import Network
from tests.partition.problems import problems
from tests.partition.test_planner import small

RULES = MoveRules(margin=0.1, dwell_s=5.0, shun_s=60.0, horizon_s=30.0)
ON_DEVICE = Partition((2,), ("fp32",))
FAST = dataclasses.replace(small(), networks=(Network(8e6, 8e6, 0.001),))


def sight(problem, time_s=100.0, **more):
    return Sight(time_s, problem, **{"requests_per_s": 1.0, **more})


def test_cuts_move_when_the_network_becomes_fast_and_not_before():
    place, decision = decide_move(StandingCuts(ON_DEVICE), sight(small()), RULES)
    assert decision.verdict is Verdict.STAY and decision.reason == "the best already"
    place, decision = decide_move(place, sight(FAST), RULES)
    assert decision.verdict is Verdict.MOVE and place.partition.cuts == (0,)
    assert decision.best_s < decision.now_s and place.before == ON_DEVICE


def test_a_gain_within_the_margin_or_below_its_cost_moves_nothing():
    _, decision = decide_move(StandingCuts(ON_DEVICE), sight(FAST), MoveRules(margin=0.95))
    assert decision.verdict is Verdict.STAY and "within the margin" in decision.reason
    _, decision = decide_move(StandingCuts(ON_DEVICE), sight(FAST, move_s=1e4), RULES)
    assert decision.verdict is Verdict.STAY and "cost" in decision.reason


def test_a_move_that_does_not_bear_out_is_undone_and_left_alone():
    place, _ = decide_move(StandingCuts(ON_DEVICE), sight(FAST, took_s=2.0), RULES)
    place, decision = decide_move(place, sight(FAST, 104.0, took_s=9.0), RULES)
    assert decision.verdict is Verdict.STAY  # too soon after the move
    place, decision = decide_move(place, sight(FAST, 106.0, took_s=3.0), RULES)
    assert decision.verdict is Verdict.BACK and place.partition == ON_DEVICE
    place, decision = decide_move(place, sight(FAST, 120.0, took_s=2.0), RULES)
    assert decision.verdict is Verdict.STAY  # shunned
    _, decision = decide_move(place, sight(FAST, 170.0, took_s=2.0), RULES)
    assert decision.verdict is Verdict.MOVE


def test_a_move_that_bears_out_stays():
    place, _ = decide_move(StandingCuts(ON_DEVICE), sight(FAST, took_s=2.0), RULES)
    place, decision = decide_move(place, sight(FAST, 106.0, took_s=0.3), RULES)
    assert decision.verdict is Verdict.STAY and place.before is None


@settings(max_examples=25, deadline=None)
@given(problems(most_units=4, most_hosts=3), st.lists(st.floats(0.97, 1.03), min_size=30))
def test_noise_within_the_margin_does_not_make_cuts_flap(problem, noise):
    problem = dataclasses.replace(problem, constraints=Constraints(), requests_per_s=0.0)
    start = solve(problem)
    if start is None or not math.isfinite(evaluate(problem, start).latency_s):
        return
    place, moves, count = StandingCuts(start), 0, len(problem.hosts)
    for index, factor in enumerate(noise):
        conditions = ChainConditions((factor,) * count, (0.0,) * count, (None,) * (count - 1))
        seen = sight(under(problem, conditions), 1000.0 + 10 * index)
        place, decision = decide_move(place, seen, RULES)
        moves += decision.verdict is not Verdict.STAY
    assert moves == 0


def passed(link_s, device_s, server_s):
    parts = [
        {
            "host": "device",
            "queue_s": 0.01,
            "compute_s": device_s,
            "link_s": link_s,
            "bytes": 10**4,
        },
        {"host": "server", "queue_s": 0.02, "compute_s": server_s},
    ]
    return Passed(None, parts, 0.0, 100)


def test_conditions_are_learned_from_what_requests_tell():
    problem = FAST
    observer = Observer(problem)
    back = 2 * 0.001 + 8 * (40 + FRAME_BYTES) / 8e6
    for _ in range(5):
        observer.seen(Partition((1,), ("fp32",)), passed(back + 8e4 / 2e6, 3.0, 0.2), 1, 4.0)
    found = observer.conditions()
    assert found.slower == pytest.approx((3.0, 2.0)) and found.waiting_s == (0.01, 0.02)
    assert found.up_bits_s[0] == pytest.approx(2e6)
    assert observer.took_s == 4.0
    now = under(problem, found)
    assert now.path(0, 1).up_bits_s == pytest.approx(2e6)
    assert now.hosts[0].costs.seconds(1)[0] == pytest.approx(6.0)
    observer.forget()
    assert observer.took_s is None


def test_what_was_not_used_is_as_expected():
    observer = Observer(FAST)
    nothing = (None, None)
    assert observer.conditions() == ChainConditions(
        (1.0, 1.0), (0.0, 0.0), (None,), nothing, nothing
    )
    assert under(FAST, observer.conditions()).networks == FAST.networks


def test_a_host_that_takes_no_part_is_known_by_what_it_says():
    """A host that was slow once stayed slow for ever: nothing was sent that would have told."""
    observer = Observer(FAST)
    observer.seen(Partition((1,), ("fp32",)), passed(1.0, 3.0, 0.8), 1, 4.0)
    observer.noted(1, 0.5, 1e9)
    assert observer.conditions().slower[1] == pytest.approx(8.0)  # requests told it just now
    alone = Passed(None, [{"host": "device", "queue_s": 0.0, "compute_s": 1.0}], 0.0, 100)
    for _ in range(16):
        observer.seen(Partition((2,), ("fp32",)), alone, 1, 1.0)
    found = observer.conditions()
    assert found.slower[1] == 2.0 and found.others[1] == 0.5  # half of its processors are left
    observer.noted(1, 1.0, 1e9)
    assert observer.conditions().slower[1] == 10.0


def test_cuts_do_not_move_to_a_host_whose_memory_others_hold():
    observer = Observer(FAST)
    observer.noted(1, 0.0, 0.0)
    now = under(FAST, observer.conditions())
    assert now.hosts[1].memory_bytes == 0
    there = decide_move(StandingCuts(ON_DEVICE), sight(FAST), RULES)[1]
    here = decide_move(StandingCuts(ON_DEVICE), sight(now), RULES)[1]
    assert (there.verdict, here.verdict) == (Verdict.MOVE, Verdict.STAY)
    assert here.reason == "the best already"
