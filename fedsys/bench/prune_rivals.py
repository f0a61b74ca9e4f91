"""Torch-Pruning, as its own documentation uses it: magnitude importance over coupled channels.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedsys.errors import ModelError

_STEPS = 7
"""Halvings of the interval of ratios: the parameters agree to about one per cent of the model."""


def torch_pruning(
    model: nn.Module, input_shape: Sequence[int], params: int, leave: Sequence[str]
) -> nn.Module:
    """Return `model` pruned by Torch-Pruning to the largest size of at most `params` parameters.

    Args:
        model: Left as it was.
        input_shape: Of one input without the batch.
        params: Parameters that may be left.
        leave: Names of weights whose layers keep their outputs.

    Raises:
        ModelError: The package is not installed, or no ratio leaves so few parameters.
    """
    library = _import()
    low, high, best = 0.0, 0.99, None
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        pruned = _pruned(library, model, input_shape, ratio, leave)
        if sum(p.numel() for p in pruned.parameters()) <= params:
            best, high = pruned, ratio
        else:
            low = ratio
    if best is None:
        raise ModelError(f"Torch-Pruning leaves more than {params} parameters at every ratio")
    return best


def _pruned(
    library: Any, model: nn.Module, input_shape: Sequence[int], ratio: float, leave: Sequence[str]
) -> nn.Module:
    new = copy.deepcopy(model).eval()
    kept = [new.get_submodule(name.rpartition(".")[0]) for name in leave]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters that it does not know
        pruner = library.pruner.MagnitudePruner(
            new,
            torch.zeros(1, *input_shape),
            importance=library.importance.MagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=kept,
        )
        pruner.step()
    return new.eval()


def _import() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ModelError(
            "this benchmark needs torch-pruning: install it by pip install 'fedsys[prune]'"
        ) from error
