import json
import math
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from fedsys import data
from fedsys.commands.bench import rivals, simulators, simulators_pfl
from fedsys.commands.bench.simulators import SimulatorCell, goals_of, ratios_of
from fedsys.commands.bench.simulators_process import (
    Simulator,
    _files,
    _values,
    file_memory,
    own_memory,
)
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.training import federation

TINY = {"model": {"_target_": "fedsys.models.dense.mlp", "hidden": 8, "depth": 1}}
TINY |= {"examples": 4, "turns": 1, "batched": 2}
OPTIONS = {
    "quick": False, "users": 6, "cohort": 2, "models": {"tiny": TINY}, "workers": [1, 2],
    "who": ["fedsys"], "flower_turns": 1, "small": "tiny", "large": "tiny", "large_cohort": 4,
    "large_workers": [2], "environments": "none", "longest_s": 300,
}  # fmt: skip


@pytest.fixture
def tiny(configure, tmp_path):
    return configure("+bench=simulators", "client.batch_size=2", f"run.dir={tmp_path / 'run'}")


# --------------------------------------------------------------------------------------------------
# Whole


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_fedsys_is_measured_with_both_numbers_of_workers_and_learns_the_same(tiny):
    figures = simulators.run(tiny, OPTIONS)
    assert [(row["workers"], row["cohort"]) for row in figures["cells"]] == [
        (1, 2), (2, 2), (2, 4),
    ]  # fmt: skip
    for row in figures["cells"]:
        assert {"model", "workers", "who", "round_s", "peak_mb"} <= row.keys()
        assert row["peak_mb"] > 50 and math.isfinite(row["loss"])
        assert (row["rounds"], row["round_s"] is None) == ((1, False), (0, True))[row["cohort"] > 2]
    goals = {row["goal"]: row for row in figures["goals"]}
    assert goals["two workers learn the same bits"]["met"]
    assert figures["ratios"] == [] and figures["left_out"] == []
    assert simulators.chart(figures).labels == ["tiny\n1", "tiny\n2"]


def test_a_rival_that_cannot_be_installed_is_named_and_the_rest_is_there(
    tiny, monkeypatch, tmp_path, capsys
):
    def offline(call, **more):
        raise subprocess.CalledProcessError(1, call, stderr="x" * 400 + "no route to the index")

    monkeypatch.setattr(rivals.subprocess, "run", offline)
    options = {**OPTIONS, "who": ["pfl"], "environments": str(tmp_path / "none")}
    figures = simulators.run(tiny, {**options, "large_cohort": 0})
    (left_out,) = figures["left_out"]
    assert left_out["who"] == "pfl" and left_out["why"].endswith("no route to the index")
    assert "cannot be installed" in capsys.readouterr().err
    assert not (tmp_path / "none" / "pfl-0.6.0" / "installed").exists()


def test_a_rival_is_installed_once(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(rivals.subprocess, "run", lambda call, **more: calls.append(call))
    places = [rivals.installed("it", ("it==1.2", "that==3"), tmp_path) for _ in range(2)]
    assert places == [tmp_path / "it-1.2"] * 2
    (call,) = calls
    assert call[-4:] == ["--target", str(tmp_path / "it-1.2"), "it==1.2", "that==3"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"cohort": 7}, r"bench\.cohort=7: must be from 0 to bench\.users=6"),
        ({"who": ["flwr"]}, r"bench\.who=flwr: must be among"),
        ({"models": {"mlp": 3}}, r"bench\.models\.mlp=3: must be a group with model, examples"),
        ({"models": {"mlp": {"model": {}}}}, r"bench\.models\.mlp=.*: must be a group with model"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, wrong, told):
    with pytest.raises(ConfigError, match=told):
        simulators.run(tiny, {**OPTIONS, **wrong})


def test_quick_makes_smaller_what_was_not_given(configure):
    config = configure("+bench=simulators", "bench.quick=true", "bench.cohort=20")
    options = simulators._quick(config.bench)
    assert (options["users"], options["cohort"], options["large_cohort"]) == (40, 20, 16)
    assert {about["turns"] for about in options["models"].values()} == {1}


# --------------------------------------------------------------------------------------------------
# Arithmetic


def cells(**more):
    found = {
        ("tiny", 1, "fedsys", 2): SimulatorCell([2.0, 4.0], [2.0, 4.0], 300e6, 0.1, "a"),
        ("tiny", 2, "fedsys", 2): SimulatorCell([1.0, 2.0], [2.0, 4.0], 400e6, 0.1, "a"),
        ("tiny", 2, "batched", 2): SimulatorCell([0.5, 1.0], [1.0, 2.0], 500e6, 0.1, "b"),
        ("tiny", 2, "pfl", 2): SimulatorCell([1.4, 2.8], [3.0, 6.0], 350e6, 0.1),
        ("tiny", 1, "flower", 2): SimulatorCell([9.0], [9.0], 900e6, 0.1, "a"),
        ("tiny", 2, "fedsys", 4): SimulatorCell([], [], 450e6, 0.1, "c"),
    }
    return found | more


def test_ratios_are_theirs_over_ours_and_of_the_same_turns():
    rows = {(row["who"], row["workers"], row["rival"]): row for row in ratios_of(cells())}
    assert rows.keys() == {("fedsys", 2, "pfl"), ("batched", 2, "pfl"), ("fedsys", 1, "flower")}
    row = rows["fedsys", 2, "pfl"]
    assert row["faster"] == pytest.approx(1.4) and row["cpu"] == pytest.approx(1.5)
    assert row["memory"] == pytest.approx(400 / 350)
    assert rows["fedsys", 1, "flower"]["faster"] == pytest.approx(3.0)  # by medians


def test_each_goal_says_what_was_seen_and_what_is_needed():
    goals = {(row["goal"], row["workers"]): row for row in goals_of(cells(), OPTIONS)}
    first = goals["fedsys faster than pfl", 2]
    assert (first["seen"], first["at_least"], first["met"]) == (pytest.approx(1.4), 1.3, True)
    assert goals["batched faster than pfl", 2]["at_least"] == 2.5
    assert goals["fedsys faster than flower", 1]["at_least"] == 1.0
    memory = goals["memory to that of pfl", 2]
    assert (memory["at_most"], memory["met"]) == (1.0, False)
    growth = goals["memory of 4 users to that of fewer", 2]
    assert (growth["seen"], growth["met"]) == (450 / 400, False)
    assert goals["two workers to one", 2]["met"]
    assert goals["two workers learn the same bits", 2]["met"]
    other = cells()
    other["tiny", 2, "fedsys", 2].sha256 = "z"
    same = [row for row in goals_of(other, OPTIONS) if "bits" in row["goal"]]
    assert [row["met"] for row in same] == [False]


# --------------------------------------------------------------------------------------------------
# What a rival is given


def test_pfl_gets_the_users_the_inputs_and_the_initial_model_of_fedsys(tiny, tmp_path):
    work = simulators._work(tiny, OPTIONS, "tiny", 2)
    simulators.write_work(work.config, tmp_path, rounds=3, cohort=2)
    told = json.loads((tmp_path / "work.json").read_text())
    fed = federation.federation(work.config)
    assert (told["rounds"], told["cohort"], told["batch_size"]) == (3, 2, 2)
    parts = np.load(tmp_path / "parts.npy")
    assert parts.shape == (6, 4) and sorted(parts.ravel()) == list(range(24))
    pixels, labels = simulators_pfl._arrays(tmp_path, "train")
    ((x, y),) = data.eval_batches(fed.dataset.train.take(parts[1]), fed.dataset)
    assert torch.allclose(simulators_pfl._normal(pixels[parts[1]], told), x, atol=1e-6)
    assert torch.equal(labels[parts[1]], y)
    model = simulators_pfl._model(told)
    ours = federation.build_model(work.config, fed.dataset)
    for (_, a), b in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    expected = torch.nn.functional.cross_entropy(ours(x), y)
    assert model.loss(x, y).item() == pytest.approx(expected.item())


# --------------------------------------------------------------------------------------------------
# Processes

ANSWERS = """
import json, sys
print(json.dumps({"ready": 1}), flush=True)
for line in sys.stdin:
    print(json.dumps({"loss": 0.5}), flush=True)
"""


def simulator(tmp_path, *programs, longest_s=60.0):
    calls = [([sys.executable, "-c", program], {}) for program in programs]
    return Simulator("it", calls, tmp_path / "it.log", longest_s)


def test_a_round_is_over_when_all_processes_say_so_and_memory_is_that_of_all(tmp_path):
    one, two = simulator(tmp_path, ANSWERS), simulator(tmp_path, ANSWERS, ANSWERS)
    peaks = []
    for it in (one, two):
        assert it.ready() == {"ready": 1}
        with it.watched() as peak:
            told = it.round()
        assert told["loss"] == 0.5 and told["seconds"] > 0 and told["cpu_s"] >= 0
        peaks.append(peak[0])
        it.close()
    assert 1e6 < peaks[0] < peaks[1] < 2 * peaks[0]  # files of both count once


def test_one_that_ends_or_says_nothing_is_an_error_with_its_last_word(tmp_path):
    failing = simulator(tmp_path, "raise SystemExit('no such user')")
    with pytest.raises(RuntimeFailure, match="it has ended: no such user"):
        failing.ready()
    failing.kill()
    silent = simulator(tmp_path, "import time; time.sleep(600)", longest_s=0.2)
    with pytest.raises(RuntimeFailure, match=r"it says nothing within 0\.2 s"):
        silent.ready()
    silent.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_read_in_two_parts_that_make_up_the_resident_size():
    own = [psutil.Process()]
    both = own_memory(own) + file_memory(own)
    assert both == pytest.approx(own[0].memory_info().rss, rel=0.3)
    assert file_memory(own * 2) == pytest.approx(file_memory(own), rel=0.05)
    assert not any(path.startswith("/memfd:") for path in _files(os.getpid()))


def test_sizes_are_read_from_files_of_proc_and_none_where_there_is_none(tmp_path):
    file = tmp_path / "rollup"
    file.write_text("5-7 ---p 00 00:00 0 [rollup]\nPss_Anon:    12 kB\nVmFlags: rd\n")
    assert _values(file) == {"Pss_Anon": 12 * 1024}
    assert _values(tmp_path / "none") == {}
