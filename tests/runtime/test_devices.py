"""What ends in a launched deployment is started again, and its secrets go with whoever made them.

The executor of one device, killed, ended a run of which all else lived; the keys of a launcher that
was killed stayed on the disk.
"""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import psutil
import pytest

from fedsys.errors import RuntimeFailure
from fedsys.runs.folder import RunFolder
from fedsys.runtime import deployment, launch
from fedsys.runtime.busy import WAITS_S, asked_again
from fedsys.runtime.launch import RESTART_S, RESTARTS, Devices
from fedsys.runtime.processes import Processes, free_ports
from fedsys.runtime.server_side import Restarted, ServerSide
from tests.waiting import until

WAIT_S = 60.0


class Waiting:
    """A deployment whose nodes and executors only wait for a SuperLink that is not there."""

    node_keys, waited = (b"one", b"two"), 0

    def start_node(self, processes, partition):
        self._start(processes, f"node-{partition}")
        self.start_node_executor(processes, partition)

    def start_node_executor(self, processes, partition):
        self._start(processes, f"node-{partition}-executor")

    def _start(self, processes, name):
        port, nobody = free_ports(2)
        superlink = f"127.0.0.1:{nobody}"
        command = ["flower-supernode", "--insecure", "--superlink", superlink]
        processes.start(name, [*command, "--port", str(port)], vital=False)

    def start_superlink(self, processes):
        self._start(processes, "superlink")

    def wait(self, processes):
        assert "superlink" not in processes.ended()
        self.waited += 1

    def start_executor(self, processes):
        self._start(processes, "superlink-executor")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Return what starts processes: it imports Flower once."""
    folder = tmp_path_factory.mktemp("devices")
    with Processes(folder, launch.environment(folder / "home")) as processes:
        yield processes


@pytest.fixture
def watched(processes):
    """Return the processes of two devices, what watches them, and what it says."""
    notes, made = [], Waiting()
    for partition in (0, 1):
        made.start_node(processes, partition)
    time_ = SimpleNamespace(now=0.0)
    devices = Devices(made, processes, notes.append, lambda: time_.now)
    yield SimpleNamespace(processes=processes, notes=notes, devices=devices, time=time_)
    processes.stop(at_once=True)


def kill(watched, name):
    pid = watched.processes.pid(name)
    os.kill(pid, signal.SIGKILL)
    until(lambda: name in watched.processes.ended())
    return pid


def test_a_program_leads_its_group_before_anything_is_said_to_it(processes):
    """A fork that was killed before it had its own group was missed, and waited for for ever."""
    for count in range(20):
        made = Waiting()
        made.start_node(processes, count)
        names = f"node-{count}", f"node-{count}-executor"
        pids = [processes.pid(name) for name in names]
        groups = [os.getpgid(pid) for pid in pids]
        processes.stop(names, at_once=True)
        assert groups == pids


def test_the_executor_of_a_device_is_started_again_and_its_node_stays(watched):
    node, other = watched.processes.pid("node-0"), watched.processes.pid("node-1-executor")
    former = kill(watched, "node-0-executor")
    watched.devices.check()
    watched.processes.check()
    assert watched.processes.pid("node-0-executor") != former
    assert watched.processes.pid("node-0") == node
    assert watched.processes.pid("node-1-executor") == other
    assert watched.processes.ended() == {}
    (note,) = watched.notes
    assert note.startswith("node-0-executor ended with status -9") and "started again" in note


def test_a_node_is_started_again_with_its_executor(watched):
    before = kill(watched, "node-1"), watched.processes.pid("node-1-executor")
    watched.devices.check()
    names = ("node-1", "node-1-executor")
    assert not {watched.processes.pid(name) for name in names} & set(before)
    assert watched.processes.ended() == {}


@pytest.mark.parametrize("name", ["superlink", "superlink-executor"])
def test_what_a_run_needs_is_started_again_and_the_run_is_over(name, watched):
    """A SuperLink or an executor that was killed ended a launched run for good."""
    processes, made = watched.processes, Waiting()
    made.start_superlink(processes)
    made.start_executor(processes)
    server = ServerSide(made, processes)
    server.check()
    superlink, executor = processes.pid("superlink"), processes.pid("superlink-executor")
    kill(watched, name)
    with pytest.raises(Restarted, match=f"{name} ended with status -9 and was started again"):
        server.check()
    server.check()
    assert (processes.pid("superlink") != superlink) == (made.waited == 1) == (name == "superlink")
    assert processes.pid("superlink-executor") != executor  # with the server app in it
    assert processes.ended() == {}


def test_a_device_that_ends_again_and_again_is_left_out_and_the_others_stay(watched):
    def notes():  # another test may take a port that was free: then node 1 begins again, too
        return [note for note in watched.notes if "node-0" in note or "device 0" in note]

    for number in range(1, RESTARTS + 2):
        kill(watched, "node-0-executor")
        watched.devices.check()
        if number > 1:  # Flower refuses a node that died for a minute: no hurry helps
            assert len(notes()) == number - 1
            watched.time.now += RESTART_S
            watched.devices.check()
        assert len(notes()) == number
    watched.devices.check()
    watched.processes.check()
    assert notes()[-1].endswith("device 0 is left out") and len(notes()) == RESTARTS + 1
    with pytest.raises(KeyError):
        watched.processes.pid("node-0")
    assert watched.processes.status("node-1") is None


LAUNCHER = """
import os, sys, time
from pathlib import Path
from fedsys.runtime.processes import Processes
folder = Path(sys.argv[1])
with Processes(folder, dict(os.environ), [folder / "secrets"]) as processes:
    print("ready", flush=True)
    time.sleep(600)
"""


def test_secrets_go_although_the_launcher_was_killed(tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.pem").write_text("a key")
    command = [sys.executable, "-c", LAUNCHER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        assert (tmp_path / "secrets" / "key.pem").exists()
        launcher.kill()
    until(lambda: not (tmp_path / "secrets").exists())


def test_a_busy_superlink_is_asked_again_and_others_errors_are_raised_at_once():
    """A locked database, answered by 500, ended a run before its first round."""
    waited, answers = [], [500, 503, 500, 200]
    handler = httpx.MockTransport(lambda request: httpx.Response(answers.pop(0)))

    def call():
        return client.get("http://superlink/").raise_for_status().status_code

    with httpx.Client(transport=handler) as client:
        assert asked_again(call, waited.append) == 200
        assert tuple(waited) == WAITS_S[:3]
        answers[:] = [403]
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            asked_again(call, waited.append)
        answers[:] = [500] * 20
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            asked_again(call, waited.append)
        assert len(answers) == 20 - 1 - len(WAITS_S)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (httpx.HTTPStatusError("locked", request=None, response=None), True),
        (httpx.ReadTimeout("late"), True),
        (KeyboardInterrupt(), True),  # what Flower does to a server app without its token
        (type("ObjectPushError", (Exception,), {})("replaced"), True),  # to another SuperLink
        (None, True),  # its process was killed, and said nothing
        (ValueError("of a strategy"), False),
    ],
)
def test_a_run_that_flower_ended_is_submitted_again_and_goes_on(
    error, again, tmp_path, configure, monkeypatch
):
    """An expired session or a lost token of the server app ended a run for good."""
    folder = tmp_path / "run"
    config = configure("rounds=1", f"run.dir={folder}")
    asked, notes = [], []

    def carried_out(config, here, progress):
        asked.append(config.resume)
        if len(asked) == 1:  # as a server app that ends in this way leaves its folder
            if error is None:
                RunFolder.create(folder, config.text)
            else:
                with pytest.raises(type(error)), RunFolder.create(folder, config.text):
                    raise error
            raise deployment.Unfinished("run 1 ended as failed")
        return {"accuracy": 1.0}

    monkeypatch.setattr(deployment, "_carry_out", carried_out)
    progress = SimpleNamespace(note=notes.append)
    if again:
        assert deployment._carry_through(config, None, progress) == {"accuracy": 1.0}
        assert asked == [None, str(folder)] and "submitted again" in notes[0]
    else:
        with pytest.raises(RuntimeFailure, match="run 1 ended"):
            deployment._carry_through(config, None, progress)


def test_a_run_that_does_not_go_on_names_its_folder_and_the_command(tmp_path, configure):
    config = configure("runtime=deployment", "runtime.launch=true", f"run.dir={tmp_path}")
    told = f"ended; fedsys train resume={tmp_path} continues it"
    with pytest.raises(Restarted, match=told), deployment._with_way_on(config):
        raise Restarted("superlink ended")


@pytest.mark.deployment
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_run_outlives_its_processes(tmp_path):
    """First the SuperLink, then what runs one device and the node of another at the same time.

    Flower takes a minute to notice that a device is gone: one minute for both.
    """
    folder, said = tmp_path / "run", tmp_path / "said"
    command = [
        sys.executable, "-m", "fedsys.main", "train", "runtime=deployment", "runtime.launch=true",
        "data=synthetic", "data.max_examples=200", "model=cnn", "rounds=4", "num_clients=3",
        "run.plots=false", f"run.dir={folder}",
    ]  # fmt: skip
    with said.open("w") as stream:
        child = subprocess.Popen(command, stderr=stream)
        for rounds, killed in ((1, ["superlink"]), (2, ["node-1-executor", "node-2"])):
            until(lambda n=rounds: rounds_of(folder) >= n or child.poll() is not None, 300)
            assert child.poll() is None, said.read_text()
            for process in [launched_by(child.pid, folder, name) for name in killed]:
                process.kill()
        assert child.wait(300) == 0, said.read_text()
    for name in ("superlink", "node-1-executor", "node-2"):
        assert f"{name} ended with status -9" in said.read_text()
    assert [row["round"] for row in RunFolder.open(folder).rounds()] == [1, 2, 3, 4]
    assert not (folder / "flower" / "secrets").exists()


def rounds_of(folder):
    """Return how many rounds a run has, which may not have begun."""
    return len(RunFolder.open(folder).rounds()) if (folder / "metrics.csv").exists() else 0


def launched_by(pid, folder, name):
    """Return the process that a launcher started under a name."""
    log = str(folder / "flower" / f"{name}.log")
    (found,) = [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if os.getpgid(process.pid) == process.pid
        and log in {os.path.realpath(file.path) for file in process.open_files()}
    ]
    return found
