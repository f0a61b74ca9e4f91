"""Offloading policies: who decides at which cut, on which edge, each device trains in a round.

A policy is two pure functions over small records: `init` gives a state, `plan` takes it with what
was seen in the last round and gives the next state and one assignment for each device. Measuring
and sending happen in `strategies.offload`. A complete policy::

    class HalfAndHalf:
        def init(self, layers, nodes):
            return None

        def plan(self, state, seen):
            return state, {node: Assignment(cut=3, edge=0) for node in seen}

What it may have beside, for what is told of its decisions: `Explains`, `Predicts`, `Probes`,
`KeepsAgent`; `MeasuresLinks`, and `OrdersMoves`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.ordering import Order
from fedsys.planning.planner import Plan
from fedsys.planning.resources import Observation

__all__ = [
    "Assignment",
    "Explains",
    "KeepsAgent",
    "MeasuresLinks",
    "Observation",
    "OffloadPolicy",
    "OrdersMoves",
    "PolicyState",
    "Predicts",
    "Probes",
]

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


@runtime_checkable
class Explains(Protocol):
    """A policy that says why."""

    def reasons(self, state: PolicyState, clients: Sequence[int]) -> Mapping[int, str]:
        """Return a sentence for each client about what it does in the round that `plan` planned."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A policy that expects something of its plan."""

    def predicted(self, state: PolicyState, clients: Sequence[int]) -> Plan:
        """Return what it expects of some clients of the round that it has planned."""
        ...


@runtime_checkable
class MeasuresLinks(Protocol):
    """A policy that has devices measure their links which train alone."""

    def to_measure(self, state: PolicyState, clients: Sequence[int]) -> Mapping[int, int]:
        """Return the bytes each way, by client that is to do so in the round that is planned."""
        ...


@runtime_checkable
class OrdersMoves(Protocol):
    """A policy that has devices go on at another edge server in the middle of a round."""

    def orders(
        self, state: PolicyState, clients: Sequence[int], free: Sequence[int], round_: int
    ) -> Mapping[int, Order]:
        """Return the moves that it orders in the round that is planned, by client.

        Args:
            state: What `plan` returned.
            clients: Who takes part.
            free: Those of them that are not where mobility has them be.
            round_: The round.
        """
        ...


@runtime_checkable
class Probes(Protocol):
    """A policy that sends something of its own to learn about links."""

    def probe_bytes(self, state: PolicyState) -> int:
        """Return the bytes that were sent for the last plan."""
        ...


@runtime_checkable
class KeepsAgent(Protocol):
    """A policy whose decisions are those of an agent in a file."""

    @property
    def agent_file(self) -> Path | None:
        """The file, whole; None if it is nowhere."""
        ...
