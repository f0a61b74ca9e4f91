"""Launching and reaching a SuperLink, as far as that can be tried without one."""

import contextlib
import hashlib
import importlib
import io
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
from flwr.cli.install import install_from_fab
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supernode import start_client_internal

from fedsys.errors import SecurityError
from fedsys.main import main
from fedsys.runtime import bundle, executor, supernode
from fedsys.runtime.control import SuperLinkAddress, SuperLinkClient
from fedsys.runtime.launch import Deployment, environment
from fedsys.runtime.processes import Processes, free_ports
from fedsys.transport import security
from fedsys.transport.security import Authority, Credentials

# Flower builds its bundles with a class that the library of that class is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@contextlib.contextmanager
def speaking_tls(credentials: Credentials, folder: Path) -> Iterator[int]:
    """Yield a port of 127.0.0.1 where TLS is spoken and nothing else."""
    credentials.save(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")

    def serve() -> None:
        with contextlib.suppress(OSError):  # among them those of TLS
            while True:
                connection, _ = listening.accept()
                with contextlib.suppress(OSError), connection:
                    context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def issued(authority: Authority, days: int = 90) -> Credentials:
    return authority.issue("superlink", ["127.0.0.1"], role="server", days=days)


def call(port: int, folder: Path, *more: str) -> list[str]:
    return [
        "train",
        "runtime=deployment",
        f"runtime.superlink=127.0.0.1:{port}",
        f"run.dir={folder / 'run'}",
        "json=true",
        *more,
    ]


def test_an_expired_certificate_is_one_clear_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(security, "_CLOCK_SKEW", security.dt.timedelta(days=3))
    authority = Authority.create("test")
    authority.save(tmp_path)
    trust = f"runtime.root_certificates={tmp_path / 'ca.pem'}"
    with speaking_tls(issued(authority, days=-1), tmp_path / "server") as port:
        assert main(call(port, tmp_path, trust)) == 1
        told = capsys.readouterr()
        assert told.err.splitlines()[-1] == (
            f"fedsys: runtime.superlink=127.0.0.1:{port}: the SuperLink's certificate has "
            "expired; issue a new one and restart it"
        )
        assert told.out == ""


def test_a_certificate_of_another_authority_is_not_accepted(tmp_path):
    with speaking_tls(issued(Authority.create("theirs")), tmp_path) as port:
        address = SuperLinkAddress(f"127.0.0.1:{port}", Authority.create("ours").certificate)
        with (
            SuperLinkClient(address) as control,
            pytest.raises(SecurityError, match=r"not accepted .*runtime\.root_certificates"),
        ):
            control.ping()


def test_no_superlink_at_the_address_ends_with_status_one(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(call(port, tmp_path, "runtime.insecure=true")) == 1
    assert f"127.0.0.1:{port}: no SuperLink answers there" in capsys.readouterr().err


def test_a_port_in_use_is_a_usage_error_before_anything_is_started(tmp_path, capsys):
    before = psutil.Process().children(recursive=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(call(port, tmp_path, "runtime.launch=true")) == 2
    said = capsys.readouterr().err
    assert f"runtime.superlink=127.0.0.1:{port}: must not be in use" in said
    assert "null takes a free port" in said
    assert psutil.Process().children(recursive=True) == before


def test_a_folder_of_another_run_is_refused_before_anything_is_started(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "failed"}')
    assert main(call(8000, tmp_path, "runtime.launch=true", "runtime.superlink=null")) == 2
    assert "must not hold another run; continue that run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "flower").exists()
    assert (tmp_path / "run" / "run.json").read_text() == '{"status": "failed"}'


def test_what_a_killed_command_left_behind_does_not_stand_in_the_way(tmp_path):
    """`resume=` of a launched run that was killed raised FileExistsError, for its secrets."""
    folder = tmp_path / "flower"
    first = Deployment.prepare(folder, 1, 1)
    (folder / "superlink.db").write_text("runs that nobody waits for")
    (folder / "superlink.log").write_text("said")
    second = Deployment.prepare(folder, 1, 2)
    assert first.node_keys[0] not in second.node_keys
    assert not (folder / "superlink.db").exists()
    assert (folder / "superlink.log").read_text() == "said"


def test_whoever_submits_a_run_needs_no_torch():
    code = (
        "import sys, fedsys.commands.train, fedsys.runtime.deployment; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_interrupt_in_the_middle_of_a_request_ends_everything(tmp_path, monkeypatch):
    """The answer that nobody had read was taken for that to the next request."""
    port = free_ports(1)[0]
    others = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(KeyboardInterrupt),
        Processes(tmp_path, environment(tmp_path / "home")) as processes,
    ):
        waits = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
        processes.start("node", [*waits, "--port", str(free_ports(1)[0])])
        started = set(psutil.Process().children(recursive=True)) - others
        assert processes.pid("node") in {process.pid for process in started}

        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(processes, "_answer", interrupted)
        processes.check()
    _, alive = psutil.wait_procs(started, 60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_nodes_ask_for_work_often_but_not_more_often_than_one_superlink_can_answer():
    """Each round of a launched run waited for up to three seconds, and its begin likewise."""
    assert vars(start_client_internal)["time"] is time  # where Flower waits between two questions
    assert [supernode.interval_s(count) for count in (1, 5, 20, 30, 1000)] == [0.5, 0.5, 2, 3, 3]
    hasty, began = supernode.Hasty(0.01), time.monotonic()
    hasty.sleep(600)
    assert began < hasty.monotonic() < began + 60


def test_a_supernode_is_woken_by_what_its_executor_leaves():
    """It looked every half second, twice for each message: for a reply, and for its parts."""
    hasty, kept = supernode.Hasty(600), []
    hasty.waking(kept.append)("reply")
    hasty.sleep(600)
    assert kept == ["reply"]
    for place, method in supernode.KEEPERS:
        module, _, name = place.rpartition(".")
        assert callable(getattr(getattr(importlib.import_module(module), name), method))


class Stays:
    """Stands for a zygote, and notes what it is to start."""

    made: ClassVar[list["Stays"]] = []

    def __init__(self, bundle):
        self.bundle, self.started, self.alive = bundle, [], True
        self.made.append(self)

    def start(self, command, log):
        self.started.append(command[0])
        return self.alive

    def end(self):
        self.alive = False


def unpack(home, digest):
    folder = home / "apps" / f"me.app.1.0.0.{digest[:8]}"
    folder.mkdir(parents=True)
    folder.with_name(folder.name + executor.WHOLE).touch()


def test_from_the_second_message_of_a_bundle_on_what_stays_for_it_is_forked(monkeypatch, tmp_path):
    forked, made = [], []
    monkeypatch.setattr(Stays, "made", made)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(executor, "Zygote", Stays)
    monkeypatch.setattr(executor.forks, "fork", lambda command, log: forked.append(command[0]))
    runs = executor.ForkExecutor(None, executor.Patient())
    about = {"runtime_api_address": "h:1", "token": "t", "insecure": True, "suppress_output": False}

    def launch(digest, kind=TaskType.CLIENT_APP):
        runs.launch(SimpleNamespace(task_type=kind, fab_hash=digest, **about))

    one, other = "1" * 64, "2" * 64
    launch(one)
    launch(None)
    assert forked == ["flwr-clientapp"] * 2 and not made
    unpack(tmp_path, one)
    launch(one)
    launch(one)
    launch(one, TaskType.SERVER_APP)
    assert made[0].started == ["flwr-clientapp"] * 2 and forked[2:] == ["flwr-serverapp"]
    unpack(tmp_path, other)
    launch(other)
    assert not made[0].alive and made[1].started == ["flwr-clientapp"]
    made[1].end()
    launch(other)
    assert len(made) == 2 and forked[3:] == ["flwr-clientapp"]
    launch(other)
    assert len(made) == 3 and made[2].started == ["flwr-clientapp"]


def test_where_nothing_can_stay_each_message_is_forked_by_the_executor(monkeypatch, tmp_path):
    """An executor ended where the system has no such sockets (macOS), or no room for a process."""

    def refused(bundle):
        raise OSError("Protocol not supported")

    forked = []
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(executor, "Zygote", refused)
    monkeypatch.setattr(executor.forks, "fork", lambda command, log: forked.append(command[0]))
    unpack(tmp_path, "1" * 64)
    spec = SimpleNamespace(
        task_type=TaskType.CLIENT_APP, fab_hash="1" * 64, runtime_api_address="h:1", token="t",
        insecure=True, suppress_output=False,
    )  # fmt: skip
    executor.ForkExecutor(None, executor.Patient()).launch(spec)
    assert forked == ["flwr-clientapp"]


def test_an_executor_asks_often_after_a_task_and_seldom_when_there_is_none_for_long():
    """Ten questions a second took a ninth of two cores where three devices had nothing to do."""
    assert vars(run_superexec)["time"] is time  # where Flower waits between two questions
    now, slept = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append, name="the clock")
    patient = executor.Patient(clock)
    for now[0] in (1.0, 2.0, 10.0, 3600.0):
        patient.sleep(0.1)
    assert slept == [0.1, 0.1, 0.5, 1.0] and patient.name == "the clock"
    patient.begin()
    patient.sleep(0.1)
    assert slept[-1] == 0.1


def test_a_bundle_is_unpacked_once_and_another_one_beside_it(tmp_path, monkeypatch):
    """Flower unpacked and hashed its files for each message, and took those that were there."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (one, _), unpacked = bundle.build(), []

    def install(fab, **more):
        unpacked.append(more)
        return install_from_fab(fab, **more)

    installed = executor.once(install)
    folder = installed(one, skip_prompt=True)
    assert (folder / "clients" / "app.py").is_file()
    assert installed(one, skip_prompt=True) == folder and unpacked == [{"skip_prompt": True}]
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        known = {name for name in archive.namelist() if not name.startswith(".info")}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == known
    for app in executor.APPS:  # which have it by this name
        assert vars(importlib.import_module(app))["install_from_fab"] is install_from_fab
    (tmp_path / "apps" / folder.name).rename(tmp_path / "apps" / "another.0")
    assert installed(one, skip_prompt=True) == folder and len(unpacked) == 2


def test_a_bundle_that_another_process_is_unpacking_is_not_taken_as_it_is(tmp_path, monkeypatch):
    """Of several nodes on a machine one took what another had unpacked half."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    folder = tmp_path / "apps" / f"me.app.1.0.0.{hashlib.sha256(b'bundle').hexdigest()[:8]}"
    (folder / "half").mkdir(parents=True)
    asked = []

    def install(fab):
        asked.append(fab)
        return folder

    installed = executor.once(install)
    assert (installed(b"bundle"), asked) == (folder, [b"bundle"])
    assert (installed(b"bundle"), asked) == (folder, [b"bundle"])
