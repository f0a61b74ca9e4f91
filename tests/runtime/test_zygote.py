"""What stays on a device for a bundle: an app is imported once, and data of a run are loaded once.

Each message imported the bundle, looked for a program in all distributions, and loaded the data (an
`image_folder` looked at each of its files): half a second of a desktop's core, seconds on a device.
"""

import json
import os
import signal

import pytest

from fedsys.runtime import zygote
from tests.waiting import until

APP = """
import sys
from pathlib import Path
app, data = object(), {}

def load(name):
    broken = Path(__file__).with_name("broken").exists()
    data.clear()
    data["name"] = name
    with Path(__file__).with_name("loads").open("a") as file:
        file.write(name + "\\n")
    if broken:
        sys.exit("the data are broken")
"""

PROGRAM = """
import json, os, sys
from pathlib import Path
import zygote_app
from fedsys.runtime import zygote

def main():
    run, known = sys.argv[1], dict(zygote_app.data)
    stale = zygote.ask_for(int(run), "zygote_app:load", {"name": "of " + run})
    told = {"parent": os.getppid(), "known": known, "stale": stale}
    file = Path(__file__).with_name(sys.argv[2])
    file.with_suffix(".new").write_text(json.dumps(told))
    file.with_suffix(".new").rename(file)
"""


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
        'dependencies = []\n[tool.flwr.app]\npublisher = "x"\n[tool.flwr.app.components]\n'
        'serverapp = "zygote_app:app"\nclientapp = "zygote_app:app"\n'
    )
    (tmp_path / "zygote_app.py").write_text(APP)
    package = tmp_path / "zygote_programs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text(PROGRAM)
    return tmp_path


@pytest.fixture
def stays(bundle):
    made = zygote.Zygote(bundle)
    yield made
    made.end()
    os.waitpid(made._pid, 0)


def answered(stays, bundle, run, name):
    assert stays.start(["zygote_programs.one", str(run), name], bundle / "log")
    file = bundle / "zygote_programs" / name
    until(file.exists)
    return json.loads(file.read_text())


def loads(bundle):
    file = bundle / "loads"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def test_an_app_is_imported_once_and_data_of_a_run_are_loaded_once(stays, bundle):
    first = answered(stays, bundle, 1, "a")
    assert first == {"parent": stays._pid, "known": {}, "stale": False}
    until(lambda: loads(bundle) == ["of 1"])
    for name in "bc":
        told = answered(stays, bundle, 1, name)
        assert told == {"parent": stays._pid, "known": {"name": "of 1"}, "stale": False}
    assert loads(bundle) == ["of 1"]


def test_data_of_a_former_run_are_forgotten_because_files_may_have_changed(stays, bundle):
    answered(stays, bundle, 1, "a")
    until(lambda: loads(bundle) == ["of 1"])
    assert answered(stays, bundle, 2, "b")["stale"]
    until(lambda: loads(bundle) == ["of 1", "of 2"])
    assert answered(stays, bundle, 2, "c")["known"] == {"name": "of 2"}


def test_what_is_left_of_data_that_could_not_be_loaded_is_forgotten(stays, bundle):
    """The first message of the next run was answered from images of the run that had failed.

    They had been read when their division among clients was refused, and nobody was told that they
    were there. And the process was gone where a source of data called ``sys.exit``.
    """
    (bundle / "broken").touch()
    assert not answered(stays, bundle, 1, "a")["stale"]
    until(lambda: loads(bundle) == ["of 1"])
    (bundle / "broken").unlink()
    told = answered(stays, bundle, 2, "b")
    assert told == {"parent": stays._pid, "known": {"name": "of 1"}, "stale": True}
    until(lambda: loads(bundle) == ["of 1", "of 2"])
    assert answered(stays, bundle, 2, "c")["known"] == {"name": "of 2"}


@pytest.mark.parametrize("app", ["raise ImportError('no such thing')", "raise SystemExit('no')"])
def test_a_bundle_whose_app_cannot_be_imported_has_forks_that_may_say_why(app, bundle):
    """With one that calls ``sys.exit``, every other message was sent to a process that was gone."""
    (bundle / "zygote_app.py").write_text(app)
    made = zygote.Zygote(bundle)
    (bundle / "given").write_text("[1]")
    assert made.start(["json.tool", str(bundle / "given"), str(bundle / "made")], None)
    until(lambda: (bundle / "made").exists() and "1" in (bundle / "made").read_text())
    made.end()
    assert os.waitpid(made._pid, 0)[1] == 0


def test_what_has_ended_is_noticed_when_it_is_asked(bundle):
    made = zygote.Zygote(bundle)
    os.kill(made._pid, signal.SIGKILL)
    os.waitpid(made._pid, 0)
    assert not made.start(["zygote_programs.one", "1", "a"], None)


def test_without_one_nobody_is_asked(monkeypatch):
    monkeypatch.delenv(zygote.SOCKET, raising=False)
    assert not zygote.ask_for(1, "zygote_app:load", {})
