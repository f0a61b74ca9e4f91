"""The examples, and the Python of the README, run as they stand and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

PROMISES = {
    "own_task.py": r"(?s)the same model, to the bit; .*error 0\.\d+.*% of the weights pruned",
    "small_variants.py": r"none +85,162 .*\n +30% .*\n +45% .*\n +60% ",
    "split_by_hand.py": r"(cut \d, behind .*; the same model, to the bit\n){2}",
    "where_to_cut.py": r"(?s)4g: a round takes \d+ s.*wifi: .*trains up to conv1, the edge",
}


def said_by(tmp_path, *command):
    """Run Python in an empty folder and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_promises_something():
    assert set(EXAMPLES) == PROMISES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_says_what_it_promises(name, tmp_path):
    said = said_by(tmp_path, str(ROOT / "examples" / name))
    assert re.search(PROMISES[name], said), said
    assert "ANOTHER MODEL" not in said


@pytest.mark.slow
def test_the_python_of_the_readme_runs_and_prints_what_it_says(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    said = said_by(tmp_path, "-c", code).splitlines()
    promised = re.findall(r"print\(.*?\) +# (.*)", code)
    assert promised and said == promised
