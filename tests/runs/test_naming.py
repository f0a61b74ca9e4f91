"""Names of run folders, and the link to the last one."""

from pathlib import Path

from fedsys.runs.naming import label_of, point_to, take_back


def test_a_name_holds_what_differs_in_characters_that_need_no_quotes():
    values = {"strategy": "fedprox", "client.lr": "0.1", "fleet.devices": "[pi3, pi4]"}
    assert label_of("train", values) == "train-fedprox-lr0.1-devices_pi3_pi4"
    assert label_of("train", {}) == "train"
    assert len(label_of("train", {f"a.b{i}": str(i) for i in range(99)})) <= 80


def test_latest_points_to_the_last_and_back(tmp_path):
    first, second = tmp_path / "day" / "one", tmp_path / "day" / "two"
    first.mkdir(parents=True)
    second.mkdir()
    assert point_to(tmp_path, first) is None
    before = point_to(tmp_path, second)
    assert (tmp_path / "latest").resolve() == second
    take_back(second, before)
    assert (tmp_path / "latest").resolve() == first and not second.exists()


def test_a_folder_with_a_round_is_not_taken_back(tmp_path):
    path = tmp_path / "outputs" / "day" / "run"
    path.mkdir(parents=True)
    (path / "metrics.csv").write_text("round\n1\n")
    take_back(path, None)
    assert (path / "metrics.csv").exists()


def test_somebodys_own_folder_is_not_replaced(tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "run").mkdir()
    assert point_to(tmp_path, tmp_path / "run") is None
    assert not (tmp_path / "latest").is_symlink() and Path(tmp_path / "latest").is_dir()
