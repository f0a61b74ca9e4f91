"""The command line: what it prints, the status it ends with, and what it leaves behind."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsys.main import COMMANDS, check_siblings, main
from tests.terminal import CODE

QUICK = (
    "rounds=1", "num_clients=3", "client.epochs=1", "data.max_examples=200", "run.plots=false"
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_signals_and_folder(tmp_path, monkeypatch):
    """The command takes SIGTERM over and writes into the current folder."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSYS_TRACEBACK", raising=False)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def fedsys(capsys):
    """Return a function that runs the command and returns status, output and errors."""

    def call(*arguments):
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def refused(fedsys, *arguments, status=2):
    """Run what must be refused; return the message after checking that it is one."""
    ended, out, err = fedsys(*arguments)
    said = [line for line in err.splitlines() if line.startswith("fedsys: ")]
    assert ended == status, err
    assert out == "" and len(said) == 1 and "Traceback" not in err
    assert err.splitlines()[-1] == said[0]
    return said[0].removeprefix("fedsys: ")


def nothing_looks_whole(folder):
    """Assert that no run in `folder` says that it has finished."""
    for file in folder.rglob("run.json"):
        info = json.loads(file.read_text())
        assert info["status"] == "failed" and info["error"]
        assert not (file.parent / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# A run


def test_a_run_ends_with_one_json_object_and_leaves_a_whole_folder(fedsys, tmp_path):
    status, out, err = fedsys(
        "train", *QUICK, "run.plots=true", "json=true", "rounds=2", "run.dir=a run"
    )
    assert status == 0
    *before, last = out.splitlines()
    assert before == []
    result = json.loads(last)
    assert result.keys() >= {"accuracy", "val_accuracy", "rounds", "run_dir", "model_sha256"}
    assert (result["rounds"], result["num_clients"]) == (2, 3)
    folder = Path(result["run_dir"])
    assert folder == tmp_path / "a run"
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "finished" and info["result"] == result
    names = {p.name for p in folder.iterdir()}
    assert names >= {"run.json", "metrics.csv", "model.safetensors", "plots"}
    assert {p.name for p in (folder / "plots").iterdir()} >= {"class_counts.png"}
    assert err.count("round 1/2") == 1 and err.count("round 2/2") == 1
    assert str(folder) in err


def test_without_json_the_summary_ends_with_a_new_folder(fedsys, tmp_path):
    status, out, _ = fedsys("train", *QUICK)
    [file] = (tmp_path / "outputs").rglob("run.json")
    assert status == 0 and out.splitlines()[-1].endswith(str(file.parent))


def test_a_sweep_ends_with_one_object_of_all_runs(fedsys):
    status, out, _ = fedsys("train", "--multirun", *QUICK, "strategy=fedavg,fedprox", "json=true")
    runs = json.loads(out.splitlines()[-1])["runs"]
    assert status == 0 and len(runs) == 2
    assert len({run["run_dir"] for run in runs}) == 2


def test_a_run_of_a_sweep_that_fails_keeps_no_other_from_running(fedsys):
    status, out, err = fedsys("train", "-m", *QUICK, "client.lr=-1,0.05,-2", "json=true")
    assert status == 2 and len(json.loads(out.splitlines()[-1])["runs"]) == 1
    assert "client.lr=-1.0: must be greater than 0" in err
    assert err.splitlines()[-1].startswith("fedsys: client.lr=-2.0: must be greater than 0")


def test_a_sweep_says_where_it_is_and_ends_with_a_table_and_leaves_named_folders(fedsys, tmp_path):
    status, out, err = fedsys("train", "-m", *QUICK, "strategy=fedavg,fedprox", "client.lr=0.1,-1")
    assert status == 2
    assert "run 1/4: strategy=fedavg, client.lr=0.1" in err.splitlines()
    assert "run 4/4: strategy=fedprox, client.lr=-1" in err.splitlines()
    *_, head, first, second, third, fourth, last = out.splitlines()
    assert head.split()[:3] == ["run", "strategy", "client.lr"]
    assert first.split()[:3] == ["1", "fedavg", "0.1"] and "%" in first
    assert second.split()[:3] == ["2", "fedavg", "-1"] and "must be greater than 0" in second
    assert third.split()[:3] == ["3", "fedprox", "0.1"] and fourth.split()[0] == "4"
    folders = sorted(path for path in (tmp_path / "outputs").glob("2*/*"))
    assert [folder.name[9:] for folder in folders] == ["train-fedavg-lr0.1", "train-fedprox-lr0.1"]
    assert (tmp_path / "outputs" / "latest").resolve() == folders[1]
    assert last == "compare them: fedsys report " + " ".join(
        str(folder.relative_to(tmp_path)) for folder in folders
    )
    status, out, _ = fedsys("runs")
    assert status == 0 and len(out.splitlines()) == 3 and "FedProx" in out
    status, out, _ = fedsys("runs", "outputs", "json=true")
    told = json.loads(out.splitlines()[-1])["runs"]
    assert [run["run_dir"] for run in told] == [str(folder) for folder in folders]
    assert fedsys("report", *map(str, folders))[0] == 0
    assert "<li>" in (page := Path("report.html").read_text()) and "FedProx</li>" in page
    assert fedsys("train", "resume=outputs/latest", "rounds=2")[0] == 0
    assert json.loads((folders[1] / "run.json").read_text())["result"]["rounds"] == 2


def test_a_refused_run_leaves_no_folder_and_latest_stays(fedsys, tmp_path):
    """It left an empty folder for each configuration that the data or the model did not go with."""
    refused(fedsys, "train", *QUICK, "model=variant")
    assert list(tmp_path.iterdir()) == []
    assert fedsys("train", *QUICK)[0] == 0
    [folder] = (tmp_path / "outputs").glob("2*/*")
    refused(fedsys, "train", *QUICK, "policy=fixed", "policy.cut=99")
    assert list((tmp_path / "outputs").glob("2*/*")) == [folder]
    assert (tmp_path / "outputs" / "latest").resolve() == folder


def test_an_option_without_effect_is_pointed_out(fedsys):
    status, _, err = fedsys("train", *QUICK, "network=wifi", "num_edges=3")
    assert status == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "network=wifi is without effect" in notes[0]


def test_a_trained_model_is_where_another_run_begins(fedsys):
    fedsys("train", *QUICK, "run.dir=one")
    arguments = ("train", *QUICK, "model.init=one/model.safetensors", "client.lr=1e-30")
    assert fedsys(*arguments, "client.momentum=0", "run.dir=two")[0] == 0
    one, two = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    parameters = [n for n in one if "running" not in n and "num_batches" not in n]
    assert parameters and all(torch.allclose(one[n], two[n]) for n in parameters)


# --------------------------------------------------------------------------------------------------
# Help


def test_help_lists_the_commands_and_a_command_its_groups_and_options(fedsys):
    status, out, _ = fedsys("--help")
    assert status == 0 and all(f"  {verb} " in out for verb in COMMANDS)
    assert fedsys()[0] == 2
    for verb, command in COMMANDS.items():
        status, out, err = fedsys(verb, "--help")
        assert (status, err) == (0, "")
        assert out.splitlines()[0].startswith(f"usage: fedsys {verb}") and command.help in out
        assert all(f"  {name}: " in out for name in command.names)
        assert all(f"  {group}: " in out for group in command.groups)
        assert ("batch_size: 32" in out) == bool(
            {"client", "client.batch_size"} & set(command.options)
        )
        status, out, err = fedsys(verb, "--help-all")
        assert (status, err) == (0, "")
        assert "strategy: " in out and "fedavgm" in out and "batch_size: 32" in out
    for verb in ("edge", "serve", "query"):  # only its own options
        _, out, _ = fedsys(verb, "--help")
        assert "strategy: " not in out and "rounds: " not in out
    assert "max_sessions: 256" in fedsys("edge", "--help")[1]


def test_help_shows_what_is_chosen_with_its_comments(fedsys, tmp_path):
    out = fedsys("train", "--help", "policy=auto")[1]
    assert "  hysteresis: 0.05   # share of the time that a new plan must save" in out
    assert "hysteresis" not in fedsys("train", "--help")[1]
    assert "epochs: 2           # passes over a client's examples per round" in out
    assert "shaped_seconds: 2.0" in fedsys("bench", "link", "--help")[1]
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "tiny.yaml").write_text(
        "_target_: mine.tiny\nhidden: 64 # units\n"
    )
    out = fedsys("train", "--config-dir", "own", "--help", "model=tiny")[1]
    assert "tiny" in out and "hidden: 64 # units" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "rounds=7", "--cfg", "job"),
        ("train", "--cfg", "job", "rounds=7"),
        ("train", "--cfg=job", "--rounds", "7"),
        ("train", "--rounds=7", "--cfg", "job", "client.lr=0.1"),
        ("train", "client.lr=0.1", "-c", "job", "--resolve", "rounds=7"),
        ("bench", "split", "--config-dir", ".", "--cfg", "job", "rounds=7"),
        ("prune", "--config-dir", ".", "rounds=7", "--cfg", "job"),
        ("report", "--config-dir", ".", "rounds=7", "RUN", "--cfg", "job"),
        ("train", "--multirun", "rounds=7", "seed=1,2", "--cfg", "job", "--json"),
    ],
)
def test_flags_stand_anywhere_and_options_may_be_written_as_flags(fedsys, arguments):
    """--config-dir in front of an override was refused by prune, bench and report."""
    status, out, err = fedsys(*arguments)
    assert (status, err) == (0, "") and "rounds: 7" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--roundz", "5"],
            "train: see fedsys train --help; there is no flag --roundz; did you mean '--rounds'?",
        ),
        (["plan", "--xyz"], "plan: see fedsys plan --help; there is no flag --xyz; options are"),
        (["train", "--rounds"], "--rounds: must be followed by a value, as in rounds=10"),
        (["train", "--cfg", "job", "--info"], "--cfg --info: must not stand together"),
        (["train", "--resolve"], "--resolve: must stand with --cfg job"),
        (["train", "--cfg"], "--cfg: must be followed by job, hydra or all"),
        (["train", "rounds"], "rounds: must be written as key=value"),
        (
            ["train", "client.learning_rate=0.1"],
            "client.learning_rate: no such option; did you mean 'client.lr'?",
        ),
        (["train", "epochs=3"], "epochs: no such option; did you mean 'client.epochs'?"),
        (["completion", "fish"], "completion fish: must be followed by one of bash, zsh"),
        (["runs", "nowhere"], "runs=nowhere: must be a folder with runs"),
    ],
)
def test_what_is_written_otherwise_is_answered_by_the_right_way(fedsys, arguments, message):
    assert refused(fedsys, *arguments).startswith(message)


def test_the_version_is_that_of_the_distribution(fedsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert fedsys("--version") == (0, f"fedsys {project['project']['version']}\n", "")
    assert importlib.import_module("fedsys").__version__ == project["project"]["version"]


def test_the_composed_configuration_can_be_printed_without_a_run(fedsys, tmp_path):
    status, out, _ = fedsys("train", "--cfg", "job", "client.lr=0.125")
    assert status == 0 and "lr: 0.125" in out and not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("client.lrr=0.1", "client.lrr: no such option; did you mean 'client.lr'? see --help"),
        ("+client.lrr=0.1", "client.lrr: no such option; did you mean 'lr'? see --help"),
        (
            "pruning.sparsty=0.5",
            "pruning.sparsty: no such option; did you mean 'pruning.sparsity'?",
        ),
        ("policy.cut=1", "policy.cut: no such option with what is chosen; policy=fixed has it"),
        ("pruning.scores.mix=1", "pruning.scores.mix: no such option; "),
        ("strategi=fedavg", "strategi: no such option; did you mean 'strategy'? see --help"),
        ("strategy=fedav", "strategy=fedav: no such choice; did you mean 'fedavg'? known are bul"),
        ("strategy.momentum=1", "strategy.momentum: no such option; "),
        ("+strategy.etta=1", "strategy.etta: FedAvg has no such parameter; "),
        ("model=lennet", "model=lennet: no such choice; did you mean 'lenet'? known are cnn, gpt"),
        ("model=resnet19", "model=resnet19: no such choice; did you mean 'resnet18'? known are "),
        ("model=torchvision model.name=resnet19", "model.name=resnet19: must be a classifier of"),
        ("client.lr=-0.1", "client.lr=-0.1: must be greater than 0; try client.lr=0.02"),
        ("client.lr=nan", "client.lr=nan: must be a finite number"),
        ("client.lr=fast", "client.lr=fast: must be of type float"),
        ("rounds=2.5", "rounds=2.5: must be of type int"),
        ("schedule.micro_batches=64", "schedule.micro_batches=64: must not exceed client.batch_s"),
        ("strategy.fraction_train=1.5", "strategy.fraction_train=1.5: must be in (0, 1]"),
        ("num_clients=200", "num_clients=200: must be at most "),
        ("data=image_folder data.root=nowhere", "data.root=nowhere: must be an existing folder"),
        ("model.init=nowhere", "model.init=nowhere: must be a safetensors file that exists"),
        ("client.lr=[", "no viable alternative at input '['"),
        ("--no-such-flag", "train: see fedsys train --help"),
        ("runtime.kind=cloud", "runtime.kind=cloud: must be one of local, simulation, deploym"),
    ],
)
def test_what_cannot_be_used_is_refused_with_one_message(fedsys, tmp_path, argument, message):
    said = refused(fedsys, "train", *QUICK, *argument.split())
    assert said.startswith(message)
    nothing_looks_whole(tmp_path)


def test_an_unknown_command_or_benchmark_is_refused(fedsys):
    assert refused(fedsys, "trian").startswith("trian: no such command; did you mean 'train'?")
    assert refused(fedsys, "bench").startswith("bench: must be followed by one of ")
    assert "did you mean 'training'?" in refused(fedsys, "bench", "trainin")


def test_a_folder_that_holds_a_run_is_not_written_over(fedsys, tmp_path):
    fedsys("train", *QUICK, "run.dir=kept")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "kept").rglob("*")) if p.is_file()}
    assert refused(fedsys, "train", *QUICK, "run.dir=kept").startswith("run.dir=")
    after = {p: p.read_bytes() for p in sorted((tmp_path / "kept").rglob("*")) if p.is_file()}
    assert after == before


def test_an_init_file_that_lacks_a_tensor_names_it(fedsys, tmp_path):
    fedsys("train", *QUICK, "run.dir=whole")
    state = load_file("whole/model.safetensors")
    name = next(n for n in state if n.endswith("running_var"))
    del state[name]
    save_file(state, "part.safetensors")
    status, out, err = fedsys("train", *QUICK, "model.init=part.safetensors", "run.dir=new")
    assert (status, out) == (1, "") and f"{name}: missing" in err and "Traceback" not in err
    nothing_looks_whole(tmp_path / "new")


def test_an_image_that_cannot_be_read_is_named(fedsys, tmp_path):
    from PIL import Image

    for k in range(12):
        folder = tmp_path / "images" / f"class{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * k, np.uint8)).save(folder / f"{k}.png")
    bad = tmp_path / "images" / "class1" / "bad.png"
    bad.write_bytes(b"not an image")
    arguments = ("data=image_folder", f"data.root={tmp_path / 'images'}", "data.cache=cache")
    assert str(bad) in refused(fedsys, "train", *QUICK, *arguments, status=1)
    nothing_looks_whole(tmp_path)


def test_a_traceback_is_shown_to_who_asks_for_it(fedsys, monkeypatch):
    monkeypatch.setenv("FEDSYS_TRACEBACK", "1")
    status, _, err = fedsys("train", "client.lr=-1")
    assert status == 2 and "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("fedsys: client.lr=-1.0")


def test_packages_of_another_distribution_are_not_mistaken_for_ours(monkeypatch, tmp_path, fedsys):
    check_siblings()
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "clients", raising=False)
    assert f"package clients: comes from {tmp_path}" in refused(fedsys, "train")


# --------------------------------------------------------------------------------------------------
# In a process of its own


def spawn(*arguments, cwd, limit=None):
    """Start the command in a process, with a limit on the size of each file it writes."""
    code = CODE
    if limit is not None:
        code = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
        )
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_ends_the_run_with_one_message_and_no_model(tmp_path):
    process = spawn(*QUICK, "run.dir=full", cwd=tmp_path, limit=100_000)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    assert "free some space" in err.splitlines()[-1]
    assert not (tmp_path / "full" / "model.safetensors").exists()
    info = json.loads((tmp_path / "full" / "run.json").read_text())
    assert info["status"] == "failed" and "result" not in info


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_says_so_in_its_folder(tmp_path, sent):
    process = spawn(*QUICK, "rounds=99999", "run.dir=stopped", "json=true", cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[:2] == ["round", "2/99999"]:
            process.send_signal(sent)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted"
    assert err.splitlines()[-3:-1] == ["continue the run by", "  fedsys train resume=stopped"]
    info = json.loads((tmp_path / "stopped" / "run.json").read_text())
    assert info["status"] == "interrupted" and "result" not in info
    assert info["error"]["type"] == "KeyboardInterrupt"
