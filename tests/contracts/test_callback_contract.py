"""Callbacks: begin once, rounds in order, end once, whatever shows the run and however it ends."""

import io
import types

import pytest

import fedsys
from fedsys.errors import ConfigError, RunError
from fedsys.runs.callbacks import listening
from fedsys.runs.lines import table_row
from fedsys.runs.notebook import NotebookProgress
from fedsys.runs.progress import LineProgress, Silent, choose
from fedsys.runtime.relay import Relay, Replay

FEW = ("data=table", "model=mlp", "task=regression", "num_clients=2", "client.epochs=1",
       "run.plots=false")  # fmt: skip
ROW = {"round": 1, "val_accuracy": 0.5, "seconds_round": 1.0}


class Written:
    """A user's callback: three methods and a list."""

    def __init__(self):
        self.told = []

    def start(self, rounds, done):
        self.told.append(("start", rounds, done))

    def round(self, row):
        self.told.append(("round", row["round"]))
        row.clear()  # what it was given is its own

    def end(self, figures):
        self.told.append(("end", figures and figures.get("rounds")))


def of_functions():
    made = types.SimpleNamespace(told=[])
    made.start = lambda rounds, done: made.told.append(("start", rounds, done))
    made.round = lambda row: made.told.append(("round", row["round"]))
    made.end = lambda figures: made.told.append(("end", figures and figures.get("rounds")))
    return made


KINDS = pytest.mark.parametrize("kind", [Written, of_functions], ids=["class", "functions"])


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@KINDS
def test_a_run_that_goes_well_and_is_continued(kind):
    first, second = kind(), kind()
    run = fedsys.train(*FEW, "rounds=2", callbacks=[first, second])
    assert first.told == second.told
    assert first.told == [("start", 2, 0), ("round", 1), ("round", 2), ("end", 2)]
    more = kind()
    fedsys.train(f"resume={run.path}", "rounds=3", callbacks=[more])
    assert more.told == [("start", 3, 2), ("round", 3), ("end", 3)]


def test_a_run_without_them_is_the_same_to_the_bit():
    plain = fedsys.train(*FEW, "rounds=1")
    told = fedsys.train(*FEW, "rounds=1", callbacks=[Written()])
    assert plain.figures["model_sha256"] == told.figures["model_sha256"]


@KINDS
def test_what_one_raises_ends_the_run_and_all_are_told(kind):
    class Broken(Written):
        def round(self, row):
            raise ValueError("enough")

    broken, other = Broken(), kind()
    with pytest.raises(ValueError, match="enough"):
        fedsys.train(*FEW, "rounds=2", "run.dir=broken", callbacks=[other, broken])
    assert other.told == [("start", 2, 0), ("round", 1), ("end", None)]
    assert broken.told == [("start", 2, 0), ("end", None)]
    with pytest.raises(ConfigError, match="this one is failed"):
        fedsys.load("broken")


@KINDS
def test_one_that_never_began_is_not_told_of_an_end(kind):
    callback = kind()
    with pytest.raises(ConfigError):
        fedsys.train(*FEW, "rounds=0", callbacks=[callback])
    assert callback.told == []


@KINDS
def test_a_run_elsewhere_tells_the_same(kind):
    """A deployment prints its rounds beside the SuperLink; a lost SuperLink begins it again."""
    callback, stream = kind(), io.StringIO()
    relay = Relay(stream)
    relay.start(3)
    relay.round_done(ROW)
    relay.start(3, done=1)
    relay.round_done({**ROW, "round": 2})
    with listening([callback]) as listeners:
        Replay(choose(json=True, stream=io.StringIO())).feed(stream.getvalue())
        listeners.end({"rounds": 2})
    assert callback.told == [("start", 3, 0), ("round", 1), ("round", 2), ("end", 2)]


@pytest.mark.parametrize("display", [Silent, lambda: LineProgress(io.StringIO())])
def test_all_are_told_of_an_end_whatever_one_raises(display):
    class Late(Written):
        def end(self, figures):
            super().end(figures)
            raise RunError("no place to write")

    callbacks = [Written(), Late(), Written()]
    with pytest.raises(RunError, match="no place"), listening(callbacks) as listeners:
        listeners.start(1, 0)
        listeners.end({"rounds": 1})
    assert [c.told for c in callbacks] == [[("start", 1, 0), ("end", 1)]] * 3


@pytest.mark.parametrize("wrong", [print, Written, object()])
def test_what_is_no_callback_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"callbacks\[0\].*methods start, round and end"):
        fedsys.train(*FEW, callbacks=[wrong])


def test_a_notebook_shows_one_output_that_grows():
    shown = []
    progress = NotebookProgress(shown.append, clock=lambda: 3.0)
    with progress:
        progress.phase("loading <digits>")
        assert "loading &lt;digits&gt;" in shown[-1]["text/html"]
        progress.start(2, "train")
        progress.round_done(ROW)
        assert '<progress max="2" value="1">' in shown[-1]["text/html"]
        assert table_row(ROW, 2, progress._columns) in shown[-1]["text/plain"]
        count = len(shown)
        for _ in range(9):
            progress.within("1 of 2 clients done")
        assert len(shown) == count + 1  # at one time: once
        progress.note("client 1 was lost")
        progress.finish({"accuracy": 0.5, "rounds": 2})
    last = shown[-1]
    assert "<progress" not in last["text/html"] and "ETA" not in last["text/plain"]
    assert "client 1 was lost" in last["text/html"] and "test accuracy 50.00%" in last["text/plain"]
    assert last["text/html"].count("<tr>") == 2
