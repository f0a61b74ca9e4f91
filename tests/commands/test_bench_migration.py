"""The benchmarks of moves: what they tell, and that one goes on where it was interrupted."""

import dataclasses
import json

import pytest

from fedsys.commands.bench import migration, vehicles
from fedsys.errors import RuntimeFailure

SMALL = (
    "policy=fixed", "policy.cut=0.3", "num_edges=2", "num_clients=2", "rounds=1",
    "data.max_examples=200", "client.batch_size=10", "model.width=4", "model.hidden=16",
    "mobility=halfway",
)  # fmt: skip
OPTIONS = {"shares": [0.5], "move_at": [0.5], "links_mbit_s": [100], "hows": ["announced"]}


@pytest.fixture
def config(configure, identity):
    return configure(*SMALL)


def once(monkeypatch):
    """Let nothing be carried out any more."""

    def refuse(runs, **values):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(migration.Runs, "carry_out", refuse)


def test_a_move_is_measured_against_the_round_that_begins_anew(config, tmp_path, monkeypatch):
    """With `kept`, what was measured before an interruption is not measured again."""
    runs, path = migration.Runs(config, tmp_path), tmp_path / "kept"
    (case,) = migration._cases(runs, config, OPTIONS, migration.Kept(path, config))
    assert case["max_abs_diff"] == 0.0
    assert case["at_most"] == pytest.approx(1 / 3, abs=0.05)
    assert case["goal_s"] == pytest.approx(1.25 * case["on_the_wire_s"] + 0.05)
    assert case["on_the_wire_s"] == pytest.approx(8 * case["bytes"] / 100e6)
    assert case["predicted_pause_s"] > 8 * case["predicted_bytes"] / 100e6 > 0
    assert sum(case["parts_s"].values()) == pytest.approx((1 + case["parts_off"]) * case["pause_s"])
    assert migration.chart({"cases": [case]}).labels == ["0.5, 0.5, 100"]
    once(monkeypatch)
    path.write_bytes(path.read_bytes() + b'{"of": "half of a li')
    assert list(migration._cases(runs, config, OPTIONS, migration.Kept(path, config))) == [case]
    other = dataclasses.replace(config, seed=config.seed + 1)
    with pytest.raises(AssertionError, match="measured before"):
        list(migration._cases(runs, other, OPTIONS, migration.Kept(path, other)))


def test_a_device_that_moved_less_often_than_it_should_is_no_measurement(
    config, tmp_path, monkeypatch
):
    runs, asked = migration.Runs(config, tmp_path), migration._moves
    still = migration.Later(lambda: runs.carry_out(mobility=migration._stays()))
    assert migration._moved(runs, 3, still) == 0.0
    monkeypatch.setattr(migration, "_moves", lambda at, how: asked(at[:2], how))
    with pytest.raises(RuntimeFailure, match="moved 2 times of 3"):
        migration._moved(runs, 3, still)


def test_schedules_of_faults_are_told_apart_by_how_they_end(config, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    monkeypatch.setitem(migration._SMALL, "data", {"max_examples": 200})
    told = migration._schedules(config, tmp_path, 2, migration.Kept(path, config))
    assert (told["schedules"], told["resumed"] + told["excluded"], told["wrong"]) == (2, 2, 0)
    assert told["longest_s"] > 0
    once(monkeypatch)
    assert migration._schedules(config, tmp_path, 2, migration.Kept(path, config)) == told
    broken = path.read_text().replace('"what": "resumed"', '"what": "another model"')
    path.write_text(broken)
    again = migration._schedules(config, tmp_path, 2, migration.Kept(path, config))
    assert again["wrong"] == told["resumed"]


def test_a_fault_without_anybody_to_strike_is_counted_by_itself(config, tmp_path, monkeypatch):
    """It counted as a run that went wrong; the model of such a run is compared all the same."""
    monkeypatch.setitem(migration._SMALL, "data", {"max_examples": 200})
    cut = {"kind": "link_cut", "round": 1, "step": 10_000, "who": 0, "position": "after_step"}
    never = {"mobility": {"at": [0.5], "devices": []}, "faults": {"list": [cut]}}
    monkeypatch.setattr(migration, "schedule", lambda number: never)
    told = migration._schedules(config, tmp_path, 1, migration.Kept(None, config))
    assert (told["not_struck"], told["wrong"], told["resumed"]) == (1, 0, 0)
    other = dataclasses.replace(config, seed=config.seed + 1)
    text = migration.configuration.with_values(other.text, **migration._SMALL, seed=other.seed)
    runs = migration.Runs(migration.configuration.parse(text), tmp_path)
    still = migration.Later(lambda: migration.Runs(config, tmp_path).carry_out())
    assert migration._struck(runs, 0, still)["what"] == "another model"


def test_what_was_kept_of_a_benchmark_is_lines_of_its_own(config, tmp_path, capsys):
    kept = migration.Kept(tmp_path / "kept", config)
    assert kept.measured(lambda: 3, "schedule", 1) == 3
    assert "schedule 1: 0.0 s" in capsys.readouterr().err
    (line,) = (tmp_path / "kept").read_text().splitlines()
    assert json.loads(line)["value"] == 3
    assert migration.Kept(tmp_path / "kept", config).measured(lambda: 4, "schedule", 1) == 3
    assert migration.Kept(None, config).measured(lambda: 4, "schedule", 1) == 4


def test_vehicles_are_played_over_edge_servers(configure):
    config = configure(
        "fleet=pi_lab", "network=wifi", "model=vgg5", "data=synthetic_32x32",
        "schedule=pipelined", "client.batch_size=100", "policy=fixed",
    )  # fmt: skip
    options = {
        "file": "", "vehicles": 12, "edges": 3, "examples": 400, "cut": 4, "workers": 8,
        "rounds": 2, "most_turns": 20000,
    }  # fmt: skip
    first, second = (vehicles.run(config, options) for _ in range(2))
    assert [row["round"] for row in first["rows"]] == [1, 2]
    assert sum(row["handovers"] for row in first["rows"]) > 0
    timed = ("moves_seconds", "play_seconds", "seconds")
    for one, other in zip(first["rows"], second["rows"], strict=True):
        assert one["vehicles_moving"] <= min(12, one["handovers"])
        assert one["foreseen"] <= one["handovers"]
        assert (one["bytes"] > 0) == (one["handovers"] > 0)
        assert {k: one[k] for k in one if k not in timed} == {
            k: other[k] for k in other if k not in timed
        }
    assert first["slowest_s"] == max(row["seconds"] for row in first["rows"])
    assert vehicles.chart(first).labels == ["1", "2"]
