"""What offloading did in a run: counted, kept in checkpoints, and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsys.models.layers import LayeredModel, fractions
from fedsys.runs.happened import recovery_in_words


@dataclass
class OffloadTotals:
    """What offloading did in a run so far.

    Attributes:
        cuts: The last cut of each client: index, unit before it, device's share of the work, and
            where there are such the machine, edge, pieces and codec.
        edge_steps: Optimizer steps on edge servers.
        bytes_up: Bytes that devices sent to edges.
        bytes_down: Bytes that they received.
        recoveries: What was done about losses, and about moves that came to nothing.
        moves: What became of moves between edges, as `fedsys.planning.moves.Handover`.
    """

    cuts: dict[str, dict[str, Any]] = field(default_factory=dict)
    edge_steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)

    def note(self, round_: int, client: int, entry: Mapping[str, Any]) -> None:
        """Note what was done about a loss of a client."""
        self.recoveries.append({"client": client, "round": round_, **entry})

    def note_cut(self, client: int, layers: LayeredModel, cut: int, **more: object) -> None:
        """Note where the model was cut for a client, and what more is known of it."""
        self.cuts[str(client)] = {**place_of(layers, cut), **more}


def place_of(layers: LayeredModel, cut: int) -> dict[str, Any]:
    """Return where a cut is: its index, the unit before it, and the device's share of the work."""
    return {
        "index": cut,
        "unit": layers.units[cut - 1].name if cut else "",
        "device_share": fractions(layers)[cut - 1] if cut else 0.0,
    }


def move_in_words(move: Mapping[str, Any]) -> str:
    """Return a handover of `moves` as a line for people."""
    begin = f"round {move['round']}: client {move['client']} went from {move['source']}"
    return f"{begin} to {move['target']}: {move['why']}"


def in_words(entry: Mapping[str, Any]) -> str:
    """Return an entry of `recoveries` as a line for people."""
    told = recovery_in_words(entry, f"client {entry['client']}")
    why = f": {entry['why']}" if entry["what"] == "stays" else ""
    return f"round {entry['round']}: {told}{why}"
