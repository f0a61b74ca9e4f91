"""Sessions on the disk of an edge server, between its end and its next start.

One file per session, ``<hash of its name>.safetensors``, readable by its owner only, because it
holds the session's token. Its header holds the specification as JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsys.errors import ConfigError, FedsysError, RunError
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")


def keep(folder: Path, spec: SessionSpec, snapshot: Snapshot) -> Path:
    """Write a session and return its file.

    Raises:
        RunError: It cannot be written.
    """
    name = hashlib.blake2b(spec.id.encode(), digest_size=16).hexdigest()
    path = folder / f"{name}.safetensors"
    about = {"spec": json.dumps(spec.to_meta()), "step": str(snapshot.step)}
    tensors = {n: t.cpu().contiguous() for n, t in snapshot.tensors().items()}
    try:
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(save(tensors, about))
        part.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    return path


def checked_folder(text: str | None) -> Path | None:
    """Return the folder for sessions, made if it is not there; None for none.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    if text is None:
        return None
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        rule = f"must be a folder that can be written to ({error.strerror})"
        raise ConfigError.of("edge.state_dir", folder, rule) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError.of("edge.state_dir", folder, "must be a folder that can be written to")
    return folder


def take(folder: Path) -> Iterator[tuple[SessionSpec, Snapshot]]:
    """Yield the sessions of a folder, and remove their files; damaged ones are left and named."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            session = _read(path)
        except (OSError, ValueError, SafetensorError, FedsysError) as error:
            _log.warning("%s holds no session: %s", path, error)
            continue
        path.unlink(missing_ok=True)
        yield session


def _read(path: Path) -> tuple[SessionSpec, Snapshot]:
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    spec = SessionSpec.from_meta(json.loads(about.get("spec", "{}")))
    frame = Frame("state", {"step": int(about.get("step", "-1"))}, tensors)
    return spec, Snapshot.from_frame(frame)
