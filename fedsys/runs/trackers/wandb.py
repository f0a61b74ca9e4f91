"""``tracker=wandb``: a run of a Weights & Biases project, or, offline, a file for later.

Offline runs lie in the run's folder; ``wandb sync`` sends them. What W&B would do besides is turned
off: capture of the output, measurements of the machine, the state of the Git repository.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from fedsys.config.targets import import_extra
from fedsys.errors import RunError
from fedsys.runs.tracking import End, TrackedRun

_EXIT: Final = {"finished": 0, "failed": 1, "interrupted": 255}


class WandbTracker:
    """Writes a run to Weights & Biases.

    Args:
        project: Name of the project.
        mode: ``online``, ``offline``, or None for what ``WANDB_MODE`` says, else online.
        entity: User or team; None for the user's own.
        model: Whether the model is stored, too, at the end, as an artifact.

    Raises:
        ModelError: The package wandb is not installed.
    """

    def __init__(
        self,
        project: str = "fedsys",
        mode: str | None = None,
        entity: str | None = None,
        model: bool = True,
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        self._library = import_extra("wandb", "wandb", "tracker=wandb")
        self._project, self._entity, self._model = project, entity, model
        self._mode = mode or os.environ.get("WANDB_MODE") or "online"

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or take up the one that it continues.

        Raises:
            RunError: Nobody is logged in; W&B would ask on the terminal.
        """
        wandb = self._library
        if self._mode == "online" and not wandb.setup().settings.api_key and not wandb.api.api_key:
            raise RunError("nobody is logged in; set WANDB_API_KEY, or tracker.mode=offline")
        self._run: Any = wandb.init(
            project=self._project, entity=self._entity, name=run.name, id=run.identity,
            resume="allow", config=dict(run.config), dir=str(run.folder), mode=self._mode,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True,
                disable_job_creation=True, x_disable_stats=True,
            ),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="round")  # a continued run repeats rounds

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers of a round, with ``round`` as their step."""
        self._run.log({"round": number, **scalars})

    def finish(self, end: End) -> None:
        """Log figures, pictures and model, and end the run."""
        self._run.summary.update(dict(end.figures))
        if end.plots:
            pictures = {f"plots/{p.stem}": self._library.Image(str(p)) for p in end.plots}
            self._run.log({"round": end.last_round, **pictures})
        if self._model and end.model is not None:
            artifact = self._library.Artifact(f"model-{self._run.id}", type="model")
            artifact.add_file(str(end.model), policy="immutable")
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=_EXIT[end.status])
