"""What a shell is offered, and that real shells take the scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedsys.commands.catalog import COMMANDS
from fedsys.commands.completion import SCRIPTS, candidates
from fedsys.config import options_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fedsys tr", ["train"]),
        ("fedsys train strategy=fedp", ["strategy=fedprox"]),
        ("fedsys train strategy=fedavg,fedp", ["strategy=fedavg,fedprox"]),
        ("fedsys train client.dev", ["client.device="]),
        ("fedsys train client.device=c", ["client.device=cpu", "client.device=cuda"]),
        ("fedsys train --json client.frozen=", ["client.frozen=true", "client.frozen=false"]),
        ("fedsys train policy=auto policy.hys", ["policy.hysteresis="]),
        ("fedsys train policy.hys", []),
        ("fedsys train --multi", ["--multirun"]),
        ("fedsys bench spl", ["split"]),
        ("fedsys bench split bench.tu", ["bench.turns="]),
        ("fedsys prune run", ["run=", "run.dir=", "run.plots=", "run.oracle="]),
        ("fedsys nothing x", []),
    ],
)
def test_a_word_is_completed_by_what_can_stand_there(line, wanted):
    assert candidates(line) == wanted


def test_all_commands_and_all_choices_are_offered():
    assert candidates("fedsys ") == list(COMMANDS)
    assert candidates("fedsys train model=") == [f"model={name}" for name in options_of("model")]


def test_runs_are_offered_the_last_one_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "2026-11-23" / "09-38-22-train"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    (tmp_path / "outputs" / "latest").symlink_to(run)
    folders = ["outputs/latest", "outputs/2026-11-23/09-38-22-train"]
    assert candidates("fedsys report outputs/") == folders
    assert candidates("fedsys train resume=") == [f"resume={folder}" for folder in folders]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell_takes_its_script(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    done = subprocess.run([shell, "-n"], input=SCRIPTS[shell], text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_replaces_the_word_behind_the_last_sign_that_ends_one(tmp_path):
    """Bash ends words at = and :, so that only what stands behind is replaced."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    tool = tmp_path / "fedsys"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m fedsys.main "$@"\n')
    tool.chmod(0o755)
    script = SCRIPTS["bash"] + (
        'compopt() { echo "nospace"; }\n'
        'complete_() { COMP_LINE=$1 COMP_POINT=${#1}; _fedsys; echo "${COMPREPLY[@]}"; }\n'
        "complete_ 'fedsys train policy=p'\ncomplete_ 'fedsys train client.dev'\n"
        "complete_ 'fedsys train data.root=x'\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, text=True, capture_output=True
    )
    assert done.stdout.splitlines() == ["pipar", "nospace", "client.device=", ""], done.stderr
