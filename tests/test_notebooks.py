"""The notebooks run as they stand, in an empty folder, and say what they are kept with."""

import copy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def said(cell):
    """Return what a cell prints, and the value of its last line; pictures are no text."""
    return "".join(
        output.get("text") or output["data"]["text/plain"]
        for output in cell.get("outputs", ())
        if output["output_type"] in ("stream", "execute_result")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the client and its event loop
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_says_what_it_is_kept_with(file, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = nbformat.read(file, as_version=4)
    ran = copy.deepcopy(kept)
    NotebookClient(ran, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kept, now = [said(cell) for cell in kept.cells], [said(cell) for cell in ran.cells]
    assert any(kept) and [new for new, old in zip(now, kept, strict=True) if old] == [
        old for old in kept if old
    ]


def test_a_notebook_keeps_nothing_that_another_machine_would_say_otherwise():
    for file in NOTEBOOKS:
        text = file.read_text()
        assert "/tmp/" not in text and len(text) < 100_000
