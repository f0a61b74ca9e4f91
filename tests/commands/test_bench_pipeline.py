"""The benchmark of split training: what it plans, bounds and compares; and a small real cell."""

import json

import numpy as np
import pytest
from PIL import Image

from fedsys.commands import bench
from fedsys.commands.bench import pipeline
from fedsys.config import parse, with_values
from fedsys.errors import ConfigError
from fedsys.main import main

SMALL = ("+bench=pipeline", "num_clients=2", "client.batch_size=20", "data.shape=[3,16,16]")


def options_of(config, **more):
    return {key: value for key, value in config.bench.items() if key != "name"} | more


@pytest.fixture
def config(configure):
    return configure(*SMALL)


def test_every_cell_has_a_plan_and_bounds_that_it_cannot_beat(config):
    cells = list(pipeline.planned(config, options_of(config, links=["wifi"])))
    assert len(cells) == 1 * 2 * 2 * len(pipeline.METHODS)
    for cell in cells:
        bound, busiest = pipeline.bounds(cell)
        assert 0 < busiest <= bound * (1 + 1e-9)
        assert bound <= max(cell.plan.iteration_s)
        cuts = {choice.cut for choice in cell.plan.choices}
        if cell.method == "classic":
            assert cuts == {cell.load.units} and cell.alone
            assert max(cell.plan.iteration_s) <= 1.1 * bound
        if cell.method in ("splitfed", "pipar", "auto_offloaded"):
            assert max(cuts) < cell.load.units
    assert len({cell.key for cell in cells if cell.method == "classic"}) == 2  # one for each device


def test_cells_that_are_one_measurement_have_one_key(config):
    cells = list(pipeline.planned(config, options_of(config)))
    for one in cells:
        for other in cells:
            if one.key == other.key:
                assert one.device == other.device
                assert one.alone == other.alone
                assert one.alone or one.plan.choices == other.plan.choices
                assert one.alone or (one.link, one.codec) == (other.link, other.codec)


@pytest.mark.parametrize(
    ("key", "value", "hint"), [("methods", ["pipra"], "pipar"), ("links", ["wifl"], "wifi")]
)
def test_a_name_that_there_is_not_is_said_with_one_that_there_is(config, key, value, hint):
    with pytest.raises(ConfigError, match=hint):
        list(pipeline.planned(config, options_of(config, **{key: value})))


def row(link, codec, method, seconds, *, bound=1.0, predicted=1.0, void=False):
    return {
        "link": link, "device": "pi3", "codec": codec, "method": method, "iteration_s": seconds,
        "bound_ratio": bound / seconds, "prediction_error": predicted / seconds - 1, "void": void,
    }  # fmt: skip


def test_the_comparison_is_that_of_valid_cells_of_one_setting():
    rows = [
        row("4g", "fp32", "splitfed", 4.0, predicted=4.4),
        row("4g", "fp32", "auto_offloaded", 2.0, bound=1.9, predicted=2.0),
        row("4g", "int8", "auto_offloaded", 0.8, bound=0.6, predicted=0.8),
        row("4g", "fp32", "classic", 2.5, predicted=2.5),
        row("4g", "fp32", "auto", 2.6, bound=2.5, predicted=2.6),
        row("4g", "fp32", "exhaustive", 2.6, predicted=2.6),
        row("wifi", "fp32", "splitfed", 9.0, void=True),
        row("wifi", "fp32", "auto_offloaded", 1.0, bound=0.1, predicted=9.0, void=True),
    ]
    found = pipeline.summary(rows)
    assert found["bound_ratio_least"] == pytest.approx(0.75)
    assert found["prediction_error_largest"] == pytest.approx(0.1)
    assert found["prediction_error_median"] == 0.0
    assert found["auto_by_classic_largest"] == pytest.approx(1.04)
    assert found["auto_by_exhaustive_largest"] == 1.0
    assert found["splitfed_by_auto_offloaded_median"] == 2.0
    assert found["splitfed_by_int8_largest"] == 5.0
    assert found["void_cells"] == 2


def test_a_cell_whose_device_lost_its_edge_server_is_void(config):
    """On a machine that was too busy two devices trained alone, at 54 s instead of 9, as valid."""
    cell = next(pipeline.planned(config, options_of(config, links=["wifi"])))
    measured = {"measured_by": cell.name, "iteration_s": 1.0, "emulation_load": 0.1}
    for recoveries, void in ((0, False), (1, True)):
        assert pipeline.row_of(cell, {**measured, "recoveries": recoveries})["void"] is void


@pytest.mark.slow
def test_one_cell_is_measured_on_real_links_and_shared_by_methods_with_one_plan(
    configure, tmp_path
):
    base = configure(*SMALL, f"run.dir={tmp_path}", "data.test_examples=10")
    fleet = {"machines": {"fast": {"macs_per_s": 1e11}}}
    config = parse(with_values(base.text, fleet=fleet))
    options = options_of(
        config, links=["wifi"], devices=["fast"], codecs=["int8"],
        methods=["auto_offloaded", "exhaustive", "auto"], iterations=2, cpu_cuts=[],
    )  # fmt: skip
    figures = pipeline.run(config, options)
    rows = figures["cells"]
    assert [r["method"] for r in rows] == ["auto_offloaded", "exhaustive", "auto"]
    assert {"link", "device", "codec", "method", "cut", "micro_batches", "iteration_s",
            "edge_idle_s", "busiest_s", "bound_s", "predicted_s", "device_cpu_s",
            "emulation_load"} <= set(rows[0])  # fmt: skip
    assert rows[0]["iterations"] == 2 * 2
    assert rows[0]["iteration_s"] > 0 and rows[0]["device_cpu_s"] > 0
    shared = [r for r in rows if r["same_as"]]
    for r in shared:
        assert r["iteration_s"] == next(
            o["iteration_s"] for o in rows if r["same_as"].endswith(f"-{o['method']}")
        )
    predicted = json.loads((tmp_path / "profile.json").read_text())["predicted"]
    assert [p["predicted_s"] for p in predicted] == [r["predicted_s"] for r in rows]
    ran = tmp_path / "wifi-fast-int8-auto_offloaded"
    assert (ran / "trace.json").exists() and json.loads((ran / "trace.json").read_text())
    assert bench.draw(pipeline.chart(figures), tmp_path / "p.png").stat().st_size > 1000


def test_the_benchmark_takes_real_images_and_then_scores_each_codec(tmp_path, capsys):
    """``data.root=`` was refused, and nothing said how accurate int8 is beside fp32."""
    for k in range(160):
        part = "test" if k < 20 else "train"
        folder = tmp_path / "images" / part / f"class{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 90 * (k % 2) + k, np.uint8)).save(folder / f"{k}.png")
    status = main([
        "bench", "pipeline", "json=true", f"run.dir={tmp_path / 'run'}", "num_clients=1",
        f"data.root={tmp_path / 'images'}", f"data.cache={tmp_path / 'cache'}", "run.plots=false",
        "client.batch_size=20", "+fleet.machines.fast={macs_per_s: 1.0e+11}", "bench.links=[wifi]",
        "bench.devices=[fast]", "bench.methods=[splitfed]", "bench.iterations=2",
        "bench.cpu_cuts=[]",
    ])  # fmt: skip
    assert status == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["codec"] for row in figures["cells"]] == ["fp32", "int8"]
    scores = figures["accuracies"]
    assert [(row["codec"], row["rounds"]) for row in scores] == [("fp32", 5), ("int8", 5)]
    assert all(0 <= row["accuracy"] <= 1 for row in scores)


def test_a_choice_of_data_stands_whatever_follows_from_its_root(capsys, tmp_path):
    where = (f"data.root={tmp_path}", f"run.dir={tmp_path / 'run'}")
    assert main(["bench", "pipeline", "data=mnist", "model=lenet", *where]) == 2
    assert "MNIST" in capsys.readouterr().err
