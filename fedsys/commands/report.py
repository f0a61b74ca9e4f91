"""``fedsys report RUN…``: one self-contained HTML page about a run, or about several compared."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.errors import ConfigError
from fedsys.files import write_atomic
from fedsys.runs.report.labels import labelled
from fedsys.runs.report.loading import as_json, load, named
from fedsys.runs.report.page import page
from fedsys.runs.report.promised import check_audit

DEFAULT_NAME = "report.html"


def job(tree: Any) -> Mapping[str, Any]:
    """Write the page of the runs that ``report.runs`` names, and print its path.

    With ``report.audit`` it shows what an audit found to leak (``fedsys bench leakage``).

    The page of one run goes into its folder, that of several into the current one, unless
    ``report.out`` says where.

    Args:
        tree: The composed configuration (a DictConfig).

    Returns:
        ``path`` of the page and what is known of the ``runs``.

    Raises:
        ConfigError: No run is named, or a folder does not exist or holds no run, or no audit.
        RunError: The page cannot be written.
    """
    options = configuration.plain(tree)["report"]
    folders = [Path(str(name)).resolve() for name in options["runs"]]
    if not folders:
        raise ConfigError("report: must be followed by run folders; for instance fedsys report RUN")
    for folder in folders:
        if not (folder / "run.json").is_file() and not (folder / "config.yaml").is_file():
            missing = "there is no such folder" if not folder.is_dir() else "there is no run in it"
            raise ConfigError.of("report", folder, "must be the folder of a run", missing)
    runs = labelled(named([load(folder) for folder in dict.fromkeys(folders)]))
    default = folders[0] / DEFAULT_NAME if len(runs) == 1 else Path(DEFAULT_NAME)
    path = Path(str(options["out"])) if options["out"] else default
    audit = Path(str(options["audit"])).expanduser() if options["audit"] else None
    if audit is not None:
        check_audit(audit)
    write_atomic(path.absolute(), page(runs, datetime.now(), audit).encode())
    if not tree.json:
        print(path.absolute())
    return {"path": str(path.absolute()), "runs": [as_json(run) for run in runs]}
