"""What is believed of machines whose speed depends on what is planned for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.planning.measured_speeds import LEAST, MOST, believed

FACTORS = st.floats(LEAST, MOST)


@pytest.mark.parametrize(
    ("before", "went", "now", "expected"),
    [
        (1.0, 0, 9.0, (9.0, 1)),  # what was never measured is believed whole
        (1.0, 0, 1.1, (1.0, 0)),  # within the drift nothing changes
        (9.0, 1, 12.0, (12.0, 1)),  # slower again: whole
        (9.0, 1, 4.0, (6.0, -1)),  # back: half of the way
        (6.0, -1, 4.0, (4.0, -1)),  # and further: whole
        (9.0, 1, 10.0, (9.0, 1)),
        (1.0, 0, 1e9, (MOST, 1)),
        (1.0, 0, 0.0, (LEAST, -1)),
    ],
)
def test_what_goes_on_is_believed_whole_and_what_turns_back_half_of_the_way(
    before, went, now, expected
):
    assert believed(before, went, now, 0.2) == pytest.approx(expected)


@given(FACTORS, st.sampled_from([-1, 0, 1]), FACTORS)
def test_a_machine_that_stays_as_it_is_measured_is_believed_after_two_rounds(before, went, now):
    once, way = believed(before, went, now, 0.0)
    assert min(before, now) <= once * (1 + 1e-12) and once <= max(before, now) * (1 + 1e-12)
    assert believed(once, way, now, 0.0)[0] == pytest.approx(now)


@given(st.floats(1.0, 100.0), st.floats(1.5, 100.0))
def test_two_measurements_that_alternate_are_believed_with_the_cube_root_of_their_ratio(
    fast, times
):
    """With h the higher belief and l the lower one: h² = l slow and l² = h fast."""
    slow, belief, went = fast * times, 1.0, 0
    seen = []
    for now in [slow, fast] * 30:
        belief, went = believed(belief, went, now, 0.0)
        seen.append(belief)
    assert seen[-2] / seen[-1] == pytest.approx(times ** (1 / 3))
