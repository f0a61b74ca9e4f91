import itertools
import math

import pytest

from fedsys.errors import DataError
from fedsys.partition.study import (
    FACTORS,
    Sample,
    Study,
    best_cuts,
    effects,
    gains,
    read_published,
    sensitivity,
)


def study_of(seconds, levels=3, cuts=(1, 2), repeats=2):
    """A full factorial of the seconds of a condition, a cut and a repeat."""
    return Study.of(
        Sample(condition, cut, repeat, seconds(condition, cut, repeat))
        for condition in itertools.product(range(levels), repeat=len(FACTORS))
        for cut in cuts
        for repeat in range(repeats)
    )


def test_effects_are_those_of_a_closed_form():
    """ln t = a·network + b·network·edge_cpu, levels −1, 0, 1: the shares are 2a²/3 to (2b/3)²."""
    a, b = 0.3, 0.2

    def seconds(condition, cut, repeat):
        network, edge = condition[0] - 1, condition[4] - 1
        return cut * math.exp(a * network + b * network * edge)

    shares = {row["effect"]: row["share"] for row in effects(study_of(seconds))}
    main, both = a * a * 2 / 3, b * b * 4 / 9
    assert shares["network"] == pytest.approx(main / (main + both))
    assert shares["network x edge_cpu"] == pytest.approx(both / (main + both))
    assert sum(shares.values()) == pytest.approx(1) and shares["edge_cpu"] == pytest.approx(0)
    assert effects(Study.of([Sample((0,) * 5, 1, 0, 1.0), Sample((1,) * 5, 1, 0, 1.0)])) == []


def test_a_factor_moves_the_cut_and_the_others_do_not():
    """Cut 1 sends more: it is the best one only where the network is fast."""
    study = study_of(lambda condition, cut, repeat: [1 + 2 * condition[0], 2][cut - 1])
    assert [row["best_cut"] for row in best_cuts(study)] == [1] * 81 + [2] * 162
    rows = {row["factor"]: row for row in sensitivity(study)}
    # one level more: from 1 s to 3 s with the cut that stays, then nothing with the other
    assert rows["network"]["moves"] == 0.5 and rows["network"]["slowdown"] == pytest.approx(1.0)
    assert rows["edge_cpu"]["moves"] == 0 == rows["edge_cpu"]["slowdown"]
    found = gains(study)
    assert (
        found["held_out"] and found["static_s"] == 2 and found["oracle_s"] == pytest.approx(5 / 3)
    )
    assert found["initial_s"] == 3 and found["gain_over_static"] == pytest.approx(1 / 6)
    assert found["gain_by_network"] == pytest.approx(1 / 6) and found["gain_by_edge_cpu"] == 0


def test_an_oracle_of_noise_gains_nothing_where_it_is_scored_on_other_repeats():
    """Scored by what it was chosen by, it would save half of the time."""

    def seconds(condition, cut, repeat):
        lucky = (sum(condition) + cut + repeat) % 2
        return 1.0 if lucky else 3.0

    study = study_of(seconds)
    assert gains(study)["gain_over_static"] <= 0
    one = study_of(lambda c, cut, repeat: seconds(c, cut, 0), repeats=1)
    assert not gains(one)["held_out"] and gains(one)["gain_over_static"] > 0.49


def test_published_files_are_read_and_their_rows_checked(tmp_path):
    (tmp_path / "weights_00000.txt").write_text("0.4 0.03 0.2 1\n0.1 0.03 0.07 3\n")
    (tmp_path / "weights_20010.txt").write_text("0.9 0.03 0.2 1\n1.1 0.03 0.07 3\n\n")
    samples = list(read_published(tmp_path))
    assert samples[3] == Sample((2, 0, 0, 1, 0), 3, 0, 1.1, 0.03, 0.07)
    assert [row["best_cut"] for row in best_cuts(Study.of(samples))] == [3, 1]
    (tmp_path / "weights_00001.txt").write_text("0.9 0.03 1\n")
    with pytest.raises(DataError, match=r"weights_00001.txt:1: '0.9 0.03 1': must be seconds"):
        list(read_published(tmp_path))
    with pytest.raises(DataError, match="holds no files"):
        list(read_published(tmp_path / ".."))
