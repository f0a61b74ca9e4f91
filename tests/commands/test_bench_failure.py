"""What the benchmark of failures says of events, oracles and soaks, without running any."""

import time

import pytest

from fedsys.commands.bench import failure, failure_oracle, failure_soak
from fedsys.commands.bench.failure_chain import ConstantLoad, RequestLedger
from fedsys.commands.bench.failure_event import Scene
from fedsys.commands.bench.failure_figures import figures_of
from fedsys.commands.bench.failure_models import _near
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective
from tests.serving.chains import images, model
from tests.serving.recovery.failing import continuing
from tests.waiting import until

FULL = RecoveryCandidate("repartition", "5/9", latency_ms=20.0, accuracy=0.92, downtime_ms=300.0)
EARLY = RecoveryCandidate("exit", "exit:5@5/6", latency_ms=8.0, accuracy=0.80, downtime_ms=4.0)
SKIP = RecoveryCandidate("skip", "skip:5-9@5/5", latency_ms=14.0, accuracy=0.90, downtime_ms=5.0)


def slower(candidate, factor):
    return RecoveryCandidate(
        candidate.technique, candidate.path, candidate.latency_ms * factor, candidate.accuracy,
        candidate.downtime_ms,
    )  # fmt: skip


def test_an_oracle_that_measures_what_was_expected_always_agrees():
    found = failure_oracle.judge((FULL, EARLY, SKIP), (FULL, EARLY, SKIP), RecoveryObjective(), 50)
    assert found.agrees and found.regret == 0.0
    assert (found.cells, found.regrets, found.misses) == (50, (), (0.0, 0.0, 0.0))


def test_regret_is_what_the_choice_lacks_in_score_and_misses_of_thresholds():
    by_time = RecoveryObjective(weights=failure_oracle.WeightsConfig(0.0, 1.0, 0.0))
    truth = (slower(FULL, 0.2), EARLY, SKIP)  # 4 ms: the fastest
    found = failure_oracle.judge((FULL, EARLY, SKIP), truth, by_time, 0)
    assert (found.best, found.agrees) == (FULL.path, False)
    assert found.regret == pytest.approx((8 - 4) / (14 - 4))
    assert found.misses == (pytest.approx(4.0), 0.0, 0.0)
    bound = RecoveryObjective(latency_ms=10.0, weights=by_time.weights)
    late = (FULL, slower(EARLY, 2.0), slower(SKIP, 0.5))
    missed = failure_oracle.judge((FULL, EARLY, SKIP), late, bound, 0)
    assert missed.best == SKIP.path
    assert missed.regret > 0.6  # 16 ms miss 10 ms by 0.6


def test_the_grid_is_the_same_for_the_same_candidates():
    first, again = (list(failure_oracle.grid_of((FULL, EARLY), 30)) for _ in range(2))
    assert first == again
    assert len({(o.weights, o.latency_ms, o.accuracy) for o in first}) > 20


def test_figures_of_events_are_medians_by_fault_and_count_what_was_lost():
    kill = {
        "fault": "kill", "technique": "skip", "gap_ms": 100.0, "detect_ms": 40.0, "exit_ms": 30.0,
        "decide_ms": 0.2, "apply_ms": 1.0, "answer_ms": 50.0, "silence_ms": 200.0, "lost": 0,
        "twice": 0, "agrees": True, "regret": 0.0, "predicted_ms": 11.0, "measured_ms": 10.0,
        "replayed": 2,
    }  # fmt: skip
    stop = {"fault": "pause", "technique": "none", "silence_ms": 9.0, "lost": 1, "twice": 0}
    about = {
        "chain": "x", "events": 3, "left_out": 4, "decisions": 10, "decide_ms_median": 0.1,
        "decide_ms_p99": 0.4, "grid": 10, "grid_agreement": 0.9, "grid_regret_max": 0.02,
        "latency_error": 0.03, "estimates": {"build": {"mean": 0.1, "samples": 9}},
    }  # fmt: skip
    found = figures_of([kill, {**kill, "gap_ms": 140.0}, stop], [about])
    assert found["gap_ms_median"] == 120.0
    assert found["seen_ms_median"] == 10.0
    assert found["prediction_error_mean"] == pytest.approx(0.1)
    assert (found["lost"], found["left_out"], found["goal_requests"]) == (1, 4, False)
    assert found["goal_decision"] and found["goal_gap"]
    assert [row["fault"] for row in found["faults"]] == ["kill", "pause"]
    assert found["estimates"] == [{"chain": "x", "of": "build", "mean": 0.1, "samples": 9}]
    assert failure.chart(found).labels == ["kill", "pause"]
    nothing = figures_of([], [])
    assert nothing["gap_ms_median"] is None and not nothing["goal_gap"]
    assert not nothing["goal_requests"]
    unanswered = figures_of([kill, {**kill, "gap_ms": None}], [about])
    assert unanswered["gap_ms_median"] == 100.0 and not unanswered["goal_gap"]


def test_a_chain_for_which_no_time_was_left_is_counted_and_ends_nothing():
    """With little of bench.minutes left nothing happened on a chain, and its decisions, of which
    there were none, ended the benchmark with all figures of the chains before it."""
    with continuing(model(), (2,), names=("device", "edge")) as (engine, _, continuer):
        about = Scene(engine, continuer, [], {}).about()
    found = figures_of([], [{"chain": "x", "events": 0, "left_out": 30, **about}])
    assert (found["decisions"], found["decide_ms_median"], found["left_out"]) == (0, None, 30)
    assert not found["goal_decision"]


def test_a_request_that_was_sent_on_ends_the_gap_though_the_next_one_is_far():
    """The gap went to the first answer after the failover had been told: what an exit on the first
    host had answered before counted for nothing, and 80 ms were 270, until the next request."""
    ledger = RequestLedger(5, {0: 9.9, 1: 10.08, 2: 10.27, 3: 10.05, 4: 9.8}, around={1, 2, 4})
    assert ledger.first_around(10.0) == 10.08  # 3 was past the lost host already, 4 is of before
    assert ledger.first_around(10.3) is None


def test_the_load_tells_what_other_routes_answered():
    with continuing(model(), (2,), names=("device", "edge")) as (engine, fleet, continuer):
        assert until(lambda: engine.switcher.spare and continuer.at_rest)
        load = ConstantLoad(engine, images(4), 50.0)
        assert until(lambda: len(load.ledger.answers) > 3)
        assert not load.ledger.around
        killed = time.monotonic()
        fleet.kill("edge")
        assert until(lambda: load.ledger.first_around(killed) is not None)
        ledger = load.close()
        assert ledger.failed == {} and ledger.twice == 0
        assert len(ledger.answers) == ledger.issued


def test_cuts_are_near_equal_shares_where_they_are_possible():
    assert _near([5.7, 11.3], range(1, 17)) == (6, 11)
    assert _near([4.5, 9.0, 13.5], range(1, 18)) == (4, 9, 13)
    assert _near([1.2, 1.4, 1.6], [1, 2, 3]) == (1, 2, 3)


def test_a_soak_compares_what_came_early_with_what_came_late():
    samples = [
        {"minute": m, "entry_mb": 100.0 + (m > 3), "hosts_mb": 50.0, "descriptors": 9, "threads": 5}
        for m in range(12)
    ]
    found = failure_soak._growth(samples)
    assert (found["entry_mb_early"], found["entry_mb_late"]) == (100.0, 101.0)
    assert found["descriptors_early"] == found["descriptors_late"] == 9
    assert failure.chart({"samples": samples}).lines
