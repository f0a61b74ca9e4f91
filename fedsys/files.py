"""Files that are whole or absent, whatever happens to the process or the disk.

A file is replaced as a whole or appended by whole lines. A failure is one `RunError` that names
the file, the reason and the way out.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedsys.errors import RunError

ELSEWHERE = "choose another folder with run.dir="
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def user_cache() -> Path:
    """Return the folder for what is derived or downloaded and can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedsys"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into the `RunError` that names the file and the way out."""
    try:
        yield
    except OSError as error:
        way_out = "free some space" if error.errno in NO_SPACE else "check the folder"
        text = error.strerror or str(error)
        raise RunError(f"cannot write {path}: {text}; {way_out}, or {ELSEWHERE}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends well and vanishes if not."""
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with writing(path):
            yield part
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk; a full disk may show only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` such that a reader sees the old file or the new one, never a part.

    Raises:
        RunError: The file cannot be written, for instance on a full disk. `path` is as it was.
    """
    with replacing(path) as part:
        part.write_bytes(data)


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file that must not exist yet; of two writers, one succeeds.

    It is there with all of its content or not at all, unless the file system has no hard links.

    Args:
        path: The file.
        data: Its content.
        mode: Who may read and write it, less what the process masks.

    Raises:
        FileExistsError: It exists, or what should be its folder is a file.
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        opener = partial(os.open, mode=mode)
        with open(part, "xb", opener=opener) as file:
            file.write(data)
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:
            with open(path, "xb", opener=opener) as file:
                file.write(data)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, line: bytes) -> None:
    """Append one whole line, or raise `RunError` and leave the file as it was."""
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):  # what cannot be cut, such as a device, keeps no part either
                file.truncate(size)
            raise


def end_line(path: Path) -> None:
    """Drop what stands behind the last end of a line, so that the next one begins a line.

    Raises:
        RunError: The file cannot be changed.
    """
    if not path.exists():
        return
    with writing(path), path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that were written to their end; none if there is no file."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    return text.split("\n")[:-1]


def json_text(value: object, indent: int | None = None) -> str:
    """Return `value` as strict JSON.

    NumPy and torch scalars become numbers, paths text, tuples lists, dataclasses objects. JSON
    has no NaN and no infinity: they become ``null``.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if hasattr(value, "tolist"):  # scalars and arrays of NumPy and torch
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")
