"""``fedsys train resume=RUN``: the configuration of the run that is continued.

A run continues with its own configuration, the ``config.yaml`` in its folder, so that it ends with
the model that it would have had without the interruption. What is given beside ``resume=`` must
agree with it, except for what the model does not depend on (`HARMLESS`), and ``rounds``, which may
be raised to train longer.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedsys.config import Config
from fedsys.config.resilience import ResilienceConfig
from fedsys.errors import ConfigError, RunError
from fedsys.runs import plain_yaml
from fedsys.runs.folder import RunFolder

HARMLESS: Final = frozenset(
    {
        *("json", "resume", "runtime", "faults", "checkpoint", "bench", "hydra"),
        *("num_edges", "fleet", "edge", "link", "network", "mobility"),
        *("host", "hosts", "partition", "tracker", "dashboard"),
    }
)
"""Groups that the model does not depend on."""

_OPEN: Final = ("rounds", "run.plots", "run.oracle")  # keys of other groups that may change

_FIXED: Final = ("runtime.kind",)  # where a run is deployed, devices may have data of their own
_NOT_IN_DIGEST: Final = HARMLESS | {"rounds", "run", "text"}
_IN_DIGEST: Final = {"variants": "prune"}
"""Former names of groups: checkpoints have the digest of these."""

_NO_MATTER: Final = tuple(
    f"serving.{name}"
    for name in (
        *("max_waiting_bytes", "max_header_bytes", "header_s", "grpc", "recovery", "exits"),
        *("engine", "objective.accuracy", "objective.latency_ms", "objective.downtime_ms"),
        *("objective.weights", "objective.resolution", "objective.techniques"),
    )
)
"""Options in groups of the digest that the model does not depend on."""

_LATER: Final[Mapping[str, Any]] = {
    "client.kernels": "plain",
    "client.precision": "fp32",
    "client.train": "all",
    "pruning.score": None,
    "privacy.where": "server",
    **{
        f"resilience.{name}": getattr(ResilienceConfig(), name)
        for name in ("head_weight", "match", "pool", "measured")
    },
}
"""Options that came later: what is computed where they are this was computed without them."""

_THEN: Final = {"variants.fine_tune": 0}
"""What options that may be null, on which the model does not depend, were before they could be."""

Plain = Mapping[str, Any]


def digest(config: Config) -> str:
    """Return the SHA-256 of everything that the model after a given round depends on."""
    groups = dataclasses.asdict(config).items()
    values = {k: v for k, v in groups if k not in _NOT_IN_DIGEST}
    unused = {
        "privacy": not config.privacy.active,
        "resilience": not config.resilience.active,
        "task": config.task.usual and config.task.measure.name == "accuracy",
        "client.lora": config.client.train == "all",
    }
    unused |= {key: _lookup(values, key) == then for key, then in _LATER.items()}
    for key in (*_NO_MATTER, *(key for key, is_so in unused.items() if is_so)):
        _drop(values, key)
    for key, then in _THEN.items():
        if _lookup(values, key) is None:
            _put(values, key, then)
    values = {_IN_DIGEST.get(k, k): v for k, v in values.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_folder(path: Path) -> None:
    """Refuse what is not the folder of a run that has begun.

    Raises:
        ConfigError: There is no such folder, or no run in it.
    """
    rule = "must be the folder of a run"
    if not path.is_dir():
        raise ConfigError.of("resume", path, rule, "there is no such folder")
    if not (path / "run.json").is_file():
        raise ConfigError.of("resume", path, rule, "this one holds no run.json")


def stored(path: Path) -> dict[str, Any]:
    """Return the configuration of the run in a folder: ``config.yaml``, or what ``run.json`` has.

    Raises:
        RunError: Both are missing or damaged.
    """
    import yaml

    file, claimed = path / "config.yaml", _claimed(path)
    try:
        tree = plain_yaml.load(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or (claimed and set(tree) != set(claimed)):
            raise ValueError(f"{file} is damaged")
        return tree
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if claimed:  # killed before config.yaml was written, or it was damaged since
            return claimed
        reason = str(error).splitlines()[0]
        raise RunError(
            f"cannot continue {path}: {reason}; run again into another folder"
        ) from error


def _claimed(path: Path) -> dict[str, Any]:
    """Return the configuration in ``run.json``; empty if there is none."""
    try:
        config = RunFolder.open(path).info.get("config")
    except RunError:
        return {}
    return dict(config) if isinstance(config, dict) else {}


def merged(own: Plain, asked: Plain, given: Sequence[str], path: Path) -> dict[str, Any]:
    """Return the configuration with which a run continues.

    Args:
        own: That of the run.
        asked: That of the command line, complete.
        given: Keys of `asked` that the command line names, such as ``client.lr`` or ``model``.
        path: Folder of the run.

    Raises:
        ConfigError: Names a key whose value differs from that of the run.
    """
    result = copy.deepcopy(dict(own))
    for key in given:
        group = key.partition(".")[0]
        here, there = _lookup(asked, key), _lookup(own, key)
        if key == "run.dir":
            here = str(Path(str(here)).absolute())
        for leaf, value, kept in _differences(key, here, there):
            if leaf in _FIXED or (group not in HARMLESS and leaf not in _OPEN):
                raise ConfigError.of(
                    leaf,
                    value,
                    f"must be {kept} as in the run that is continued",
                    f"leave it out, or start a new run instead of resume={path}",
                )
        if group in HARMLESS or key in _OPEN:
            _put(result, key, here)
    if result.get("rounds") != own.get("rounds"):
        _check_rounds(own, result["rounds"])
    # Whether this call wants JSON does not depend on what the former one wanted.
    run = {**result.get("run", {}), "dir": str(path)}
    return result | {"json": asked["json"], "resume": str(path), "run": run}


def _check_rounds(own: Plain, rounds: object) -> None:
    kind = _lookup(own, "client.lr_schedule.kind")
    by_levels = _lookup(own, "pruning.rounds_per_level")  # each level has the same rates
    if kind == "cosine" and not by_levels:
        rule = f"must stay {own.get('rounds')}: the learning rates of the rounds that are done"
        raise ConfigError.of("rounds", rounds, f"{rule} depend on it (client.lr_schedule=cosine)")


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, Mapping):
            tree = tree.get(part)
        else:
            return None
    return tree


def _drop(tree: dict[str, Any], key: str) -> None:
    folder, _, name = key.rpartition(".")
    inner = _lookup(tree, folder) if folder else tree
    if isinstance(inner, dict):
        inner.pop(name, None)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *folders, name = key.split(".")
    for position, part in enumerate(folders):
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):  # a place in a list: the command line has all of the list
            raise ConfigError(
                f"{key}: write {'.'.join(folders[: position + 1])}=[…] as a whole with resume="
            )
        tree = inner
    tree[name] = copy.deepcopy(value)


def _differences(key: str, here: Any, there: Any) -> list[tuple[str, Any, Any]]:
    """Return the leaves in which two values differ: name, first value, second value."""
    if not isinstance(here, Mapping) or not isinstance(there, Mapping):
        return [] if here == there else [(key, here, there)]
    names = [*here, *(name for name in there if name not in here)]
    return [
        found
        for name in names
        for found in _differences(f"{key}.{name}", here.get(name), there.get(name))
    ]
