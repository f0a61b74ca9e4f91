"""Whatever a disk or a kill does to the files of a run: one clear error, or the run goes on.

A flipped bit in ``metrics.csv`` ended ``resume=`` and ``fedsys report`` with a traceback of the
standard library, and a run killed between its first two files could never be continued. Each file
of a folder is damaged in each way here; what goes on must end with the same model.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from fedsys.commands.runs import table
from fedsys.config import parse, to_text, with_values
from fedsys.errors import FedsysError
from fedsys.main import main
from fedsys.runs.folder import RunFolder
from fedsys.runs.progress import choose
from fedsys.runs.report.loading import as_json, load
from fedsys.runs.report.page import page
from fedsys.runs.resume import stored
from strategies.crash_safety import opened

SMALL = (
    "data=synthetic", "data.max_examples=60", "num_clients=2", "model=cnn", "model.width=2",
    "model.hidden=4", "run.plots=false",
)  # fmt: skip
FILES = (
    "run.json", "config.yaml", "metrics.csv", "events.jsonl", "run.log", "class_counts.csv",
    "model.safetensors", "checkpoints/lock", "checkpoints/round-000001.json",
    "checkpoints/round-000002.json", "checkpoints/round-000002.safetensors",
)  # fmt: skip


def one_byte(data, share, value):
    place = int(len(data) * share)
    return data[:place] + bytes([value]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "a line break in the middle": lambda data: one_byte(data, 0.5, 13),
    "a line end near its end": lambda data: one_byte(data, 0.95, 10),
    "a zero in front": lambda data: one_byte(data, 0.05, 0),
    "a byte that is no text": lambda data: one_byte(data, 0.7, 0xFF),
    "a quote": lambda data: one_byte(data, 0.8, 34),
    "not itself": lambda data: b"[1, 2]\n",
    "missing": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run of two rounds, and the model that a third one gives."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *SMALL, "rounds=2", f"run.dir={folder}"]) == 0
    RunFolder.open(folder).event("client_lost", client=1, round=1, reason="a test")
    third = Path(shutil.copytree(folder, folder.with_name("third")))
    assert main(["train", f"resume={third}", "rounds=3"]) == 0
    return folder, RunFolder.open(third).info["result"]["model_sha256"]


@pytest.fixture
def damaged(whole, tmp_path):
    """Return a function that copies the run and damages one of its files."""

    def damage(file, how):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
        path, change = folder / file, DAMAGES[how]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        return folder

    return damage


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_run_is_reported_and_listed(file, damaged):
    for how in DAMAGES:
        folder = damaged(file, how)
        run = load(folder)
        assert "<html" in page([run], datetime(2026, 1, 1))
        assert as_json(run)["run_dir"] == str(folder)
        assert table([run])


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_run_goes_on_or_is_refused_by_name(file, damaged):
    for how in DAMAGES:
        folder = damaged(file, how)
        try:
            text = with_values(
                to_text(stored(folder)), resume=str(folder), run={"dir": str(folder)}, rounds=3
            )
            with opened(parse(text), folder, choose(json=True)) as safety:
                assert safety.done in ((1, 2) if "000002" in file else (2,)), how
        except FedsysError as error:
            assert file in ("run.json", "config.yaml"), how  # all else can be done without
            assert str(folder) in str(error) or file == "config.yaml", how  # an option's name


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("run.json", "half"),
        ("config.yaml", "empty"),
        ("config.yaml", "missing"),
        ("events.jsonl", "half"),
        ("checkpoints/round-000002.json", "a quote"),
        ("checkpoints/round-000002.safetensors", "half"),
    ],
)
def test_a_damaged_run_ends_with_the_model_of_the_undamaged_one(file, how, damaged, whole):
    folder = damaged(file, how)
    assert main(["train", f"resume={folder}", "rounds=3"]) == 0
    assert RunFolder.open(folder).info["result"]["model_sha256"] == whole[1]
    assert [row["round"] for row in RunFolder.open(folder).rounds()] == [1, 2, 3]


@pytest.mark.parametrize("how", ["empty", "half", "a byte that is no text", "missing"])
@pytest.mark.parametrize("file", ["run.json", "config.yaml", "model.safetensors"])
def test_a_damaged_run_is_pruned_or_refused(file, how, damaged, capsys, monkeypatch):
    """What can be pruned is not: this is about reading."""
    monkeypatch.setattr("fedsys.commands.prune.make", lambda *_, **__: (_ for _ in ()).throw(Fine))
    folder = damaged(file, how)
    try:
        status = main(["prune", f"run={folder}", f"run.dir={folder}-pruned"])
    except Fine:
        return
    assert status in (1, 2)
    assert capsys.readouterr().err.startswith("fedsys: ")


class Fine(Exception):
    """The parent was read."""


def test_a_damaged_line_is_dropped_said_and_kept_in_a_copy(damaged, capsys):
    folder = damaged("metrics.csv", "a line break in the middle")
    before = (folder / "metrics.csv").read_bytes()
    assert main(["train", f"resume={folder}", "rounds=3"]) == 0
    assert (folder / "metrics.damaged.csv").read_bytes() == before
    assert [row["round"] for row in RunFolder.open(folder).rounds()][-1] == 3
    (told,) = [e for e in RunFolder.open(folder).events() if e["kind"] == "damaged"][:1]
    assert "metrics.csv is damaged: line" in told["reason"]
    assert told["continued_after"] == 2


def test_a_finished_run_without_its_model_makes_it_again_from_its_checkpoint(damaged):
    folder = damaged("model.safetensors", "missing")
    told = RunFolder.open(folder).info["result"]["model_sha256"]
    assert main(["train", f"resume={folder}"]) == 0
    assert RunFolder.open(folder).info["result"]["model_sha256"] == told
    assert (folder / "model.safetensors").is_file()


KILL = """
import os, signal, sys
def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
from fedsys.runs.folder import RunFolder
from pathlib import Path
RunFolder.create(Path(sys.argv[2]), sys.argv[3])
"""


def test_a_run_killed_before_its_configuration_was_written_goes_on(tmp_path, configure):
    """``run.json`` came first, and without ``config.yaml`` neither resume= nor run.dir= took it."""
    folder = tmp_path / "run"
    text = configure(*SMALL, "rounds=1", f"run.dir={folder}").text
    killed = subprocess.run([sys.executable, "-c", KILL, "/config.yaml", folder, text], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [f for f in os.listdir(folder) if not f.startswith(".")] == ["run.json"]
    assert json.loads((folder / "run.json").read_bytes())["status"] == "running"
    assert main(["train", f"resume={folder}"]) == 0
    result = RunFolder.open(folder).info["result"]
    assert (result["rounds"], result["num_clients"]) == (1, 2)
