"""Starts runs. The only package that knows how Flower is started, and its private parts.

==============  ====================================================================
``local``       everything in this process; clients are threads behind a grid
``simulation``  Flower's simulation engine; clients are processes under Ray
``deployment``  Flower's SuperLink and SuperNodes, which exist or are launched here
==============  ====================================================================

The same ServerApp and ClientApp run in all of them and give the same model.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.runtime.processes import terminable

__all__ = ["RUNTIMES", "quiet_flower", "run"]

RUNTIMES = {
    "local": "fedsys.runtime.local:run_local",
    "simulation": "fedsys.runtime.simulation:run_simulation",
    "deployment": "fedsys.runtime.deployment:run_deployment",
}


QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables that keep Flower and Ray from calling home and from installing anything."""


def run(config: Config) -> Mapping[str, Any] | None:
    """Carry a run out in the runtime that it asks for; its results are in its run folder.

    Returns:
        The result, if the run took place in another process, whose folder may be far away.

    Raises:
        FedsysError: Whatever made the run fail.
    """
    quiet_flower()
    name = RUNTIMES.get(config.runtime.kind)
    if name is None:
        known = ", ".join(RUNTIMES)
        raise ConfigError.of("runtime.kind", config.runtime.kind, f"must be one of {known}")
    module, _, function = name.partition(":")
    carry_out: Callable[[Config], Mapping[str, Any] | None]
    carry_out = getattr(importlib.import_module(module), function)
    with terminable():
        return carry_out(config)


def quiet_flower() -> None:
    """Keep Flower and Ray from calling home, from installing anything, and from much talk.

    Whoever sets one of these variables keeps his own choice.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with _without_command_of_httpx():
        import flwr.supercore  # noqa: F401 - sets the level of its logger when it is imported

    logger = logging.getLogger("flwr")
    logger.propagate = False
    logger.setLevel(logging.WARNING)


@contextmanager
def _without_command_of_httpx() -> Iterator[None]:
    """Let httpx be imported without its own command, which imports rich, click and pygments.

    It does without where these are not installed. Flower imports httpx, and a run needs neither.
    """
    name = "httpx._main"
    if "httpx" in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment] # the import says that there is none
    try:
        yield
    finally:
        del sys.modules[name]
