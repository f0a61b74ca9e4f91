"""What commit bde1fc2 wrote still opens, reports, resumes and answers: `tests/golden/README.md`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedsys.config import parse, with_values
from fedsys.identity import environment, state_sha256
from fedsys.main import main
from fedsys.pruning.portfolio import Portfolio, run
from fedsys.runs.checkpoint import Checkpoints
from fedsys.runs.folder import RunFolder
from fedsys.runtime import run as carry_out
from fedsys.serving.images import normalise
from fedsys.serving.portfolio import PortfolioEngine, card_of
from fedsys.training.masks import Masks

GOLDEN = Path(__file__).parent / "golden"
FINISHED, INTERRUPTED = GOLDEN / "finished", GOLDEN / "interrupted"
NAMES = ("parent", "group_norm-30", "group_norm-50")


def result():
    return RunFolder.open(FINISHED).info["result"]


def same_arithmetic():
    """Return whether this machine computes the bits of the one that wrote the golden data."""
    here, there = environment(), RunFolder.open(FINISHED).info
    keys = ("cpu", "instruction_set", "libraries")
    same = all(here[key] == there[key] for key in keys)
    return same and here["versions"]["torch"] == there["versions"]["torch"]


def agrees(folder):
    """Check the model of a run against the golden one; to the bit where bits can be equal."""
    told = RunFolder.open(folder).info["result"]
    state, golden = (load_file(f / "model.safetensors") for f in (folder, FINISHED))
    assert told["model_sha256"] == state_sha256(state)
    if same_arithmetic():
        assert told["model_sha256"] == result()["model_sha256"]
    torch.testing.assert_close(state, golden, rtol=1e-2, atol=1e-3)


@pytest.fixture
def interrupted(tmp_path):
    """Return a copy of the interrupted run, which the test may continue."""
    return Path(shutil.copytree(INTERRUPTED, tmp_path / "interrupted"))


def test_a_finished_run_opens():
    folder = RunFolder.open(FINISHED)
    assert folder.info["status"] == "finished"
    assert [row["round"] for row in folder.rounds()] == [1, 2, 3, 4]
    assert folder.rounds()[-1]["val_accuracy"] == result()["val_accuracy"]
    state = load_file(FINISHED / "model.safetensors")
    assert state_sha256(state) == result()["model_sha256"]
    masks = Masks.load(FINISHED / "masks.safetensors")
    assert masks.figures().sparsity == pytest.approx(0.4, abs=0.01)
    for name, mask in masks.items():
        assert not state[name][~mask].any(), name


@pytest.mark.parametrize("run", ["finished", "interrupted"])
def test_the_configuration_of_a_run_is_still_one(run):
    config = parse((GOLDEN / run / "config.yaml").read_text())
    assert (config.rounds, config.num_clients, config.policy["kind"]) == (4, 3, "fixed")
    assert config.pruning.method == "group_norm"


def test_a_run_is_reported(tmp_path, capsys):
    page = tmp_path / "page.html"
    runs = [str(FINISHED), str(INTERRUPTED)]
    assert main(["report", *runs, f"report.out={page}", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [run["status"] for run in told] == ["finished", "interrupted"]
    assert f"{result()['accuracy']:.2%}" in page.read_text()


def test_a_checkpoint_opens_and_is_as_it_was_after_it_is_written_again(interrupted, tmp_path):
    with Checkpoints(interrupted) as checkpoints:
        checkpoint = checkpoints.newest()
    assert checkpoint is not None and checkpoint.round == 3
    copy = tmp_path / "copy"
    copy.mkdir()
    with Checkpoints(copy) as checkpoints:
        checkpoints.write(checkpoint)
    for suffix in ("json", "safetensors"):
        name = f"checkpoints/round-000003.{suffix}"
        assert (copy / name).read_bytes() == (INTERRUPTED / name).read_bytes()


def test_an_interrupted_run_ends_with_the_model_of_the_uninterrupted_one(interrupted, capsys):
    assert main(["train", f"resume={interrupted}", "faults=none", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rounds"] == 4
    agrees(interrupted)
    for device, cut in result()["cuts"].items():
        assert cut.items() <= told["cuts"][device].items()
    assert [row["round"] for row in RunFolder.open(interrupted).rounds()] == [1, 2, 3, 4]


def test_a_new_run_gives_the_model_and_the_scores_of_the_golden_one(tmp_path):
    own = yaml.safe_load((FINISHED / "config.yaml").read_text())
    text = with_values(yaml.safe_dump(own), run={"dir": str(tmp_path / "new"), "plots": False})
    carry_out(parse(text))
    agrees(tmp_path / "new")
    before, after = RunFolder.open(FINISHED).rounds(), RunFolder.open(tmp_path / "new").rounds()
    columns = ("val_accuracy", "train_loss", "sparsity", "dead_channels", "bytes_up", "bytes_down")
    if same_arithmetic():
        for old, new in zip(before, after, strict=True):
            assert [old[name] for name in columns] == [new[name] for name in columns]
    assert [set(row) for row in after] == [set(row) for row in before]


@pytest.fixture(scope="module")
def portfolio():
    return Portfolio.load(GOLDEN / "portfolio")


def test_a_portfolio_opens_with_its_figures(portfolio):
    assert tuple(variant.name for variant in portfolio.variants) == NAMES
    assert [variant.params for variant in portfolio.variants] == [2582, 1599, 759]
    assert portfolio.parent.test_accuracy == pytest.approx(0.947075208913649)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_answers_what_it_answered_before(portfolio, name, configure):
    stored = load_file(GOLDEN / "answers.safetensors")
    images = torch.from_numpy(normalise(stored["pixels"].numpy(), card_of(portfolio)))
    scores = run(portfolio.module(name), images)
    torch.testing.assert_close(scores, stored[name], rtol=1e-4, atol=1e-4)
    engine = PortfolioEngine(portfolio, configure(f"serving.variant={name}").serving)
    try:
        answer = engine.answer(images.numpy())
    finally:
        engine.close()
    assert answer.by == name
    torch.testing.assert_close(torch.from_numpy(answer.scores), stored[name], rtol=1e-4, atol=1e-4)
