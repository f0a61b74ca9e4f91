"""What is secret stays so: in texts, files and pages of a run, in its model, and in folder names.

Before, a control token stood in clear in ``config.yaml``, ``run.json``, ``report.html`` and the
metadata of the model, and was sent to every device with the configuration of the run.
"""

import os
import stat

import pytest

from fedsys import config as configuration
from fedsys.config import compose_text, parse, secret
from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.offload.edge import EdgeServer
from fedsys.runs import resume
from fedsys.runs.folder import RunFolder

TOKEN = "SECRETXYZ123"


@pytest.fixture(autouse=True)
def no_token_outside(monkeypatch):
    monkeypatch.delenv(secret.VARIABLE, raising=False)


def holding(folder, text):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes()]


def test_the_text_of_a_run_has_no_token_and_its_values_have():
    given = compose_text(f"fleet.control_token={TOKEN} edge.control_token={TOKEN}2")
    config = parse(given)
    assert TOKEN in given and TOKEN not in config.text and TOKEN not in repr(config)
    assert (config.fleet.control_token, config.edge.control_token) == (TOKEN, TOKEN + "2")
    assert parse(config.text).fleet.control_token == secret.MASK


def test_a_text_without_secrets_is_as_it_was():
    text = compose_text("rounds=3")
    assert parse(text).text == text == configuration.public_text(text)


def test_a_token_comes_from_the_option_its_file_or_the_environment(tmp_path, monkeypatch, capsys):
    file = tmp_path / "token"
    file.write_text("of the file\n")
    file.chmod(0o600)
    monkeypatch.setenv(secret.VARIABLE, "of the environment")
    for overrides, expected in [
        ("fleet.control_token=given", "given"),
        (f"fleet.control_token_file={file}", "of the file"),
        ("", "of the environment"),
    ]:
        fleet = parse(compose_text(overrides)).fleet
        assert secret.control_token(fleet, "fleet") == expected
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    secret.control_token(parse(compose_text(f"edge.control_token_file={file}")).edge, "edge")
    assert f"{file} can be read by others" in capsys.readouterr().err


def test_a_file_without_a_token_is_named(tmp_path):
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        fleet = parse(compose_text(f"fleet.control_token_file={tmp_path / name}")).fleet
        with pytest.raises(ConfigError, match=rf"fleet\.control_token_file=.*{name}.*openssl"):
            secret.control_token(fleet, "fleet")


def test_a_token_that_was_masked_is_asked_for_again():
    fleet = parse(parse(compose_text(f"fleet.control_token={TOKEN}")).text).fleet
    with pytest.raises(ConfigError, match=secret.VARIABLE):
        secret.control_token(fleet, "fleet")
    with secret.handed_on(TOKEN):
        assert secret.control_token(fleet, "fleet") == TOKEN
    assert secret.VARIABLE not in os.environ


def test_what_a_user_calls_a_secret_is_one_wherever_it_stands():
    tree = {
        "model": {"api_key": "k", "num_tokens": 7, "parts": [{"password": "p"}]},
        "data": {"url": "https://me:pw@example.org/x"},
        "lr": 0.1,
    }
    assert secret.public(tree) == {
        "model": {"api_key": "***", "num_tokens": 7, "parts": [{"password": "***"}]},
        "data": {"url": "https://me:***@example.org/x"},
        "lr": 0.1,
    }
    assert secret.is_private(tree)
    assert not secret.is_private({"fleet": {"control_token": "t"}, "lr": 0.1})


def test_a_folder_that_keeps_a_secret_is_its_owners_alone(tmp_path):
    with RunFolder.create(tmp_path / "r") as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) & 0o055
        folder.log_config("model: {api_key: k}\n")
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder.path / "run.json").stat().st_mode) == 0o600


def test_a_run_leaves_no_token_behind_and_is_continued_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edge = EdgeServer("a", "memory://secret-edge", control_token=TOKEN)
    command = [
        *("train", "num_clients=2", "policy=fixed", "policy.cut=0.5", "run.dir=r"),
        "run.plots=false",
        "fleet.edges=[{name: a, address: 'memory://secret-edge'}]",
    ]
    try:
        assert main([*command, "rounds=1", f"fleet.control_token={TOKEN}"]) == 0
        said = capsys.readouterr().err
        assert "fleet.control_token= can be read by every user" in said and TOKEN not in said
        assert main(["report", "r"]) == 0
        assert (tmp_path / "r" / "report.html").is_file() and holding(tmp_path, TOKEN) == []
        assert resume.stored(tmp_path / "r")["fleet"]["control_token"] == secret.MASK
        assert main(["train", "resume=r", "rounds=2"]) == 2
        assert "fleet.control_token_file=FILE" in capsys.readouterr().err
        monkeypatch.setenv(secret.VARIABLE, TOKEN)
        assert main(["train", "resume=r", "rounds=2"]) == 0
        assert holding(tmp_path, TOKEN) == []
    finally:
        edge.kill()


def test_a_sweep_over_tokens_names_no_folder_by_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokens = f"fleet.control_token={TOKEN},{TOKEN}b"
    small = ("num_clients=2", "rounds=1", "run.plots=false")
    assert main(["train", "--multirun", tokens, *small]) == 0
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    assert not [path for path in tmp_path.rglob("*") if TOKEN in path.name]
    assert holding(tmp_path, TOKEN) == []


def test_a_token_is_not_sent_to_a_superlink(tmp_path, monkeypatch, capsys):
    """It tells the configuration of a run to every device."""
    monkeypatch.chdir(tmp_path)
    given = ("runtime=deployment", "runtime.superlink=127.0.0.1:1", "runtime.insecure=true")
    assert main(["train", *given, f"fleet.control_token={TOKEN}"]) == 2
    assert "fleet.control_token=***: must not be sent" in capsys.readouterr().err
