"""``fedsys train``: carry out one run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.config.pruning import check_rounds
from fedsys.runs import resume
from fedsys.runs import startup as stages
from fedsys.runs.folder import RunFolder, default_path


def job(tree: Any) -> Mapping[str, Any]:
    """Run what the composed configuration describes and return the result in ``run.json``.

    With ``resume=`` the run in that folder is continued; one that is finished is left as it is.

    Args:
        tree: The composed configuration (a DictConfig).

    Raises:
        FedsysError: The configuration is not usable, or the run failed.
    """
    clock = stages.begin()
    config = _continued(tree) if tree.resume else _new(tree)
    clock.reached("command and configuration")
    for line in configuration.without_effect(config, configuration.given()):
        print(f"note: {line}", file=sys.stderr)
    if config.resume:
        path = Path(str(config.run.dir))
        info = RunFolder.open(path).info
        if info["status"] == "finished" and info["result"]["rounds"] == config.rounds:
            print(f"{path} is finished; rounds= above {config.rounds} goes on", file=sys.stderr)
            return _result(path)
    from fedsys import runtime  # imports Flower, which is not needed to refuse a configuration

    result = runtime.run(config)
    return _result(Path(str(config.run.dir))) if result is None else result


def _new(tree: Any) -> Config:
    # Bad values are said before a folder is made.
    config = configuration.parse(configuration.to_text(tree))
    check_rounds(config.pruning, config.rounds)
    if config.runtime.kind == "deployment" and not config.runtime.launch:
        return config  # the run folder is on the machine of the server app, which chooses it
    tree.run.dir = str(Path(tree.run.dir or default_path(Path("outputs"), "train")).absolute())
    return configuration.parse(configuration.to_text(tree))


def _continued(tree: Any) -> Config:
    path = Path(str(tree.resume)).absolute()
    resume.check_folder(path)
    asked, given = configuration.plain(tree), configuration.given_keys()
    merged = resume.merged(resume.stored(path), asked, given, path)
    return configuration.parse(configuration.to_text(merged))


def _result(path: Path) -> Mapping[str, Any]:
    result: Mapping[str, Any] = RunFolder.open(path).info["result"]
    return result
