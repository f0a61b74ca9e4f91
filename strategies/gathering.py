"""Before the first round: who takes part, and among how many the data are divided.

`fedsys train` says how many clients there are, and the run waits for as many nodes. Users of
Flower expect the opposite of ``flwr run``: there are as many clients as nodes, and every node is
used. Then the number follows from the nodes, and the clients are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.runtime.grids import AnnotatedGrid, AttentiveGrid
from fedsys.training import federation
from fedsys.transport.messages import FEDERATION, Division, written
from strategies.roster import Roster

ENGINE_S = 300.0
"""Seconds that Flower's simulation engine may take to add its nodes, while it starts Ray."""


def gather(
    config: Config, grid: Grid, run_config: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[Config, Grid, Roster]:
    """Wait for the nodes that the run needs and settle how many clients there are.

    Args:
        config: The run as it was asked for.
        grid: Reaches the nodes.
        run_config: Says whether the run was submitted by fedsys or by a bare ``flwr run``.
        say: Told what a person should know.

    Returns:
        The run as it takes place, the grid for it, and who is there.

    Raises:
        RuntimeFailure: As `Roster.assemble`.
    """
    wait_s = config.runtime.wait_s
    if not run_config.get("hydra-config") and config.runtime.kind != "deployment":
        patience_s = wait_s if isinstance(grid, AttentiveGrid) else max(wait_s, ENGINE_S)
        count = Roster(wait_s=patience_s, say=say).count(grid)
        if count != config.num_clients:
            say(
                f"num_clients={config.num_clients} in the configuration, but {count} "
                f"{'node is' if count == 1 else 'nodes are'} connected: the data are divided among "
                f"{count}"
            )
            config = configuration.divided(config, count)
        grid = AnnotatedGrid(grid, FEDERATION, ConfigRecord(written(Division(count))))

    def classes() -> Sequence[str]:
        return federation.federation(config).dataset.classes

    roster = Roster(config.num_clients, classes, wait_s=wait_s, say=say)
    roster.assemble(grid)
    return config, grid, roster
