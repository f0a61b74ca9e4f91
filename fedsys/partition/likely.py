"""Which partitions may become the best ones, so that pipelines of them are worth keeping ready."""

from __future__ import annotations

from collections.abc import Iterator

from fedsys.partition.conditions import ChainConditions, under
from fedsys.partition.planner import solve
from fedsys.partition.problem import Partition, Problem

_RATES = (0.5, 2.0, 0.2, 5.0, 0.1)
_SLOWER = (2.0, 5.0)


def likely(problem: Problem, count: int) -> tuple[Partition, ...]:
    """Return the best partition, and those that are best if one link or one host changes.

    Args:
        problem: As it is expected.
        count: Of partitions at most; those of small changes come first.
    """
    found: dict[tuple[int, ...], Partition] = {}
    for conditions in _changes(problem):
        best = solve(under(problem, conditions))
        if best is not None:
            found.setdefault(best.cuts, best)
        if len(found) == count:
            break
    return tuple(found.values())


def _changes(problem: Problem) -> Iterator[ChainConditions]:
    slower, waiting = [1.0] * len(problem.hosts), tuple(host.waiting_s for host in problem.hosts)
    rates = [network.up_bits_s for network in problem.networks]
    yield ChainConditions(tuple(slower), waiting, tuple(rates))
    for factor in _RATES:
        for link, rate in enumerate(rates):
            other = [*rates[:link], rate * factor, *rates[link + 1 :]]
            yield ChainConditions(tuple(slower), waiting, tuple(other))
    for factor in _SLOWER:
        for host in range(len(slower)):
            other = [*slower[:host], factor, *slower[host + 1 :]]
            yield ChainConditions(tuple(other), waiting, tuple(rates))
