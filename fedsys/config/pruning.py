"""The group ``pruning``: what is pruned, by which score, and when between the rounds.

Two schedules. *Gradual*: from dense to ``sparsity`` in ``steps`` prunings between rounds, each of
which prunes an equal share of what is left; with one step before the first round it is pruning in
one shot at initialisation. *Levels with rewinding* (``rounds_per_level``): train, prune
``share`` of the survivors, start again from the weights after round ``rewind``; as many levels as
there are rounds for (Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, rewind to the
start; Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, to
the weights after some rounds). Everything here is a function of the configuration and the round,
so server, clients and edge servers agree without a message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedsys.errors import ConfigError, did_you_mean

METHODS = (
    "random",
    "magnitude",
    "magnitude_channel",
    "group_norm",
    "snip",
    "grasp",
    "synflow",
    "own",
)
CHANNEL_METHODS = ("magnitude_channel", "group_norm")
"""Those by which whole channels go."""

SCOPES = ("global", "layer")
COSTS = ("none", "macs", "params", "elements")
"""What scores of channels can be divided by (`fedsys.pruning.structure.channel_costs`)."""


@dataclass(frozen=True)
class PruningConfig:
    """What is pruned, and when.

    Attributes:
        method: One of `METHODS`, or ``none``.
        score: ``own``: what scores weights, as a group with a ``_target_`` that takes the model.
        sparsity: Share of the masked weights that goes, in [0, 1), or several in ascending order:
            then ``fedsys prune`` makes a variant of each.
        scope: ``global`` compares all weights with each other, ``layer`` those of one layer.
        leave: Layers to leave alone: names or patterns. None leaves the last one, whose outputs
            are the classes.
        keep_channels: Channels of every layer that keep a weight in any case.
        cost: ``macs``, ``params`` or ``elements`` (of maps): of two channels of one score the one
            goes first that costs more of these; ``none`` looks at the score alone. Only for
            `CHANNEL_METHODS`.
        cost_weight: The exponent of the cost that scores are divided by; 0 is like ``none``.
        mix: ``magnitude_channel``: from 0 (weights alone) to 1 (whole channels).
        iterations: ``synflow``: steps of one pruning.
        examples: ``snip``, ``grasp``: images that the gradient is taken on.
        start: Rounds before the first pruning; 0 prunes at initialisation.
        steps: Prunings.
        every: Rounds from one pruning to the next.
        rounds_per_level: Rounds of a level; 0 prunes gradually, without rewinding.
        share: Levels: share of the survivors that each pruning takes, in (0, 1).
        rewind: Levels: round whose weights every level starts from; 0 for those at the start.
        group_lasso: Weight of the penalty on channels (`fedsys.training.penalty`), until the last
            pruning of a gradual schedule and in all levels; 0 for none.
    """

    method: str = "none"
    score: Mapping[str, Any] | None = None
    sparsity: tuple[float, ...] | float = 0.9  # what is no number is built as a list
    scope: str = "global"
    leave: tuple[str, ...] | None = None
    keep_channels: int = 0
    cost: str = "none"
    cost_weight: float = 1.0
    mix: float = 0.8
    iterations: int = 100
    examples: int = 512
    start: int = 1
    steps: int = 5
    every: int = 1
    rounds_per_level: int = 0
    share: float = 0.2
    rewind: int = 1
    group_lasso: float = 0.0

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The shares in ascending order, also if there is only one."""
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.method != "none"

    @property
    def rewinds(self) -> bool:
        """Whether pruning goes by levels that start anew."""
        return self.active and self.rounds_per_level > 0


# --------------------------------------------------------------------------------------------------
# Rules


def check(pruning: PruningConfig) -> None:
    """Refuse values out of range, whatever they are used for.

    Raises:
        ConfigError: Names the key, its value and the rule.
    """
    _choice("method", pruning.method, (*METHODS, "none"))
    _choice("scope", pruning.scope, SCOPES)
    _check_score(pruning)
    if pruning.method == "synflow" and pruning.scope != "global":
        raise ConfigError.of("pruning.scope", pruning.scope, "must be global for synflow")
    _choice("cost", pruning.cost, COSTS)
    check_cost(pruning.cost, pruning.method, pruning.scope)
    rules = (
        (
            "sparsity",
            all(0 <= a < b for a, b in pairwise((*pruning.sparsities, 1.0))),
            "must be in [0, 1), or several of them in ascending order",
        ),
        ("keep_channels", pruning.keep_channels >= 0, "must be at least 0"),
        (
            "cost_weight",
            0.0 <= pruning.cost_weight < math.inf,
            "must be at least 0 and finite",
        ),
        ("mix", 0.0 <= pruning.mix <= 1.0, "must be in [0, 1]"),
        ("iterations", pruning.iterations >= 1, "must be at least 1"),
        ("examples", pruning.examples >= 1, "must be at least 1"),
        ("start", pruning.start >= 0, "must be at least 0"),
        ("steps", pruning.steps >= 1, "must be at least 1"),
        ("every", pruning.every >= 1, "must be at least 1"),
        ("rounds_per_level", pruning.rounds_per_level >= 0, "must be at least 0"),
        ("share", 0.0 < pruning.share < 1.0, "must be above 0 and below 1"),
        ("rewind", pruning.rewind >= 0, "must be at least 0"),
        ("group_lasso", pruning.group_lasso >= 0.0, "must be at least 0"),
    )
    for key, holds, rule in rules:
        if not holds:
            raise ConfigError.of(f"pruning.{key}", getattr(pruning, key), rule)


def _check_score(pruning: PruningConfig) -> None:
    """Refuse an own method without a function, and a function that is not called."""
    named = isinstance((pruning.score or {}).get("_target_"), str)
    if pruning.method == "own" and not named:
        rule = "must have a _target_, the path of a function of the model"
        raise ConfigError.of(
            "pruning.score", pruning.score, rule, "pruning.score._target_=mine.score"
        )
    if pruning.method != "own" and pruning.score is not None:
        rule = f"must be null for pruning.method={pruning.method}"
        raise ConfigError.of("pruning.score", dict(pruning.score), rule, "try pruning=own")


def check_cost(cost: str, method: str, scope: str) -> None:
    """Refuse a cost where nothing can be divided by it.

    Raises:
        ConfigError: The method does not score channels, or layers are not compared.
    """
    if cost == "none" or method == "none":
        return
    if method not in CHANNEL_METHODS:
        rule = f"must be none for pruning.method={method}, which does not score channels"
        way_out = f"try pruning.method={CHANNEL_METHODS[-1]}"
        raise ConfigError.of("pruning.cost", cost, rule, way_out)
    if scope != "global":
        rule = f"must be none with pruning.scope={scope}: all channels of a layer cost the same"
        raise ConfigError.of("pruning.cost", cost, rule, "try pruning.scope=global")


def _choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        rule = f"must be one of {', '.join(known)}"
        raise ConfigError.of(f"pruning.{key}", value, rule, did_you_mean(value, known))


def check_rounds(pruning: PruningConfig, rounds: int) -> None:
    """Refuse a schedule that does not end within the rounds of a run.

    Raises:
        ConfigError: The last pruning would come after the last round, or there is more than one
            sparsity.
    """
    if len(pruning.sparsities) != 1:
        rule = "must be one number for fedsys train"
        raise ConfigError.of("pruning.sparsity", list(pruning.sparsities), rule)
    if pruning.rewinds and rounds <= pruning.rewind:
        rule = f"must be above pruning.rewind={pruning.rewind}"
        raise ConfigError.of("rounds", rounds, rule, "levels begin behind it")
    if pruning.active and not pruning.rewinds and (last := last_pruning(pruning, rounds)) > rounds:
        raise ConfigError.of(
            "pruning.steps",
            pruning.steps,
            f"must end within rounds={rounds}, and the last pruning would be before round {last}",
            "lower it, pruning.every or pruning.start, or raise rounds",
        )


# --------------------------------------------------------------------------------------------------
# The schedule


def prunings_before(pruning: PruningConfig, round_: int) -> int:
    """Return how many prunings there are before a round; that is the level, where there are levels.

    Args:
        pruning: The schedule.
        round_: The round, from 1.
    """
    if not pruning.active:
        return 0
    if pruning.rewinds:
        return max(0, round_ - 1 - pruning.rewind) // pruning.rounds_per_level
    if round_ <= pruning.start:
        return 0
    return min(pruning.steps, 1 + (round_ - 1 - pruning.start) // pruning.every)


def last_pruning(pruning: PruningConfig, rounds: int) -> int:
    """Return the round before which is pruned for the last time."""
    if pruning.rewinds:
        level = prunings_before(pruning, rounds)
        return pruning.rewind + level * pruning.rounds_per_level + 1
    return pruning.start + (pruning.steps - 1) * pruning.every + 1


def position(pruning: PruningConfig, round_: int, rounds: int) -> tuple[int, int]:
    """Return a round and the number of rounds as the learning rate is to see them.

    Every level repeats the rates from the round that it rewinds to (Frankle et al., 2020).
    """
    if not pruning.rewinds:
        return round_, rounds
    level = pruning.rewind + pruning.rounds_per_level
    if round_ <= pruning.rewind:
        return round_, level
    return pruning.rewind + 1 + (round_ - 1 - pruning.rewind) % pruning.rounds_per_level, level


def ends_level(pruning: PruningConfig, round_: int) -> bool:
    """Whether a round is the last of a level."""
    behind = round_ - pruning.rewind
    return pruning.rewinds and behind > 0 and behind % pruning.rounds_per_level == 0


def penalty_weight(pruning: PruningConfig, round_: int, rounds: int) -> float:
    """Return the weight of the penalty in a round: none behind the last pruning.

    With levels there is always another one, if the run is continued: so it does not end.
    """
    to_come = pruning.rewinds or round_ < last_pruning(pruning, rounds)
    return pruning.group_lasso if pruning.active and to_come else 0.0
