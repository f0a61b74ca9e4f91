"""Hydra's application composes once, and still does what ``hydra.mode`` says."""

import pytest
from hydra._internal.hydra import Hydra

from fedsys.main import Invocation, main


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Collect the configurations of jobs, which do nothing, and how often Hydra composed."""
    monkeypatch.chdir(tmp_path)  # a sweep leaves multirun.yaml
    trees, composed, compose = [], [], Hydra.compose_config

    def counted(self, *arguments, **named):
        composed.append(named.get("overrides"))
        return compose(self, *arguments, **named)

    monkeypatch.setattr(Hydra, "compose_config", counted)
    monkeypatch.setattr(Invocation, "_function", lambda self: lambda tree: trees.append(tree) or {})
    return trees, composed


def test_a_run_is_composed_once(jobs):
    assert main(["train", "rounds=3"]) == 0
    trees, composed = jobs
    assert [tree.rounds for tree in trees] == [3] and len(composed) == 1


def test_a_sweep_is_one_by_its_flag_or_by_hydras_mode(jobs):
    for arguments in (["-m", "rounds=3,4"], ["hydra.mode=MULTIRUN", "rounds=3,4"]):
        jobs[0].clear()
        assert main(["train", *arguments]) == 0
        assert [tree.rounds for tree in jobs[0]] == [3, 4]


def test_a_file_of_the_users_may_ask_for_a_sweep(jobs, tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {rounds: '3,4'}}}\n"
    (tmp_path / "experiment" / "swept.yaml").write_text(text)
    assert main(["train", "--config-dir", str(tmp_path), "+experiment=swept"]) == 0
    assert [tree.rounds for tree in jobs[0]] == [3, 4]
