"""Machines as one may misjudge them: each unit's cost off by a factor of its own."""

from __future__ import annotations

import numpy as np

from fedsys.planning.correction import kind_of, scaled
from fedsys.planning.costs import MachineCosts
from fedsys.randomness import Address


def misjudged(costs: MachineCosts, most: float, seed: int) -> MachineCosts:
    """Return a machine whose units take 1/most to `most` times as long, alike in the logarithm.

    The factors depend on the seed and the name of the machine, so that all machines of a kind are
    misjudged alike, and different kinds differently.

    Args:
        costs: The machine.
        most: Largest factor, at least 1.
        seed: Of the run.
    """
    if most == 1.0:
        return costs
    kind = Address(seed).seed_for("misjudged", name=kind_of(costs))
    exponents = np.random.default_rng(kind).uniform(-1.0, 1.0, len(costs))
    return scaled(costs, most**exponents)
