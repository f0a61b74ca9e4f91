"""``fedsys train``: carry out one run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.config import Config, secret
from fedsys.config.pruning import check_rounds
from fedsys.errors import ConfigError, RunError
from fedsys.runs import opening, resume
from fedsys.runs import startup as stages
from fedsys.runs.folder import RunFolder
from fedsys.runs.lines import fitted
from fedsys.runs.naming import default_path, label_of, point_to, shortest, take_back


def job(tree: Any) -> Mapping[str, Any]:
    """Run what the composed configuration describes and return the result in ``run.json``.

    With ``resume=`` the run in that folder is continued; one that is finished is left as it is.

    Args:
        tree: The composed configuration (a DictConfig).

    Raises:
        FedsysError: The configuration is not usable, or the run failed.
    """
    clock = stages.begin()
    if tree.resume:
        return _carried_out(_continued(tree), clock)
    config = _checked(tree)
    if tree.run.dir or (config.runtime.kind == "deployment" and not config.runtime.launch):
        return _carried_out(_placed(tree, config, tree.run.dir), clock)
    with _new_folder() as path:
        return _carried_out(_placed(tree, config, path), clock)


def _carried_out(config: Config, clock: stages.Startup) -> Mapping[str, Any]:
    clock.reached("command and configuration")
    for line in configuration.without_effect(config, configuration.given()):
        print(fitted(f"note: {line}", sys.stderr), file=sys.stderr)
    if config.resume:
        path = Path(str(config.run.dir))
        if _finished(path, config.rounds):
            print(f"{path} is finished; rounds= above {config.rounds} goes on", file=sys.stderr)
            return _result(path)
    opening.say(f"{_about(config)}: loading PyTorch and Flower", stays=True)
    from fedsys import runtime  # imports Flower, which is not needed to refuse a configuration

    opening.say("starting the run")
    try:
        result = runtime.run(config)
    except KeyboardInterrupt:
        if config.run.dir and (Path(config.run.dir) / "run.json").is_file():
            print(_how_to_continue(Path(config.run.dir)), file=sys.stderr)
        raise
    return _result(Path(str(config.run.dir))) if result is None else result


def _about(config: Config) -> str:
    """Return what a run will do, before anything is loaded that could say more about it."""
    model = str(config.model.get("name") or config.model["_target_"]).rpartition(".")[2]
    data = config.data.get("source", "data")
    rounds = f"{config.rounds} round{'' if config.rounds == 1 else 's'}"
    verb = "continuing" if config.resume else "training"
    return f"{verb} {model} on {data}, {config.num_clients} clients, {rounds}"


def _finished(path: Path, rounds: int) -> bool:
    """Return whether a run has all of its rounds behind it, and left its model and its figures."""
    try:
        info = RunFolder.open(path).info
    except RunError:  # damaged: its checkpoints may be good
        return False
    whole = (path / "model.safetensors").is_file()
    return info["status"] == "finished" and info["result"].get("rounds") == rounds and whole


def _how_to_continue(path: Path) -> str:
    return f"continue the run by\n  fedsys train {shlex.quote(f'resume={shortest(path)}')}"


def _checked(tree: Any) -> Config:
    """Return the configuration of a new run; bad values are said before a folder is made."""
    config = configuration.parse(configuration.to_text(tree))
    check_rounds(config.pruning, config.rounds)
    return config


def _placed(tree: Any, config: Config, path: Path | str | None) -> Config:
    """Return the configuration with the run's folder; None leaves it to where the server app is."""
    if path is None:
        return config
    tree.run.dir = str(Path(path).absolute())
    return configuration.parse(configuration.to_text(tree))


@contextmanager
def _new_folder() -> Iterator[Path]:
    """Make a folder in ``outputs/``, which is taken back if the run is refused in the block."""
    outputs, given = Path("outputs"), configuration.given()
    values = {
        key: given[key].partition("=")[2]
        for key in configuration.varying()
        if not secret.is_secret(key)
    }
    path = default_path(outputs, label_of("train", values)).absolute()
    before = point_to(outputs.absolute(), path)
    try:
        yield path
    except ConfigError:
        take_back(path, before)
        raise


def _continued(tree: Any) -> Config:
    path = Path(str(tree.resume)).resolve()  # where outputs/latest points now
    resume.check_folder(path)
    asked, given = configuration.plain(tree), configuration.given_keys()
    merged = resume.merged(resume.stored(path), asked, given, path)
    return configuration.parse(configuration.to_text(merged))


def _result(path: Path) -> Mapping[str, Any]:
    result: Mapping[str, Any] = RunFolder.open(path).info["result"]
    return result
