"""Moves on the timeline and the clock: what they add to a round, by what their parts are."""

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import Crossing, MachineCosts, frame_bytes
from fedsys.planning.handing_over import (
    STATE_CHANGED,
    WEIGHTS_CHANGED,
    mirrored_bytes,
    moving_job,
    price,
    price_of,
)
from fedsys.planning.jobs import Exchange, Job, LegChange, Turn
from fedsys.planning.moves import Move
from fedsys.planning.timeline import play
from fedsys.planning.virtual_clock import Ways, virtual_round
from fedsys.planning.workload import Device, EdgeLink, Workload, job_of
from fedsys.transport.network import Network

ONE = MachineCosts("m", (1,), ((0.1, 0.2, 0.3),), ((0.2, 0.4, 0.6),), (0.01, 0.02, 0.03))
CROSSINGS = tuple(Crossing(n, 1) for n in (300, 100, 10))
SLOW = Network(1e6, 1e6, 0.01)


def load_of(*examples, edges=(ONE, ONE), **given):
    devices = [Device(str(i), ONE, SLOW, n) for i, n in enumerate(examples)]
    given = {"between": EdgeLink(8e3, 0.05), "moments": 1.0, **given}
    return Workload(CROSSINGS, (40, 80, 8), (1, 2), 4, tuple(devices), edges, (1, 2), **given)


def round_of(load, *moves, anew=False, choice=None, **more):
    choices = [choice or Assignment(1, micro_batches=2)] * len(load.devices)
    by_device = {}
    for move in moves:
        by_device.setdefault(move.client, []).append(move)
    ways = Ways({k: tuple(own) for k, own in by_device.items()}, anew=anew)
    return virtual_round(load, choices, ways=ways, **more)


# --------------------------------------------------------------------------------------------------
# What a move costs


def test_a_session_is_its_weights_as_a_difference_and_its_state_whole():
    paid = price(1000, 500, EdgeLink(8000, 0.1), 0.02)
    assert paid.bytes == round(WEIGHTS_CHANGED * 1000 + 500) and paid.precopied_bytes == 0
    assert paid.parts_s["transfer"] == pytest.approx((WEIGHTS_CHANGED * 1000 + 500) / 1000 + 0.2)
    assert paid.parts_s["reconnect"] == pytest.approx(0.08)
    assert set(paid.parts_s) == {"freeze", "encode", "transfer", "restore", "reconnect"}


def test_what_goes_ahead_leaves_a_difference_for_the_pause():
    paid = price(1000, 500, EdgeLink(8000, 0.1), ahead=True)
    assert paid.bytes == round(WEIGHTS_CHANGED * 1000 + STATE_CHANGED * 500)
    assert paid.precopied_bytes == round(WEIGHTS_CHANGED * 1000 + 500)
    assert paid.ahead_s == pytest.approx(paid.precopied_bytes / 1000 + 0.1)


def test_with_a_shadow_only_what_was_not_mirrored_moves_in_the_pause():
    """Where a mini-batch is larger than the difference, there is no shadow."""
    still = price(1000, 500, EdgeLink(8000, 0.1), ahead=True)
    paid = price(1000, 500, EdgeLink(8000, 0.1), ahead=True, mirrored=300.0)
    assert (paid.bytes, paid.precopied_bytes) == (300, still.precopied_bytes)
    assert paid.parts_s["transfer"] == pytest.approx(300 / 1000 + 0.2)
    assert price(1000, 500, EdgeLink(8000, 0.1), ahead=True, mirrored=3000.0) == still
    load = dataclasses.replace(load_of(16, mirror=True), state_bytes=(40, 80_000, 8))
    up = frame_bytes(CROSSINGS[0], 4, "fp32", labels=True)
    assert mirrored_bytes(load, Assignment(1)) == up and mirrored_bytes(load, Assignment(0)) == 0
    move = Move(0, 1, 0.5, 1, "foreseen", notice=0.25)
    assert price_of(load, load.devices[0], Assignment(1), move).bytes == up


def test_whoever_begins_anew_takes_nothing_along():
    paid = price(1000, 500, EdgeLink(8000, 0.1), 0.02, anew=True)
    assert paid.bytes == 0 and "transfer" not in paid.parts_s


# --------------------------------------------------------------------------------------------------
# A round


def test_a_move_to_a_like_edge_adds_its_pause_to_a_round():
    load = load_of(16)
    still, moved = round_of(load), round_of(load, Move(0, 1, 0.5, 1))
    (played,) = moved.timeline.moves
    weights = 88
    bits = 8 * (WEIGHTS_CHANGED * weights + weights)
    assert played.pause_s == pytest.approx(bits / 8e3 + 0.1 + 0.04, abs=1e-3)
    assert (played.iteration, played.source, played.target) == (2, 0, 1)
    waited = moved.seconds - still.seconds - played.pause_s
    # It stands still once its session has stepped, which else would be hidden
    assert -1e-9 <= waited <= ONE.update_s[1] + ONE.update_s[2] + 1e-9
    assert {e.resource for e in moved.timeline.events if e.kind == "edge"} == {"edge:0", "edge:1"}
    assert all(
        e.end_s <= played.start_s or e.start_s >= played.end_s for e in moved.timeline.events
    )


def test_a_round_that_begins_anew_repeats_what_was_done():
    load = load_of(16, exchange=False)
    still = round_of(load).seconds
    for at, done in ((0.0, 0), (0.5, 2), (1.0, 4)):
        played = round_of(load, Move(0, 1, at, 1), anew=True)
        (move,) = played.timeline.moves
        assert move.anew and move.iteration == done
        assert played.seconds == pytest.approx(still * (1 + done / 4) + move.pause_s, abs=0.07)


def test_a_move_that_was_foreseen_waits_for_what_is_left_of_what_goes_ahead():
    load = load_of(16, between=EdgeLink(8e3, 0.0))
    soon = round_of(load, Move(0, 1, 0.75, 1, "foreseen", notice=0.25)).timeline.moves[0]
    at_once = round_of(load, Move(0, 1, 0.75, 1, "foreseen", notice=0.0)).timeline.moves[0]
    assert soon.bytes < at_once.bytes and soon.pause_s < at_once.pause_s
    crawling = dataclasses.replace(load, between=EdgeLink(80.0, 0.0))
    late = round_of(crawling, Move(0, 1, 0.75, 1, "foreseen", notice=0.25)).timeline.moves[0]
    assert late.pause_s > 8 * late.bytes / 80 + 1  # the copy itself had not arrived


def test_a_slower_edge_and_another_cut_count_from_the_move_on():
    load = load_of(16, edges=(ONE, ONE.slower(3.0)))
    half, most = (round_of(load, Move(0, 1, at, 1)).seconds for at in (0.5, 0.25))
    slow = round_of(load, choice=Assignment(1, 1, micro_batches=2)).seconds
    assert round_of(load).seconds < half < most < slow
    deeper = round_of(load, Move(0, 1, 0.0, 0, cut=2))
    assert deeper.seen[0].compute_s > round_of(load).seen[0].compute_s


def test_out_of_reach_is_a_pause_without_bytes():
    load = load_of(16)
    played = round_of(load, Move(0, 1, 0.5, 0, away_s=7.0))
    (gap,) = played.timeline.moves
    assert (gap.pause_s, gap.bytes, gap.source, gap.target) == (pytest.approx(7.0), 0, 0, 0)
    ways = Ways(waits_s={0: 5.0})
    waits = virtual_round(load, [Assignment(1, micro_batches=2)], ways=ways)
    assert waits.seconds == pytest.approx(round_of(load).seconds + 5.0)
    assert played.paused_s == (pytest.approx(7.0),) and waits.paused_s == (5.0,)


def test_what_is_measured_of_an_iteration_leaves_pauses_out():
    load = load_of(40)
    still, moved = (
        round_of(load, *moves).seen[0] for moves in ((), (Move(0, 1, 0.5, 1, away_s=50.0),))
    )
    assert moved.iteration_s == pytest.approx(still.iteration_s, rel=0.02)
    assert (moved.compute_s, moved.up_bit_s) == pytest.approx((still.compute_s, still.up_bit_s))


def test_of_a_long_round_a_part_is_played_with_its_moves_and_whole_pauses():
    load = load_of(800)
    moves = Move(0, 1, 0.3, 1), Move(0, 1, 0.6, 0)
    for anew in (False, True):
        whole, part = (round_of(load, *moves, anew=anew, most=n) for n in (10**6, 400))
        assert len(part.timeline.events) < len(whole.timeline.events)
        assert part.seconds == pytest.approx(whole.seconds, rel=0.05)
        assert part.paused_s == pytest.approx(whole.paused_s)


def test_whole_models_have_no_session_to_take_along():
    load = load_of(16)
    job = job_of(load, load.devices[0], Assignment(3))
    assert moving_job(load, load.devices[0], Assignment(3), [Move(0, 1, 0.5, 1)], job) is job


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(0, 1)), max_size=6),
    st.booleans(), st.integers(1, 2), st.sampled_from(["sequential", "pipelined"]),
)  # fmt: skip
def test_every_step_is_done_once_or_repeated_as_it_is_said(ways, anew, workers, schedule):
    edge = dataclasses.replace(ONE, workers=workers)
    load = load_of(16, 9, 5, edges=(edge, edge), schedule=schedule)
    moves = [Move(client, 1, at, target) for client, at, target in sorted(ways)]
    played = round_of(load, *moves, anew=anew)
    for client, device in enumerate(load.devices):
        own = [m for m in played.timeline.moves if m.job == client]
        assert len(own) == sum(move.client == client for move in moves)
        repeated = sum(move.iteration for move in own if move.anew)
        ups = [e for e in played.timeline.events if e.resource == f"up:{device.name}"]
        first = sum(e.name == "up" and e.piece == 0 for e in ups)
        assert first == load.iterations(device) + repeated
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(own))


def test_jobs_without_moves_are_played_as_ever_and_legs_count_their_iterations():
    turn = Turn("forward", 0, 1.0, Exchange(1.0, 1.0, 1.0))
    job = Job("a", (turn, Turn("backward", 0, 1.0)), iterations=5)
    assert job.legs() == [(job, 0, 5)] and play([job]).moves == ()
    moving = dataclasses.replace(
        job, moves=(LegChange(2, 1.0, job), LegChange(4, 1.0, job, anew=True))
    )
    assert [(start, stop) for _, start, stop in moving.legs()] == [(0, 2), (2, 4), (0, 5)]
    assert play([moving]).seconds == pytest.approx(play([job]).seconds * 9 / 5 + 2.0)
