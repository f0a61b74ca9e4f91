"""Time as a model: what a round takes on given machines and networks, and what to do about it.

`run_workload` describes what is to be trained and on what; `plan` chooses cut, pieces, codec and
edge server for each device, and `evaluate` times a choice of one's own::

    load = run_workload(config, layers, machines_of(config, layers), examples, PlanOptions())
    print(plan(load, "auto").seconds, plan(load, "classic").seconds)

Closed forms time iterations, `play` the same as events, and `virtual_round` a whole round of a run.
Nothing here waits, connects or trains.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Assignment",
    "MachineCosts",
    "Plan",
    "PlanOptions",
    "Timeline",
    "VirtualRound",
    "Workload",
    "best_static",
    "evaluate",
    "machines_of",
    "next_best",
    "plan",
    "play",
    "run_workload",
    "virtual_round",
]

if TYPE_CHECKING:
    from fedsys.planning.assignment import Assignment
    from fedsys.planning.costs import MachineCosts
    from fedsys.planning.options import PlanOptions, machines_of, run_workload
    from fedsys.planning.planner import Plan, best_static, evaluate, next_best, plan
    from fedsys.planning.timeline import Timeline, play
    from fedsys.planning.virtual_clock import VirtualRound, virtual_round
    from fedsys.planning.workload import Workload
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "assignment": "Assignment",
            "costs": "MachineCosts",
            "options": "PlanOptions machines_of run_workload",
            "planner": "Plan best_static evaluate next_best plan",
            "timeline": "Timeline play",
            "virtual_clock": "VirtualRound virtual_round",
            "workload": "Workload",
        },
    )
