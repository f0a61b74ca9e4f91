"""``decisions.csv``: what is written can be read, and a run that continues goes on with it."""

from __future__ import annotations

import csv
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.runs import decisions
from fedsys.runs.decisions import COLUMNS, FILE, OffloadDecision

PLAIN = OffloadDecision(1, 0, "pi4", 2, "conv2", False, 0.25, 4, "fp32", "edge-0")

seconds = st.none() | st.floats(1e-9, 1e9)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")))
entries = st.builds(
    OffloadDecision,
    round=st.integers(1, 10**6),
    client=st.integers(0, 10**6),
    machine=words,
    cut=st.integers(0, 99),
    unit=words,
    whole=st.booleans(),
    device_share=st.floats(0, 1),
    pieces=st.integers(1, 64),
    codec=words,
    edge=words,
    reason=words,
    iteration_s=seconds,
    up_mbit_s=seconds,
    predicted_s=seconds,
    oracle_cut=st.none() | st.integers(0, 99),
    oracle_s=seconds,
)


@given(st.lists(st.lists(entries, max_size=3), max_size=3))
def test_what_is_written_is_read(tmp_path_factory, rounds):
    folder = tmp_path_factory.mktemp("run")
    for one in rounds:
        decisions.write(folder, one)
    assert decisions.read(folder) == [entry for one in rounds for entry in one]


def test_there_is_no_file_without_decisions(tmp_path):
    decisions.write(tmp_path, [])
    assert not (tmp_path / FILE).exists()
    assert decisions.read(tmp_path) == []
    decisions.forget(tmp_path, 0)
    assert not (tmp_path / FILE).exists()


def test_rounds_that_are_played_again_are_forgotten(tmp_path):
    of = [dataclasses.replace(PLAIN, round=n, client=k) for n in (1, 2, 3) for k in (0, 1)]
    decisions.write(tmp_path, of)
    decisions.forget(tmp_path, 2)
    assert decisions.read(tmp_path) == of[:4]
    decisions.write(tmp_path, of[4:])
    assert decisions.read(tmp_path) == of
    decisions.forget(tmp_path, 0)
    assert decisions.read(tmp_path) == []
    decisions.write(tmp_path, of[:1])
    assert decisions.read(tmp_path) == of[:1]


def test_a_line_that_was_cut_short_is_left_out_and_a_damaged_file_refused(tmp_path):
    decisions.write(tmp_path, [PLAIN])
    with (tmp_path / FILE).open("a") as file:
        file.write("2,0,pi4,2")
    assert decisions.read(tmp_path) == [PLAIN]
    (tmp_path / FILE).write_text("round,client\n1,0\n")
    with pytest.raises(ValueError, match="other columns"):
        decisions.read(tmp_path)
    (tmp_path / FILE).write_text(",".join(COLUMNS) + "\n" + "x," * (len(COLUMNS) - 1) + "x\n")
    with pytest.raises(ValueError, match="x"):
        decisions.read(tmp_path)


def test_any_reader_of_csv_reads_it(tmp_path):
    decisions.write(tmp_path, [dataclasses.replace(PLAIN, reason='as "auto", 2 times faster')])
    with (tmp_path / FILE).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reason"] == 'as "auto", 2 times faster'
    assert (row["whole"], row["iteration_s"], row["device_share"]) == ("0", "", "0.25")
