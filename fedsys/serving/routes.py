"""Routes: which way through the model a request takes, and which host computes what of it.

A *way* is a chain of units: that of the whole model, named by the empty text; ``exit:5``, its first
five units and the exit behind them; ``skip:4-7``, all of its units but ``[4, 7)``; or the name of a
variant of a portfolio. A route divides a way among hosts and has a label, as ``3/7`` or
``exit:5@3/6``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

from fedsys.partition.problem import RAW, Partition

WHOLE = ""
"""The way of all units."""

EXIT, SKIP = "exit:", "skip:"


@dataclass(frozen=True)
class Route:
    """A way through the model, and who computes what of it.

    Attributes:
        partition: The division of the way's units among the hosts.
        way: `WHOLE`, ``exit:B``, ``skip:A-B`` or the name of a variant.
    """

    partition: Partition
    way: str = WHOLE

    @property
    def technique(self) -> str:
        """What it is when it stands in for another: repartition, exit, skip or replica."""
        if not self.way:
            return "repartition"
        return self.way.split(":")[0] if self.way.startswith((EXIT, SKIP)) else "replica"

    @property
    def label(self) -> str:
        """Its name; `route_of` reads it."""
        cuts = label_of(self.partition)
        return f"{self.way}@{cuts}" if self.way else cuts


def label_of(partition: Partition) -> str:
    """Return the name of a partition: its cuts, with codecs that are not fp32, as ``5/9:int8``."""
    return "/".join(
        f"{cut}" if codec == RAW else f"{cut}:{codec}"
        for cut, codec in zip(partition.cuts, partition.codecs, strict=True)
    )


def partition_of(label: str) -> Partition:
    """Return the partition of a name that `label_of` gave."""
    pairs = [part.partition(":") for part in label.split("/") if part]
    return Partition(tuple(int(cut) for cut, _, _ in pairs), tuple(c or RAW for _, _, c in pairs))


def route_of(label: str) -> Route:
    """Return the route of a name that `Route.label` gave."""
    way, _, cuts = label.rpartition("@")
    return Route(partition_of(cuts), way)


def run_of(way: str) -> tuple[int, int]:
    """Return the units ``[first, last)`` that a skip leaves out."""
    first, _, last = way.removeprefix(SKIP).partition("-")
    return int(first), int(last)


def common_units(way: str, units: int) -> int:
    """Return how many units a way has in common with the whole model, from the first on.

    Up to there a tensor of the one is one of the other.

    Args:
        way: The way.
        units: Of the whole model.
    """
    if way == WHOLE:
        return units
    if way.startswith(EXIT):
        return int(way.removeprefix(EXIT))
    return run_of(way)[0] if way.startswith(SKIP) else 0


def working(partition: Partition, units: int) -> Iterator[tuple[int, int, int]]:
    """Yield the hosts that compute something, with their units ``[first, last)``."""
    for host in range(len(partition.cuts) + 1):
        first, last = partition.units_of(host, units)
        if last > first:
            yield host, first, last


# --------------------------------------------------------------------------------------------------
# Around hosts that are lost


def around_by_exit(home: Partition, boundary: int, gone: Collection[int]) -> Partition | None:
    """Return who computes units ``[0, boundary)`` and the exit behind them; None: not possible.

    Hosts before those that are gone keep their units, so a request that they hold goes on at once;
    the last of them has the exit.

    Args:
        home: Who computes what of the whole model.
        boundary: Where the exit is.
        gone: Hosts that are lost.
    """
    begins = (0, *home.cuts)
    takes = [host for host, begin in enumerate(begins) if begin < boundary]
    last = next((h for h in reversed(takes) if _ends(home, h, boundary) > begins[h]), None)
    if last is None or any(host in gone and _works(home, host, boundary) for host in takes):
        return None
    cuts = tuple(cut if h <= last else boundary + 1 for h, cut in enumerate(home.cuts, 1))
    codecs = tuple(c if h <= last else RAW for h, c in enumerate(home.codecs, 1))
    return Partition(cuts, codecs)


def _ends(home: Partition, host: int, most: int) -> int:
    return min(home.cuts[host], most) if host < len(home.cuts) else most


def _works(home: Partition, host: int, most: int) -> bool:
    return _ends(home, host, most) > (0, *home.cuts)[host]


def run_gone(home: Partition, units: int, gone: Collection[int]) -> tuple[int, int] | None:
    """Return the units of hosts that are gone, if they follow each other; else None."""
    runs = [(first, last) for host, first, last in working(home, units) if host in gone]
    joined = all(before[1] == after[0] for before, after in pairwise(runs))
    return (runs[0][0], runs[-1][1]) if runs and joined else None


def around_by_skip(home: Partition, run: tuple[int, int], adapters: int) -> Partition:
    """Return who computes what when a run of units is left out.

    Hosts before it keep their units; the next behind it begins with the adapters.

    Args:
        home: Who computes what of the whole model.
        run: The units ``[first, last)``: those of one host, or of hosts that follow each other.
        adapters: Units that stand in for them.
    """
    first, last = run
    cuts = tuple(
        cut if cut <= first else first if cut <= last else cut - (last - first) + adapters
        for cut in home.cuts
    )
    return Partition(cuts, home.codecs)
