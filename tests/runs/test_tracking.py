"""A tracker changes nothing of a run, whatever it does: it fails, hangs, or is slow."""

import threading
from pathlib import Path
from typing import Any

import pytest

from fedsys.errors import ConfigError, ModelError
from fedsys.runs.folder import RunFolder
from fedsys.runs.tracking import Tracking, built, flat, tracked

ROWS = [{"round": k, "val_accuracy": k / 4} for k in (1, 2, 3)]


class Recording:
    """Notes what it is told, and does before it what the test wants."""

    def __init__(self, before: Any = lambda name: None) -> None:
        self.told: list[Any] = []
        self.before = before

    def start(self, run: Any) -> None:
        self.before("start")
        self.told.append(("start", run.after_round))

    def log(self, number: int, scalars: Any) -> None:
        self.before("log")
        self.told.append((number, dict(scalars)))

    def finish(self, end: Any) -> None:
        self.before("finish")
        self.told.append((end.status, end.last_round))


def play(tracker: Recording, path: Path, monkeypatch: Any, wait_s: float = 60.0) -> list[str]:
    """Play three rounds and return what was said."""
    monkeypatch.setattr("fedsys.runs.tracking.built", lambda spec: tracker)
    said: list[str] = []
    with (
        RunFolder.create(path, "seed: 0") as folder,
        tracked({"wait_s": wait_s}, "seed: 0", folder, 0, said.append),
    ):
        for row in ROWS:
            folder.add_round(row)
        folder.finish({"accuracy": 0.5})
    assert RunFolder.open(path).info["status"] == "finished"
    assert [row["round"] for row in RunFolder.open(path).rounds()] == [1, 2, 3]
    return said


def test_a_tracker_is_told_the_run_in_its_order(tmp_path, monkeypatch):
    tracker = Recording()
    assert play(tracker, tmp_path / "run", monkeypatch) == []
    rounds = [(k, {"accuracy/val": k / 4}) for k in (1, 2, 3)]
    assert tracker.told == [("start", 0), *rounds, ("finished", 3)]


@pytest.mark.parametrize("error", [OSError("no route to the server"), SystemExit(3)])
@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path, monkeypatch, method, error
):
    def fails(name: str) -> None:
        if name == method:
            raise error

    tracker = Recording(fails)
    (said,) = play(tracker, tmp_path / "run", monkeypatch)
    assert said.startswith(f"the tracker Recording failed: {type(error).__name__}")
    assert "the run goes on" in said
    if method == "start":  # it has no run to which anything could be added
        assert tracker.told == []


def test_a_tracker_that_was_out_of_reach_for_a_round_gets_the_others(tmp_path, monkeypatch):
    calls = iter(["start", "first", "second"])

    def fails(name: str) -> None:
        if next(calls, "") == "second":
            raise OSError("for a while")

    tracker = Recording(fails)
    assert len(play(tracker, tmp_path / "run", monkeypatch)) == 1
    assert [told[0] for told in tracker.told] == ["start", 1, 3, "finished"]


def test_no_round_waits_for_a_tracker_and_one_that_hangs_is_left_behind(tmp_path, monkeypatch):
    released = threading.Event()
    tracker = Recording(lambda name: released.wait(60) and None)
    (said,) = play(tracker, tmp_path / "run", monkeypatch, wait_s=0.1)
    assert said.startswith("the tracker Recording is still at work after 0.1 s")
    assert tracker.told == []
    released.set()


def test_what_a_run_raises_passes_by_its_tracker(tmp_path, monkeypatch):
    tracker = Recording()
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr("fedsys.runs.tracking.built", lambda spec: tracker)
        with (
            RunFolder.create(tmp_path / "run", "") as folder,
            tracked({}, "", folder, 0, lambda text: None),
        ):
            folder.add_round(ROWS[0])
            raise KeyboardInterrupt
    assert tracker.told[-1] == ("interrupted", 1)


def test_no_tracker_costs_nothing(tmp_path):
    threads = threading.active_count()
    with (
        RunFolder.create(tmp_path / "run", "") as folder,
        tracked({"kind": "none"}, "", folder, 0, lambda text: None),
    ):
        assert threading.active_count() == threads


def test_what_is_no_tracker_is_refused_before_the_first_round():
    with pytest.raises(ConfigError, match="has no method start, log, finish"):
        built({"_target_": "pathlib.Path"})
    with pytest.raises(ConfigError, match=r"tracker\._target_=mine\.Nothing"):
        built({"_target_": "mine.Nothing"})


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch, name):
    import sys

    module = {"mlflow": "mlflow.tracking", "wandb": "wandb"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=rf"pip install 'fedsys\[{name}\]'"):
        built({"_target_": f"fedsys.runs.trackers.{name}.{name.title()}Tracker", "wait_s": 1})


def test_leaves_of_nested_options_have_the_path_to_them():
    tree = {"a": {"b": {"c": 1}, "d": []}, "e": {}}
    assert flat(tree, ".") == {"a.b.c": 1, "a.d": [], "e": {}}


def test_wandb_asks_nobody_on_the_terminal(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    from fedsys.runs.trackers.wandb import WandbTracker

    said: list[str] = []
    with RunFolder.create(tmp_path / "run", "") as folder:
        from fedsys.runs.tracking import TrackedRun

        run = TrackedRun("run", "0" * 16, folder.path, {}, 0)
        tracking = Tracking(WandbTracker(), run, said.append)
        tracking.finish(folder.path, "failed", {})
    assert len(said) == 1
    assert "set WANDB_API_KEY, or tracker.mode=offline" in said[0]
