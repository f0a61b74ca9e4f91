"""What a strategy that offloads somewhere in its layers has to tell of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsys.planning.resources import Event
from strategies.around import find
from strategies.offload import Offload


def figures(strategy: Strategy) -> dict[str, Any]:
    """Return what offloading did in a run, for its result; empty if nothing was offloaded."""
    offload = find(strategy, Offload)
    return {} if offload is None else dataclasses.asdict(offload.totals)


def traces(strategy: Strategy) -> Mapping[str, list[Event]]:
    """Return what the devices of the last round did, by name; empty if nothing was split."""
    offload = find(strategy, Offload)
    held = {} if offload is None else offload.traces
    return {f"device {client}": held[client] for client in sorted(held)}


def recoveries(strategy: Strategy) -> list[dict[str, Any]]:
    """Return what was done about losses so far in a run."""
    offload = find(strategy, Offload)
    return [] if offload is None else offload.totals.recoveries
