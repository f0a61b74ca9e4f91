import json
from pathlib import Path

import pytest

from fedsys.main import main

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "portfolio"


@pytest.fixture
def partition(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        status = main(
            ["partition", "json=true", f"run.dir={tmp_path / 'run'}", "run.plots=false", *arguments]
        )
        told = capsys.readouterr()
        return status, json.loads(told.out.splitlines()[-1]) if status == 0 else told.err

    return run


def test_a_model_is_divided_among_three_hosts_and_the_parts_add_up(partition, tmp_path):
    status, found = partition(
        "model=vgg5", "network=4g", "partition.input=[3,32,32]",
        "partition.must={conv1: device, conv2: edge, fc1: cloud}",
    )  # fmt: skip
    assert status == 0
    assert found["hosts"][0]["units"] == "conv1" and found["cuts"][0] == 1
    parts = sum(
        row[key] for row in found["hosts"] for key in ("compute_ms", "messages_ms", "wait_ms")
    )
    parts += sum(row[key] for row in found["links"] for key in ("up_ms", "answer_ms", "latency_ms"))
    assert found["latency_ms"] == pytest.approx(parts)
    assert [row["allowed"] for row in found["whole"]] == [False, False, False]
    assert "takes most" in found["why"] and found["links"][0]["network"] == "4g"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_the_network_that_is_chosen_is_the_first_link_and_decides(partition):
    shape = ("model=vgg16", "partition.input=[3,32,32]", "hosts=device_edge")
    status, mobile = partition(*shape, "network=4g")
    _, wired = partition(*shape, "network=ethernet", "run.dir=null")
    assert status == 0 and mobile["links"][0]["network"] == "4g"
    assert wired["links"][0]["network"] == "ethernet"
    assert wired["latency_ms"] < mobile["latency_ms"] < mobile["whole"][0]["latency_ms"]


def test_a_picture_shows_the_chain(capsys, tmp_path):
    folder = tmp_path / "run"
    arguments = ["model=vgg5", "partition.input=[3,32,32]", "partition.must={conv1: edge}"]
    assert main(["partition", f"run.dir={folder}", *arguments]) == 0
    assert (folder / "plots" / "chain.png").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert "all on device (not allowed)" in told and "takes most" in told


def test_more_than_one_tensor_at_a_cut_stands_beside_the_best_with_one(partition):
    arguments = ("model=googlenet", "hosts=device_edge", "partition.solver=min_cut")
    status, found = partition(*arguments, "partition.input=[3,64,64]")
    assert status == 0 and found["minimum_cut"]["saves"] >= -1e-9


def test_the_effect_of_codecs_is_measured_on_images(partition):
    arguments = ("model=vgg5", "hosts=device_edge", "partition.input=null", "partition.images=64")
    cut = "partition.must={conv1: device, conv2: edge}"
    status, found = partition(*arguments, cut, "partition.codecs=[fp32,int8]")
    assert status == 0
    effect = found["codec_effect"]
    assert effect["fp32"] == effect["fp32"] | {"same_answers": 1.0, "max_difference": 0.0}
    assert 0 < effect["int8"]["max_difference"] < 1


REFUSED = [
    (["hosts.list=[]"], "hosts.list"),
    (["partition.must={conv9: device}"], "partition.must=conv9: must be one of the units"),
    (["partition.must={conv1: moon}"], "partition.must.conv1=moon: must be one of the hosts"),
    (["partition.must={conv1: cloud, conv2: device}"], "partition.must.conv2=device"),
    (["partition.upload_mb={device: x}"], "partition.upload_mb.device=x"),
    (["partition.objective=fastest"], "partition.objective=fastest: must be one of"),
    (["partition.images=10"], "partition.input=null"),
    (["hosts.links=[]"], "hosts.links=0: must be 2"),
    (["hosts.list=[{name: a, machine: pi4},{name: a, machine: pi4}]"], "a name of its own"),
    (["hosts.list=[{name: a, machine: pi9},{name: b, machine: pi4}]"], "must be one of hosts.mach"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_its_name(partition, arguments, words):
    status, told = partition("model=vgg5", "partition.input=[3,32,32]", *arguments)
    assert status == 2 and words in told


def test_variant_and_cuts_of_a_portfolio_are_chosen_together(partition):
    status, found = partition(f"portfolio={GOLDEN}", "network=wifi")
    assert status == 0
    names = {row["variant"] for row in found["variants"]}
    assert found["variant"] in names and "parent" in names
    chosen = next(row for row in found["variants"] if row["variant"] == found["variant"])
    best = max(row["accuracy"] for row in found["variants"])
    fit = [row for row in found["variants"] if row["accuracy"] >= best - 0.02]
    assert chosen["latency_ms"] == min(row["latency_ms"] for row in fit)
