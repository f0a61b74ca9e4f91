import csv
import dataclasses
import errno
import hashlib
import io
import json
import logging
import math
import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedsys.errors import ConfigError, RunError
from fedsys.identity import _little_endian
from fedsys.runs import scalars
from fedsys.runs.folder import (
    RunFolder,
    default_path,
    environment,
    json_text,
    state_sha256,
    write_atomic,
)
from fedsys.runs.scalars import from_cell, scalar_tag, to_cell

NOON = datetime(2026, 11, 23, 14, 3, 55)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel refuse to let files grow beyond `size` bytes, as a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only an administrator can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# --------------------------------------------------------------------------------------------------
# Atomic files


def test_an_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_atomic(file, b"a longer first text")
    write_atomic(file, b"second")
    assert file.read_bytes() == b"second"
    assert names(tmp_path) == ["run.json"]


def test_an_atomic_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_write_beyond_the_limit_keeps_the_old_file_and_says_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_atomic(file, b"old")
    with file_size_limit(1000), pytest.raises(RunError) as caught:
        write_atomic(file, bytes(5000))
    for part in (str(file), os.strerror(errno.EFBIG), "free some space", "run.dir="):
        assert part in str(caught.value)
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["run.json"]


def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "run.json", b"x")
    assert names(tmp_path) == []


def test_a_folder_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory; check the folder"):
        write_atomic(tmp_path / "gone" / "run.json", b"x")


def test_a_full_disk_stops_the_run_and_never_looks_finished(tiny_disk: Path) -> None:
    state = {"weight": torch.zeros(100_000)}
    with pytest.raises(RunError) as caught, RunFolder.create(tiny_disk / "run") as run:
        run.add_round({"round": 1})
        run.save_model(state, {})
    assert "model.safetensors" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    reopened = RunFolder.open(tiny_disk / "run")
    assert reopened.info["status"] == "failed"
    assert reopened.rounds() == [{"round": 1.0}]
    assert "model.safetensors" not in names(tiny_disk / "run")
    assert not [name for name in names(tiny_disk / "run") if name.endswith(".part")]


def test_a_disk_that_fills_while_rounds_are_written_keeps_whole_rounds(
    tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = tiny_disk / "filler"
    written = 0
    with RunFolder.create(tiny_disk / "run") as run:
        run.add_round({"round": 0, "note": "x"})
        filler.write_bytes(bytes(20_000))
        with pytest.raises(RunError, match="No space left on device"):
            for written in range(1, 1000):
                run.add_round({"round": written, "note": "x" * 1000})
        assert [row["round"] for row in run.rounds()] in (
            [float(k) for k in range(written)],
            [float(k) for k in range(written + 1)],
        )
        run.fail(RunError("disk full"))
    assert RunFolder.open(tiny_disk / "run").info["status"] in ("running", "failed")
    assert "Traceback" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# JSON


def test_json_text_takes_what_results_are_made_of() -> None:
    @dataclasses.dataclass
    class Pair:
        x: int
        y: tuple[float, ...]

    value = {
        "nan": math.nan,
        "inf": [math.inf, np.float32(-math.inf)],
        "numpy": np.float64(0.5),
        "array": np.arange(2),
        "tensor": torch.tensor(3),
        "path": Path("a/b"),
        "pair": Pair(1, (2.0,)),
        "yes": True,
        "none": None,
        7: "ü",
    }
    assert json.loads(json_text(value)) == {
        "nan": None,
        "inf": [None, None],
        "numpy": 0.5,
        "array": [0, 1],
        "tensor": 3,
        "path": "a/b",
        "pair": {"x": 1, "y": [2.0]},
        "yes": True,
        "none": None,
        "7": "ü",
    }


def test_json_text_refuses_what_has_no_form() -> None:
    with pytest.raises(TypeError, match="set has no form in JSON"):
        json_text({"x": {1}})


# --------------------------------------------------------------------------------------------------
# The hash of a state


def expected_hash(entries: list[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    text = b""
    for name, dtype, shape, data in entries:
        text += struct.pack("<Q", len(name.encode())) + name.encode()
        text += struct.pack("<Q", len(dtype)) + dtype.encode()
        text += struct.pack("<Q", len(shape)) + b"".join(struct.pack("<Q", d) for d in shape)
        text += struct.pack("<Q", len(data)) + data
    return hashlib.sha256(text).hexdigest()


def test_the_hash_is_what_its_definition_says() -> None:
    state = {
        "b.weight": torch.tensor([[1.0, -0.0, 2.5], [3.0, math.inf, 5.0]]),
        "b.steps": torch.tensor(7),
        "a.half": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
        "a.mask": torch.tensor([True, False]),
        "ü": torch.empty(0, 4, dtype=torch.float64),
    }
    entries: list[tuple[str, str, tuple[int, ...], bytes]] = [
        ("a.half", "bfloat16", (2,), struct.pack("<HH", 0x3F80, 0xC000)),
        ("a.mask", "bool", (2,), b"\x01\x00"),
        ("b.steps", "int64", (), struct.pack("<q", 7)),
        ("b.weight", "float32", (2, 3), struct.pack("<6f", 1, -0.0, 2.5, 3, math.inf, 5)),
        ("ü", "float64", (0, 4), b""),
    ]
    assert state_sha256(state) == expected_hash(entries)


def test_a_tensor_without_elements_has_a_hash_whatever_its_strides() -> None:
    """An average of nothing has stride 0, which torch does not view as bytes: a run ended so."""
    for strides in ((0,), (1,), (7,)):
        empty = torch.empty_strided((0,), strides, dtype=torch.float64)
        assert state_sha256({"no": empty}) == expected_hash([("no", "float64", (0,), b"")])


def test_the_empty_state_has_the_hash_of_nothing() -> None:
    assert state_sha256({}) == hashlib.sha256(b"").hexdigest()


def test_the_hash_does_not_see_how_a_state_is_stored() -> None:
    x = torch.arange(48.0).reshape(2, 2, 3, 4)
    y = torch.arange(6.0).reshape(2, 3)
    plain = state_sha256({"x": x, "y": y})
    assert state_sha256({"y": y, "x": x}) == plain
    assert state_sha256({"x": x.to(memory_format=torch.channels_last), "y": y}) == plain
    assert state_sha256({"x": x, "y": y.t().contiguous().t()}) == plain
    assert state_sha256({"x": x, "y": torch.stack([y, y], dim=-1)[..., 0]}) == plain
    assert state_sha256({"x": torch.nn.Parameter(x), "y": y.clone().requires_grad_()}) == plain


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([-0.0, 1.0])},
        {"x": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {"x": torch.tensor([0, 0x3F800000], dtype=torch.int32)},
        {"x": torch.tensor([[0.0, 1.0]])},
        {"y": torch.tensor([0.0, 1.0])},
        {"x": torch.tensor([0.0]), "y": torch.tensor([1.0])},
        {"x": torch.tensor([0.0, 1.0]), "y": torch.empty(0)},
        {"x": torch.tensor([0.0, math.nextafter(1.0, 2.0)], dtype=torch.float64).float() + 1e-7},
        {},
    ],
)
def test_the_hash_sees_every_difference(other: dict[str, torch.Tensor]) -> None:
    assert state_sha256(other) != state_sha256({"x": torch.tensor([0.0, 1.0])})


def test_names_and_data_cannot_trade_bytes() -> None:
    one = {"ab": torch.zeros(1, dtype=torch.uint8), "c": torch.zeros(1, dtype=torch.uint8)}
    two = {"a": torch.zeros(1, dtype=torch.uint8), "bc": torch.zeros(1, dtype=torch.uint8)}
    assert state_sha256(one) != state_sha256(two)


def test_the_bytes_of_a_machine_of_other_byte_order_are_turned() -> None:
    turned = torch.tensor(np.array([1, 258], dtype="<i4").byteswap())
    assert bytes(_little_endian(turned, "big").numpy()) == struct.pack("<ii", 1, 258)
    pair = torch.tensor(np.array([1 + 2j], dtype="<c8").byteswap())
    assert bytes(_little_endian(pair, "big").numpy()) == struct.pack("<ff", 1, 2)


def test_conjugate_and_negative_views_are_hashed_by_value() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert state_sha256({"z": z.conj()}) == state_sha256({"z": z.conj().resolve_conj()})
    assert state_sha256({"z": z.conj().imag}) == state_sha256({"z": torch.tensor([-2.0, 4.0])})


def test_the_environment_says_what_bits_depend_on() -> None:
    found = environment()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["numpy"] == np.__version__
    assert found["threads"]["intra_op"] == torch.get_num_threads()
    assert found["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert json.loads(json_text(found)) == found


# --------------------------------------------------------------------------------------------------
# The folder


def test_default_paths_of_one_second_differ(tmp_path: Path) -> None:
    paths = [default_path(tmp_path, "train", NOON) for _ in range(3)]
    day = tmp_path / "2026-11-23"
    assert paths == [day / f"14-03-55-train{end}" for end in ("", "-2", "-3")]
    assert all(path.is_dir() for path in paths)


def test_threads_never_share_a_default_path(tmp_path: Path) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(default_path(tmp_path, "x", NOON)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 8


def test_outputs_that_are_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir=.*must be a folder that can be written to"):
        default_path(tmp_path / "outputs", "train", NOON)


def test_a_run_is_marked_as_running_then_as_finished(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a" / "run") as run:
        assert json.loads((run.path / "run.json").read_bytes())["status"] == "running"
        run.log_config("seed: 3\nclient:\n  lr: 0.1\n")
        run.finish({"accuracy": np.float32(0.5), "where": run.path, "loss": math.nan})
    told = json.loads((run.path / "run.json").read_bytes())
    assert told["status"] == "finished"
    assert told["seed"] == 3
    assert told["config"] == {"seed": 3, "client": {"lr": 0.1}}
    assert told["result"] == {"accuracy": 0.5, "where": str(run.path), "loss": None}
    assert told["versions"] == environment()["versions"]
    assert told["started"] <= told["ended"]
    assert RunFolder.open(run.path).info == told


def test_an_exception_marks_the_run_as_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder.create(tmp_path) as run:
        run.log_config("seed: 1\n")
        run.add_round({"round": 1, "val_loss": 0.5})
        raise ZeroDivisionError("by zero")
    reopened = RunFolder.open(tmp_path)
    assert reopened.info["status"] == "failed"
    assert reopened.info["error"] == {"type": "ZeroDivisionError", "message": "by zero"}
    assert "result" not in reopened.info
    assert reopened.rounds() == [{"round": 1.0, "val_loss": 0.5}]
    assert "by zero" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(0), "interrupted"),  # Flower's answer to SIGTERM
        (SystemExit("no more"), "failed"),
    ],
)
def test_what_somebody_asked_to_end_is_interrupted(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), RunFolder.create(tmp_path):
        raise error
    assert RunFolder.open(tmp_path).info["status"] == status


def test_a_result_that_cannot_be_written_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(TypeError), RunFolder.create(tmp_path) as run:
        run.finish({"x": {1, 2}})
    assert RunFolder.open(tmp_path).info["status"] == "failed"


def test_a_folder_that_holds_a_run_is_refused_with_the_way_out(tmp_path: Path) -> None:
    RunFolder.create(tmp_path).close()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path)
    for part in (f"run.dir={tmp_path}", f"resume={tmp_path}", "must not hold another run"):
        assert part in str(caught.value)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("tail", ["", "below"])
def test_a_path_at_or_below_a_file_is_refused(tmp_path: Path, tail: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="Not a directory"):
        RunFolder.create(tmp_path / "file" / tail)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"written to \(Permission denied\); choose another"):
        RunFolder.create(tmp_path / "run")


def test_a_folder_that_cannot_be_filled_is_left_unclaimed(tmp_path: Path) -> None:
    with file_size_limit(10), pytest.raises(RunError):
        RunFolder.create(tmp_path)
    assert names(tmp_path) == []
    RunFolder.create(tmp_path).close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run.json"),
        ("", "is damaged"),
        ('{"status": "fini', "is damaged"),
        ("[]", "has no status"),
        ('{"status": 3}', "has no status"),
        ("\xff", "is damaged"),
    ],
)
def test_what_is_no_run_is_not_opened(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=message):
        RunFolder.open(tmp_path)


def test_a_missing_folder_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        RunFolder.open(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------------
# Rounds


def test_rounds_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        run.add_round({"round": 1, "val_loss": 0.1 + 0.2, "who": 'a,"b"'})
        lines = (tmp_path / "metrics.csv").read_text().splitlines()
        assert lines == ["round,val_loss,who", '1,0.30000000000000004,"a,""b"""']
        assert run.rounds() == [{"round": 1.0, "val_loss": 0.1 + 0.2, "who": 'a,"b"'}]


def test_columns_may_come_and_go(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        run.add_round({"round": 1, "a": 1})
        run.add_round({"round": 2, "b": np.float32(0.5)})
        run.add_round({"round": 3, "a": None, "b": math.nan, "flag": True})
        run.add_round({"b": torch.tensor(2.0), "round": 4})
        rounds = run.rounds()
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["round", "a", "b", "flag"],
            ["1", "1", "", ""],
            ["2", "", "0.5", ""],
            ["3", "", "nan", "1"],
            ["4", "", "2.0", ""],
        ]
    assert rounds[:2] == [{"round": 1.0, "a": 1.0}, {"round": 2.0, "b": 0.5}]
    assert math.isnan(float(rounds[2]["b"]))
    assert rounds[3] == {"round": 4.0, "b": 2.0}


def test_a_run_without_rounds_has_none(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        assert run.rounds() == []
        assert run.events() == []


def test_a_line_torn_by_a_kill_is_not_read_and_not_continued(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        run.add_round({"round": 1, "loss": 0.5})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0.")
    assert RunFolder.open(tmp_path).rounds() == [{"round": 1.0, "loss": 0.5}]
    with RunFolder.resume(tmp_path, after_round=1) as run:
        run.add_round({"round": 2, "loss": 0.25})
        assert [row["loss"] for row in run.rounds()] == [0.5, 0.25]


def test_a_line_that_does_not_fit_leaves_no_part(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        run.add_round({"round": 1, "note": "x"})
        size = (tmp_path / "metrics.csv").stat().st_size
        with file_size_limit(size + 5), pytest.raises(RunError, match=r"metrics\.csv"):
            run.add_round({"round": 2, "note": "y" * 100})
        assert (tmp_path / "metrics.csv").stat().st_size == size


def test_a_resumed_run_drops_the_rounds_behind_its_checkpoint(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        for k in (1, 2, 3):
            run.add_round({"round": k, "loss": k / 10})
        run.fail(RuntimeError("killed"))
    with RunFolder.resume(tmp_path, after_round=2) as run:
        assert RunFolder.open(tmp_path).info["status"] == "running"
        run.add_round({"round": 3, "loss": 9.0})
        run.finish({"rounds": 3})
    reopened = RunFolder.open(tmp_path)
    assert [row["loss"] for row in reopened.rounds()] == [0.1, 0.2, 9.0]
    assert reopened.info["status"] == "finished"
    assert "error" not in reopened.info
    assert [(e["kind"], e["after_round"]) for e in reopened.events()] == [("resumed", 2)]


@settings(max_examples=50, deadline=None)
@given(st.floats(), st.integers(-(2**53), 2**53))
def test_numbers_survive_the_table(x: float, n: int) -> None:
    again = from_cell(to_cell(x))
    assert again == x or (math.isnan(x) and math.isnan(float(again)))
    assert from_cell(to_cell(n)) == n


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_a_text_is_always_one_cell_of_one_line(text: str) -> None:
    assert len(to_cell(text).splitlines()) <= 1


def test_events_are_one_json_object_per_line_from_any_thread(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:

        def work(client: int) -> None:
            for step in range(20):
                run.event("fault", client=client, step=step, text="line\nline\u2028end")

        threads = [threading.Thread(target=work, args=(c,)) for c in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        events = run.events()
    assert {(e["client"], e["step"]) for e in events} == {
        (c, s) for c in range(4) for s in range(20)
    }
    assert all(e["kind"] == "fault" and e["text"] == "line\nline\u2028end" for e in events)
    assert all(e["time"] > 1.7e9 for e in events)


# --------------------------------------------------------------------------------------------------
# Model, log, TensorBoard


def test_a_model_is_written_with_its_configuration(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    state = {
        "conv": torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
        "tied.a": tied,
        "tied.b": tied,
        "count": torch.tensor(5),
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    with RunFolder.create(tmp_path) as run:
        path = run.save_model(state, {"model": "lenet", "config": "a: 'ü'\n"})
    with safe_open(path, framework="pt") as file:
        again = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        assert file.metadata() == {"model": "lenet", "config": "a: 'ü'\n"}
    assert state_sha256(again) == state_sha256(state)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    told = {f"key{k}": f"ü\n\x01{k}" for k in range(8)}
    state = {"b": torch.ones(3), "a": torch.zeros(2)}
    with RunFolder.create(tmp_path) as run:
        files = {run.save_model(state, told).read_bytes() for _ in range(4)}
    assert len(files) == 1


def test_a_model_that_does_not_fit_leaves_the_former(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        path = run.save_model({"x": torch.ones(1)}, {})
        before = path.read_bytes()
        with file_size_limit(1000), pytest.raises(RunError, match="free some space"):
            run.save_model({"x": torch.ones(1000)}, {})
        assert path.read_bytes() == before
        assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_the_log_holds_what_the_loggers_of_the_package_say(tmp_path: Path) -> None:
    root = logging.getLogger("fedsys")
    before = root.level, list(root.handlers)
    with RunFolder.create(tmp_path) as run:
        logging.getLogger("fedsys.training.plain").info("hello %d", 3)
        logging.getLogger("elsewhere").error("not mine")
        run.close()
        logging.getLogger("fedsys").warning("too late")
    text = (tmp_path / "run.log").read_text()
    assert "INFO    fedsys.training.plain: hello 3" in text
    assert "not mine" not in text
    assert "too late" not in text
    assert (root.level, root.handlers) == before


def test_a_log_that_cannot_be_written_warns_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    with RunFolder.create(tmp_path):
        for _ in range(3):
            logging.getLogger("fedsys").info("x")
    err = capsys.readouterr().err
    assert err.count("No space left on device") == 1
    assert "Traceback" not in err


def test_an_append_to_a_full_device_is_one_clear_error(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        (tmp_path / "events.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"events\.jsonl: No space left on device"):
            run.event("fault")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read with TensorBoard's own reader what TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_every_number_by_round(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        run.add_round({"round": 1, "val_accuracy": 0.5, "clients": 8, "label": "a"})
        run.add_round({"round": 2, "val_accuracy": 0.75, "seconds_train": 2.0})
        assert read_scalars(tmp_path) == {
            "accuracy/val": [(1, 0.5), (2, 0.75)],
            "clients": [(1, 8.0)],
            "seconds/train": [(2, 2.0)],
        }


@given(st.binary(max_size=300))
def test_records_are_those_that_tensorboard_writes(data: bytes) -> None:
    """Its writer was used, which imported a third of TensorBoard in each run."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(data)
    assert scalars._record(data) == file.getvalue()


def test_tensorboard_forgets_rounds_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        for k in (1, 2, 3):
            run.add_round({"round": k, "loss": k})
    with RunFolder.resume(tmp_path, after_round=1) as run:
        run.add_round({"round": 2, "loss": 20})
    assert read_scalars(tmp_path) == {"loss": [(1, 1.0), (2, 20.0)]}


@pytest.mark.parametrize(
    ("column", "tag"),
    [
        ("train_loss", "loss/train"),
        ("bytes_up", "bytes/up"),
        ("seconds", "seconds"),
        ("epsilon", "epsilon"),
        ("round_trip", "round_trip"),
    ],
)
def test_tensorboard_groups_columns_by_kind(column: str, tag: str) -> None:
    assert scalar_tag(column) == tag


def test_writing_scalars_imports_neither_torch_nor_tensorflow_nor_a_summary_writer(
    tmp_path: Path,
) -> None:
    code = (
        "import sys; from pathlib import Path; from fedsys.runs.scalars import Scalars; "
        f"s = Scalars(Path({str(tmp_path)!r})); s.add(1, {{'loss': 1.0}}); s.close(); "
        "bad = {'torch', 'tensorflow', 'matplotlib', 'torchvision'} & set(sys.modules); "
        "assert not bad, bad"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
