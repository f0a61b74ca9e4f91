"""The picture of decisions, and the part of the page about them."""

from __future__ import annotations

import dataclasses
import re
from html import unescape

from fedsys.runs import decision_plots, decisions
from fedsys.runs.decision_plots import PICTURE, slowest
from fedsys.runs.decisions import FILE, OffloadDecision
from fedsys.runs.report import decided
from fedsys.runs.report.loading import Run

PLAIN = OffloadDecision(
    1, 0, "pi4", 2, "conv2", False, 0.25, 4, "fp32", "edge-0", iteration_s=0.5,
    seen_up_mbit_s=75.0, seen_down_mbit_s=75.0, up_mbit_s=75.0, down_mbit_s=75.0,
    reason="because it is & <fast>", predicted_s=2.0, measured_s=2.5, oracle_cut=5,
    oracle_unit="fc2", oracle_share=1.0, oracle_pieces=1, oracle_s=2.0,
)  # fmt: skip


def made_of(rounds, clients, **changed):
    return [
        dataclasses.replace(PLAIN, round=n, client=k, measured_s=1.0 + k, **changed)
        for n in range(1, rounds + 1)
        for k in range(clients)
    ]


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_each_panel_is_drawn_where_there_is_something_to_show(tmp_path):
    decisions.write(tmp_path, made_of(3, 2))
    assert is_picture(decision_plots.draw(tmp_path))
    assert len(decision_plots.panels(made_of(3, 2))) == 3
    bare = {"up_mbit_s": None, "seen_up_mbit_s": None, "oracle_cut": None, "oracle_s": None}
    assert len(decision_plots.panels(made_of(3, 2, **bare))) == 1
    few = made_of(1, 1, **bare, whole=True, device_share=1.0, machine="")
    other = tmp_path / "other"
    other.mkdir()
    decisions.write(other, few)
    assert is_picture(decision_plots.draw(other))


def test_nothing_is_drawn_of_no_decisions_or_of_a_damaged_file(tmp_path):
    assert decision_plots.draw(tmp_path) is None
    (tmp_path / FILE).write_text("round,client\n1,0\n")
    assert decision_plots.draw(tmp_path) is None
    assert not (tmp_path / "plots").exists()


def test_of_many_devices_the_slowest_are_shown():
    assert slowest(made_of(2, 30), 10) == list(range(20, 30))
    assert slowest(made_of(2, 3), 10) == [0, 1, 2]


def test_the_page_tells_the_reasons_of_the_last_round(tmp_path):
    run = Run("run", tmp_path, "finished")
    assert decided.section(run) == ""
    decisions.write(tmp_path, [*made_of(1, 2, reason="long ago"), *made_of(2, 2)[2:]])
    text = decided.section(run)
    assert "<img" not in text  # none was drawn
    words = unescape(re.sub(r"<[^>]+>", " ", text))
    assert "Why, in round 2" in words and "long ago" not in words
    assert words.count("because it is & <fast>") == 2
    assert "2 after conv2, 25% on the device, 4 pieces, fp32" in words
    assert "0.50 s an iteration, 75/75 Mbit/s" in words
    assert "whole model: 2.00 s" in words
    decision_plots.draw(tmp_path)
    assert "data:image/png;base64," in decided.section(run)
    assert (tmp_path / "plots" / PICTURE).is_file()
    (tmp_path / FILE).write_text("round,client\n1,0\n")
    assert "other columns" in decided.section(run)


def test_a_page_of_a_large_fleet_says_how_much_it_shows(tmp_path):
    decisions.write(tmp_path, made_of(1, 50))
    text = decided.section(Run("run", tmp_path, "finished"))
    assert "The first 40 of 50." in text and text.count("<tr><th>pi4") == 40
