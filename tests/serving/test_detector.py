"""Who counts as lost, and when."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.serving.recovery.detector import (
    DetectorRules,
    Health,
    Heart,
    answered,
    deadline_s,
    ended,
    look,
    sent,
)

RULES = DetectorRules()


def play(rules, trips, heart=None, ends_s=0.0):
    """Send heartbeats whose answers take `trips` (None: no answer); return all states in order."""
    heart, states = heart or Heart(), []
    begin = heart.looked_s or 0.0
    tick, until = rules.interval_s / 4, begin + rules.interval_s * len(trips) + ends_s
    due, step = [], 0
    while begin + step * tick < until:
        now = begin + step * tick
        for _, number, trip in sorted(entry for entry in due if entry[0] <= now):
            heart = answered(heart, number, trip)
        due = [entry for entry in due if entry[0] > now]
        heart = look(heart, now, rules)
        if step % 4 == 0 and step // 4 < len(trips):
            number = step // 4
            heart = sent(heart, number)
            if trips[number] is not None:
                due.append((now + trips[number], number, trips[number]))
        states.append(heart)
        step += 1
    return states


@settings(max_examples=20)
@given(
    usual=st.floats(1e-4, 2.0),
    jitter=st.lists(st.floats(0.8, 1.2), min_size=20, max_size=30),
    slow=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_answers_at_three_times_the_usual_time_are_no_failure(usual, jitter, slow):
    quiet = [usual * j for j in jitter]
    later = [usual * (3 if s else 1) for s in slow]
    rules = DetectorRules(interval_s=max(0.05, usual))  # each is answered before many others
    states = play(rules, quiet + later, ends_s=3 * usual)
    assert all(heart.health.usable for heart in states)


@settings(max_examples=20)
@given(usual=st.floats(1e-4, 0.5), rules=st.sampled_from([RULES, DetectorRules(0.02, 0.02)]))
def test_silence_is_a_verdict_within_two_deadlines_and_suspicion_comes_first(usual, rules):
    rules = replace(rules, interval_s=max(rules.interval_s, usual / 4))
    heart = play(rules, [usual] * 30, ends_s=2 * usual)[-1]
    bound = deadline_s(heart, rules)
    states = play(rules, [None] * int(4 + (3 * bound) / rules.interval_s), heart)
    seen = [s.health for s in states]
    first, verdict = seen.index(Health.SUSPECTED), seen.index(Health.LOST)
    assert first < verdict
    silence = states[verdict].watched_s - states[0].watched_s
    assert bound <= silence <= 2 * bound + 2 * rules.interval_s


def test_however_unsteady_answers_were_silence_is_noticed():
    """A host that was stopped for four seconds was never missed where answers took 20 to 300 ms."""
    heart = play(RULES, [0.3, 0.02] * 30, ends_s=1.0)[-1]
    assert RULES.patience * (heart.mean_s + 4 * heart.spread_s) > 2 * RULES.ceiling_s
    states = play(RULES, [None] * 60, heart)
    lost = next(s for s in states if s.health is Health.LOST)
    assert lost.watched_s - states[0].watched_s <= 2 * RULES.ceiling_s + 2 * RULES.interval_s


def test_a_connection_that_ends_is_a_verdict_at_once():
    heart = ended(play(RULES, [0.001] * 5)[-1], "connection reset")
    assert (heart.health, heart.why) == (Health.LOST, "connection reset")
    assert ended(heart, "again") == heart


def test_one_answer_ends_a_suspicion():
    heart = play(RULES, [0.001] * 5 + [None, 0.12, 0.001, 0.001])
    assert [s.health for s in heart].count(Health.SUSPECTED) > 0
    assert heart[-1].health is Health.ALIVE


def test_who_was_paused_itself_accuses_nobody():
    """A process that was stopped for a second believed all its hosts to be lost."""
    heart = sent(play(RULES, [0.001] * 5)[-1], 99)
    assert look(heart, heart.looked_s + 60.0, RULES).health is Health.ALIVE


def test_a_host_that_answers_again_is_used_after_its_dwell_time():
    rules = DetectorRules(dwell_s=0.5)
    heart = play(rules, [0.001] * 20, ended(Heart(looked_s=0.0), "gone"))
    health = [s.health for s in heart]
    assert health[0] is Health.LOST and health[-1] is Health.ALIVE
    began, used = health.index(Health.RETURNING), health.index(Health.ALIVE)
    assert heart[used].watched_s - heart[began].since_s >= 0.5


def test_a_host_that_falls_silent_while_it_returns_is_lost_without_suspicion():
    states = play(RULES, [0.001] * 5 + [None] * 60, ended(Heart(looked_s=0.0), "gone"))
    seen = [s.health for s in states]
    assert Health.RETURNING in seen and Health.SUSPECTED not in seen
    assert seen[-1] is Health.LOST
