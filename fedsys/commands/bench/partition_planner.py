"""How long the planner takes, and whether it finds what trying everything finds."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from fedsys.partition.evaluation import evaluate
from fedsys.partition.planner import solve
from fedsys.partition.problem import Host, Problem
from fedsys.planning.costs import Crossing, MachineCosts
from fedsys.transport.network import Network

_HAIR = 1e-9
_UNITS = 100


def drawn_problem(draw: random.Random, units: int, hosts: int) -> Problem:
    """Return a problem in which every host after the first is about four times as fast.

    Args:
        draw: Gives costs, sizes and rates.
        units: Of the model; it may be cut everywhere.
        hosts: Of the chain.
    """
    seconds = [draw.uniform(1e-4, 1e-2) for _ in range(units)]
    zeros = (0.0,) * units
    machines = [
        MachineCosts(f"h{h}", (1,), (tuple(s * 4.0**-h for s in seconds),), (zeros,), zeros, 1e-4)
        for h in range(hosts)
    ]
    networks = [Network(10 ** draw.uniform(6, 8), 1e8, 1e-3) for _ in range(hosts - 1)]
    return Problem(
        tuple(f"u{i}" for i in range(units)),
        tuple(range(units + 1)),
        tuple(Crossing(draw.randint(1_000, 200_000), 1) for _ in range(units + 1)),
        (0,) * units,
        tuple(Host(m.name, m) for m in machines),
        tuple(networks),
    )


def planner_figures(compared: int, repeats: int, seed: int) -> dict[str, Any]:
    """Return milliseconds of planning, and how many small problems were solved as by trying all.

    Args:
        compared: Small problems.
        repeats: Of each time.
        seed: Of all problems.
    """
    draw, same = random.Random(seed), 0
    for number in range(compared):
        problem = drawn_problem(draw, draw.randint(2, 6), draw.randint(2, 4))
        objective = ("latency", "throughput")[number % 2]
        one, other = (solve(problem, objective, name) for name in ("auto", "exhaustive"))
        assert one is not None and other is not None  # there are no constraints
        costs = [evaluate(problem, found).value(objective) for found in (one, other)]
        same += math.isclose(*costs, rel_tol=_HAIR)
    two, four = drawn_problem(draw, _UNITS, 2), drawn_problem(draw, _UNITS, 4)
    return {
        "planner_compared": compared,
        "planner_equal": same,
        "plan_two_ms": _ms(lambda: solve(two), repeats),
        "plan_four_ms": _ms(lambda: solve(four), repeats),
    }


def _ms(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - began))
    return median(taken[2:])
