"""Partitioned inference: where to cut a model among hosts, and who follows the conditions.

`plan_partition` says which host computes which units, beside its alternatives and the whole model
on each host; `evaluate` what a partition costs, part by part.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Constraints",
    "Host",
    "Partition",
    "PartitionPlan",
    "Problem",
    "best_division",
    "evaluate",
    "pareto",
    "plan_partition",
    "problem_of",
]

if TYPE_CHECKING:
    from fedsys.partition.configured import problem_of
    from fedsys.partition.evaluation import evaluate
    from fedsys.partition.minimum_cut import best_division
    from fedsys.partition.planner import PartitionPlan, pareto, plan_partition
    from fedsys.partition.problem import Constraints, Host, Partition, Problem
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "configured": "problem_of",
            "evaluation": "evaluate",
            "minimum_cut": "best_division",
            "planner": "PartitionPlan pareto plan_partition",
            "problem": "Constraints Host Partition Problem",
        },
    )
