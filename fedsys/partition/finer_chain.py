"""Chains that several tensors may cross: their units, and what hosts take for them.

`partition.tensors` says how many may cross a cut; with ``partition.solver=min_cut`` the steps that
a minimum cut leaves on the device come first, so that its division is one of the cuts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.models.measure import measure
from fedsys.models.several import finer
from fedsys.partition.configured import problem_of
from fedsys.partition.minimum_cut import best_division
from fedsys.partition.problem import Problem
from fedsys.planning.costs import MachineCosts


def finer_chain(config: Config, whole: LayeredModel, input_shape: Sequence[int]) -> LayeredModel:
    """Return the chain that is divided: `whole`, or a finer one if several tensors may cross.

    Args:
        config: ``hosts``, ``network`` and ``partition`` count.
        whole: The model as a chain that one tensor crosses.
        input_shape: Of an example, without the batch.

    Raises:
        ConfigError: A minimum cut does not go with hosts or constraints.
        ModelError: Its order of steps cannot be computed.
    """
    options = config.partition
    if options.solver == "min_cut":
        problem = problem_of(config, whole, input_shape)
        division = best_division(problem, whole, input_shape, options.objective)
        first = division.device[1:]  # without the input
        if first and division.crossing:
            return finer(whole, input_shape, options.tensors, first=first,
                         fc_as_one=options.fc_as_one)  # fmt: skip
    if options.tensors == 1:
        return whole
    return finer(whole, input_shape, options.tensors, fc_as_one=options.fc_as_one)


def finer_problem(
    config: Config, whole: LayeredModel, layers: LayeredModel, input_shape: Sequence[int]
) -> Problem:
    """Return what the configuration asks about a chain of `finer_chain`.

    Machines are described, and may have been profiled, for the units of `whole`.

    Raises:
        ConfigError: As `problem_of`.
    """
    problem = problem_of(config, layers, input_shape, described=whole)
    if layers is whole:
        return problem
    hosts = tuple(
        dataclasses.replace(host, costs=regrouped(host.costs, whole, layers, input_shape))
        for host in problem.hosts
    )
    return dataclasses.replace(problem, hosts=hosts)


def regrouped(
    costs: MachineCosts, whole: LayeredModel, layers: LayeredModel, input_shape: Sequence[int]
) -> MachineCosts:
    """Return what a machine takes for other units of the same steps.

    The seconds of a unit are divided among its steps by their multiply-accumulates, as for a
    minimum cut.

    Args:
        costs: For the units of `whole`.
        whole: The model.
        layers: The same model, by other units.
        input_shape: Of an example, without the batch.
    """
    work = measure(whole.graph, torch.empty((2, *input_shape), device="meta"))
    unit_of = {name: index for index, unit in enumerate(layers.units) for name in unit.nodes}
    shares: list[tuple[int, int, float]] = []
    for index, unit in enumerate(whole.units):
        macs = [max(work[name].macs, 0) for name in unit.nodes]
        for name, own in zip(unit.nodes, macs, strict=True):
            shares.append((index, unit_of[name], own / sum(macs) if sum(macs) else 1 / len(macs)))

    def spread(seconds: Sequence[float]) -> tuple[float, ...]:
        found = [0.0] * len(layers)
        for before, after, share in shares:
            found[after] += share * seconds[before]
        return tuple(found)

    return dataclasses.replace(
        costs,
        forward_s=tuple(map(spread, costs.forward_s)),
        backward_s=tuple(map(spread, costs.backward_s)),
        update_s=spread(costs.update_s),
    )
