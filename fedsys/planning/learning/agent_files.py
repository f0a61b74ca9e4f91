"""Agents in files: weights as safetensors, all else as JSON in the metadata, a checksum over both.

Nothing is unpickled. Version 1 are agents that say shares of the work, version 2 those that score
cuts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsys.errors import ConfigError
from fedsys.files import write_atomic

SHARES: Final = "1"
CUTS: Final = "2"

FORMATS: Final[Mapping[str, str]] = {SHARES: "shares", CUTS: "cuts"}
"""Versions of the file, and what agents of them say (``policy.action``)."""

WAY_OUT: Final = "train one: leave policy.agent out"

Weights = Mapping[str, NDArray[np.float32]]


def write(path: Path, version: str, told: Mapping[str, Any], weights: Weights) -> None:
    """Write an agent to a file."""
    kept = {name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}
    text = json.dumps(told, sort_keys=True)
    metadata = {"format": version, "agent": text, "sha256": _digest(text, kept)}
    write_atomic(path, save(kept, metadata))


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Return the version of an agent's file, what it says, and its weights.

    Raises:
        ConfigError: There is no such file, it is damaged, or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError.of(
            "policy.agent", path, f"must be an agent's file ({error})", WAY_OUT
        ) from error
    version = metadata.get("format", "none")
    if version not in FORMATS:
        raise ConfigError.of(
            "policy.agent", path,
            f"must be of version {' or '.join(FORMATS)}, and is of {version}", WAY_OUT,
        )  # fmt: skip
    text = metadata.get("agent", "")
    if metadata.get("sha256") != _digest(text, weights):
        raise ConfigError.of("policy.agent", path, "is damaged: its checksum is not that", WAY_OUT)
    told: dict[str, Any] = json.loads(text)
    return version, told, weights


def _digest(text: str, weights: Weights) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(weights):
        array = weights[name]
        digest.update(f"\0{name}\0{array.shape}\0".encode() + array.astype("<f4").tobytes())
    return digest.hexdigest()
