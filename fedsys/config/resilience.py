"""The group ``resilience``: early exits and tolerance of skipped units, trained for CONTINUER."""

from __future__ import annotations

from dataclasses import dataclass

from fedsys.errors import ConfigError, did_you_mean

TRAININGS = ("none", "joint", "frozen")


@dataclass(frozen=True)
class ResilienceConfig:
    """What a model learns beside its task, so that it can answer without some of its units.

    Attributes:
        training: ``joint`` trains backbone, exits and adapters together; ``frozen`` trains exits
            and adapters on a backbone that stays as it is, to the bit; ``none`` trains neither.
        exits: Boundaries with an exit: ``b`` is behind units ``[0, b)``. None: behind every unit.
        exit_weight: Weight of the mean loss of the exits; that of the final one is 1.
        failures: Share of the mini-batches in which a run of units is left out, in [0, 1].
        longest: Units of such a run at most; runs up to this length are measured at the end.
        backbone_rounds: ``frozen``: rounds in which the backbone is trained first, alone.
        head_weight: Weight of its loss by which each exit itself learns; the backbone learns by
            `exit_weight` whatever this is. None: `exit_weight` over the number of exits, too.
        match: Weight of the loss by which adapters learn in every mini-batch to make what their
            units make; 0: they learn in those whose failure includes their unit, and else nothing.
        pool: Exits pool features to so many times as many places.
        measured: Units of a run that is measured at the end at most; None: `longest`.
    """

    training: str = "none"
    exits: tuple[int, ...] | None = None
    exit_weight: float = 1.0
    failures: float = 0.3
    longest: int = 3
    backbone_rounds: int = 0
    head_weight: float | None = None
    match: float = 0.0
    pool: int = 1
    measured: int | None = None

    @property
    def active(self) -> bool:
        """Whether there are exits and adapters."""
        return self.training != "none"

    @property
    def measured_units(self) -> int:
        """Units of a run that is measured at the end at most."""
        return self.longest if self.measured is None else self.measured

    def frozen(self, round_: int) -> bool:
        """Whether the backbone stays as it is in a round, from 1."""
        return self.training == "frozen" and round_ > self.backbone_rounds


def check(
    resilience: ResilienceConfig, rounds: int, others: tuple[tuple[str, str, bool], ...]
) -> None:
    """Refuse values out of range, and what does not go with exits and adapters.

    Args:
        resilience: The group.
        rounds: Of the run.
        others: Key, value and whether it is chosen, of what does not go with them.

    Raises:
        ConfigError: Names the key, its value, the rule and the way out.
    """
    if resilience.training not in TRAININGS:
        hint = did_you_mean(resilience.training, TRAININGS)
        rule = f"must be one of {', '.join(TRAININGS)}"
        raise ConfigError.of("resilience.training", resilience.training, rule, hint)
    rules = (
        ("exit_weight", resilience.exit_weight > 0, "must be above 0"),
        ("failures", 0 <= resilience.failures <= 1, "must be in [0, 1]"),
        ("longest", resilience.longest >= 1, "must be at least 1"),
        ("backbone_rounds", resilience.backbone_rounds >= 0, "must be at least 0"),
        (
            "head_weight",
            resilience.head_weight is None or resilience.head_weight > 0,
            "must be above 0",
        ),
        ("match", resilience.match >= 0, "must be at least 0"),
        ("pool", resilience.pool >= 1, "must be at least 1"),
        ("measured", resilience.measured is None or resilience.measured >= 1, "must be at least 1"),
    )
    for key, holds, rule in rules:
        if not holds:
            raise ConfigError.of(f"resilience.{key}", getattr(resilience, key), rule)
    if not resilience.active:
        return
    if resilience.training == "frozen" and resilience.backbone_rounds >= rounds:
        rule = f"must leave rounds for exits, and rounds={rounds}"
        raise ConfigError.of("resilience.backbone_rounds", resilience.backbone_rounds, rule)
    for key, value, chosen in others:
        if chosen:
            rule = f"must be none with resilience.training={resilience.training}"
            way_out = "exits and adapters are trained by devices that hold the whole model"
            raise ConfigError.of(key, value, rule, way_out)
