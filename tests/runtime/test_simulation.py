"""Flower's simulation engine against the in-process runtime."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedsys.errors import FedsysError
from fedsys.runs.folder import RunFolder
from fedsys.runtime import run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray drops the handles of its own processes while they run, which Popen objects to.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = ("rounds=2", "client.epochs=1", "data.max_examples=300")

RUNS = {
    "adam, part of the clients, kept optimizers, pruned": (
        "strategy=fedadam",
        "strategy.fraction_train=0.5",
        "num_clients=4",
        "client.keep_optimizer=true",
        "pruning=magnitude",
        "pruning.steps=1",
    ),
    "an agent that is trained on the clients": (
        "policy=fedadapt",
        "policy.training.where=clients",
        "policy.training.iterations=2",
        "policy.ppo.updates=1",
        "policy.ppo.every=2",
        "num_clients=2",
    ),
    "noise at the cut": (
        "privacy=cut",
        "privacy.epsilon=50",
        "policy=fixed",
        "policy.cut=0.3",
        "num_clients=2",
    ),
}


def result_of(configure, folder, *overrides):
    config = configure(*SMALL, "json=true", f"run.dir={folder}", *overrides)
    run(config)
    return RunFolder.open(folder).info["result"]


@pytest.fixture(scope="module")
def ray():
    """Start Ray once: an engine takes the instance that there is, and leaves it running."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    end = ray.shutdown
    ray.init(num_cpus=2, include_dashboard=False, logging_level="CRITICAL", log_to_driver=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "shutdown", lambda: None)
        yield
    end()


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_gives_the_same_model_as_the_process(configure, ray, tmp_path, name):
    local = result_of(configure, tmp_path / "local", *RUNS[name])
    engine = result_of(configure, tmp_path / "engine", "runtime=simulation", *RUNS[name])
    assert engine["model_sha256"] == local["model_sha256"]
    assert engine["val_loss"] == local["val_loss"]
    assert engine.get("epsilon") == local.get("epsilon")
    assert ("epsilon" in local) == any("privacy" in each for each in RUNS[name])


def test_an_error_of_a_client_is_one_clear_message(configure, ray, tmp_path):
    with pytest.raises(
        FedsysError, match=r"client\.optimizer=lbfgs: must name an optimizer"
    ) as caught:
        result_of(
            configure, tmp_path / "run", "runtime=simulation", "num_clients=2",
            "client.optimizer=lbfgs",
        )  # fmt: skip
    assert "Traceback" not in str(caught.value)


def children_of(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def test_an_interrupted_run_leaves_no_process_behind(tmp_path):
    command = [
        sys.executable, "-m", "fedsys.main", "train", "runtime=simulation", "rounds=1000",
        "num_clients=2", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    home = Path(__file__).resolve().parents[2]
    with (tmp_path / "said").open("w") as said:
        child = subprocess.Popen(command, cwd=home, stderr=said, start_new_session=True)
        while not (tmp_path / "run" / "metrics.csv").exists():
            assert child.poll() is None
            time.sleep(0.1)
        started = children_of(child.pid)
        assert started
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 130
    _, alive = psutil.wait_procs(started, 10)
    assert not alive
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
