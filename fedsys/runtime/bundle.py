"""The Flower App Bundle: what of fedsys travels to SuperLink and SuperNodes with each run.

It holds the four packages and ``pyproject.toml``, no data, no tests and no certificates. It is
made in memory from the packages as they are here, in a checkout as in an installed wheel, which
has no ``pyproject.toml``: then one is written from what the distribution says of itself.
"""

from __future__ import annotations

import hashlib
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from fedsys.errors import RuntimeFailure

HOME = Path(__file__).resolve().parents[2]
PACKAGES = ("fedsys", "strategies", "clients", "conf")
SUFFIXES = (".py", ".yaml")


def files() -> dict[str, bytes]:
    """Return the contents of the bundle's files by their path in it."""
    found = {
        path.relative_to(HOME).as_posix(): path.read_bytes()
        for package in PACKAGES
        for path in sorted((HOME / package).rglob("*"))
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }
    return {"pyproject.toml": _project(), **found}


def build() -> tuple[bytes, str]:
    """Return the bundle and its SHA-256, as ``flwr build`` makes it.

    Raises:
        RuntimeFailure: Flower refuses to bundle the files.
    """
    from flwr.cli.build import build_fab_from_files

    try:
        content, _ = build_fab_from_files(files())
    except ValueError as error:
        raise RuntimeFailure(f"the Flower App Bundle cannot be built: {error}") from error
    return content, hashlib.sha256(content).hexdigest()


def _project() -> bytes:
    import tomli_w

    file = HOME / "pyproject.toml"
    if file.exists() and tomllib.loads(file.read_text())["project"]["name"] == "fedsys":
        return file.read_bytes()
    about = metadata.metadata("fedsys")
    project: dict[str, Any] = {
        "name": "fedsys",
        "version": about["Version"],
        "description": about["Summary"],
        "license": "Apache-2.0",
        "dependencies": [],  # the nodes have fedsys's own dependencies installed
    }
    app = {
        "publisher": "fedsys",
        "fab-include": [f"/{package}/**" for package in PACKAGES],
        "components": {"serverapp": "strategies.app:app", "clientapp": "clients.app:app"},
        "config": RUN_CONFIG,
    }
    return tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}).encode()


RUN_CONFIG = {"hydra-config": "", "overrides": "", "progress": "lines", "edges": ""}
"""The keys of the run config with their defaults, as in ``pyproject.toml``.

``hydra-config`` holds the composed YAML of a run that ``fedsys train`` submits; ``overrides``
Hydra overrides in shell syntax for a bare ``flwr run``; ``progress`` is ``lines`` for people or
``relayed`` for the fedsys command that follows the run; ``edges`` the edge servers that it started.
"""
