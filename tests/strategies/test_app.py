"""The ServerApp: what a whole run does around its rounds."""

import pytest
import yaml

from fedsys.config import parse
from fedsys.errors import ModelError
from fedsys.main import main
from fedsys.runs.folder import RunFolder
from fedsys.runs.happened import in_words
from fedsys.runtime import run
from tests.planning.mobility.sumo_files import as_xml


def test_a_device_that_will_reach_no_edge_server_is_left_out_and_that_is_said(tmp_path, capsys):
    """The run ended with a KeyError where the plans of its devices were told."""
    steps = {2.0 * i: [("near", 20.0 * i, 0.0), ("far", 9e3, 9e3)] for i in range(50)}
    (tmp_path / "fcd.xml").write_text(as_xml(steps))
    small = ("data=synthetic", "data.examples=40", "data.test_examples=10", "num_clients=2")
    split = ("rounds=1", "policy=fixed", "num_edges=2", "client.epochs=1")
    places = "fleet.places=[{x: 0, y: 0, radius_m: 600}, {x: 1000, y: 0, radius_m: 600}]"
    moves = ("mobility=trace", f"mobility.file={tmp_path / 'fcd.xml'}", places)
    folder = ("run.plots=false", f"run.dir={tmp_path / 'run'}")
    assert main(["train", *small, *split, *moves, *folder]) == 0
    assert "no edge server is in its reach any more" in capsys.readouterr().err
    assert RunFolder.open(tmp_path / "run").info["status"] == "finished"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_model_that_diverges_is_told_of_once(tmp_path, capsys):
    """Such a run ended as finished, with nan in its table and no word of it."""
    small = ("data=synthetic", "data.examples=40", "data.test_examples=10", "num_clients=2")
    wild = ("rounds=3", "client.lr=1e30", "run.plots=false", f"run.dir={tmp_path / 'run'}")
    assert main(["train", *small, *wild]) == 0
    said = capsys.readouterr().err
    assert said.count("the model has diverged") == 1 and "client.lr lower than 1e+30" in said
    events = RunFolder.open(tmp_path / "run").events()
    (event,) = [e for e in events if e["kind"] == "diverged"]
    assert in_words(event).endswith("trains nothing more")


def forked(config):
    model = {"_target_": "tests.models.odd.Forked", "norm": "none", "init": None}
    return parse(yaml.safe_dump({**yaml.safe_load(config.text), "model": model}))


def test_a_model_that_cannot_be_traced_trains_as_a_whole_and_is_not_split(configure, tmp_path):
    """Runs traced their model for what is told of a split, and ended where there was none."""
    small = ("data=synthetic", "num_clients=2", "rounds=1")
    run(forked(configure(*small, f"run.dir={tmp_path / 'whole'}")))
    assert RunFolder.open(tmp_path / "whole").info["status"] == "finished"
    with pytest.raises(ModelError, match="cannot be traced"):
        run(forked(configure(*small, "policy=fixed", f"run.dir={tmp_path / 'split'}")))
