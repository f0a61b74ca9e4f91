"""Keeping to what was fastest, once an agent has had its trials.

An agent that is followed for ever can go back and forth between two choices, or stay with a worse
one than it began with. So it is followed for some rounds after each change of a link, a machine or
of who takes part, and then what was fastest of all that was measured since is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Conditions:
    """What choices were measured under, by client.

    Attributes:
        bit_s: Seconds of a bit, both ways together; 0 if unknown.
        baseline_s: Seconds of an iteration alone.
    """

    bit_s: Mapping[int, float] = field(default_factory=dict)
    baseline_s: Mapping[int, float] = field(default_factory=dict)

    def differ(self, others: Conditions, drift: float) -> bool:
        """Return whether others are other conditions: by who is there, or by more than a drift."""
        if self.baseline_s.keys() != others.baseline_s.keys():
            return True
        return any(
            before > 0 and after > 0 and abs(after / before - 1.0) > drift
            for name in ("bit_s", "baseline_s")
            for before, after in (
                (values[client], getattr(others, name)[client])
                for values in (getattr(self, name),)
                for client in values
            )
        )

    def known_with(self, others: Conditions) -> Conditions:
        """Return the same, with rates of others where none was known."""
        return dataclasses.replace(
            self, bit_s={client: bit or others.bit_s[client] for client, bit in self.bit_s.items()}
        )


@dataclass(frozen=True)
class Memory:
    """What was fastest under the present conditions.

    Attributes:
        conditions: These.
        rounds: How many were measured under them.
        picked: The cuts of the fastest one, by index.
        seconds: What an iteration took its slowest device.
    """

    conditions: Conditions = Conditions()
    rounds: int = 0
    picked: Mapping[int, int] = field(default_factory=dict)
    seconds: float = math.inf

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Memory:
        """Return what `dataclasses.asdict` made plain values of; of none, what knows nothing."""
        if not values:
            return cls()
        return cls(**{**values, "conditions": Conditions(**values["conditions"])})

    def seen(
        self, now: Conditions, picked: Mapping[int, int], seconds: float, drift: float
    ) -> Memory:
        """Take in a round: what each device did, and how long the slowest took."""
        fresh = self.conditions.differ(now, drift)
        before = Memory(now) if fresh else self
        better = seconds < before.seconds
        return Memory(
            before.conditions.known_with(now),
            before.rounds + 1,
            dict(picked) if better else before.picked,
            seconds if better else before.seconds,
        )
