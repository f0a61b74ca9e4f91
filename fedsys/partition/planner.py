"""Where to cut: the best partition, what it is compared with, and why it is that one."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedsys.errors import ConfigError
from fedsys.partition.evaluation import RequestCost, evaluate
from fedsys.partition.problem import RAW, Partition, Problem
from fedsys.partition.solvers import broken, dynamic, exhaustive, frontier, scan


@dataclass(frozen=True)
class Choice:
    """A partition and what it costs.

    Attributes:
        partition: Who computes what.
        cost: What a request costs.
    """

    partition: Partition
    cost: RequestCost


@dataclass(frozen=True)
class PartitionPlan:
    """What was chosen, beside what it is compared with.

    Attributes:
        best: The choice.
        objective: What it minimises.
        solver: What found it.
        planned_s: How long that took.
        alternatives: The best of those with one other cut, or without one of the hosts, in order.
        whole: The whole model on each host, by its index, also where a constraint forbids it.
        forbidden: Hosts on which the whole model breaks a constraint.
    """

    best: Choice
    objective: str
    solver: str
    planned_s: float
    alternatives: tuple[Choice, ...]
    whole: tuple[Choice, ...]
    forbidden: frozenset[int]


def solve(problem: Problem, objective: str = "latency", solver: str = "auto") -> Partition | None:
    """Return the best partition within the time limit; None if there is none.

    Args:
        problem: What is to be divided.
        objective: One of `fedsys.config.partition.OBJECTIVES`.
        solver: ``auto``, ``scan``, ``dynamic`` or ``exhaustive``.

    Raises:
        ConfigError: The solver is for two hosts.
    """
    if solver == "scan" and len(problem.hosts) != 2:
        raise ConfigError.of("partition.solver", solver, "must have two hosts", "take dynamic")
    if solver == "exhaustive":
        return exhaustive(problem, objective)
    limit = problem.constraints.time_limit_s
    if math.isfinite(limit) and objective != "latency":
        within = [p for p in frontier(problem, "latency", objective)
                  if evaluate(problem, p).latency_s <= limit]  # fmt: skip
        return within[-1] if within else None  # the second objective falls along the frontier
    quick = solver == "scan" or (solver == "auto" and len(problem.hosts) == 2)
    quick = quick and objective != "throughput"
    found = scan(problem, objective) if quick else dynamic(problem, objective)
    if found is not None and evaluate(problem, found).latency_s > limit:
        return None
    return found


def plan_partition(
    problem: Problem, objective: str = "latency", solver: str = "auto", alternatives: int = 5
) -> PartitionPlan:
    """Return the best partition beside its alternatives and the whole model on each host.

    Args:
        problem: What is to be divided.
        objective: One of `fedsys.config.partition.OBJECTIVES`.
        solver: ``auto``, ``scan``, ``dynamic`` or ``exhaustive``.
        alternatives: How many others are wanted.

    Raises:
        ConfigError: No partition obeys all constraints; names those that contradict each other.
    """
    if objective == "energy" and all(host.power_w is None for host in problem.hosts):
        raise ConfigError.of(
            "partition.objective",
            objective,
            "must have the power of a host",
            "give hosts.list[…].power_w",
        )
    start = time.perf_counter()
    best = solve(problem, objective, solver)
    planned_s = time.perf_counter() - start
    if best is None:
        raise ConfigError(contradiction(problem))
    used = solver if solver != "auto" else "scan" if len(problem.hosts) == 2 else "dynamic"
    whole = tuple(_choice(problem, alone_on(problem, h)) for h in range(len(problem.hosts)))
    return PartitionPlan(
        _choice(problem, best),
        objective,
        used,
        planned_s,
        tuple(_others(problem, best, objective, alternatives)),
        whole,
        frozenset(h for h, one in enumerate(whole) if not _obeys(problem, one)),
    )


def _choice(problem: Problem, partition: Partition) -> Choice:
    return Choice(partition, evaluate(problem, partition))


def _obeys(problem: Problem, choice: Choice) -> bool:
    in_time = choice.cost.latency_s <= problem.constraints.time_limit_s
    return in_time and not broken(problem, choice.partition)


def alone_on(problem: Problem, host: int) -> Partition:
    """Return the partition in which one host computes everything."""
    others = len(problem.hosts) - 1
    cuts = tuple(0 if h <= host else len(problem) for h in range(1, len(problem.hosts)))
    return Partition(cuts, (RAW,) * others)


def _others(problem: Problem, best: Partition, objective: str, count: int) -> list[Choice]:
    """Return the best partitions that are one step away: another cut, or without a host."""
    found = {
        other.cuts: _choice(problem, other)
        for other in (*_moves(problem, best), *_without_one(problem, best, objective))
        if other.cuts != best.cuts
    }
    allowed = [choice for choice in found.values() if _obeys(problem, choice)]
    allowed.sort(key=lambda c: (c.cost.value(objective), c.cost.latency_s))
    return allowed[:count]


def _moves(problem: Problem, partition: Partition) -> Iterator[Partition]:
    for host in range(1, len(problem.hosts)):
        for cut in problem.cuts:
            other = moved(problem, partition, host, cut)
            if other is not None:
                yield other


def moved(problem: Problem, partition: Partition, host: int, cut: int) -> Partition | None:
    """Return a partition in which a host begins with another unit; None if that is out of order.

    Where it receives what it can write as it likes for the first time, that is in the first codec.
    """
    cuts, codecs = list(partition.cuts), list(partition.codecs)
    before = cuts[host - 1]
    cuts[host - 1] = cut
    if cuts != sorted(cuts):
        return None
    inside = 0 < cut < len(problem)
    was_inside = 0 < before < len(problem) and codecs[host - 1] in problem.codecs
    codecs[host - 1] = (codecs[host - 1] if was_inside else problem.codecs[0]) if inside else RAW
    for index, begin in enumerate(cuts):  # a host that begins to take part needs a codec, too
        if 0 < begin < len(problem) and codecs[index] not in problem.codecs:
            codecs[index] = problem.codecs[0]
    return Partition(tuple(cuts), tuple(codecs))


def _without_one(problem: Problem, partition: Partition, objective: str) -> Iterator[Partition]:
    """Yield the best partitions in which a host that takes part computes nothing."""
    for host in range(len(problem.hosts)):
        first, last = partition.units_of(host, len(problem))
        if last > first:
            refused = frozenset((unit, host) for unit in range(len(problem)))
            without = _with(problem, must_not=problem.constraints.must_not | refused)
            other = solve(without, objective)
            if other is not None:
                yield other
        yield alone_on(problem, host)


def _with(problem: Problem, **changes: object) -> Problem:
    rules = dataclasses.replace(problem.constraints, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(problem, constraints=rules)


# --------------------------------------------------------------------------------------------------
# What contradicts what


@dataclass(frozen=True)
class _Rule:
    """One constraint: its words, and the problem without it."""

    words: str
    dropped: Callable[[Problem], Problem]


def contradiction(problem: Problem) -> str:
    """Return a sentence that names a smallest set of constraints that cannot hold together."""
    rules, left = _rules(problem), problem
    needed = []
    for rule in rules:
        without = rule.dropped(left)
        if _possible(without):
            needed.append(rule.words)
        else:
            left = without
    if not needed:
        return (
            "hosts: no partition has finite costs; check hosts.links and partition.requests_per_s"
        )
    one = "this constraint" if len(needed) == 1 else "one of these constraints"
    return f"{' and '.join(needed)}: no partition obeys; loosen {one}"


def _possible(problem: Problem) -> bool:
    return solve(problem, "latency") is not None


def _rules(problem: Problem) -> list[_Rule]:
    rules, hosts, units = problem.constraints, problem.hosts, problem.units
    made = []
    for unit, host in rules.must.items():
        words = f"partition.must.{units[unit]}={hosts[host].name}"
        made.append(_Rule(words, lambda p, u=unit: _without_must(p, u)))  # type: ignore[misc]
    for host in sorted({h for _, h in rules.must_not}):
        names = ",".join(units[u] for u, h in sorted(rules.must_not) if h == host)
        words = f"partition.must_not.{hosts[host].name}=[{names}]"
        made.append(_Rule(words, lambda p, h=host: _without_must_not(p, h)))  # type: ignore[misc]
    for host, limit in rules.upload_bytes.items():
        words = f"partition.upload_mb ({limit / 1e6:g} MB from {hosts[host].name})"
        made.append(_Rule(words, lambda p, h=host: _without_upload(p, h)))  # type: ignore[misc]
    for host, one in enumerate(hosts):
        if math.isfinite(one.memory_bytes):
            words = f"memory_mb of {one.name} ({one.memory_bytes / 1e6:g} MB)"
            made.append(_Rule(words, lambda p, h=host: _without_memory(p, h)))  # type: ignore[misc]
    if math.isfinite(rules.time_limit_s):
        words = f"partition.time_limit_ms={rules.time_limit_s * 1e3:g}"
        made.append(_Rule(words, lambda p: _with(p, time_limit_s=math.inf)))
    if problem.requests_per_s:
        words = f"partition.requests_per_s={problem.requests_per_s:g}"
        made.append(_Rule(words, lambda p: dataclasses.replace(p, requests_per_s=0.0)))
    return made


def _without_must(problem: Problem, unit: int) -> Problem:
    return _with(problem, must={u: h for u, h in problem.constraints.must.items() if u != unit})


def _without_must_not(problem: Problem, host: int) -> Problem:
    kept = frozenset((u, h) for u, h in problem.constraints.must_not if h != host)
    return _with(problem, must_not=kept)


def _without_upload(problem: Problem, host: int) -> Problem:
    kept = {h: n for h, n in problem.constraints.upload_bytes.items() if h != host}
    return _with(problem, upload_bytes=kept)


def _without_memory(problem: Problem, host: int) -> Problem:
    free = dataclasses.replace(problem.hosts[host], memory_bytes=math.inf)
    hosts = tuple(free if h == host else one for h, one in enumerate(problem.hosts))
    return dataclasses.replace(problem, hosts=hosts)


def pareto(problem: Problem, objectives: Sequence[str]) -> list[Choice]:
    """Return the choices that are best in one of two objectives for what they cost in the other."""
    first, second = objectives
    found = [_choice(problem, p) for p in frontier(problem, first, second)]
    limit = problem.constraints.time_limit_s
    return [choice for choice in found if choice.cost.latency_s <= limit]
