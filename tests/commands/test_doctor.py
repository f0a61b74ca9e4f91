import datetime as dt
import json
import math
import re
import resource
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from fedsys.commands.doctor import checks, estimate, machine, network
from fedsys.config.serving import ServingConfig
from fedsys.identity import arithmetic
from fedsys.main import main
from fedsys.models.fused.building import Built
from fedsys.offload.edge import EdgeServer
from fedsys.runtime.control import _field
from fedsys.transport.security import Authority


def statuses(found):
    return {check.name: check.status for check in found}


def test_the_default_run_can_go(configure, capsys):
    assert main(["doctor", "json=true", "num_clients=2"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ok"] is True
    assert {tuple(check) for check in told["checks"]} == {("name", "status", "detail", "way_out")}
    names = [check["name"] for check in told["checks"]]
    for name in ("packages", "instruction set", "memory", "results", "data", "model", "to expect"):
        assert name in names


def test_a_run_that_cannot_go_gives_status_one_and_the_way_out(capsys):
    assert main(["doctor", "model=lenet"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "must get images of at least 12x12 pixels" in out
    assert "→ choose a smaller model" in out
    assert "the run cannot go: data and model" in out


def test_a_bad_value_is_a_usage_error(capsys):
    assert main(["doctor", "client.lr=-1"]) == 2
    assert "client.lr=-1.0: must be greater than 0" in capsys.readouterr().err


def test_every_finding_that_is_not_ok_has_a_way_out(configure):
    found = list(checks(configure("data.source=nowhere")))
    assert "fail" in statuses(found).values()
    assert all(check.way_out for check in found if check.status == "fail")


# --- the machine ---


def test_installed_packages_are_compared_with_what_is_required():
    found = list(machine.packages(["numpy>=1", "flwr<2,>=1.41", "onnx; extra == 'export'"]))
    assert [check.status for check in found] == ["ok"]
    assert "flwr 1." in found[0].detail


@pytest.mark.parametrize(
    ("need", "detail", "way_out"),
    [
        ("flwr<1", "is installed, <1 is needed", 'pip install "flwr<1"'),
        ("no-such-package>=2", "no-such-package is not installed", "no-such-package>=2"),
    ],
)
def test_a_package_that_does_not_fit_keeps_the_run_from_going(need, detail, way_out):
    (found,) = machine.packages([need])
    assert found.status == "fail"
    assert detail in found.detail
    assert way_out in found.way_out


def test_fused_kernels_are_built_or_it_is_said_that_they_cannot_be(configure, monkeypatch):
    plain, fused = configure(), configure("client.kernels=fused")
    assert machine.kernels(plain).status == "ok"
    monkeypatch.setattr("fedsys.models.fused.building._built", lambda: Built(None, "no compiler"))
    check = machine.kernels(fused)
    assert check.status == "warn" and "no compiler" in check.detail and check.way_out


def test_more_threads_than_cores_is_a_warning(configure, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    run = configure("runtime.workers=5", "num_clients=8")
    found = {check.name: check for check in machine.processor(run)}
    assert found["threads"].status == "warn"
    assert found["threads"].way_out == "runtime.workers=4"
    fewer = configure("runtime.workers=5", "num_clients=3")
    assert statuses(machine.processor(fewer))["threads"] == "ok"


@pytest.mark.parametrize(("free", "status"), [(100, "fail"), (1000, "warn"), (9000, "ok")])
def test_little_memory_is_said(free, status, monkeypatch):
    class Memory:
        available = free * machine.MB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(machine, "_cgroup", lambda name: None)
    assert machine.memory().status == status


@pytest.mark.parametrize(("average", "status"), [(1.0, "ok"), (9.5, "warn")])
def test_a_busy_machine_is_pointed_out(average, status, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    check = machine.load(average)
    assert check.status == status
    assert check.detail == f"{average} processes want one of 4 cores"
    assert ("start it beforehand" in check.way_out) == (status == "warn")


def test_the_limit_of_a_container_counts(monkeypatch):
    sizes = {"memory.max": 900 * machine.MB, "memory.current": 800 * machine.MB}
    monkeypatch.setattr(machine, "_cgroup", sizes.get)
    assert machine.memory().status == "fail"


@pytest.mark.parametrize(
    "hard, status", [(1024, "warn"), (8192, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_few_descriptors_are_said_as_an_edge_server_then_takes_fewer_links(hard, status):
    check = machine.descriptors(hard)
    assert check.status == status
    assert ("LimitNOFILE=" in check.way_out) == (status == "warn")


def test_a_folder_that_is_not_there_yet_is_checked_where_it_would_be_made(tmp_path):
    assert machine.disk(tmp_path / "a" / "b").status == "ok"
    assert list(tmp_path.iterdir()) == []
    assert machine.disk(Path("/proc/nowhere")).status == "fail"


# --- the network ---


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        network_ports = {port: "somebody"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "PORTS", network_ports)
            found = network.ports()
    assert found.status == "warn"
    assert f"{port} (somebody)" in found.detail


def test_the_default_port_of_serve_is_among_those_checked():
    """Port 8000, which only the SuperLink takes, stood there for both."""
    assert network.PORTS[urlsplit(ServingConfig().address).port] == "serve"


def test_a_server_that_accepts_can_be_reached_and_no_other():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"grpc://127.0.0.1:{server.getsockname()[1]}"
        assert network.reach("edge a", address).status == "ok"
    assert network.reach("edge a", address).status == "fail"
    assert network.reach("edge a", "nowhere").status == "fail"


@pytest.mark.parametrize(
    ("days", "status", "words"),
    [(0, "ok", "is valid until"), (355, "warn", "expires on"), (370, "fail", "expired on")],
)
def test_the_end_of_a_certificate_is_told_in_time(tmp_path, days, status, words):
    """The clock of the test was read at import: in a long run certificates were of the future."""
    file = tmp_path / "ca.pem"
    file.write_bytes(Authority.create(days=365).certificate)
    found = network.certificate(file, "key", now=dt.datetime.now(dt.UTC) + dt.timedelta(days=days))
    assert (found.status, words in found.detail) == (status, True)


def test_a_certificate_of_the_future_points_at_the_clock(tmp_path):
    file = tmp_path / "ca.pem"
    file.write_bytes(Authority.create().certificate)
    found = network.certificate(file, "key", now=dt.datetime.now(dt.UTC) - dt.timedelta(days=2))
    assert (found.status, found.way_out) == ("fail", "check the clock of this machine")


def test_what_is_no_certificate_is_a_failure(tmp_path):
    assert network.certificate(tmp_path / "none.pem", "key").status == "fail"
    (tmp_path / "text.pem").write_text("hello")
    assert "no certificate in PEM" in network.certificate(tmp_path / "text.pem", "key").detail


def test_a_deployment_without_a_superlink_cannot_go(configure):
    assert network.superlink(configure()) is None
    deployed = network.superlink(configure("runtime=deployment"))
    assert deployed.status == "fail"
    nobody = configure(
        "runtime=deployment", "runtime.superlink=127.0.0.1:1", "runtime.insecure=true"
    )
    assert network.superlink(nobody).status == "fail"


class Process:
    def __init__(self, command, environment=None):
        self.pid, self._command, self._environment = 4711, command, environment

    def cmdline(self):
        return self._command

    def environ(self):
        if self._environment is None:
            raise psutil.AccessDenied
        return self._environment


@pytest.fixture
def edge():
    server = EdgeServer("a", "grpc://127.0.0.1:0", control_token="t")
    yield server
    server.kill()


@pytest.mark.parametrize(
    ("token", "told", "status", "words"),
    [
        ("t", {}, "ok", "as here: torch "),
        ("t", {"torch": "1.0"}, "warn", "torch 1.0 instead of .*, not to the bit"),
        ("t", {"instruction set": "abacus"}, "warn", "instruction set abacus instead of"),
        ("guessed", {}, "fail", "may not control"),
    ],
)
def test_an_edge_that_computes_otherwise_is_pointed_out(
    token, told, status, words, edge, configure, monkeypatch
):
    there = arithmetic() | told
    monkeypatch.setattr("fedsys.offload.edge_control.arithmetic", lambda: there)
    address = f"fleet.edges=[{{name: a, address: '{edge.address}'}}]"
    more = (address, f"fleet.control_token={token}")
    reached, bits = network.edges(configure("policy=fixed", "policy.cut=1", *more))
    assert (reached.status, bits.status) == ("ok", status)
    assert re.search(words, bits.detail)
    assert bool(bits.way_out) == (status != "ok")


def test_a_superlink_left_by_flwr_run_that_installs_everything_anew_is_told():
    python = ["/usr/bin/python", "/venv/bin/flower-superlink"]
    processes = [
        Process([*python, "--insecure"], {}),
        Process([*python, network.FLAG], {}),
        Process(python, {network.SWITCH: "1"}),
        Process(python),  # of another user
        Process(["vim", "notes"], {}),
        Process([], {}),
    ]
    (found,) = network.left_behind(processes)
    assert found.status == "warn"
    assert "kill 4711" in found.way_out


def test_padding_is_a_field_that_protobuf_carries_and_ignores():
    from flwr.proto.control_pb2 import ListRunsRequest

    request = ListRunsRequest(limit=1)
    request.MergeFromString(_field(number=1000, size=5000))
    sent = request.SerializeToString()
    assert len(sent) > 5000
    assert ListRunsRequest.FromString(sent).limit == 1


# --- what to expect ---


def test_what_to_expect_follows_from_steps_rounds_and_workers(configure, monkeypatch):
    monkeypatch.setattr(estimate, "usable_cores", lambda: 4)
    run = configure("rounds=10", "client.batch_size=32", "client.epochs=2", "runtime.workers=2")
    parts = [100, 33]
    steps = 2 * sum(math.ceil(n / 32) for n in parts)
    assert steps == 12
    told = estimate.expectation(run, parts, per_step=0.5)
    assert "about 30.0 s of training for 10 rounds" in told  # 12 steps x 0.5 s x 10 / 2
    assert "12 steps per round, 2 at a time" in told


def test_a_step_is_measured(configure, monkeypatch):
    monkeypatch.setattr(estimate, "BENCHMARK_S", 0.0)
    assert 0 < estimate.seconds_per_step(configure("num_clients=2")) < 60
