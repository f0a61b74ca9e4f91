"""Exits and adapters of a run: ``resilience.safetensors`` and ``resilience.json`` in its folder.

``model.safetensors`` has the backbone alone, as that of any run, so whatever reads it need not know
of exits. The JSON says what was measured of each path, and which backbone the exits are of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsys.errors import ModelError, RunError
from fedsys.files import json_text, write_atomic
from fedsys.models.layers import LayeredModel
from fedsys.models.resilient import PREFIXES, ResilientModel, resilient
from fedsys.runs.model_file import save_model
from fedsys.training.resilience import ExitScore, PathScores, SkipScore

if TYPE_CHECKING:
    from torch import Tensor

STATE, FIGURES = "resilience.safetensors", "resilience.json"
FORMAT = 1


@dataclass(frozen=True)
class Resilience:
    """What was trained to answer without some of its units.

    Attributes:
        model: Backbone, exits and adapters, in evaluation.
        scores: What was measured of its paths.
    """

    model: ResilientModel
    scores: PathScores


def divided(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state of the backbone, and that of exits and adapters."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIXES)}
    return own, {name: tensor for name, tensor in state.items() if name not in own}


def save(
    folder: Path, parts: Mapping[str, Tensor], scores: PathScores, backbone: str, pool: int = 1
) -> None:
    """Write what was trained beside the backbone, and what was measured.

    Args:
        folder: Of the run.
        parts: State of exits and adapters.
        scores: Of the paths.
        backbone: SHA-256 of its state.
        pool: Places in each direction to which exits pool a map.

    Raises:
        RunError: A file cannot be written.
    """
    save_model(folder / STATE, parts, {"model_sha256": backbone})
    body = {"format": FORMAT, "model_sha256": backbone, "pool": pool, "scores": scores}
    write_atomic(folder / FIGURES, json_text(body, indent=1).encode() + b"\n")


def load(
    folder: Path, layers: LayeredModel, input_shape: tuple[int, ...], num_classes: int,
    *, norm: str = "batch",
) -> Resilience:  # fmt: skip
    """Return the model of a run with its exits and adapters.

    Args:
        folder: Of the run.
        layers: Its backbone, with the values of ``model.safetensors``; they are shared.
        input_shape: Of an image, without the batch.
        num_classes: Outputs.
        norm: ``model.norm`` of the run.

    Raises:
        RunError: A file is missing or damaged, or the exits are of another backbone.
        ModelError: The exits do not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fedsys.runs.folder import state_sha256

    try:
        body = json.loads((folder / FIGURES).read_bytes())
        scores, pool = _scores(body["scores"]), int(body.get("pool", 1))
        parts = load_file(folder / STATE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder}: no exits can be read: {error!r}; train them by resilience=joint or frozen"
        ) from error
    if body.get("model_sha256") != state_sha256(layers.graph.state_dict()):
        raise RunError(f"{folder}: its exits were trained on another model than the one given")
    boundaries = [each.after for each in scores.exits]
    model = resilient(
        layers, input_shape, num_classes, seed=0, boundaries=boundaries, norm=norm, pool=pool
    )
    own = {name for name in model.state_dict() if name.startswith(PREFIXES)}
    try:
        if own != parts.keys():
            raise RuntimeError(f"other names: {sorted(own ^ parts.keys())[:3]}")
        model.load_state_dict(parts, strict=False)
    except RuntimeError as error:  # of other shapes
        raise ModelError(f"{folder / STATE} does not fit the model: {error}") from error
    return Resilience(model.eval(), scores)


def _scores(body: Mapping[str, Any]) -> PathScores:
    """Return what was measured, from JSON."""
    exits = tuple(ExitScore(**each) for each in body["exits"])
    skips = tuple(
        SkipScore((int(each["units"][0]), int(each["units"][1])), each["accuracy"], each["macs"])
        for each in body["skips"]
    )
    return PathScores(body["accuracy"], body["macs"], exits, skips, body["examples"])
