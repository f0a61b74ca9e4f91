"""A dense variant of a portfolio as a model that can be trained (``model=variant``).

Its architecture and weights are data (`fedsys.pruning.dense.architecture`), so it is fine-tuned,
re-calibrated or pruned once more like any other model, also by federated and split training. What
its original froze is frozen.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.dense import architecture


def variant(input_shape: tuple[int, int, int], num_classes: int, *, path: str | None) -> nn.Module:
    """Return a variant with its weights.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Number of outputs that it must have.
        path: Folder of the variant, ``PORTFOLIO/variants/NAME``; every machine of the run needs it.

    Raises:
        ConfigError: There is no such folder, or the variant is for other images or classes.
        ModelError: The folder is damaged.
    """
    rule = "must be the folder of a variant"
    if path is None or not (folder := Path(path).expanduser()).is_dir():
        way_out = "fedsys prune makes some: model.path=PORTFOLIO/variants/NAME"
        raise ConfigError.of("model.path", path, f"{rule} on this machine", way_out)
    wanted = torch.empty(0).device  # meta, where only names and shapes are asked for
    with torch.device("cpu"):
        model = architecture.load(folder)
        try:
            with torch.inference_mode():
                outputs = model(torch.zeros((1, *input_shape)))
        except RuntimeError as error:
            made = f"{rule} for images of shape {tuple(input_shape)}"
            raise ConfigError.of("model.path", path, made, str(error)) from error
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, num_classes):
        shape = tuple(outputs.shape[1:]) if isinstance(outputs, torch.Tensor) else "no tensor"
        raise ConfigError.of("model.path", path, f"{rule} for {num_classes} classes, not {shape}")
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ModelError(f"model.path={path}: must be in float32 to be trained")
    return model.to(wanted)
