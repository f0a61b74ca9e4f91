"""Cuts that may be chosen by what leaks at them: the audit of `fedsys bench leakage` as a limit.

``policy.max_leakage`` is the highest structural similarity (SSIM) of reconstructed images with the
true ones that is accepted, ``policy.leakage`` the ``leakage.json`` of an audit of the same model,
or the folder that has it. With ``privacy=cut`` the audit's figures with noise count, at the least ε
that is not below the run's; otherwise those without: other mechanisms do not touch activations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsys.config import Config, Spec
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel

OPTIONS: Final = ("max_leakage", "leakage")
"""Keys of the ``policy`` group of every kind."""

FILE: Final = "leakage.json"


def without_limit(policy: Spec) -> dict[str, Any]:
    """Return the options of a policy that are its own."""
    return {key: value for key, value in policy.items() if key not in OPTIONS}


@dataclass(frozen=True)
class LeakageLimit:
    """Which cuts of a model leak too much.

    Attributes:
        most: Highest SSIM that is accepted.
        measured: SSIM by cut.
    """

    most: float
    measured: Mapping[int, float]

    def allows(self, cut: int) -> bool:
        """Return whether a cut may be chosen; one that was not measured may not."""
        return self.measured.get(cut, float("inf")) <= self.most

    def reason(self, cuts: Sequence[int]) -> str:
        """Return which of some cuts may not be chosen, and why; empty if all may.

        >>> LeakageLimit(0.5, {1: 0.9, 2: 0.4}).reason([1, 2, 3])
        'not at cut 1 (SSIM 0.90) or 3 (not measured): policy.max_leakage=0.5'
        """
        barred = [
            f"{cut} (SSIM {self.measured[cut]:.2f})"
            if cut in self.measured
            else f"{cut} (not measured)"
            for cut in cuts
            if not self.allows(cut)
        ]
        if not barred:
            return ""
        return f"not at cut {' or '.join(barred)}: policy.max_leakage={self.most:g}"


def leakage_limit(config: Config, layers: LayeredModel) -> LeakageLimit | None:
    """Return the limit of a run; None where there is none.

    Raises:
        ConfigError: One of the two options is missing or not usable, or the audit is of another
            model.
    """
    most, source = (config.policy.get(name) for name in OPTIONS)
    if most is None and source is None:
        return None
    number = isinstance(most, int | float) and not isinstance(most, bool)
    if most is None or not number or not -1 <= most <= 1:
        raise ConfigError.of(
            "policy.max_leakage", most, "must be an SSIM from -1 to 1, as policy.leakage is given",
            "1 is the image itself; the audit says what a mean image has (ssim_blind)",
        )  # fmt: skip
    if source is None:
        raise ConfigError.of(
            "policy.leakage", None, "must be the file of an audit, as policy.max_leakage is given",
            "fedsys bench leakage makes one, of the same data= and model=",
        )  # fmt: skip
    path = Path(str(source)).expanduser()
    path = path / FILE if path.is_dir() else path
    return LeakageLimit(float(most), _measured(path, config, layers))


def allowed_cuts(config: Config, layers: LayeredModel, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return those of some cuts that may be chosen."""
    limit = leakage_limit(config, layers)
    return tuple(cut for cut in cuts if limit is None or limit.allows(cut))


def leakage_note(config: Config, layers: LayeredModel) -> str:
    """Return which cuts of a model may not be chosen, for the reasons of decisions."""
    limit = leakage_limit(config, layers)
    return "" if limit is None else limit.reason(layers.cuts)


def unit_list(layers: LayeredModel) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of what leaves it of each unit, by which models are told apart."""
    return [(unit.name, tuple(unit.out_shape)) for unit in layers.units]


def _measured(path: Path, config: Config, layers: LayeredModel) -> dict[int, float]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        units = [(str(name), tuple(shape)) for name, shape in told["units"]]
        found = [
            (str(row["mechanism"]), row["epsilon"], int(row["cut"]), float(row["ssim"]))
            for row in told["cuts"]
        ]
    except OSError as error:
        raise ConfigError.of("policy.leakage", path, f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError.of(
            "policy.leakage", path, "must be the leakage.json of an audit", "fedsys bench leakage"
        ) from error
    if units != unit_list(layers):
        raise ConfigError.of(
            "policy.leakage", path,
            f"must be of this model, whose units are {', '.join(u.name for u in layers.units)}",
            "fedsys bench leakage with the same data= and model=",
        )  # fmt: skip
    wanted = _mechanism(config, [(row[0], row[1]) for row in found])
    measured: dict[int, float] = {}
    for mechanism, epsilon, cut, ssim in found:
        if (mechanism, epsilon) == wanted:
            measured[cut] = max(ssim, measured.get(cut, -1.0))
    return measured


def _mechanism(config: Config, known: Sequence[tuple[str, Any]]) -> tuple[str, Any]:
    """Return which figures of an audit count for a run."""
    if config.privacy.mechanism == "cut":
        weaker = [(e, m) for m, e in known if m == "cut" and e >= config.privacy.epsilon]
        if weaker:
            epsilon, mechanism = min(weaker)
            return mechanism, epsilon
    return "none", None
