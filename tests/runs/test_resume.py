import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsys.errors import ConfigError, RunError
from fedsys.faults import SERVER_POSITIONS
from fedsys.runs import resume
from fedsys.runs.folder import RunFolder

# --- the configuration with which a run continues ---

OWN = {
    "rounds": 6,
    "json": False,
    "client": {"lr": 0.05, "lr_schedule": {"kind": "constant"}},
    "model": {"_target_": "cnn", "width": 8},
    "runtime": {"kind": "local", "workers": None},
    "faults": {"list": [{"kind": "server_killed", "round": 3}]},
    "run": {"dir": "/runs/a"},
}
RUN = Path("/runs/a")


def asked(**changes):
    tree = json.loads(json.dumps(OWN))
    tree["faults"] = {"list": []}
    tree["run"] = {"dir": None}
    for key, value in changes.items():
        *folders, name = key.split("__")
        place = tree
        for folder in folders:
            place = place[folder]
        place[name] = value
    return tree


def test_a_run_continues_with_its_own_configuration():
    result = resume.merged(OWN, asked(client__lr=0.9, model={"_target_": "vgg5"}), ["resume"], RUN)
    assert result == OWN | {"resume": "/runs/a", "run": {"dir": "/runs/a"}}


def test_what_the_model_does_not_depend_on_may_change():
    tree = asked(json=True, runtime__workers=2, rounds=8)
    given = ["resume", "json", "runtime.workers", "faults", "rounds"]
    result = resume.merged(OWN, tree, given, RUN)
    assert (result["json"], result["rounds"], result["faults"]) == (True, 8, {"list": []})
    assert result["runtime"] == {"kind": "local", "workers": 2}


def test_json_is_as_this_call_wants_it():
    own = OWN | {"json": True}
    assert resume.merged(own, asked(), ["resume"], RUN)["json"] is False


def test_what_agrees_with_the_run_may_be_said_again():
    given = ["client.lr", "model", "runtime", "run.dir"]
    assert resume.merged(OWN, asked(run={"dir": "/runs/a"}), given, RUN)["client"] == OWN["client"]


@pytest.mark.parametrize(
    ("tree", "key", "words"),
    [
        (asked(client__lr=0.1), "client.lr", "client.lr=0.1: must be 0.05 as in the run"),
        (asked(model={"_target_": "cnn"}), "model", "model.width=None: must be 8 as in the run"),
        (asked(runtime__kind="simulation"), "runtime", "runtime.kind=simulation: must be local"),
        (asked(run={"dir": "/runs/b"}), "run.dir", "run.dir=/runs/b: must be /runs/a"),
    ],
)
def test_a_value_that_differs_is_refused_by_name(tree, key, words):
    with pytest.raises(ConfigError) as raised:
        resume.merged(OWN, tree, ["resume", key], RUN)
    assert words in str(raised.value)


def test_rounds_are_not_raised_where_former_learning_rates_depend_on_them():
    own = OWN | {"client": {"lr_schedule": {"kind": "cosine"}}}
    with pytest.raises(ConfigError, match="rounds=8: must stay 6: the learning rates"):
        resume.merged(own, asked(rounds=8), ["rounds"], RUN)


def test_levels_with_rewinding_may_follow_each_other_whatever_the_rates():
    # refused until it was tried: the rates of a level do not depend on how many levels there are
    levels = {"method": "magnitude", "rounds_per_level": 3}
    own = OWN | {"client": {"lr_schedule": {"kind": "cosine"}}, "pruning": levels}
    assert resume.merged(own, asked(rounds=8), ["resume", "rounds"], RUN)["rounds"] == 8


def test_whether_pictures_are_drawn_may_change():
    tree = asked(run={"dir": None, "plots": False})
    merged = resume.merged(OWN, tree, ["run.plots"], RUN)
    assert merged["run"] == {"dir": "/runs/a", "plots": False}


def test_a_place_in_a_list_cannot_be_changed_alone():
    tree = asked(faults={"list": [{"kind": "server_killed", "round": 4}]})
    with pytest.raises(ConfigError, match=r"write faults.list=\[…\] as a whole"):
        resume.merged(OWN, tree, ["faults.list.0.round"], RUN)


def test_a_folder_without_configuration_cannot_be_continued(tmp_path):
    with pytest.raises(RunError, match="No such file"):
        resume.stored(tmp_path)
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(RunError, match=r"config.yaml is damaged"):
        resume.stored(tmp_path)


def test_the_digest_depends_on_the_model_and_not_on_how_it_is_run(configure):
    plain = resume.digest(configure())
    same = configure("rounds=3", "json=true", "runtime.workers=2", "run.dir=x", "resume=x")
    assert resume.digest(same) == plain
    for other in ("client.lr=0.1", "seed=1", "strategy=fedadam", "data=synthetic", "num_clients=3"):
        assert resume.digest(configure(other)) != plain


# --- real processes, really killed ---

RUNNER = """
import json, os, sys, time, signal
import sklearn.datasets, tensorboard.summary.writer.record_writer
import fedsys.commands.train, fedsys.runtime.local, fedsys.runs.scalars, strategies.app, clients.app
from fedsys.main import main
fedsys.runtime.quiet_flower()
fedsys.config.compose_text("")
for line in sys.stdin:  # one process, which imports once, has a child for each command
    job = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        status = 70
        try:
            status = main(job["argv"])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    kill_at = began + job["kill_after"]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.005)
        if time.monotonic() > kill_at:
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(ended[1])
    answer = {"status": status, "seconds": time.monotonic() - began}
    print(json.dumps(answer | {n: open(n).read() for n in ("out", "err")}), flush=True)
"""

SMALL = ["train", "num_clients=3", "rounds=5", "client.epochs=1", "client.batch_size=64"]
SMALL += ["json=true", "run.plots=false"]
# "kept" also prunes by levels of two rounds, each of which starts anew from round 1.
CASES = {
    "fedavgm": ["strategy=fedavgm", "strategy.server_momentum=0.9"],
    "fedadam": ["strategy=fedadam", "strategy.fraction_train=0.7"],
    "kept": ["client.keep_optimizer=true", "strategy.fraction_train=0.7"],
}
CASES["kept"] += ["pruning=iterative", "pruning.rounds_per_level=2"]
# "fedavgm" prunes channels in two steps by what they cost.
CASES["fedavgm"] += ["pruning=group_norm", "pruning.sparsity=0.5", "pruning.steps=2"]
CASES["fedavgm"] += ["pruning.cost=macs", "pruning.cost_weight=0.5"]


class Runner:
    def __init__(self, folder):
        self.folder, self.references = folder, {}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment,
            text=True,
        )

    def __call__(self, *argv, kill_after=600.0):
        job = {"argv": argv, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer["status"] == 0:
            answer["result"] = json.loads(answer["out"].splitlines()[-1])
        return answer

    def reference(self, case):
        if case not in self.references:
            self.references[case] = self(*SMALL, *CASES[case], f"run.dir={case}-whole")
        return self.references[case]

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def fedsys(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("runs"))
    yield runner
    runner.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_random_moments_ends_with_the_same_model(fedsys, case):
    whole = fedsys.reference(case)
    moments = random.Random(f"kill {case}")
    fault = "faults.list=[{kind:server_killed,round:1,position:after_checkpoint}]"
    assert fedsys(*SMALL, *CASES[case], fault, f"run.dir={case}")["status"] == -signal.SIGKILL
    for _ in range(3):
        after = moments.uniform(0.1, 0.6) * whole["seconds"]
        ended = fedsys("train", f"resume={case}", "json=true", kill_after=after)
        if ended["status"] != -signal.SIGKILL:
            break
    else:
        ended = fedsys("train", f"resume={case}", "json=true")
    assert ended["status"] == 0, ended["err"]
    assert ended["result"]["model_sha256"] == whole["result"]["model_sha256"]
    rounds = [row["round"] for row in RunFolder.open(fedsys.folder / case).rounds()]
    assert rounds == [1, 2, 3, 4, 5]
    masks = [p.relative_to(fedsys.folder / f"{case}-whole") for p in
             (fedsys.folder / f"{case}-whole").rglob("*.safetensors")]  # fmt: skip
    written = {"fedavgm": 1, "kept": 3}
    assert len([p for p in masks if "masks" in p.name]) == written.get(case, 0)
    for file in masks:
        expected = (fedsys.folder / f"{case}-whole" / file).read_bytes()
        if "checkpoints" not in file.parts and file.name != "model.safetensors":
            assert (fedsys.folder / case / file).read_bytes() == expected


@pytest.mark.parametrize("position", SERVER_POSITIONS)
def test_a_server_killed_anywhere_in_a_round_ends_with_the_same_model(fedsys, position):
    whole = fedsys.reference("fedadam")
    fault = f"faults.list=[{{kind:server_killed,round:3,position:{position}}}]"
    name = f"run.dir={position}"
    killed = fedsys(*SMALL, *CASES["fedadam"], fault, name)
    assert killed["status"] == -signal.SIGKILL
    ended = fedsys("train", f"resume={position}", "json=true")
    assert ended["status"] == 0, ended["err"]
    assert ended["result"]["model_sha256"] == whole["result"]["model_sha256"]
    assert [fault["fired"] for fault in ended["result"]["faults"]] == [True]
    assert ended["result"]["accuracy"] == whole["result"]["accuracy"]


def test_training_longer_gives_the_model_of_the_longer_run(fedsys):
    short = [part if part != "rounds=5" else "rounds=3" for part in SMALL]
    assert fedsys(*short, *CASES["fedavgm"], "run.dir=short")["status"] == 0
    finished = fedsys("train", "resume=short", "json=true")
    assert finished["status"] == 0
    assert "is finished; rounds= above 3 goes on" in finished["err"]
    assert finished["result"]["rounds"] == 3
    longer = fedsys("train", "resume=short", "rounds=5", "json=true")
    whole = fedsys.reference("fedavgm")
    assert longer["result"]["model_sha256"] == whole["result"]["model_sha256"]
    shorter = fedsys("train", "resume=short", "rounds=2")
    assert shorter["status"] == 2
    assert "rounds=2: must be at least 5, the rounds that the run has behind it" in shorter["err"]


def test_a_damaged_checkpoint_costs_a_round_and_not_the_run(fedsys):
    whole = fedsys.reference("fedadam")
    fault = "faults.list=[{kind:server_killed,round:4,position:after_checkpoint}]"
    fedsys(*SMALL, *CASES["fedadam"], fault, "run.dir=damaged")
    file = fedsys.folder / "damaged/checkpoints/round-000004.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    ended = fedsys("train", "resume=damaged", "json=true")
    assert re.search(
        r"round-000004.safetensors is damaged: .*continuing after round 3", ended["err"]
    )
    assert ended["result"]["model_sha256"] == whole["result"]["model_sha256"]
    kinds = [event["kind"] for event in RunFolder.open(fedsys.folder / "damaged").events()]
    assert kinds == ["fault", "resumed", "checkpoint_damaged"]


def test_checkpoints_of_another_configuration_are_refused(fedsys):
    fault = "faults.list=[{kind:server_killed,round:2}]"
    fedsys(*SMALL, fault, "run.dir=edited")
    file = fedsys.folder / "edited/config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    ended = fedsys("train", "resume=edited")
    assert ended["status"] == 2
    assert "must hold checkpoints of its own config.yaml" in ended["err"]


def test_a_device_is_lost_again_when_its_round_is_played_again(fedsys):
    device = "{kind:device_killed,who:1,round:2,step:1,position:after}"
    plain = fedsys(*SMALL, f"faults.list=[{device}]", "run.dir=lost")
    assert "round 2: client 1 was lost: DeviceKilled" in plain["err"]
    server = "{kind:server_killed,round:2,position:before_checkpoint}"
    fedsys(*SMALL, f"faults.list=[{device},{server}]", "run.dir=lost-twice")
    ended = fedsys("train", "resume=lost-twice", "json=true")
    assert ended["result"]["model_sha256"] == plain["result"]["model_sha256"]
    assert [fault["fired"] for fault in ended["result"]["faults"]] == [True, True]
    assert plain["result"]["model_sha256"] != fedsys.reference("fedavgm")["result"]["model_sha256"]


def test_a_fault_that_never_strikes_makes_the_run_fail(fedsys):
    fault = "faults.list=[{kind:device_killed,who:1,round:1,step:999}]"
    ended = fedsys(*SMALL, "rounds=1", fault, "run.dir=unmet")
    assert ended["status"] == 1
    assert "device_killed (who 1, round 1, step 999, before) did not strike" in ended["err"]
    assert RunFolder.open(fedsys.folder / "unmet").info["status"] == "failed"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["resume=nowhere"], "must be the folder of a run; there is no such folder"),
        (["resume=."], "must be the folder of a run; this one holds no run.json"),
    ],
)
def test_what_is_no_run_is_refused(fedsys, argv, words):
    ended = fedsys("train", *argv)
    assert ended["status"] == 2
    assert words in ended["err"]
