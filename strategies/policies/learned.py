"""Policies that learn what machines take, for the machines of a run."""

from __future__ import annotations

from collections.abc import Sequence

from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.planning.hardware import Hardware
from fedsys.planning.learned import LearnedPlanner, LearningOptions
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.planning.workload import Workload
from strategies.policies.planned import refuse_private


def learned_planner(config: Config, examples: Sequence[int]) -> LearnedPlanner:
    """Return the policy of ``policy.learn=true``.

    Args:
        config: The run; ``policy`` holds the options.
        examples: Examples of each client.

    Raises:
        ConfigError: An option is not usable, or labels stay on devices.
    """
    refuse_private(config)
    options = PlanOptions.of(config.policy)
    own = list(examples) or [config.client.batch_size]
    known: list[tuple[LayeredModel, Hardware]] = []

    def believed(layers: LayeredModel, clients: Sequence[int]) -> Workload:
        if not known or known[-1][0] is not layers:
            known[:] = [(layers, machines_of(config, layers))]
        return run_workload(config, layers, known[-1][1], own, options, clients or None)

    return LearnedPlanner(believed, LearningOptions.of(options, config.client.max_model_bytes))
