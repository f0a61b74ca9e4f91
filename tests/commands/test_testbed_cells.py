"""The pure functions of ``benchmarks/testbed_cells.py``: what is made of measurements."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def cells():
    """The module, as it is found beside the command that uses it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("cells", BENCHMARKS / "testbed_cells.py")
        module = sys.modules["cells"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("cells", "on_testbed"):
            sys.modules.pop(name, None)


def test_cells_are_named_by_quota_and_network(cells):
    assert cells.cell_of("10:4g_plus") == (10, "4g_plus")
    for text in ("10", "wifi", "11:wifi", "10:5g", "ten:wifi"):
        with pytest.raises(ValueError, match="must be one of 10:wifi"):
            cells.cell_of(text)


def test_processor_time_between_two_moments_is_interpolated(cells):
    samples = [(10.0, 1.0), (11.0, 1.4), (12.0, 1.4)]
    assert cells.busy_s(samples, 10.5, 11.5) == pytest.approx(0.2)
    assert cells.busy_s(samples, 10.25, 10.75) == pytest.approx(0.2)
    assert cells.busy_s(samples, 0.0, 99.0) == pytest.approx(0.4)


def test_the_rival_is_as_fast_here_as_classic_training_says(cells):
    """A machine on which bde1fc2 trains twice as long would have PiPar train twice as long, too."""
    took = {"fp32": {"measured_s": 1.449, "predicted_s": 1.62}}
    took["int8"] = {"measured_s": 0.58, "predicted_s": 0.60}
    told = cells.judged((10, "wifi"), 2 * 1.23, 1.40, took)
    assert told["pipar_s"] == pytest.approx(2.32)
    assert told["int8"]["times_as_fast"] == pytest.approx(4.0)
    assert told["int8"]["met"] == {"pipar": True, "classic": True, "prediction": True}
    assert told["fp32"]["met"] == {"pipar": True, "classic": False, "prediction": False}
    assert cells.judged((25, "wifi"), 0.48, 1.0, took)["fp32"]["goal"] == 0


def test_an_edge_has_what_devices_leave_of_the_cores(cells):
    costs = cells.MachineCosts("edge", (1,), ((0.1,),), ((0.2,),), (0.01,))
    shared = cells.sharing(costs, 2, 1.0)
    assert (shared.forward_s, shared.backward_s, shared.update_s) == (((0.2,),), ((0.4,),), (0.02,))
    assert cells.sharing(costs, 2, 2.0).forward_s == ((pytest.approx(1.0),),)


def test_plans_are_said_by_kind_and_the_table_says_what_is_missed(cells):
    assert cells.in_words([[1, 4], [1, 5], [1, 4], [5, 1]], 5) == "2 × (1, 4), (1, 5), alone"
    seen = {
        codec: {"choices": [[1, 4]] * 4, "predicted_s": 0.5, "measured_s": 0.4, "cpu_s": 0.03,
                "load": 1.0}
        for codec in ("fp32", "int8")
    }  # fmt: skip
    cell = {
        **{"quota": 10, "link": "wifi", "units": 5, "base_classic_s": 1.23, "classic_s": 1.0},
        **{"seen": seen, **cells.judged((10, "wifi"), 1.23, 1.0, seen)},
    }
    lines = cells.as_table([cell]).splitlines()
    assert len(lines) == 4
    assert "| 10 %, wifi | 1.160 | 1.000 | fp32 | (1, 4) | 0.500 | 0.400 |" in lines[2]
    assert "+25% **missed**" in lines[2]
    assert "| 2.90 | 3.5 **missed** |" in lines[3]


def test_what_was_kept_is_not_measured_again(cells, tmp_path):
    file, asked = tmp_path / "kept.json", []
    for _ in range(2):
        kept = cells.Kept(file)
        assert kept.of("a", lambda: asked.append(1) or {"measured_s": 1.0}) == {"measured_s": 1.0}
    assert len(asked) == 1
    assert cells.Kept(None).of("a", lambda: 2) == 2


def test_as_many_images_of_each_class_are_linked(cells, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for number in range(200):
            (tmp_path / "all" / name / f"{number:03}.png").write_bytes(b"")
    made = cells.a_sample(tmp_path / "all", tmp_path / "some", 2)
    counts = {each.name: len(list(each.iterdir())) for each in made.iterdir()}
    assert counts == {"cat": 140, "dog": 140}
