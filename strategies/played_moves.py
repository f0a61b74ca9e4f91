"""Where devices go in a round, for the virtual clock; and what it says of each of their moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fedsys.planning.moves import Move
from fedsys.planning.virtual_clock import VirtualRound, Ways
from strategies.offload import Offload


@runtime_checkable
class Waits(Protocol):
    """A mobility source whose devices may be out of reach for a while."""

    def waits(self, round_: int, clients: Sequence[int]) -> Mapping[int, float]:
        """Return the seconds for which some devices wait for their first edge server."""
        ...

    def gaps(self, round_: int, clients: Sequence[int]) -> tuple[Move, ...]:
        """Return when some clients lose their edge server for a while and find the same one."""
        ...


def ways_of(offload: Offload | None, round_: int, who: Sequence[int], *, anew: bool) -> Ways:
    """Return where the devices of a round go.

    Args:
        offload: Knows their moves.
        round_: The round.
        who: Its clients, in the order of the workload.
        anew: Whether rounds begin anew at each edge server that a device comes to.
    """
    if offload is None:
        return Ways()
    moves, waits = dict(offload.journeys.moves), dict[int, float]()
    if isinstance(offload.mobility, Waits):
        waits = dict(offload.mobility.waits(round_, who))
        for gap in offload.mobility.gaps(round_, who):
            together = (*moves.get(gap.client, ()), gap)
            moves[gap.client] = tuple(sorted(together, key=lambda move: move.at))
    return Ways(
        {k: moves[client] for k, client in enumerate(who) if client in moves},
        {k: waits[client] for k, client in enumerate(who) if client in waits},
        anew,
    )


def note_predictions(
    records: Sequence[dict[str, Any]],
    round_: int,
    who: Sequence[int],
    played: VirtualRound,
    ways: Ways,
) -> None:
    """Write beside what was measured of each move in a round what the clock said of it.

    A device that was out of reach and came back to its edge server has no record.

    Args:
        records: Handovers of the run, changed here.
        round_: The round.
        who: Its clients, in the order of the workload.
        played: The round on the virtual clock.
        ways: Where its devices went.
    """
    for k, client in enumerate(who):
        measured = [r for r in records if (r["round"], r["client"]) == (round_, client)]
        expected = [m for m in played.timeline.moves if m.job == k and m.source != m.target]
        for record, move in zip(measured, expected, strict=False):
            record["predicted_pause_s"] = move.pause_s
            record["predicted_bytes"] = move.bytes
