import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.training import schedule
from fedsys.training.schedule import bounded, operations, pipelined, sequential

micro_batches = st.integers(1, 40)
depths = st.integers(1, 12)
kinds = st.sampled_from(["sequential", "pipelined", "bounded"])


def listed(kind, pieces, depth, tail):
    return list(operations(kind, pieces, depth, tail=tail))


@given(kinds, micro_batches, depths, st.booleans())
def test_each_operation_is_done_once(kind, pieces, depth, tail):
    names = ("forward", "tail", "backward") if tail else ("forward", "backward")
    expected = {(name, piece) for name in names for piece in range(pieces)}
    done = listed(kind, pieces, depth, tail)
    assert len(done) == len(expected)
    assert set(done) == expected


@given(kinds, micro_batches, depths, st.booleans())
def test_every_kind_of_operation_goes_in_the_order_of_the_pieces(kind, pieces, depth, tail):
    done = listed(kind, pieces, depth, tail)
    for name in ("forward", "tail", "backward") if tail else ("forward", "backward"):
        assert [piece for operation, piece in done if operation == name] == list(range(pieces))


@given(kinds, micro_batches, depths, st.booleans())
def test_a_piece_goes_forward_then_through_the_tail_then_backward(kind, pieces, depth, tail):
    at = {operation: index for index, operation in enumerate(listed(kind, pieces, depth, tail))}
    for piece in range(pieces):
        middle = [at["tail", piece]] if tail else []
        places = [at["forward", piece], *middle, at["backward", piece]]
        assert places == sorted(places)


@given(micro_batches, depths, st.booleans())
def test_no_more_activations_are_held_than_the_depth_allows(pieces, depth, tail):
    held = highest = 0
    for name, _ in bounded(pieces, depth=depth, tail=tail):
        held += {"forward": 1, "tail": 0, "backward": -1}[name]
        highest = max(highest, held)
    assert highest == min(depth, pieces)
    assert held == 0


@given(micro_batches, st.booleans())
def test_the_extremes_of_the_depth_are_the_other_two_schedules(pieces, tail):
    assert list(bounded(pieces, depth=1, tail=tail)) == list(sequential(pieces, tail=tail))
    assert list(bounded(pieces, depth=pieces, tail=tail)) == list(pipelined(pieces, tail=tail))


def test_the_staircase_of_a_pipeline_with_a_private_tail():
    assert list(pipelined(3, tail=True)) == [
        ("forward", 0), ("forward", 1), ("forward", 2),
        ("tail", 0), ("tail", 1), ("tail", 2),
        ("backward", 0), ("backward", 1), ("backward", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sequential", "pipelined", "bounded"])
def test_one_piece_is_the_plain_loop_under_every_schedule(kind):
    assert listed(kind, 1, 3, False) == [("forward", 0), ("backward", 0)]


def test_the_schedules_in_the_description_are_as_printed():
    outcome = doctest.testmod(schedule)
    assert outcome.attempted and not outcome.failed
