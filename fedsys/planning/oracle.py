"""The oracle: what devices should have done in a round, by who knows the truth.

It knows the machines and rates of the virtual clock and chooses as `policy=exhaustive` would, for
the mean rates that links have over the round; its choices are then played on the clock from the
same moment. What a policy loses against it is its *regret*: seconds over those of the oracle, less
one. As rates within a round are means to the planner, and above 10^6 combinations it changes one
device after the other, the oracle takes the policy's own choices where these turn out faster:
regret is never below 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedsys.planning.assignment import Assignment
from fedsys.planning.planner import plan
from fedsys.planning.virtual_clock import VirtualClock, VirtualRound, same_round
from fedsys.planning.workload import Workload

EXHAUSTIVE_DEVICES: Final = 8
"""Devices of a round up to which all choices of each are gone through; above, as `auto` does."""

MOST_DEVICES: Final = 200
"""Devices of a round above which there is no oracle: playing its choices would cost too much."""

_NEAR = 0.05  # relative change of a round's length for which rates are averaged anew
_KEPT = 64  # rounds that are remembered
_ROUNDING = 1e-9  # relative difference of rounds that are as long: others begin at another moment

Choices = tuple[Assignment, ...]


@dataclass(frozen=True)
class Optimum:
    """What the oracle says of a round.

    Attributes:
        choices: Of each device.
        played: The round with them.
        how: How they were found, in a sentence.
    """

    choices: Choices
    played: VirtualRound
    how: str

    @property
    def seconds(self) -> float:
        """Seconds of the round."""
        return self.played.seconds


class Oracle:
    """Finds the best choices for rounds. One that is like an earlier round costs nothing.

    Args:
        offload: Whether every device has to offload.
        clock: Plays the rounds.
    """

    def __init__(self, *, offload: bool = False, clock: VirtualClock | None = None) -> None:
        self._offload, self._clock = offload, clock or VirtualClock()
        # With the load, whose machines are told apart by identity
        self._known: dict[tuple[object, ...], tuple[Workload, Optimum]] = {}

    def best(
        self,
        load: Workload,
        start_s: float = 0.0,
        own: tuple[Sequence[Assignment], VirtualRound] | None = None,
    ) -> Optimum | None:
        """Return the best choices for a round; None for more than `MOST_DEVICES`.

        Args:
            load: What is trained, on the true machines and networks; with all that may be chosen.
            start_s: When the round begins, in seconds of the traces of networks.
            own: The choices of a policy, and the round with them; they are taken if nothing better
                is found.
        """
        if len(load.devices) > MOST_DEVICES:
            return None
        key = *same_round(load, start_s), load.micro_batches, load.codecs
        if key not in self._known:
            if len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            span = 0.0 if own is None else own[1].seconds
            self._known[key] = load, self._searched(load, start_s, span)
        found = self._known[key][1]
        if own is None or found.seconds <= own[1].seconds * (1.0 + _ROUNDING):
            return found
        how = f"the policy's own choices, as none better were found: {found.how}"
        return Optimum(tuple(own[0]), own[1], how)

    def _searched(self, load: Workload, start_s: float, span: float) -> Optimum:
        found = self._planned(load, start_s, span)
        if not any(device.network.changes for device in load.devices):
            return found
        if abs(found.seconds - span) > _NEAR * found.seconds:
            again = self._planned(load, start_s, found.seconds)
            found = min(found, again, key=lambda optimum: optimum.seconds)
        return dataclasses.replace(found, how=f"{found.how}; for the mean rates of the round")

    def _planned(self, load: Workload, start_s: float, span: float) -> Optimum:
        now = dataclasses.replace(
            load,
            devices=tuple(
                dataclasses.replace(device, network=device.network.at(start_s, span))
                for device in load.devices
            ),
        )
        few = len(load.devices) <= EXHAUSTIVE_DEVICES
        made = plan(now, "exhaustive" if few else "auto", offload=self._offload)
        how = made.how if few else f"as policy=auto, for {len(load.devices)} devices: {made.how}"
        played = self._clock.play(load, made.choices, start_s)
        return Optimum(made.choices, played, how)


def regret(seconds: float, best_s: float) -> float:
    """Return by how much of the best time a round took longer.

    >>> regret(1.5, 1.0), regret(0.0, 0.0)
    (0.5, 0.0)
    """
    return max(0.0, seconds / best_s - 1.0) if best_s > 0 else 0.0
