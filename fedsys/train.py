"""``fedsys train``: carry out one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.run import RunFolder, default_path


def job(tree: Any) -> Mapping[str, Any]:
    """Run what the composed configuration describes and return the result in ``run.json``.

    Args:
        tree: The composed configuration (a DictConfig).

    Raises:
        FedsysError: The configuration is not usable, or the run failed.
    """
    configuration.parse(configuration.to_text(tree))  # bad values are said before a folder is made
    tree.run.dir = str(Path(tree.run.dir or default_path(Path("outputs"), "train")).absolute())
    config = configuration.parse(configuration.to_text(tree))
    from fedsys import runtime  # imports Flower, which is not needed to refuse a configuration

    runtime.run(config)
    result: Mapping[str, Any] = RunFolder.open(Path(tree.run.dir)).info["result"]
    return result
