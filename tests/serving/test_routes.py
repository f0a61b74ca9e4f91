"""Ways around hosts that are lost, as values."""

import pytest

from fedsys.partition.problem import RAW, Partition
from fedsys.serving.routes import (
    Route,
    around_by_exit,
    around_by_skip,
    common_units,
    route_of,
    run_gone,
)

HOME = Partition((3, 6), (RAW, RAW))


@pytest.mark.parametrize("label", ["3/6", "3/6:int8", "exit:5@3/6", "skip:4-7@4/4", "s-0.9@0/0"])
def test_a_label_stands_for_one_route(label):
    assert route_of(label).label == label


def test_a_route_says_which_technique_it_is():
    ways = {"": "repartition", "exit:5": "exit", "skip:4-7": "skip", "s-0.9": "replica"}
    assert {way: Route(HOME, way).technique for way in ways} == ways


@pytest.mark.parametrize(
    ("boundary", "gone", "cuts"),
    [
        (3, {1}, (4, 4)),  # the first host has all of its units, and the exit
        (2, {1}, (3, 3)),
        (6, {2}, (3, 7)),
        (3, {1, 2}, (4, 4)),
        (4, {1}, None),  # its fourth unit is lost
        (3, {0}, None),
    ],
)
def test_an_exit_stands_on_the_last_host_before_those_that_are_lost(boundary, gone, cuts):
    found = around_by_exit(HOME, boundary, gone)
    assert (found and found.cuts) == cuts


def test_units_of_lost_hosts_are_left_out_together():
    assert run_gone(HOME, 9, {1}) == (3, 6)
    assert run_gone(HOME, 9, {1, 2}) == (3, 9)
    assert run_gone(HOME, 9, {0, 2}) is None
    assert around_by_skip(HOME, (3, 6), 2).cuts == (3, 3)  # the adapters are on the host behind
    four = Partition((2, 4, 6), (RAW,) * 3)
    assert around_by_skip(four, (2, 4), 1).cuts == (2, 2, 5)


def test_a_tensor_is_one_of_another_way_as_far_as_both_have_the_same_units():
    assert [common_units(w, 9) for w in ("", "exit:5", "skip:4-7", "small")] == [9, 5, 4, 0]
