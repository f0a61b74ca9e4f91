"""A move of a device from edge to edge, as it takes note of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PARTS = ("freeze", "encode", "transfer", "restore")


@dataclass
class Leaving:
    """A move that is under way, or done.

    Attributes:
        source: Address of the edge server that the device leaves.
        to: Address of the one to which it goes; afterwards, of the one where it went on.
        how: How it leaves: see `fedsys.planning.moves`.
        began_s: When, by the device's clock.
        away_s: Seconds in which it reaches neither.
        why: In words, where it is no matter of places.
        over: Whether there is nothing more to wait for.
        step: Mini-batches that were done.
        repeated_steps: Of these, how many are done again.
        parts: Seconds by part, as edge servers told them.
        edge_s: Seconds between what a device said and what it was answered, as the edge servers
            measured them: their parts are to make them up.
        slept_s: Seconds in which it reached neither.
        bytes: Bytes that went between edge servers in the pause.
        precopied: Bytes that went before.
        pause_s: Seconds from its beginning until the device could train on.
    """

    source: str
    to: str
    how: str
    began_s: float
    away_s: float = 0.0
    why: str = ""
    over: bool = False
    step: int = 0
    repeated_steps: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    edge_s: float = 0.0
    slept_s: float = 0.0
    bytes: int = 0
    precopied: int = 0
    pause_s: float = 0.0

    def was_told(self, told: Mapping[str, Any], now_s: float) -> None:
        """Take in what an edge server says of the move."""
        parts = told.get("parts")
        if isinstance(parts, dict):
            self.parts = {p: float(parts.get(p, 0.0)) for p in PARTS}
            self.bytes = int(told.get("bytes", 0))
            self.precopied = int(told.get("precopied", 0))
            self.edge_s = float(told.get("edge_s", 0.0))
        if self.how == "commanded" and self.parts:  # it began before the device learned of it
            self.began_s = min(self.began_s, now_s - self.edge_s)

    def arrived(self, edge: str, told: Mapping[str, Any], now_s: float) -> None:
        """Take note of where the device went on.

        What neither edge servers nor distance took is the way to them: words on their way, and
        links that were made.
        """
        self.to = edge
        if told:
            self.was_told(told, now_s)
        self.pause_s = now_s - self.began_s
        self.parts["reconnect"] = max(0.0, self.pause_s - self.edge_s - self.slept_s)
        if self.slept_s:
            self.parts["away"] = self.slept_s

    def was_recut(self, seconds: float) -> None:
        """Take note of the seconds in which units changed sides after the arrival."""
        self.pause_s += seconds
        self.parts["recut"] = self.parts.get("recut", 0.0) + seconds
