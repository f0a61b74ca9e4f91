"""``fedsys doctor``: whether the run that the command line describes can go, and what to expect."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.commands.doctor import estimate, machine, network
from fedsys.commands.doctor.checks import Check
from fedsys.config import Config

__all__ = ["Check", "checks", "job"]


def job(tree: Any) -> Mapping[str, Any]:
    """Check everything and show it as a table.

    Args:
        tree: The composed configuration (a DictConfig).

    Returns:
        ``ok``, which is false if the run cannot go, and the ``checks``.

    Raises:
        ConfigError: A value of the configuration is not usable.
    """
    config = configuration.parse(configuration.to_text(tree))
    found = [*_without_effect(config), *checks(config)]
    if not tree.json:
        show(found)
    ok = all(check.status != "fail" for check in found)
    return {"ok": ok, "checks": [dataclasses.asdict(check) for check in found]}


def _without_effect(config: Config) -> Iterator[Check]:
    """Yield a warning for each option of the command line that changes nothing."""
    for line in configuration.without_effect(config, configuration.given()):
        option, _, reason = line.partition(" is without effect: ")
        detail, _, way_out = reason.partition("; ")
        yield Check("options", "warn", f"{option} is without effect: {detail}", way_out)


def checks(config: Config) -> Iterator[Check]:
    """Look at everything that the run needs, the cheap things first."""
    yield from machine.installation()
    yield from machine.processor(config)
    yield machine.kernels(config)
    yield machine.precision(config)
    yield machine.load()
    yield machine.memory()
    yield machine.descriptors()
    yield machine.disk(Path(config.run.dir or "outputs").absolute())
    yield network.ports()
    yield from network.certificates(config)
    if (found := network.superlink(config)) is not None:
        yield found
    yield from network.edges(config)
    yield from network.left_behind()
    yield from estimate.data_and_model(config)


def show(found: Sequence[Check]) -> None:
    """Print the checks as a table, with the way out below what needs one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        detail = Text(check.detail)
        if check.way_out:
            detail.append(f"\n→ {check.way_out}", style="cyan")
        table.add_row(Text(check.status, style=styles[check.status]), check.name, detail)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    console.print(table)
    bad = [check.name for check in found if check.status == "fail"]
    console.print(f"\nthe run cannot go: {', '.join(bad)}" if bad else "\nthe run can go")
