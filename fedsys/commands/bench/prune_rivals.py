"""Channels chosen by our scores and by Torch-Pruning, at the same number of parameters.

Torch-Pruning as its own documentation uses it, with magnitude importance over coupled channels
(Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023). What our plain score leaves at
``bench.rival_sparsity`` is the number of parameters for all; each of the others is the largest
model that a search by halving finds below it.

Each is timed with BatchNorm as it is, folded by `fedsys.pruning.dense.fold`, and fused by torch's
own ``torch.fx.experimental.optimization.fuse``: a variant answers folded, and so that this is not
taken for what pruning gives, its rival and the parent are folded, too.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from fedsys.config import Config
from fedsys.config.pruning import PruningConfig, check
from fedsys.config.targets import import_extra
from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.candidates import Candidate, convert
from fedsys.pruning.dense.channels import Multiples
from fedsys.pruning.dense.fold import answering
from fedsys.pruning.dense.removal import (
    Removal,
    evaluation_graph,
    make_plan,
    masked_copy,
    probes,
)
from fedsys.pruning.dense.shrink import count_parameters
from fedsys.pruning.levels import Level
from fedsys.pruning.measuring import in_turns, macs, speedup, with_threads
from fedsys.pruning.sparsify import one_shot
from fedsys.pruning.structure import structure
from fedsys.randomness import Address
from fedsys.training.masks import Masks, last_layer

SHAPE = (3, 32, 32)
_STEPS = 10
"""Halvings of the interval: parameters agree to some tenths of a per cent."""

RIVAL = "Torch-Pruning"

T = TypeVar("T")
Row = dict[str, Any]


def rivals(model: nn.Module, name: str, config: Config, options: Mapping[str, Any]) -> list[Row]:
    """Return a row for each of our scores, Torch-Pruning and the parent; latencies in turns.

    ``ms`` is with BatchNorm, ``folded_ms`` without it, ``fused_ms`` by torch's own fusion. The
    times faster are of equals, but for ``answers_faster_than_torch_pruning``: the folded model
    against Torch-Pruning's as that returns it.

    Args:
        model: With weights as after training; left as it was.
        name: Its name in the rows.
        config: ``pruning`` and ``prune`` say how ours are made.
        options: ``rival_sparsity``, ``rival_costs`` (pairs of cost and weight) and ``rival_runs``.

    Raises:
        ConfigError: A cost or its weight is out of range.
        ModelError: Torch-Pruning is not installed, or nothing is as small as wanted.
    """
    plain = plain_score(config, options)
    made = {"fedsys": _timed(lambda: _converted(model, masks_by(model, plain), config))}
    params = count_parameters(made["fedsys"][0])
    for cost, weight in options["rival_costs"]:
        chosen = weighed(plain, cost, weight)
        made[f"fedsys, {cost}^{weight:g}"] = _converted_to_size(model, chosen, config, params)
    made[RIVAL] = _timed(lambda: torch_pruning(model, SHAPE, params, last_layer(model)))
    made["parent"] = (model, 0.0)
    images = torch.randn(1, *SHAPE, generator=Address(0).torch("rival"))
    whole = {by: pruned for by, (pruned, _) in made.items()}
    forms = {"": whole, "folded_": _each(folded, whole), "fused_": _each(_fused, whole)}
    every = {form + by: m for form, models in forms.items() for by, m in models.items()}
    with with_threads(1):
        times = in_turns(every, images, int(options["rival_runs"]))

    def row(by: str) -> Row:
        figures: Row = {}
        for form in forms:
            own, parent, other = (times[form + it] for it in (by, "parent", RIVAL))
            figures[f"{form}ms"] = 1000 * median(own)
            figures[f"{form}faster_than_parent"] = speedup(parent, own)
            figures[f"{form}faster_than_torch_pruning"] = speedup(other, own)
        figures["answers_faster_than_torch_pruning"] = speedup(times[RIVAL], times[f"folded_{by}"])
        return figures

    return [
        {
            "model": name,
            "by": by,
            "params": count_parameters(pruned),
            "macs": macs(evaluation_graph(masked_copy(pruned, None)).float(), SHAPE),
            **row(by),
            "seconds": took,
        }
        for by, (pruned, took) in made.items()
    ]


def _each(change: Callable[[nn.Module], nn.Module], of: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {name: change(model) for name, model in of.items()}


def folded(model: nn.Module) -> nn.Module:
    """Return a model of 3x32x32 images as a graph with BatchNorm folded, under short names."""
    return answering(evaluation_graph(masked_copy(model, None)), SHAPE)


def _fused(model: nn.Module) -> nn.Module:
    # it imports what only the benchmark needs
    fuse = importlib.import_module("torch.fx.experimental.optimization").fuse
    fused: nn.Module = fuse(masked_copy(model, None))
    return fused.eval()


def _timed(make: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return make(), time.perf_counter() - began


def largest(
    make: Callable[[float], T], size: Callable[[T], int], most: int, steps: int = _STEPS
) -> T | None:
    """Return the largest thing of at most the size `most` that a search by halving finds.

    Args:
        make: From a number in (0, 1); the larger that is, the smaller the thing. What cannot be
            made, because a layer would be empty, counts as too small.
        size: Of such a thing.
        most: Largest size.
        steps: Things that are made.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        try:
            made = make(middle)
        except (ConfigError, ModelError):
            high = middle
            continue
        if size(made) <= most:
            best, high = made, middle
        else:
            low = middle
    return best


# --------------------------------------------------------------------------------------------------
# Ours


def masks_by(
    model: nn.Module, pruning: PruningConfig, known: Mapping[str, Any] | None = None
) -> Masks:
    """Return masks by the first sparsity; `known` is what `structure` says, if it is known."""
    return one_shot(
        pruning.method,
        model,
        pruning.sparsities[0],
        leave=last_layer(model),
        keep_channels=pruning.keep_channels,
        mix=pruning.mix,
        **(structure(pruning, model, SHAPE) if known is None else known),
    )


def plain_score(config: Config, options: Mapping[str, Any]) -> PruningConfig:
    """Return how the model is pruned that says how many parameters all others may have."""
    return dataclasses.replace(config.pruning, sparsity=float(options["rival_sparsity"]))


def weighed(plain: PruningConfig, cost: Any, weight: Any) -> PruningConfig:
    """Return the same with scores that are weighed against costs.

    Raises:
        ConfigError: The cost or its weight is out of range.
    """
    chosen = dataclasses.replace(plain, cost=str(cost), cost_weight=float(weight))
    check(chosen)
    return chosen


def converted(
    model: nn.Module, masks: Masks, config: Config, round_to: Multiples | None = None
) -> Candidate:
    """Return the verified dense model of masks; arguments and errors are those of `convert`."""
    level = Level("ours", model, masks, config.pruning.method)
    candidate, _ = convert(level, config.variants, SHAPE, lambda plan: None, round_to=round_to)
    return candidate


def _converted(model: nn.Module, masks: Masks, config: Config) -> nn.Module:
    content = converted(model, masks, config).content
    assert isinstance(content, nn.Module)
    return content


def _converted_to_size(
    model: nn.Module, pruning: PruningConfig, config: Config, params: int
) -> tuple[nn.Module, float]:
    """Return the largest model of at most so many parameters, and the seconds of one conversion."""
    masks, _ = of_size(model, pruning, params)
    return _timed(lambda: _converted(model, masks, config))


def of_size(
    model: nn.Module, pruning: PruningConfig, params: int, round_to: Multiples = 1
) -> tuple[Masks, Removal]:
    """Return the masks of the largest model of at most so many parameters, and its plan.

    Args:
        model: Left as it was.
        pruning: How channels are scored; its sparsity is what is searched for.
        params: Parameters that may be left.
        round_to: What numbers of channels are rounded up to, in what is counted.

    Raises:
        ModelError: No sparsity leaves so few parameters.
    """
    known, inputs = structure(pruning, model, SHAPE), probes(SHAPE)[:1]

    def make(share: float) -> tuple[Masks, Removal, int]:
        masks = masks_by(model, dataclasses.replace(pruning, sparsity=share), known)
        plan = make_plan(masked_copy(model, masks), inputs, round_to=round_to)
        return masks, plan, count_parameters(plan.apply())

    found = largest(make, lambda made: made[2], params)
    if found is None:
        raise ModelError(f"no sparsity by pruning.cost={pruning.cost} leaves {params} parameters")
    return found[:2]


# --------------------------------------------------------------------------------------------------
# Torch-Pruning


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
    library = import_extra("torch_pruning", "prune", "this benchmark")
    best = largest(
        lambda ratio: _pruned(library, model, input_shape, ratio, leave), count_parameters, params
    )
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
