import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.errors import RunError
from fedsys.runs.folder import RunFolder
from fedsys.runs.plots import COLORS, curves_of, draw, draw_all, time_parts, time_unit

ALL = [
    "accuracy_by_round.png",
    "accuracy_by_time.png",
    "loss_by_round.png",
    "loss_by_time.png",
    "round_time.png",
]
Row = dict[str, float | str]


def rows_of(count: int) -> list[Row]:
    return [
        {
            "round": float(k),
            "val_accuracy": 1.0 - 0.5 / k,
            "train_accuracy": 1.0 - 0.4 / k,
            "val_loss": 2.0 / k,
            "train_loss": 1.5 / k,
            "clients": 8.0,
            "seconds_round": 1.0,
            "seconds_elapsed": float(k),
            "seconds_train": 0.75,
            "seconds_evaluate": 0.125,
        }
        for k in range(1, count + 1)
    ]


def run_of(folder: Path, rows: list[Row]) -> RunFolder:
    with RunFolder.create(folder) as run:
        for row in rows:
            run.add_round(row)
    return run


def pixels(path: Path) -> Any:
    """Return the picture as an array of shape (height, width, 3), decoded by Pillow."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def shows(path: Path, color: str) -> int:
    """Return how many pixels have exactly this color."""
    rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return int((pixels(path) == rgb).all(axis=-1).sum())


@pytest.mark.parametrize("count", [1, 12, 300])
def test_every_picture_is_drawn_for_any_number_of_rounds(tmp_path: Path, count: int) -> None:
    drawn = draw_all(run_of(tmp_path, rows_of(count)))
    assert sorted(path.name for path in drawn) == ALL
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ALL
    for path in drawn:
        assert pixels(path).shape == (600, 960, 3)
        # validation or the first part; training or the second part
        assert shows(path, COLORS[0]) > 50
        assert shows(path, COLORS[1]) > 50


def test_no_rounds_make_no_pictures(tmp_path: Path) -> None:
    assert draw_all(run_of(tmp_path, [])) == []


def test_what_has_no_numbers_is_not_drawn(tmp_path: Path) -> None:
    rows: list[Row] = [{"round": 1.0, "val_loss": math.nan, "val_accuracy": 0.5, "note": "x"}]
    assert [path.name for path in draw_all(run_of(tmp_path, rows))] == ["accuracy_by_round.png"]


def test_equal_numbers_give_equal_pictures(tmp_path: Path) -> None:
    one = draw_all(run_of(tmp_path / "one", rows_of(3)))
    two = draw_all(run_of(tmp_path / "two", rows_of(3)))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path / "x.png", lambda axes: axes.plot([1, 2], [3, 4]))
    assert dict(matplotlib.rcParams) == before


def test_a_picture_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(RunError, match=r"x\.png: .*; check the folder"):
        draw(tmp_path / "plots" / "x.png", lambda axes: axes.plot([1], [1]))


def test_importing_the_module_imports_neither_matplotlib_nor_torch() -> None:
    code = "import sys, fedsys.runs.plots; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_drawing_does_not_import_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedsys.runs.plots import draw; "
        f"draw(Path({str(tmp_path / 'x.png')!r}), lambda axes: axes.plot([1], [1])); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# --------------------------------------------------------------------------------------------------
# Numbers


def test_curves_leave_out_points_without_a_number() -> None:
    rows: list[Row] = [
        {"round": 1.0, "train_loss": 3.0, "val_loss": math.nan},
        {"round": 2.0, "val_loss": 2.0},
        {"round": 3.0, "train_loss": math.inf, "val_loss": 1.0, "test_loss": "none"},
        {"train_loss": 0.5},
    ]
    assert curves_of(rows, "loss", "round") == {
        "val": ([2.0, 3.0], [2.0, 1.0]),
        "train": ([1.0], [3.0]),
    }
    assert curves_of(rows, "accuracy", "round") == {}


def test_the_parts_of_a_round_and_the_rest_make_the_whole() -> None:
    rows: list[Row] = [
        {"round": 1.0, "seconds_round": 4.0, "seconds_train": 2.0, "seconds_evaluate": 1.0},
        {"round": 2.0, "seconds_round": 3.0, "seconds_train": 3.0, "seconds_elapsed": 7.0},
    ]
    assert time_parts(rows) == {
        "train": ([1.0, 2.0], [2.0, 3.0]),
        "evaluate": ([1.0, 2.0], [1.0, 0.0]),
        "other": ([1.0, 2.0], [1.0, 0.0]),
    }


def test_a_negligible_rest_is_no_part() -> None:
    rows: list[Row] = [{"round": 1.0, "seconds_round": 1.001, "seconds_train": 1.0}]
    assert list(time_parts(rows)) == ["train"]
    assert time_parts([{"round": 1.0, "seconds_round": 1.0}]) == {}
    assert time_parts([]) == {}


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-4, 1e6))
def test_a_time_axis_has_numbers_that_are_read_easily(longest: float) -> None:
    seconds, _ = time_unit(longest)
    assert 0.1 <= longest / seconds <= 500


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["round", "seconds_round", "seconds_a", "seconds_b", "val_loss"]),
            st.one_of(st.floats(), st.text(max_size=3)),
        ),
        max_size=6,
    )
)
def test_any_table_gives_finite_numbers_of_one_length(rows: list[Row]) -> None:
    drawn = [*curves_of(rows, "loss", "round").values(), *time_parts(rows).values()]
    assert all(len(x) == len(y) > 0 and all(map(math.isfinite, [*x, *y])) for x, y in drawn)
