"""fedsys from Python: the bits of the command, and objects that go where they can."""

import json
import subprocess
import sys
from pathlib import Path
from threading import enumerate as threads

import httpx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedsys
from fedsys.commands.python import FinishedRun, PlannedRun
from fedsys.config import objects
from fedsys.errors import ConfigError, ModelError
from fedsys.main import main
from tests import own_work
from tests.models import hf_style
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("task=regression", "num_clients=2", "rounds=2", "client.epochs=1", "run.plots=false")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def perceptron():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
        )


def test_importing_it_costs_nothing_until_it_is_called():
    code = (
        "import sys, fedsys; assert callable(fedsys.train); "
        "sys.exit(bool({'torch', 'flwr', 'hydra'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    assert {"load", "plan", "prune", "train"} <= set(dir(fedsys))


def test_a_run_is_that_of_the_command_to_the_bit(tmp_path, capsys):
    overrides = ["data=table", "model=mlp", *SMALL]
    run = fedsys.train(*overrides)
    capsys.readouterr()
    assert main(["train", *overrides, f"run.dir={tmp_path / 'cli'}", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run.figures["model_sha256"] == told["model_sha256"]
    assert run.figures["mae"] == told["mae"] and "accuracy" not in run.figures
    assert isinstance(run, FinishedRun)
    assert [row["round"] for row in run.history] == [1, 2]
    assert run.history[-1]["val_mae"] == run.figures["val_mae"]
    assert run.metric.name == "mae" and not run.metric.higher
    assert "mean absolute error" in repr(run)


def test_objects_are_trained_split_and_plain_to_the_same_bits():
    def cubed(outputs, targets):
        return (outputs - targets).abs().pow(3).mean()

    given = {"model": perceptron(), "data": own_work.rows(), "loss": cubed}
    plain = fedsys.train(*SMALL, **given)
    split = fedsys.train(*SMALL, "policy=fixed", "policy.cut=0.5", **given)
    assert plain.figures["model_sha256"] == split.figures["model_sha256"]
    other = fedsys.train(*SMALL, **{**given, "loss": F.l1_loss})
    assert other.figures["model_sha256"] != plain.figures["model_sha256"]
    start, end = given["model"].state_dict(), plain.model.state_dict()
    assert all(not torch.equal(start[name], end[name]) for name in start)  # trained, and a copy
    again = fedsys.load(plain.path)
    assert torch.equal(again.model.state_dict()["0.weight"], end["0.weight"])
    assert again.figures["mae"] == plain.figures["mae"]


def test_an_object_whose_layers_share_weights_is_not_cut_between_them():
    """A copy on ``meta`` had two weights of one: it was cut, and both were trained."""
    given = {"model": hf_style.Gpt2(11), "data": own_work.Sentences()}
    asked = ("task=next_token", *SMALL[1:])
    plain = fedsys.train(*asked, **given)
    try:
        split = fedsys.train(*asked, "policy=fixed", "policy.cut=0.5", **given)
    except ModelError as refused:
        assert "share" in str(refused)
    else:
        assert plain.figures["model_sha256"] == split.figures["model_sha256"]
    with torch.device("meta"):
        made = objects.model(objects.target_of(given["model"], "model")["key"])
    assert len([*made.parameters()]) == len([*given["model"].parameters()])
    assert {p.device.type for p in [*made.parameters(), *made.buffers()]} == {"meta"}


def test_a_metric_of_ones_own_has_its_name_everywhere(capsys):
    run = fedsys.train(*SMALL, model=perceptron(), data=own_work.rows(), metric=own_work.worst)
    assert run.figures["worst"] > 0 and "val_worst" in run.history[0]
    assert "val worst" in capsys.readouterr().err


def test_a_class_goes_by_its_path_and_so_anywhere():
    assert objects.target_of(own_work.Bag, "model") == {"_target_": "tests.own_work.Bag"}
    assert objects.target_of(F.l1_loss, "function") == {"_target_": "torch.nn.functional.l1_loss"}
    kept = objects.target_of(nn.MSELoss(), "function")
    assert kept["_target_"] == "fedsys.config.objects.function"
    model = perceptron()
    assert objects.target_of(model, "model") == objects.target_of(model, "model")


@pytest.mark.parametrize(
    "runtime", [["runtime=simulation"], ["runtime=deployment", "runtime.launch=true"]],
    ids=["simulation", "deployment"],
)  # fmt: skip
def test_objects_that_cannot_travel_are_refused_with_the_way_out(runtime):
    with pytest.raises(ConfigError, match="objects of this process alone; put the class"):
        fedsys.train(*SMALL, *runtime, model=perceptron(), data=own_work.rows())


def test_an_object_of_another_process_is_named():
    with pytest.raises(ConfigError, match="does not travel; give it again"):
        objects.model("Sequential-99")


@pytest.mark.parametrize("given", ["rounds", 3, "--help"])
def test_what_is_no_override_is_refused(given):
    with pytest.raises(ConfigError, match="must be texts such as"):
        fedsys.train(given)
    with pytest.raises(ConfigError, match="no such option"):
        fedsys.train("ronds=3")


def test_a_plan_of_ones_own_model():
    made = fedsys.plan(
        "task=regression", "fleet=pi_lab", "network=wifi", "num_clients=2",
        model=perceptron(), data=own_work.rows(),
    )  # fmt: skip
    assert isinstance(made, PlannedRun) and len(made.devices) == 2
    assert made.predicted_s > 0 and made.why


def test_a_run_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(Exception, match=r"run\.json"):
        fedsys.load(tmp_path)


def test_a_model_of_images_is_pruned_and_one_of_tables_is_refused():
    few = ("data.max_examples=80", "num_clients=2", "rounds=1", "client.epochs=1")
    run = fedsys.train(*few, "run.plots=false")
    few = ("variants.memory=false", "variants.batch_sizes=[1]", "variants.threads=[1]")
    portfolio = fedsys.prune(run, "pruning.sparsity=0.5", "variants.fine_tune=0", *few)
    assert {v.name for v in portfolio.variants} >= {portfolio.parent.name}
    table = fedsys.train("data=table", "model=mlp", *SMALL)
    with pytest.raises(ConfigError, match="must be of images in classes"):
        fedsys.prune(table.path)


FEW_IMAGES = ("data.max_examples=80", "num_clients=2", "rounds=1", "client.epochs=1")


def asked(address, count=3):
    """Return what an endpoint answers to images of noise, as a client of its protocol sees it."""
    pixels = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    given = {"name": "input", "shape": list(pixels.shape), "datatype": "FP32"}
    body = {"inputs": [{**given, "data": pixels.flatten().tolist()}]}
    reply = httpx.post(f"{address}/v2/models/classifier/infer", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["outputs"][0]["data"]


def test_a_run_a_portfolio_and_an_object_are_served_with_the_same_bits():
    run = fedsys.train(*FEW_IMAGES, "run.plots=false")
    with fedsys.serve(run) as served:
        assert served.address.startswith("http://127.0.0.1:")
        by_run = asked(served.address)
        assert served.status()["answers"] == {"parent": 3} and served.grpc_address is None
    few = ("variants.memory=false", "variants.batch_sizes=[1]", "variants.threads=[1]")
    portfolio = fedsys.prune(run, "pruning.sparsity=0.5", "variants.fine_tune=0", *few)
    served = fedsys.serve(portfolio, "serving.variant=parent", "serving.name=classifier")
    assert asked(served.address) == by_run
    assert served.close() == served.close() and served.close()["answers"] == {"parent": 3}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.address}/v2")
    until(lambda: not {"http", "inference", "switch control"} & {t.name for t in threads()})
    with fedsys.serve(model=run.model, data=own_work.drawings) as served:
        assert len(asked(served.address)) == len(by_run)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"model": nn.Linear(1, 1)}, "must come with data"),
        ({}, "must name a folder of pruned variants"),
        ({"what": "nowhere"}, "must be a folder that exists"),
    ],
)
def test_what_cannot_be_served_is_refused(given, rule):
    with pytest.raises(ConfigError, match=rule):
        fedsys.serve(**given)


def test_what_a_notebook_shows_of_a_run():
    run = fedsys.train(*FEW_IMAGES, "run.plots=false")
    assert "test accuracy" in run._repr_html_() and str(run.path) in run._repr_html_()
