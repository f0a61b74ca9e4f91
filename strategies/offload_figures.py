"""What a strategy that offloads somewhere in its layers has to tell of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsys.planning.resources import Event
from strategies.around import find
from strategies.offload import Offload
from strategies.policies.policy import KeepsAgent


def figures(strategy: Strategy) -> dict[str, Any]:
    """Return what offloading did in a run, for its result; empty if nothing was offloaded.

    Beside `strategies.offload_totals.OffloadTotals` there is ``agent``, the file of the agent that
    decided, where one did.
    """
    offload = find(strategy, Offload)
    if offload is None:
        return {}
    agent = offload.policy.agent_file if isinstance(offload.policy, KeepsAgent) else None
    more = {} if agent is None else {"agent": str(agent)}
    return dataclasses.asdict(offload.totals) | more


def traces(strategy: Strategy) -> Mapping[str, list[Event]]:
    """Return what the devices of the last round did, by name; empty if nothing was split."""
    offload = find(strategy, Offload)
    if offload is None or offload.decided is None:
        return {}
    moves = [m for m in offload.totals.moves if m["round"] == offload.decided.round]
    return {
        f"device {client}": [*events, *_pauses(events, [m for m in moves if m["client"] == client])]
        for client, events in sorted(offload.traces.items())
    }


def _pauses(events: Sequence[Event], moves: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Return the pauses of a device's moves in the time of its other events."""
    begin = min((event.start_s for event in events), default=0.0)
    return [
        Event(
            "move", f"{m['source']} to {m['target']}, {m['how']}", m["step"], -1,
            begin + m["began_s"], begin + m["began_s"] + m["pause_s"],
        )
        for m in moves
    ]  # fmt: skip


def moves(strategy: Strategy) -> list[dict[str, Any]]:
    """Return what became of moves between edge servers so far in a run."""
    offload = find(strategy, Offload)
    return [] if offload is None else offload.totals.moves


def recoveries(strategy: Strategy) -> list[dict[str, Any]]:
    """Return what was done about losses so far in a run."""
    offload = find(strategy, Offload)
    return [] if offload is None else offload.totals.recoveries
