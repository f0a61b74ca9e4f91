"""What is measured corrects the costs of machines, unit by unit: Bayesian linear regression.

What a profile says of a kind of machine may be wrong, and wrong differently for each unit. So each
unit u has a factor x_u on its seconds, forward and backward together, and all machines of a kind
share the factors. Before anything is measured they are normal around 1, with a part that all units
of a machine have in common (`Doubt`):

    x ~ N(1, machine² 11ᵀ + unit² I)

A device measures what it computes in a mini-batch: at cut c the sum over the units [0, c); an edge
server what it computes for a device, the sum over [c, L). The *ratio* to the profile is a mean of
the factors of these units, weighted by their seconds in the profile, so ratios are linear in x:

    r = hᵀx + e,   e ~ N(0, noise² / rounds)

and mean and covariance of x after some ratios are those of a Gaussian that is conditioned on them.
What has the least time at *optimism* standard deviations below the mean (optimism in the face of
uncertainty, as of Auer et al., Machine Learning 47, 2002) is worth a try or is the best.

A ratio that the others of a kind make unlikely is of the one machine: it became slower or faster
as a whole (`changed`), or it is another one than its kind (`own_speeds`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import MachineCosts
from fedsys.planning.workload import Array, Device, Menu, Workload, mini_batches

MOST_ROUNDS: Final = 20
"""Rounds whose mean is kept of a ratio: older ones fade."""

AFTER_A_CHANGE: Final = 0.05
"""Rounds that a ratio counts for after its machine has changed: little more than a guess."""

UNLIKELY: Final = 4.0
"""Standard deviations from which on a ratio is no chance."""

LEAST: Final = 0.05
"""Factor below which no unit is believed to be, however optimistic."""

Ratios = Mapping[int, Sequence[float]]
"""By cut: the mean ratio to the profile, and for how many rounds it counts."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """How far profiles may be wrong: standard deviations, as shares of what they say.

    Attributes:
        unit: Of the factor of each unit by itself; a factor that is anything from 1/2 to 2 alike in
            its logarithm has 0.4.
        machine: Of what all units of a kind of machine have in common.
        own: Of what a machine has beside its kind.
        noise: Of what is measured in one round.
    """

    unit: float = 0.4
    machine: float = 0.2
    own: float = 0.1
    noise: float = 0.02

    def covariance(self, units: int) -> Array:
        """Return the covariance of factors before anything is measured, ``(L, L)``."""
        return self.unit**2 * np.eye(units) + self.machine**2


@dataclass(frozen=True)
class Factors:
    """What is believed of the factors of a kind of machine.

    Attributes:
        mean: ``(L,)``.
        covariance: ``(L, L)``.
    """

    mean: Array
    covariance: Array

    def of(self, shares: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of some weighted sums of factors.

        Args:
            shares: The weights, ``(N, L)``.
        """
        variance = np.einsum("nu,uv,nv->n", shares, self.covariance, shares)
        return shares @ self.mean, np.sqrt(np.maximum(variance, 0.0))


def conditioned(prior: Factors, shares: Array, ratios: Array, variances: Array) -> Factors:
    """Return what is believed after some ratios were measured.

    Args:
        prior: What was believed before.
        shares: Weights of the units in each ratio, ``(N, L)``.
        ratios: ``(N,)``.
        variances: Of their noise, ``(N,)``.
    """
    if not len(ratios):
        return prior
    to = prior.covariance @ shares.T
    gain = np.linalg.solve(shares @ to + np.diag(variances), to.T).T
    mean = prior.mean + gain @ (ratios - shares @ prior.mean)
    covariance = prior.covariance - gain @ to.T
    return Factors(mean, (covariance + covariance.T) / 2)


# --------------------------------------------------------------------------------------------------
# Parts of a model, and their costs


def unit_seconds(costs: MachineCosts, sizes: Array, pieces: Array) -> Array:
    """Return the seconds of each unit in a mini-batch, the optimizer's included: means, ``(L,)``.

    Args:
        costs: The machine.
        sizes: Examples of each mini-batch.
        pieces: Micro-batches of each.
    """
    forward, backward = costs.done_after(sizes / pieces)
    both = np.diff(forward + backward, axis=1) * pieces[:, None]
    seconds: Array = both.mean(axis=0) + np.array(costs.update_s)
    return seconds


@dataclass(frozen=True)
class Side:
    """The units that a kind of machine computes at each cut, with their seconds in its profile.

    Attributes:
        seconds: Of each unit in a mini-batch of full size, ``(L,)``.
        edge: Whether it is an edge server: it has the units from the cut on.
    """

    seconds: Array
    edge: bool

    @classmethod
    def of(cls, load: Workload, costs: MachineCosts, edge: bool) -> Side:
        """Return the side of a machine in a workload."""
        one = np.ones(1)
        seconds = unit_seconds(costs, load.batch_size * one, one)
        return cls(seconds - edge * np.array(costs.update_s), edge)

    def parts(self) -> Array:
        """Return the seconds of the units of each cut from 0 to L, ``(L + 1, L)``."""
        units = len(self.seconds)
        on_device = np.tril(np.ones((units + 1, units), dtype=bool), -1)
        rows: Array = np.where(on_device != self.edge, self.seconds, 0.0)
        return rows

    def shares(self, cuts: Sequence[int]) -> Array:
        """Return the weights of the units in the ratio at each of some cuts, ``(N, L)``."""
        rows = self.parts()[list(cuts)]
        total = rows.sum(axis=1, keepdims=True)
        shares: Array = np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)
        return shares

    def corrected(self, costs: MachineCosts, factors: Factors, optimism: float) -> MachineCosts:
        """Return a machine's costs at some standard deviations below what is believed.

        What is bounded is what is computed at each cut, not the unit: of sums that are known the
        units are not. A sum with more units takes no less than one with fewer.

        Args:
            costs: Its profile.
            factors: What is believed.
            optimism: Number of standard deviations; 0 for the mean.
        """
        rows = self.parts()
        mean, spread = factors.of(rows)
        low = np.maximum(mean - optimism * spread, LEAST * rows.sum(axis=1))
        way = slice(None, None, -1 if self.edge else 1)
        low = np.maximum.accumulate(low[way])[way]
        ones = np.ones_like(self.seconds)
        units = np.divide(np.abs(np.diff(low)), self.seconds, out=ones, where=self.seconds > 0)
        return scaled(costs, units)


def scaled(costs: MachineCosts, factors: Array) -> MachineCosts:
    """Return a machine each of whose units takes some factor longer, ``(L,)``."""

    def times(table: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple((np.array(row) * factors).tolist()) for row in table)

    return dataclasses.replace(
        costs,
        forward_s=times(costs.forward_s),
        backward_s=times(costs.backward_s),
        update_s=tuple((np.array(costs.update_s) * factors).tolist()),
    )


def ratio_of(
    load: Workload, device: Device, choice: Assignment, seconds: float, edge: bool
) -> float:
    """Return the ratio of what was measured to the profile, for the units; 0 if there are none.

    What does not belong to units (fixed times of operations, messages) is believed as it is.

    Args:
        load: What is trained.
        device: Who measured, with the costs of its profile.
        choice: What it did.
        seconds: Seconds of computing in a mini-batch, the mean.
        edge: Whether it is the edge server that computed.
    """
    sizes = np.array(mini_batches(device.examples, load.batch_size))
    stages = Menu(load, [choice]).resized(sizes.tolist()).stages(device)
    if edge:
        costs, last = load.edges[choice.edge], slice(choice.cut, None)
        whole = float((stages.pieces * stages.edge).mean())
    else:
        costs, last = device.costs, slice(0, choice.cut)
        own = stages.pieces * (stages.forward + stages.backward) + stages.device_update
        whole = float(own.mean())
    units = unit_seconds(costs, sizes.astype(float), stages.pieces)
    if edge:
        units = units - np.array(costs.update_s)  # the optimizer's step is not measured
    expected = float(units[last].sum())
    if expected <= 0 or seconds <= 0:
        return 0.0
    return max(LEAST, (seconds - (whole - expected)) / expected)


# --------------------------------------------------------------------------------------------------
# Machines of one kind


def kind_of(costs: MachineCosts) -> str:
    """Return the kind of a machine: its name in the fleet file."""
    return costs.name


def kind_factors(
    side: Side, ratios: Sequence[Ratios], speeds: Sequence[float], doubt: Doubt
) -> Factors:
    """Return what is believed of a kind by what its machines measured.

    Args:
        side: The kind.
        ratios: Of each machine.
        speeds: By how much each is slower than its kind.
        doubt: What is believed before.
    """
    prior = Factors(np.ones(len(side.seconds)), doubt.covariance(len(side.seconds)))
    rounds, sums = np.zeros((2, len(prior.mean) + 1))
    for own, speed in zip(ratios, speeds, strict=True):
        for cut, (ratio, count) in own.items():
            rounds[cut] += count
            sums[cut] += count * ratio / speed
    cuts = np.flatnonzero(rounds)
    variances = doubt.noise**2 / rounds[cuts]
    return conditioned(prior, side.shares(cuts.tolist()), sums[cuts] / rounds[cuts], variances)


def own_speeds(side: Side, ratios: Sequence[Ratios], doubt: Doubt, drift: float) -> list[float]:
    """Return by how much each machine is slower than its kind; 1 for all that differ by less.

    Each machine has an offset of its own beside the factors of the kind: both are estimated
    together. The machine whose offset is the median is like its kind, and an offset from there of
    more than `drift` of the ratio that the kind has is believed.

    Args:
        side: The kind.
        ratios: Of each of its machines.
        doubt: What is believed before; of an offset ``own``.
        drift: Share from which on a machine is not like its kind.
    """
    units, count = len(side.seconds), len(ratios)
    measuring = sum(bool(own) for own in ratios)
    if measuring < 2:
        return [1.0] * count
    covariance = np.zeros((units + count, units + count))
    covariance[:units, :units] = doubt.covariance(units)
    covariance[units:, units:] = doubt.own**2 * np.eye(count)
    prior = Factors(np.concatenate([np.ones(units), np.zeros(count)]), covariance)
    records = [(k, cut, *own[cut]) for k, own in enumerate(ratios) for cut in own]
    who, cuts, values, rounds = zip(*records, strict=True)
    rows = np.zeros((len(records), units + count))
    rows[:, :units] = side.shares(cuts)
    rows[np.arange(len(records)), units + np.array(who)] = 1.0
    found = conditioned(prior, rows, np.array(values), doubt.noise**2 / np.array(rounds))
    kind = rows[:, :units] @ found.mean[:units]
    typical = float(np.median(found.mean[units:][[bool(own) for own in ratios]]))
    speeds = []
    for k in range(count):
        mine = kind[np.array(who) == k]
        beside = float(found.mean[units + k]) - typical
        speed = 1.0 + beside / float(mine.mean() + typical) if len(mine) else 1.0
        speeds.append(max(LEAST, speed) if abs(speed - 1.0) > drift else 1.0)
    return speeds


def noted(ratios: Ratios, cut: int, ratio: float) -> dict[int, list[float]]:
    """Return the ratios of a machine with another one at a cut."""
    mean, count = ratios.get(cut, (ratio, 0.0))
    count = min(count, MOST_ROUNDS - 1) + 1.0
    own = {at: list(value) for at, value in ratios.items()}
    return own | {cut: [mean + (ratio - mean) / count, count]}


def changed(ratios: Ratios, factor: float) -> dict[int, list[float]]:
    """Return the ratios of a machine that became slower as a whole: each is but a guess now."""
    return {
        cut: [ratio * factor, min(count, AFTER_A_CHANGE)] for cut, (ratio, count) in ratios.items()
    }
