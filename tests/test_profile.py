"""``fedsys profile``: what it measures, and that a fleet file of it is used or refused."""

from __future__ import annotations

import json

import pytest
import yaml

from fedsys.costs import Crossing
from fedsys.link import serve
from fedsys.main import main
from fedsys.profile_link import answer, measure_link


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile")
    arguments = ["model=cnn", f"run.dir={path}", "profile.repeats=3", "profile.name=bench"]
    assert main(["profile", *arguments]) == 0
    return path / "profile.yaml"


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_profile_has_seconds_of_each_unit_and_costs_of_messages(profiled):
    machine = yaml.safe_load(profiled.read_text())["machines"]["bench"]
    assert machine["rows"] == [2, 8, 32] and machine["batch_size"] == 32
    for table in (machine["forward_s"], machine["backward_s"]):
        assert len(table) == 3 and {len(row) for row in table} == {4}
        assert all(value >= 0 for row in table for value in row) and sum(table[-1]) > 0
    assert len(machine["update_s"]) == 4
    assert machine["load_s"] > 0 and machine["message_s"] > 0
    assert set(machine["byte_s"]) == {"fp32", "fp16", "bf16", "int8"}


def test_a_profile_is_a_fleet(profiled, capsys):
    assert main(["plan", f"fleet={profiled}", "network=wifi", "num_clients=2", "json=true"]) == 0
    found = last_line(capsys)
    assert [row["machine"] for row in found["devices"]] == ["bench", "bench"]
    assert found["predicted_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["model=cnn", "model.width=24"], "profile of another model or of another version"),
        (["model=vgg5"], "profile this one"),
    ],
)
def test_a_profile_of_another_model_or_version_is_refused(profiled, capsys, arguments, names):
    assert main(["plan", f"fleet={profiled}", *arguments]) == 2
    err = capsys.readouterr().err
    assert names in err and "fleet.machines.bench.units=" in err


def test_files_that_are_no_fleet_are_refused(tmp_path, capsys):
    assert main(["plan", f"fleet={tmp_path / 'none.yaml'}"]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1]")
    assert main(["plan", f"fleet={tmp_path / 'list.yaml'}"]) == 2
    assert "must hold a mapping" in capsys.readouterr().err
    (tmp_path / "short.yaml").write_text("machines: {a: {rows: [1]}}\ndevices: [a]\nservers: [a]")
    assert main(["plan", f"fleet={tmp_path / 'short.yaml'}"]) == 2
    assert "fleet.machines.a.forward_s=None: must be given" in capsys.readouterr().err


def test_the_other_end_is_measured_over_the_link():
    server = serve("memory://profiled", answer)
    try:
        found = measure_link("memory://profiled", Crossing(256, 8), 16, 3)
    finally:
        server.stop()
    assert found.message_s > 0 and found.latency_s > 0
    assert found.up_bits_s > 0 and found.down_bits_s > 0


def test_options_of_a_profile_are_checked(capsys, tmp_path):
    assert main(["profile", "profile.repeats=1", f"run.dir={tmp_path / 'x'}"]) == 2
    assert "profile.repeats=1: must be a whole number of at least 3" in capsys.readouterr().err
