"""The model that ``fedsys serve`` makes for a chain of its own hosts is made whatever stops it.

An interrupted training, and a variant of which half was made, failed every ``fedsys serve`` from
then on.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsys.commands import own_chain
from fedsys.commands.host import start_host
from fedsys.errors import RuntimeFailure
from fedsys.main import main
from fedsys.pruning.portfolio import MANIFEST
from fedsys.runs.folder import RunFolder
from tests.terminal import fedsys
from tests.waiting import until

HOME = Path(__file__).resolve().parents[2]
ROUNDS = 40
GIVEN = [
    "data=synthetic", "data.max_examples=200", "model=cnn", "model.width=4", "num_clients=1",
    f"rounds={ROUNDS}",
]  # fmt: skip
HOST = "hosts.list=[{name: device, start: true}]"


def in_this_process(*given):
    assert main([*given, "json=true"]) == 0


def made(folder, configure, monkeypatch):
    """Make what is missing; return the folder of the training, that of the variant, and verbs."""
    called = []

    def carried_out(verb, *given):
        called.append((verb, given[0].partition("=")[0] == "resume"))
        in_this_process(verb, *given)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(own_chain, "_carry_out", carried_out)
    config = own_chain.made_model(configure(*GIVEN), GIVEN)
    pruned = folder / Path(str(config.portfolio)).parent
    return pruned.parent / "train", pruned, called


def test_a_training_that_ctrl_c_ended_goes_on_and_half_a_variant_is_made_anew(
    tmp_path, configure, monkeypatch, capsys
):
    own = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        child = subprocess.Popen(
            fedsys("serve", "hosts=local", HOST, *GIVEN),
            cwd=tmp_path,
            env=own,
            stderr=said,
            stdout=said,
            start_new_session=True,
        )
        until(lambda: [*tmp_path.glob("outputs/chains/*/train/metrics.csv")] or child.poll(), 120)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal sends it: to the training, too
        assert child.wait(60) == 130, (tmp_path / "said").read_text()
    (folder,) = tmp_path.glob("outputs/chains/*/train")
    before = RunFolder.open(folder)
    assert before.info["status"] != "finished"
    assert 1 <= len(before.rounds()) < ROUNDS

    run, pruned, called = made(tmp_path, configure, monkeypatch)
    assert run == folder and called == [("train", True), ("prune", False)]
    rounds = [row["round"] for row in RunFolder.open(run).rounds()]
    assert rounds == list(range(1, ROUNDS + 1))
    manifest = pruned / "portfolio" / MANIFEST
    assert manifest.exists()

    assert made(tmp_path, configure, monkeypatch)[2] == []
    manifest.unlink()  # written last: interrupted before, all else may be there
    assert made(tmp_path, configure, monkeypatch)[2] == [("prune", False)]
    assert manifest.exists()
    capsys.readouterr()


@pytest.fixture(autouse=True)
def handlers():
    """Put back the handler that a command of this process sets."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(
    ("does", "said"),
    [("exit 3", "ended with status 3 before"), ("exec sleep 60", "was not ready within 0.2 s")],
)
def test_a_host_that_does_not_start_is_said_with_the_reason(does, said, tmp_path, monkeypatch):
    """``fedsys bench lifecycle`` said of a host that was slow that it could not be started."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeFailure, match=f"fedsys host host.name=edge: {re.escape(said)}"):
        start_host(["host.name=edge"], "token", within_s=0.2 if "sleep" in does else 60.0)
