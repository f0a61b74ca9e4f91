"""Trackers: each shows the same of a run, and what it shows is what the run's folder holds."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsys.runs.folder import RunFolder
from fedsys.runs.tracking import flat, tracked

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:(mlflow|sqlalchemy|alembic|wandb)",  # of their own making
    "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's use of SQLAlchemy 2.1
)

CONFIG = {
    "seed": 3,
    "client": {"lr": 0.02, "betas": [0.9, 0.999], "clip_norm": None},
    "model": {"_target_": "mine.net", "api_key": "hush-hush"},
}
ROWS = [
    {"round": 1, "val_accuracy": 0.5, "train_loss": 2.25, "seconds_round": 1.5, "note": "text"},
    {"round": 2, "val_accuracy": 0.75, "train_loss": math.nan, "seconds_round": 1.25},
    {"round": 3, "val_accuracy": 0.875, "train_loss": 0.5, "seconds_round": 1.0},
]
RESULT = {"accuracy": 0.9, "rounds": 3, "model_sha256": "abc", "faults": [], "ok": True}


@dataclass
class Shown:
    """What a tracker gives back of its only run."""

    config: Mapping[str, str]
    scalars: Mapping[str, Mapping[int, float]]
    figures: Mapping[str, float]
    plots: set[str]
    model: bytes | None
    status: str


class Own:
    """A user's tracker: three methods, one file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def start(self, run: Any) -> None:
        if not run.after_round:
            text = {key: str(value) for key, value in flat(run.config, ".").items()}
            self.file.write_text(json.dumps({"config": text}) + "\n")

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        with self.file.open("a") as file:
            print(json.dumps({"round": number, "scalars": dict(scalars)}), file=file)

    def finish(self, end: Any) -> None:
        (self.file.parent / "own-model").write_bytes(end.model.read_bytes() if end.model else b"")
        told = {"status": end.status, "figures": dict(end.figures)}
        with self.file.open("a") as file:
            print(json.dumps(told | {"plots": [p.stem for p in end.plots]}), file=file)


class OfOwn:
    """Reads what `Own` wrote."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "own.jsonl"
        self.spec = {"_target_": f"{__name__}.Own", "file": str(self.file)}

    def read(self, run: Path) -> Shown:
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        scalars: dict[str, dict[int, float]] = {}
        for line in lines:
            for tag, value in line.get("scalars", {}).items():
                scalars.setdefault(tag, {})[line["round"]] = value
        end = lines[-1]
        model = (self.file.parent / "own-model").read_bytes() or None
        plots = set(end["plots"])
        return Shown(lines[0]["config"], scalars, end["figures"], plots, model, end["status"])


class OfMlflow:
    """Reads by MLflow's own client, from a store or a server."""

    def __init__(self, uri: str) -> None:
        self.spec = {
            "_target_": "fedsys.runs.trackers.mlflow.MlflowTracker",
            "uri": uri, "experiment": "of a test", "wait_s": 120,
        }  # fmt: skip

    def read(self, run: Path) -> Shown:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=str(self.spec["uri"]))
        experiment = client.get_experiment_by_name("of a test")
        (found,) = client.search_runs(
            [experiment.experiment_id], f"attributes.run_name = '{run.name}'"
        )
        identity, histories = found.info.run_id, {}
        for name in found.data.metrics:
            points = client.get_metric_history(identity, name)
            points.sort(key=lambda m: m.timestamp)
            histories[name] = {m.step: m.value for m in points}
        figures = {k: v.popitem()[1] for k, v in histories.items() if k.startswith("result/")}
        here = run.parent / "downloaded"
        here.mkdir(exist_ok=True)
        client.download_artifacts(identity, "", str(here))
        whole = yaml.safe_load((here / "config.yaml").read_text())
        assert set(flat(whole, ".")) == set(found.data.params)
        model = here / "model" / "model.safetensors"
        status = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}
        return Shown(
            found.data.params,
            {tag: points for tag, points in histories.items() if tag not in figures},
            figures,
            {plot.stem for plot in here.glob("plots/*.png")},
            model.read_bytes() if model.exists() else None,
            status[found.info.status],
        )


def records(file: Path) -> Iterator[Any]:
    """Read the records of an offline run: a log in LevelDB's form of messages of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, whole = file.read_bytes(), 1 << 15, b""
    assert data[:4] == b":W&B"
    place = 7
    while place + 7 <= len(data):
        if block - place % block < 7:  # too little of a block for a header
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last piece
            yield Record.FromString(whole)
            whole = b""


def whole(file: Path) -> list[Any]:
    """Read an offline run to its end, which W&B's process may write when `finish` is over."""
    for _ in range(300):
        found = list(records(file))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{file} has no end")


class OfWandb:
    """Reads offline runs from their files by W&B's own messages."""

    def __init__(self, folder: Path) -> None:
        self.spec = {
            "_target_": "fedsys.runs.trackers.wandb.WandbTracker",
            "mode": "offline", "wait_s": 120,
        }  # fmt: skip

    def read(self, run: Path) -> Shown:
        files = sorted(
            (run / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime
        )
        assert len({file.name for file in files}) == 1  # one identity, however often it went on
        found = [record for file in files for record in whole(file)]
        scalars: dict[str, dict[int, float]] = {}
        for record in found:
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            for tag, value in row.items():
                if not tag.startswith(("_", "plots/")) and tag != "round":
                    scalars.setdefault(tag, {})[int(row["round"])] = float(value)
        config: dict[str, Any] = {}
        for record in found:
            for item in (*record.run.config.update, *record.config.update):
                config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        config.pop("_wandb", None)
        return Shown(
            {key: str(value) for key, value in flat(config, ".").items()},
            scalars,
            _summary(found),
            {p.stem.rsplit("_", 2)[0] for f in files for p in f.parent.rglob("*.png")},
            _artifact(found),
            {0: "finished", 1: "failed", 255: "interrupted"}[found_exit(found)],
        )


def found_exit(found: list[Any]) -> int:
    return [r.exit.exit_code for r in found if r.HasField("exit")][-1]


def _summary(found: list[Any]) -> dict[str, float]:
    items = [item for record in found for item in record.summary.update]
    named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {key: value for key, value in named.items() if key.startswith("result/")}


def _artifact(found: list[Any]) -> bytes | None:
    made = [
        r.artifact if r.HasField("artifact") else r.request.log_artifact.artifact for r in found
    ]
    paths = [entry.local_path for a in made if a.type == "model" for entry in a.manifest.contents]
    return Path(paths[-1]).read_bytes() if paths else None


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of one database for all tests: making its tables takes seconds."""
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'runs.db'}"


@pytest.fixture(params=["own", "mlflow", "wandb"])
def tracker(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)  # where MLflow lays what it keeps beside a database
    if request.param == "own":
        return OfOwn(tmp_path)
    if request.param == "mlflow":
        return OfMlflow(request.getfixturevalue("store"))
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return OfWandb(tmp_path)


def said_nothing(text: str) -> None:
    raise AssertionError(text)


def picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 3), "red").save(path)


def whole_run(spec: Mapping[str, Any], path: Path, rows: Any = ROWS) -> None:
    text = yaml.safe_dump({**CONFIG, "tracker": dict(spec)})
    with (
        RunFolder.create(path, text) as folder,
        tracked(spec, text, folder, 0, said_nothing),
    ):
        for row in rows:
            folder.add_round(row)
        folder.save_model({"weight": torch.arange(6.0)}, {"config": "x"})
        picture(path / "plots" / "accuracy.png")
        picture(path / "plots" / "loss.png")
        folder.finish(RESULT)


def tensorboard(path: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


def same(one: Any, other: Any) -> bool:
    return one == pytest.approx(other, nan_ok=True)


def test_a_tracker_shows_scalars_configuration_plots_and_model_of_the_run(tracker, tmp_path):
    run = tmp_path / f"run-{os.getpid()}-{time.time_ns()}"
    whole_run(tracker.spec, run)
    shown = tracker.read(run)
    assert shown.status == "finished"
    expected = tensorboard(run)
    assert shown.scalars.keys() == expected.keys()
    for tag, points in expected.items():
        assert same(shown.scalars[tag], points), tag
    assert shown.figures == {"result/accuracy": 0.9, "result/rounds": 3}
    assert shown.plots == {"accuracy", "loss"}
    assert shown.model == (run / "model.safetensors").read_bytes()
    assert shown.config["client.lr"] == "0.02"
    assert shown.config["client.betas"] == "[0.9, 0.999]"
    assert shown.config["seed"] == "3"
    assert shown.config["model.api_key"] == "***"


def test_nothing_secret_reaches_a_tracker(tracker, tmp_path):
    run = tmp_path / f"run-{os.getpid()}-{time.time_ns()}"
    whole_run(tracker.spec, run)
    tracker.read(run)
    kept = {run / "config.yaml", run / "run.json"}  # which their owner alone can read
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f not in kept]
    assert [f for f in files if b"hush-hush" in f.read_bytes()] == []


def test_a_run_that_continues_is_the_same_run_of_the_tracker(tracker, tmp_path):
    run = tmp_path / f"run-{os.getpid()}-{time.time_ns()}"
    text = yaml.safe_dump(CONFIG)
    with (
        pytest.raises(KeyboardInterrupt),
        RunFolder.create(run, text) as folder,
        tracked(tracker.spec, text, folder, 0, said_nothing),
    ):
        folder.add_round(ROWS[0])
        folder.add_round({**ROWS[1], "val_accuracy": 0.1})
        raise KeyboardInterrupt
    assert tracker.read(run).status == "interrupted"
    with (
        RunFolder.resume(run, 1, text) as folder,
        tracked(tracker.spec, text, folder, 1, said_nothing),
    ):
        for row in ROWS[1:]:
            folder.add_round(row)
        folder.finish(RESULT)
    shown = tracker.read(run)
    assert shown.status == "finished"
    assert shown.scalars["accuracy/val"] == {1: 0.5, 2: 0.75, 3: 0.875}


def test_a_run_that_fails_has_failed_in_the_tracker(tracker, tmp_path):
    run = tmp_path / f"run-{os.getpid()}-{time.time_ns()}"
    with (
        pytest.raises(ValueError, match="broken"),
        RunFolder.create(run, "seed: 1") as folder,
        tracked(tracker.spec, "seed: 1", folder, 0, said_nothing),
    ):
        folder.add_round(ROWS[0])
        raise ValueError("broken")
    shown = tracker.read(run)
    assert (shown.status, shown.figures, shown.model) == ("failed", {}, None)
    assert RunFolder.open(run).info["status"] == "failed"


@pytest.mark.slow
def test_a_real_mlflow_server_shows_the_run(tmp_path, monkeypatch):
    pytest.importorskip("flask", reason="needs the server: pip install mlflow")
    pytest.importorskip("mlflow.server", reason="needs the server: pip install mlflow")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db"),
        *("--artifacts-destination", str(tmp_path / "artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        _wait_for(port, server)
        tracker = OfMlflow(f"http://127.0.0.1:{port}")
        run = tmp_path / "run"
        whole_run(tracker.spec, run)
        shown = tracker.read(run)
        assert shown.scalars["accuracy/val"] == {1: 0.5, 2: 0.75, 3: 0.875}
        assert shown.plots == {"accuracy", "loss"}
        assert shown.model == (run / "model.safetensors").read_bytes()
        assert any((tmp_path / "artifacts").rglob("model.safetensors"))  # it went through HTTP
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
        log.close()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    import httpx

    for _ in range(600):
        assert server.poll() is None
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(f"no MLflow server at port {port}")


@pytest.mark.slow
def test_a_run_with_a_tracker_has_the_model_of_one_without(tmp_path):
    """In processes of their own, which end as those of a user do; the tracker has all of it."""
    pytest.importorskip("wandb")
    root = Path(__file__).resolve().parents[2]
    small = ["rounds=2", "num_clients=2", "client.epochs=1", "json=true"]
    hashes = []
    for name, more in (("with", ["tracker=wandb", "tracker.mode=offline"]), ("without", [])):
        run = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-m", "fedsys.main", "train", *small, *more, f"run.dir={run}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=250,
            env={**os.environ, "PYTHONPATH": str(root), "WANDB_CACHE_DIR": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "the run goes on" not in done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        hashes.append(result["model_sha256"])
    assert hashes[0] == hashes[1]
    shown = OfWandb(tmp_path).read(tmp_path / "with")
    assert shown.status == "finished"
    assert shown.scalars.keys() == tensorboard(tmp_path / "with").keys()
    assert shown.config["client.epochs"] == "1"
    assert shown.model == (tmp_path / "with" / "model.safetensors").read_bytes()
    assert shown.plots == {p.stem for p in (tmp_path / "with" / "plots").glob("*.png")}
