"""One deployment on this machine, launched once, serves the runs of this module."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedsys.config import Config
from fedsys.errors import ConfigError, FedsysError, RuntimeFailure, SecurityError
from fedsys.runs.folder import RunFolder
from fedsys.runtime import launch, run
from fedsys.runtime.control import SuperLinkClient
from fedsys.runtime.launch import Deployment
from fedsys.runtime.processes import Processes, free_ports
from fedsys.runtime.provisioning import write_node_key
from fedsys.transport.security import Authority
from tests.terminal import fedsys
from tests.waiting import until

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    # Flower builds its bundles with a class that the library of that class is about to rename.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

Configure = Callable[..., Config]
NODES = 3


@dataclass(frozen=True)
class Launched:
    """The deployment of this module."""

    deployment: Deployment
    processes: Processes

    def overrides(self) -> list[str]:
        """Return what names this deployment in a configuration."""
        return [
            "runtime=deployment",
            f"runtime.superlink={self.deployment.address.host_port}",
            f"runtime.root_certificates={self.deployment.folder / 'secrets' / 'ca.pem'}",
        ]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("deployment") / "flower"
    deployment = Deployment.prepare(folder, free_ports(1)[0], NODES)
    with Processes(folder, launch.environment(folder / "home")) as processes:
        deployment.start_superlink(processes)
        deployment.wait(processes)
        deployment.start_executor(processes)
        deployment.start_nodes(processes)
        assert left_behind(folder)
        yield Launched(deployment, processes)
    assert not left_behind(folder)


def left_behind(folder: Path) -> list[str]:
    """Return the command of every living process of a deployment, known by its Flower folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        with contextlib.suppress(psutil.Error):
            home = process.environ().get("FLWR_HOME", "")
            if home.startswith(str(folder)) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"]))
    return found


def result_of(configure: Configure, folder: Path, *overrides: str) -> dict[str, object]:
    config = configure(*SMALL, "json=true", f"run.dir={folder}", *overrides)
    run(config)
    result: dict[str, object] = RunFolder.open(folder).info["result"]
    return result


SMALL = ("rounds=2", "client.epochs=1", "data.max_examples=300")

RUNS = {
    "adam, part of the clients, kept optimizers, pruned": (
        "strategy=fedadam",
        "strategy.fraction_train=0.7",
        "client.keep_optimizer=true",
        "pruning=magnitude",
        "pruning.steps=1",
    ),
    "clipped updates of split models with noise": (
        "privacy=client",
        "privacy.epsilon=50",
        "policy=fixed",
        "policy.cut=0.3",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_deployment_gives_the_same_model_as_the_process(configure, launched, tmp_path, name):
    overrides = [f"num_clients={NODES}", *RUNS[name]]
    local = result_of(configure, tmp_path / "local", *overrides)
    deployed = result_of(configure, tmp_path / "deployed", *launched.overrides(), *overrides)
    assert deployed["model_sha256"] == local["model_sha256"]
    assert deployed["val_loss"] == local["val_loss"]
    assert deployed.get("epsilon") == local.get("epsilon")
    assert ("epsilon" in local) == any("privacy" in each for each in RUNS[name])


def test_a_superlink_that_is_killed_and_restarted_loses_neither_run_nor_model(
    configure, launched, tmp_path, capsys
):
    longer = "client.epochs=2", "data.max_examples=null"  # the second round is to be interrupted
    overrides = [f"num_clients={NODES}", *longer]
    local = result_of(configure, tmp_path / "local", *overrides)
    folder = tmp_path / "deployed"

    def crash() -> None:
        metrics = folder / "metrics.csv"
        until(metrics.exists, 200)  # the first of the two rounds has ended
        launched.processes.stop(["superlink"], at_once=True)
        launched.deployment.start_superlink(launched.processes)

    crashing = threading.Thread(target=crash, daemon=True)
    crashing.start()
    deployed = result_of(configure, folder, *launched.overrides(), *overrides)
    crashing.join()
    assert deployed["model_sha256"] == local["model_sha256"]
    assert "is away; waiting for it" in capsys.readouterr().err


def test_too_few_nodes_are_an_error_that_says_who_is_there(configure, launched, tmp_path):
    with pytest.raises(RuntimeFailure, match=r"num_clients=5: .* there are 3 \(partition ids 0, 1"):
        result_of(
            configure, tmp_path / "run", *launched.overrides(),
            "num_clients=5", "runtime.wait_s=1",
        )  # fmt: skip


def test_an_error_of_the_server_app_arrives_as_it_was_raised(configure, launched, tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.root="):
        result_of(
            configure, tmp_path / "run", *launched.overrides(),
            "num_clients=3", "data=image_folder", f"data.root={tmp_path / 'nothing'}",
        )  # fmt: skip


def test_an_unregistered_node_is_refused(launched):
    key = launched.deployment.folder / "secrets" / "node-7"
    write_node_key(key)
    elsewhere = dataclasses.replace(launched.deployment, node_ports=tuple(free_ports(NODES)))
    elsewhere.start_node(launched.processes, 1, "node-7")
    log = launched.deployment.folder / "node-7.log"
    with pytest.raises(RuntimeFailure, match="node-7 ended with status 1"):
        while True:
            launched.processes.check(["node-7"])
            time.sleep(0.05)
    launched.processes.stop(["node-7", "node-7-executor"])
    assert "Exit Code: 305" in log.read_text()


def test_a_certificate_of_another_authority_is_refused(configure, launched, tmp_path):
    Authority.create("somebody else").save(tmp_path)
    with pytest.raises(SecurityError, match=r"certificate is not accepted .*root_certificates"):
        result_of(
            configure, tmp_path / "run", *launched.overrides(),
            f"runtime.root_certificates={tmp_path / 'ca.pem'}",
        )  # fmt: skip


def test_speaking_without_tls_to_a_superlink_with_tls_says_so(configure, launched, tmp_path):
    with pytest.raises(FedsysError, match="does not answer without TLS"):
        result_of(
            configure, tmp_path / "run", *launched.overrides(), "runtime.insecure=true"
        )  # fmt: skip


def test_two_nodes_with_one_partition_id_are_named(configure, launched, tmp_path):
    deployment = launched.deployment
    key = write_node_key(deployment.folder / "secrets" / "twin")
    with SuperLinkClient(deployment.address) as control:
        control.register(key, "twin")
    elsewhere = dataclasses.replace(deployment, node_ports=tuple(free_ports(NODES)))
    elsewhere.start_node(launched.processes, 1, "twin")
    with pytest.raises(RuntimeFailure, match=r"partition-id=1: must belong to one node, but nodes"):
        result_of(configure, tmp_path / "run", *launched.overrides(), "num_clients=4")
    launched.processes.stop(["twin", "twin-executor"])


def test_an_interrupted_launch_leaves_no_process_and_no_secret_behind(tmp_path):
    folder = tmp_path / "run"
    command = fedsys(
        "train", "runtime=deployment", "runtime.launch=true", "rounds=1000", "num_clients=1",
        f"run.dir={folder}",
    )  # fmt: skip
    home = Path(__file__).resolve().parents[2]
    with (tmp_path / "said").open("w") as said:
        child = subprocess.Popen(command, cwd=home, stderr=said, start_new_session=True)
        until(lambda: (folder / "metrics.csv").exists() or child.poll() is not None, 200)
        assert child.poll() is None
        started = psutil.Process(child.pid).children(recursive=True)
        assert len(left_behind(folder)) >= 4  # SuperLink, SuperNode, and an executor of each
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    _, alive = psutil.wait_procs(started, 10)
    assert not alive and not left_behind(folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not {"secrets", "home"} & set(os.listdir(folder / "flower"))
    assert (tmp_path / "said").read_text().splitlines()[-1] == "interrupted"
