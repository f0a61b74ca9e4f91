"""What a run can continue from: a tree of values in two files, whole or absent, checked to the bit.

::

    checkpoints/
    ├── lock                        held by the process that works on the run
    ├── round-000004.safetensors    the arrays, each named by the SHA-256 of what it is
    ├── round-000004.json           the tree, which refers to the arrays; its last line is its hash
    └── round-000005.…              the newest; the one before it stays

The JSON file is written last and makes the checkpoint; both files are replaced as a whole. So a
crash at any moment leaves the last good checkpoint, and a file that the disk has damaged is
noticed and passed over. Equal arrays are stored once.

The state of a strategy is taken out of its attributes by name (`StrategyState`), because Flower's
server optimizers keep theirs there and offer no other way.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from flwr.app import ArrayRecord

from fedsys.errors import RunError
from fedsys.files import ELSEWHERE, replacing, write_atomic, writing
from fedsys.runs.trees import Arrays, NotKeepable, Tree, array_sha256, decode, encode, keepable

logger = logging.getLogger("fedsys")

FORMAT: Final = 1
KEPT: Final = 2
"""Checkpoints that stay: the newest, and one to fall back to."""


# --------------------------------------------------------------------------------------------------
# The state of a strategy


def layers_of(strategy: object) -> Iterator[tuple[str, object]]:
    """Yield a strategy and what it wraps, outermost first, by path (``Sampled.KeptState``)."""
    path = ""
    layer: object | None = strategy
    while layer is not None:
        path = f"{path}.{type(layer).__name__}" if path else type(layer).__name__
        yield path, layer
        # `strategy` is where Flower's own wrappers keep theirs.
        layer = getattr(layer, "inner", None) or getattr(layer, "strategy", None)


class StrategyState:
    """Takes what a strategy remembers out of its attributes, and puts it back.

    A layer that has a class attribute ``STATE`` names there what outlives a round: values that have
    a form in a checkpoint, or dataclasses of them. Of any other
    (Flower's, the user's) every attribute counts that has a form in a checkpoint. The rest must
    stay the same object for the whole run: what changes and cannot be kept is refused.

    Args:
        strategy: The outermost strategy, as it was built.
    """

    def __init__(self, strategy: object) -> None:
        self._layers = dict(layers_of(strategy))
        self._fixed = {
            (path, name): value
            for path, layer in self._layers.items()
            for name, value in _attributes(layer).items()
            if not keepable(value)
        }

    def take(self) -> dict[str, dict[str, Tree]]:
        """Return the attributes to keep by path of the layer and name.

        Raises:
            RunError: Names the attribute that changed and cannot be kept.
        """
        taken: dict[str, dict[str, Tree]] = {}
        for path, layer in self._layers.items():
            taken[path] = {}
            for name, value in _attributes(layer).items():
                if dataclasses.is_dataclass(value) and hasattr(layer, "STATE"):
                    fields = dataclasses.fields(value)
                    taken[path][name] = {f.name: getattr(value, f.name) for f in fields}
                elif keepable(value):
                    taken[path][name] = value
                elif self._fixed.get((path, name)) is not value:
                    raise RunError(
                        f"strategy: {path}.{name} changes from round to round and is of type "
                        f"{type(value).__name__}, which checkpoints cannot hold; keep numbers, "
                        "arrays, or lists and dicts of them in attributes of a strategy"
                    )
        return taken

    def put(self, taken: Mapping[str, Mapping[str, Tree]]) -> None:
        """Set the attributes that `take` returned.

        Raises:
            RunError: The strategy has other layers than the one that they were taken from.
        """
        if set(taken) != set(self._layers):
            raise RunError(
                f"strategy: is stacked as {max(self._layers, key=len)}, and the checkpoint is of "
                f"{max(taken, key=len, default='none')}; continue with the version that wrote it"
            )
        for path, values in taken.items():
            layer = self._layers[path]
            for name, value in values.items():
                now = getattr(layer, name, None)
                if dataclasses.is_dataclass(now) and not isinstance(now, type):
                    value = dataclasses.replace(now, **value)
                setattr(layer, name, value)


def _attributes(layer: object) -> dict[str, Any]:
    values = vars(layer)
    named = getattr(type(layer), "STATE", None)
    if named is not None:
        return {name: values[name] for name in named}
    return {name: value for name, value in values.items() if name not in ("inner", "strategy")}


# --------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rounds after this one depend on.

    Attributes:
        round: The last round that is in it.
        arrays: The global model after that round.
        strategy: What `StrategyState.take` returned: server optimizers, state kept for clients.
        seconds: How long the run has taken until here, interruptions left out.
        config_sha256: Digest of the configuration (`fedsys.runs.resume.digest`).
    """

    round: int
    arrays: ArrayRecord
    strategy: dict[str, dict[str, Tree]]
    seconds: float
    config_sha256: str


class Checkpoints:
    """The checkpoints in a run folder. One process at a time may work on them.

    Use it as a context manager, which frees the run for others.

    Args:
        folder: The run folder; its folder ``checkpoints`` is made.

    Attributes:
        problems: What `newest` had to say about damaged checkpoints.

    Raises:
        RunError: Another process is at work on this run, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints"
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
            self._lock: IO[bytes] = (self.path / "lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RunError(
                f"{folder}: another process is at work on this run; wait for it, or end it"
            ) from error
        except OSError:  # a file system without locks
            logger.warning("%s cannot be locked: keep other processes from this run", self.path)
        self.problems: list[str] = []
        self._damaged: set[int] = set()
        for part in self.path.glob(".*.part"):  # left by a process that was killed
            part.unlink(missing_ok=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def write(self, checkpoint: Checkpoint, *, halfway: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint, and remove all but the newest `KEPT`.

        Args:
            checkpoint: What to write.
            halfway: Called when the arrays are on the disk and the tree is not.

        Raises:
            RunError: The files cannot be written, for instance on a full disk; the former
                checkpoints are as they were.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        arrays: Arrays = {}
        try:
            tree = encode(vars(checkpoint), arrays, "checkpoint")
        except NotKeepable as error:
            raise RunError(
                f"{error}, which checkpoints cannot hold; keep numbers, arrays, or lists and dicts "
                "of them in attributes of a strategy"
            ) from error
        text = json.dumps({"format": FORMAT, "checkpoint": tree}, separators=(",", ":")).encode()
        stem = self._stem(checkpoint.round)
        with replacing(file := stem.with_suffix(".safetensors")) as part:
            try:
                save_file(arrays, part)
            except SafetensorError as error:
                raise RunError(
                    f"cannot write {file}: {error}; free some space, or {ELSEWHERE}"
                ) from error
        halfway()
        write_atomic(stem.with_suffix(".json"), text + b"\n" + _hash_line(text))
        self._damaged.discard(checkpoint.round)
        good = [number for number in self.rounds() if number not in self._damaged]
        for number in (*self._damaged, *good[:-KEPT]):
            self._remove(number)
        self._damaged.clear()

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, good or damaged, in ascending order."""
        names = (p.stem.removeprefix("round-") for p in self.path.glob("round-*.json"))
        return sorted(int(name) for name in names if name.isdigit())

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is good, or None if there has never been one.

        Damaged ones are passed over; the next `write` removes them.

        Raises:
            RunError: There are checkpoints, and all of them are damaged.
        """
        for number in reversed(self.rounds()):
            try:
                return self.read(number)
            except RunError as error:
                self.problems.append(str(error))
                self._damaged.add(number)
        if self.problems:
            raise RunError(
                f"{self.problems[0]}; no other is good, so run again into another folder"
            )
        return None

    def read(self, number: int) -> Checkpoint:
        """Return the checkpoint of a round.

        Raises:
            RunError: It is missing or damaged; says where.
        """
        file = self._stem(number).with_suffix(".json")
        try:
            text, _, told = file.read_bytes().partition(b"\n")
            if told != _hash_line(text):
                raise ValueError("its hash does not fit")
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise RunError(
                    f"{file} has format {content['format']}; this version reads {FORMAT}"
                )
            file = file.with_suffix(".safetensors")
            arrays = _read_arrays(file)
            return Checkpoint(**decode(content["checkpoint"], arrays))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"checkpoint {file} is damaged: {_reason(error)}") from error

    def _stem(self, number: int) -> Path:
        return self.path / f"round-{number:06d}"

    def _remove(self, number: int) -> None:
        for suffix in (".json", ".safetensors"):  # the tree first: it makes the checkpoint
            with suppress(OSError):  # what cannot be removed does no harm
                self._stem(number).with_suffix(suffix).unlink()


def _hash_line(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode() + b"\n"


def _read_arrays(file: Path) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Arrays = load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, array in arrays.items():
        if array_sha256(array) != name:
            raise ValueError("an array does not fit its hash")
    return arrays


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error)
