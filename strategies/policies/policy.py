"""Offloading policies: who decides at which cut, on which edge, each device trains in a round.

A policy is two pure functions over small records: `init` gives a state, `plan` takes it with what
was seen in the last round and gives the next state and one assignment for each device. Measuring
and sending happen in `strategies.offload`. A complete policy::

    class HalfAndHalf:
        def init(self, layers, nodes):
            return None

        def plan(self, state, seen):
            return state, {node: Assignment(cut=3, edge=0) for node in seen}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.resources import Observation

__all__ = ["Assignment", "Observation", "OffloadPolicy", "PolicyState"]

PolicyState = Any
"""Whatever a policy wants to remember, of plain values: it is kept in checkpoints."""


class OffloadPolicy(Protocol):
    """State in, state out."""

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> PolicyState:
        """Return the state before the first round.

        Args:
            layers: The model, on ``meta``.
            nodes: Partition ids of all devices.
        """
        ...

    def plan(
        self, state: PolicyState, seen: Mapping[int, Observation]
    ) -> tuple[PolicyState, Mapping[int, Assignment]]:
        """Return the next state, and an assignment for each device in `seen`.

        Args:
            state: What `init` or the last `plan` returned.
            seen: The devices of this round, with what was last seen of each.
        """
        ...
