"""The ServerApp: what a whole run does around its rounds."""

import pytest
import yaml

from fedsys.config import parse
from fedsys.errors import ModelError
from fedsys.runs.folder import RunFolder
from fedsys.runtime import run


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
