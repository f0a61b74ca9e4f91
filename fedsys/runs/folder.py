"""The folder of a run: what was asked for, what happened, and what came out.

::

    outputs/2026-11-23/14-03-55-train/
    ├── run.json            status, result, seed, configuration, versions; the last file to change
    ├── config.yaml         the composed configuration
    ├── metrics.csv         one line per round, written when the round ends
    ├── decisions.csv       split training: each device in each round (`fedsys.runs.decisions`)
    ├── plan.json           split training: what devices do in the round that goes on
    ├── events.jsonl        faults, lost clients, decisions; one JSON object per line
    ├── run.log             what the ``fedsys`` logger said
    ├── tensorboard/        the numbers of metrics.csv for TensorBoard
    ├── plots/              pictures, drawn at the end (`fedsys.runs.plots`)
    └── model.safetensors   the trained state, with its configuration

A folder always says how far its run came: ``run.json`` claims the folder with the status
``running`` and the configuration, and ends as ``finished``, ``failed`` or ``interrupted``. Files
are replaced as a whole or appended by whole lines, so that neither a full disk nor a killed process
leaves half a result behind. What a disk damages is said: lines of ``metrics.csv`` that cannot be
read are dropped when the run continues, and the file is kept as ``metrics.damaged.csv``.
"""

from __future__ import annotations

import csv
import errno
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedsys.errors import ConfigError, RunError
from fedsys.files import (
    ELSEWHERE,
    append,
    end_line,
    json_text,
    whole_lines,
    write_atomic,
    write_new,
    writing,
)
from fedsys.identity import environment, state_sha256
from fedsys.runs import plain_yaml
from fedsys.runs.model_file import save_model
from fedsys.runs.naming import default_path, unusable
from fedsys.runs.scalars import Scalars, from_cell, scalars, to_cell
from fedsys.runs.table import Table, columns_of, csv_text, read_table

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RunFolder",
    "check_free",
    "default_path",
    "environment",
    "json_text",
    "state_sha256",
    "write_atomic",
]

logger = logging.getLogger("fedsys")


def check_free(path: Path) -> None:
    """Refuse a folder that holds a run, before much is started for another one.

    Raises:
        ConfigError: Says how to go on.
    """
    if (path / "run.json").exists():
        raise _taken(path)


def _taken(path: Path) -> ConfigError:
    way_out = f"continue that run with resume={path}, or {ELSEWHERE}"
    return ConfigError.of("run.dir", path, "must not hold another run", way_out)


class RunFolder:
    """The folder of one run, written as the run goes. Methods may be called from any thread.

    Use it as a context manager: an exception that leaves the block marks the run as failed or
    interrupted, and the files are closed::

        with RunFolder.create(path, text) as run:
            run.add_round({"round": 1, "val_accuracy": 0.91})
            run.finish({"accuracy": 0.9})

    Attributes:
        path: The folder.
        problems: What was damaged when the run was continued, and how it went on.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        self.path = path
        self._info = dict(info)
        self._lock = threading.RLock()
        self._log: _LogFile | None = None
        self._level = logging.NOTSET
        self._scalars: Scalars | None = None
        self._followers: list[Callable[[Mapping[str, Any]], None]] = []
        self.problems: tuple[str, ...] = ()

    @classmethod
    def create(cls, path: Path, config_yaml: str = "") -> RunFolder:
        """Make the folder of a new run, claim it, and write its configuration.

        The claim holds the configuration too: whenever the process is killed, the run can be
        continued.

        Args:
            path: A folder that does not exist, or one that holds no run.
            config_yaml: What becomes ``config.yaml``; nothing becomes of an empty one.

        Raises:
            ConfigError: `path` holds a run, is a file, or cannot be written to.
            RunError: The disk is full.
        """
        config = _parsed(config_yaml)
        info = {"status": "running", "started": time.time(), **environment(), "config": config}
        try:
            path.mkdir(parents=True, exist_ok=True)
            mode = 0o600 if _is_private(config) else 0o666
            write_new(path / "run.json", _info_text(info), mode)
        except FileExistsError as error:
            if not path.is_dir():
                raise unusable(
                    path, NotADirectoryError(errno.ENOTDIR, "Not a directory")
                ) from error
            raise _taken(path) from error
        except OSError as error:
            raise unusable(path, error) from error
        run = cls(path, info)
        try:
            if config_yaml:
                run.log_config(config_yaml)
            run._start_log()
        except BaseException:
            run.close()
            (path / "run.json").unlink(missing_ok=True)
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an existing run, to read it.

        Raises:
            RunError: `path` holds no run, or its ``run.json`` is damaged.
        """
        file = path / "run.json"
        try:
            info = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "holds no run.json, so it is not the folder of a run"
            if not path.exists():
                what = "does not exist"
            raise RunError(f"{path} {what}; name a folder that a run wrote") from error
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise RunError(f"{file} is damaged: {error}; run again into another folder") from error
        if not isinstance(info, dict) or not isinstance(info.get("status"), str):
            raise RunError(f"{file} is damaged: it has no status; run again into another folder")
        if info["status"] == "finished" and not isinstance(info.get("result"), dict):
            raise RunError(f"{file} is damaged: it has no result; run again into another folder")
        return cls(path, info)

    @classmethod
    def resume(cls, path: Path, after_round: int, config_yaml: str = "") -> RunFolder:
        """Open the folder of an existing run, to continue it behind a round.

        Rounds after `after_round` are dropped from ``metrics.csv`` and hidden from TensorBoard.

        Args:
            path: Folder of the run.
            after_round: Round of the checkpoint that the run continues from.
            config_yaml: What becomes ``config.yaml``; an empty one leaves it.

        Raises:
            RunError: `path` holds no run, or cannot be written to.
        """
        problems: list[str] = []
        try:
            started = cls.open(path).info.get("started")
        except RunError as error:
            if not (path / "run.json").is_file():
                raise
            started, problems = None, [str(error)]
        run = cls(path, {"status": "running", "started": started or time.time(), **environment()})
        if config_yaml:
            run.log_config(config_yaml)
        run._info["config"] = run._config()
        problems += run._keep_rounds(after_round)
        _forget_decisions(path, after_round)
        run._write_info(run._info)
        run._start_log()
        run._scalars = scalars(path / "tensorboard", first_round=after_round + 1)
        end_line(path / "events.jsonl")  # half of one may be left by a process that was killed
        for problem in problems:
            run.event("damaged", reason=problem, continued_after=after_round)
        run.event("resumed", after_round=after_round)
        run.problems = tuple(problems)
        return run

    @property
    def info(self) -> Mapping[str, Any]:
        """What ``run.json`` says: ``status``, ``result``, ``config``, ``seed`` and more."""
        return self._info

    def log_config(self, config_yaml: str) -> None:
        """Write ``config.yaml``; where it holds secrets, the folder is its owner's from then on."""
        if _is_private(_parsed(config_yaml)):
            self._keep_private()
        write_atomic(self.path / "config.yaml", config_yaml.encode())

    def _keep_private(self) -> None:
        """Let nobody else read what is there and what will be."""
        with writing(self.path):
            self.path.chmod(0o700)
            for path in self.path.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)

    def add_round(self, row: Mapping[str, Any]) -> None:
        """Append a round to ``metrics.csv`` and to TensorBoard at once.

        Args:
            row: Numbers and texts by column; ``round`` is needed. Columns may come and go between
                rounds; NaN and ``None`` are allowed.

        Raises:
            RunError: The disk is full, or the file is gone or cannot be written.
        """
        cells = {name: to_cell(value) for name, value in row.items()}
        file = self.path / "metrics.csv"
        with self._lock:
            known = next(csv.reader(whole_lines(file)[:1]), [])
            if set(cells) <= set(known):
                append(file, csv_text([[cells.get(name, "") for name in known]]))
            else:
                self._write_table([*self.table().rows, cells])
            if self._scalars is None:
                self._scalars = scalars(self.path / "tensorboard")
            if self._scalars is not None:
                self._scalars.add(int(row["round"]), row)
        for follower in self._followers:
            follower(row)

    def follow(self, follower: Callable[[Mapping[str, Any]], None]) -> None:
        """Hand each row that `add_round` gets from now on to `follower`, once it is written."""
        self._followers.append(follower)

    def rounds(self) -> list[dict[str, float | str]]:
        """Return the rows of ``metrics.csv``; numbers as floats, without the empty cells."""
        rows = self.table().rows
        return [{name: from_cell(cell) for name, cell in row.items() if cell} for row in rows]

    def table(self) -> Table:
        """Return ``metrics.csv`` as text, with what is damaged in it."""
        return read_table(self.path / "metrics.csv")

    def event(self, kind: str, **values: object) -> None:
        """Append an event to ``events.jsonl``, with the time in seconds since 1970.

        Args:
            kind: What happened, for instance ``"client_lost"``.
            values: More about it; must have a form in JSON.
        """
        line = json_text({"time": time.time(), "kind": kind, **values}) + "\n"
        with self._lock:
            append(self.path / "events.jsonl", line.encode())

    def events(self) -> list[dict[str, Any]]:
        """Return the events in the order in which they were written, without damaged lines."""
        return list(filter(None, map(_event, whole_lines(self.path / "events.jsonl"))))

    def save_model(self, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """Write ``model.safetensors`` and return its path.

        Args:
            state: Dense tensors of any shape and dtype by name.
            metadata: What is needed to build the model again; it stands in the file's header.

        Raises:
            RunError: The file cannot be written; a former model stays as it was.
        """
        path = self.path / "model.safetensors"
        save_model(path, state, metadata)
        return path

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``run.json`` with the status ``finished``: the last thing that a run does.

        Args:
            result: The figures of the run; must have a form in JSON.
        """
        self._end({"status": "finished", "result": dict(result)})

    def fail(self, error: BaseException) -> None:
        """Write ``run.json`` with the status ``failed`` and the error, if the run still goes on.

        After Ctrl-C, or a request to end that Flower turned into `SystemExit`, the status is
        ``interrupted``.

        Where not even that can be written, ``run.json`` keeps the status ``running``; that is
        logged and not raised, so that `error` stays the one that is reported.
        """
        if self._info["status"] != "running":
            return
        told = {"type": type(error).__name__, "message": str(error)}
        asked = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, SystemExit) and not error.code
        )
        status = "interrupted" if asked else "failed"
        if self._log is not None:
            text = f"the run ends as {status}: {told['type']}: {told['message']}"
            logger.log(logging.INFO if asked else logging.ERROR, text)
        try:
            self._end({"status": status, "error": told})
        except RunError as second:
            logger.error("%s", second)

    def close(self) -> None:
        """Close the log and the TensorBoard file. May be called again."""
        with self._lock:
            if self._log is not None:
                logger.removeHandler(self._log)
                with suppress(OSError):  # the handler has said that the log cannot be written
                    self._log.close()
                self._log = None
                logger.setLevel(self._level)
            if self._scalars is not None:
                self._scalars.close()
                self._scalars = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def _start_log(self) -> None:
        path = self.path / "run.log"
        with writing(path):
            self._log = _LogFile(path, encoding="utf-8")
        form = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        self._log.setFormatter(logging.Formatter(form))
        self._level = logger.level
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        logger.addHandler(self._log)

    def _end(self, news: Mapping[str, Any]) -> None:
        config = self._config()
        before = {k: v for k, v in self._info.items() if k not in ("status", "started", "config")}
        started = self._info.get("started")
        info = {
            **news,
            "seed": config.get("seed"),
            "started": started,
            "ended": time.time(),
            **before,
            "config": config,
        }
        self._write_info(info)
        self._info = info

    def _config(self) -> dict[str, Any]:
        file = self.path / "config.yaml"
        try:
            return _parsed(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {file}: {error}") from error

    def _write_info(self, info: Mapping[str, Any]) -> None:
        write_atomic(self.path / "run.json", _info_text(info))

    def _keep_rounds(self, after_round: int) -> list[str]:
        """Drop what is behind a round from ``metrics.csv``; return what is damaged or missing.

        A file with damage stays beside it, so that nothing is lost that a person could still read.
        """
        file, table = self.path / "metrics.csv", self.table()
        rows = [row for row in table.rows if float(row["round"]) <= after_round]
        problems = [f"{file} is damaged: {problem}" for problem in table.problems]
        if problems:
            copy = file.with_name("metrics.damaged.csv")
            write_atomic(copy, file.read_bytes())
            problems = [f"{problem}; the whole is in {copy}" for problem in problems[:1]]
        missing = set(range(1, after_round + 1)) - {int(float(row["round"])) for row in rows}
        if missing:
            told = ", ".join(map(str, sorted(missing)))
            problems.append(f"{file} has no line of the rounds {told}")
        self._write_table(rows)
        return problems

    def _write_table(self, rows: list[dict[str, str]]) -> None:
        columns = columns_of(rows)
        lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        write_atomic(self.path / "metrics.csv", csv_text(lines) if columns else b"")


def _info_text(info: Mapping[str, Any]) -> bytes:
    return (json_text(info, indent=2) + "\n").encode()


def _forget_decisions(path: Path, after_round: int) -> None:
    from fedsys.runs import decisions  # needed by runs that go on alone

    decisions.forget(path, after_round)


def _is_private(config: Mapping[str, Any]) -> bool:
    from fedsys.config import secret  # who reads a folder needs no OmegaConf

    return secret.is_private(config)


def _parsed(config_yaml: str) -> dict[str, Any]:
    """Return a configuration as a tree, empty if it is none.

    Raises:
        ValueError: It is no YAML.
    """
    import yaml

    try:
        config = plain_yaml.load(config_yaml)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return config if isinstance(config, dict) else {}


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "kind" in event else None


class _LogFile(logging.FileHandler):
    """A log file that says once, in one line, that it cannot be written, and lets the run go on."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._told and isinstance(error, OSError) and sys.stderr is not None:
            self._told = True
            print(f"warning: cannot write {self.baseFilename}: {error.strerror}", file=sys.stderr)
