"""A provisioned fleet with real processes on loopback: one file, a command for each machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from fedsys.main import main
from fedsys.runtime.fleet_files import read_fleet
from fedsys.runtime.machines import LONG_S, WAITS_S, KeptPrograms, Program, for_ever
from fedsys.runtime.processes import free_ports
from fedsys.runtime.provisioning import provision
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
FEW = ("num_clients=2", "rounds=1", "client.epochs=1", "data.max_examples=64", "run.plots=false")
SPLIT = ("policy=fixed", "policy.cut=0.5")


class Programs:
    """What stands for the processes of a machine: which have ended, and which were started."""

    def __init__(self):
        self.gone, self.started = {}, []

    def ended(self):
        return dict(self.gone)

    def start(self, name, command, env, *, vital):
        self.started.append(name)
        self.gone.pop(name, None)

    def last_words(self, name):
        return "Exit Code: 305"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    clock, said, programs = [0.0], [], Programs()
    monkeypatch.setattr("fedsys.runtime.machines.Processes", lambda *a, **k: programs)
    made = KeptPrograms([Program("node", ["x"])], tmp_path, said.append, clock=lambda: clock[0])
    made._start("node")
    return made, clock, said, programs


def test_what_ends_is_started_again_for_ever_and_later_each_time(kept):
    made, clock, said, programs = kept
    waits = []
    for _ in range(12):
        programs.gone["node"] = 1
        begun, count = clock[0], len(programs.started)
        made.look()
        while len(programs.started) == count:
            clock[0] += 0.5
            made.look()
        waits.append(clock[0] - begun)
    assert waits == [*WAITS_S, *[WAITS_S[-1]] * 7]
    assert said[0] == "node ended with status 1 (Exit Code: 305); again in 1 s"
    clock[0] += LONG_S  # it worked for long, so it is started again at once
    programs.gone["node"] = -9
    made.look()
    assert said[-1].endswith("again in 1 s")


def test_a_log_begins_anew_before_it_fills_a_card(kept, monkeypatch):
    made = kept[0]
    monkeypatch.setattr("fedsys.runtime.machines.LOG_BYTES", 10)
    made.log("node").write_text("a line\n")
    made.look()
    assert made.log("node").read_text() == "a line\n"
    made.log("node").write_text("a longer line\n")
    made.look()
    assert made.log("node").read_text() == ""


def test_a_machine_whose_starter_is_killed_begins_anew():
    from fedsys.errors import RuntimeFailure

    tries, slept, said = [], [], []

    def attempt():
        tries.append(len(tries))
        if len(tries) < 3:
            raise RuntimeFailure("nursery ended")

    for_ever(attempt, said.append, slept.append)
    assert len(tries) == 3 and slept == [WAITS_S[-1]] * 2 and "nursery ended" in said[0]


@contextlib.contextmanager
def machine(folder, *command):
    """Run a machine of a fleet; yield its process, which is told to end after the block."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedsys.main", *command, "json=true"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder, stdout=out, stderr=err,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, 130)


def ready(folder):
    return "ready" in (folder / "out").read_text()


@pytest.mark.deployment
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's bundle
def test_a_fleet_from_one_file_trains_the_model_of_one_process(tmp_path, capsys):
    places = free_ports(2)
    fleet = tmp_path / "farm.yaml"
    hosts = {"hosts": ["127.0.0.1"]}
    edges = [{"name": "edge-a", **hosts, "port": places[1]}]
    fleet.write_text(yaml.safe_dump(
        {"name": "farm", "server": {**hosts, "port": places[0]}, "edges": edges, "devices": 2}
    ))  # fmt: skip
    made = provision(read_fleet(fleet), tmp_path / "farm")
    local, far = tmp_path / "local", tmp_path / "far"
    with contextlib.ExitStack() as machines:
        for name, verb in (("server", "server"), ("device-0", "device"), ("device-1", "device")):
            machines.enter_context(machine(made[name], verb, str(made[name])))
        edge = ("edge", f"edge.bundle={made['edge-a']}", "edge.http=null")
        machines.enter_context(machine(made["edge-a"], *edge))
        assert main(["train", *FEW, f"run.dir={local}", "json=true"]) == 0
        until(lambda: all(ready(folder) for folder in made.values()), 200)
        conf = ("--config-dir", str(made["server"] / "conf"), "+experiment=farm")
        assert main(["train", *conf, *FEW, *SPLIT, f"run.dir={far}", "json=true"]) == 0
        state = made["device-0"] / "state"
        nodes = [p for p in psutil.process_iter() if str(state) in of(p)]
        assert nodes
    results = [line for line in capsys.readouterr().out.splitlines() if "model_sha256" in line]
    one, other = (json.loads(line)["model_sha256"] for line in results)
    assert one == other
    until(lambda: not any(p.is_running() for p in nodes))


def of(process):
    """Return Flower's folder of a process; empty for those of others."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("FLWR_HOME", "")
    return ""
