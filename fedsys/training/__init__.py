"""Plain training, and what split training shares with it: the loops that all else must equal.

`train` and `evaluate` are the loops of a model in one place. `Part` is a part of a model in
training, on a device or an edge server, and `operations` the order in which both work through a
mini-batch. `Masks` say which weights are pruned. `build_model` and `layered_model` give the model
of a run.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Federation",
    "Masks",
    "Part",
    "Penalty",
    "Score",
    "build_model",
    "evaluate",
    "layered_model",
    "make_optimizer",
    "micro_batch_bounds",
    "operations",
    "train",
]

if TYPE_CHECKING:
    from fedsys.training.federation import Federation, build_model, layered_model
    from fedsys.training.masks import Masks
    from fedsys.training.optimizers import make_optimizer
    from fedsys.training.part import Part
    from fedsys.training.penalty import Penalty
    from fedsys.training.plain import Score, evaluate, train
    from fedsys.training.schedule import micro_batch_bounds, operations
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "federation": "Federation build_model layered_model",
            "masks": "Masks",
            "optimizers": "make_optimizer",
            "part": "Part",
            "penalty": "Penalty",
            "plain": "Score evaluate train",
            "schedule": "micro_batch_bounds operations",
        },
    )
