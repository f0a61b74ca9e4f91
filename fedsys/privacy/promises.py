"""Promises whose releases are alike in every round: to each example at the cut, to each client.

At the cut, an example is released once in each epoch. A client's update is released in each round
in which it was asked; sampling of clients amplifies nothing here, as the server app that knows who
was asked is not hidden from. Where devices add the noise, two updates lie two norms apart, as two
activations do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.config import Config
from fedsys.config.privacy import PrivacyConfig
from fedsys.privacy.accountant import Releases, epsilon
from fedsys.privacy.budget import PrivacyLedger, check_delta, noise_of
from fedsys.privacy.claim import Claim
from fedsys.privacy.cut import REACH, cut_epsilon, cut_noise
from fedsys.privacy.release import Noise


@dataclass(frozen=True)
class RoundPromise:
    """What every round of a client releases.

    Attributes:
        privacy: The budget, and how it is accounted.
        noise: Deviation (Laplace: scale) of the noise over the norm that is clipped to.
        releases: Of one unit in a round.
    """

    privacy: PrivacyConfig
    noise: float
    releases: int

    def with_noise(self, noise: float) -> RoundPromise:
        """Return the promise with other noise."""
        return dataclasses.replace(self, noise=noise)

    def spent(self, ledger: PrivacyLedger) -> float:
        """Return the ε of the unit with the least privacy left; clients do not add up."""
        rounds = max(map(ledger.count, ledger.rounds), default=0)
        return self.cost(rounds * self.releases)

    def cost(self, releases: int) -> float:
        """Return the ε of a number of releases of one unit."""
        if not releases:
            return 0.0
        privacy = self.privacy
        if privacy.mechanism == "client":
            noise_over_reach = self.noise / _reach(privacy)
            alike = Releases(noise_over_reach, 1.0, releases)
            return epsilon([alike], privacy.delta, privacy.accountant)
        if privacy.noise == "gaussian" and privacy.accountant != "pld":
            alike = Releases(self.noise / REACH, 1.0, releases)
            return epsilon([alike], privacy.delta, privacy.accountant)
        noise = Noise(privacy.clip_norm, self.noise, privacy.noise)
        return cut_epsilon(noise, privacy.delta, releases)

    def settings(self) -> dict[str, float]:
        """Return what clients are told."""
        return {"noise": self.noise}

    def claim(self, spent: float) -> Claim:
        """Return the promise for what was spent."""
        privacy = self.privacy
        told: dict[str, Any] = {
            "mechanism": privacy.mechanism,
            "epsilon": spent,
            "delta": privacy.delta,
            "accountant": privacy.accountant,
            "secure": privacy.secure,
        }
        if privacy.local:
            return Claim(
                **told, unit="client", neighbours="its data are replaced by any others, as many",
                sampling="noise is added on its device, so the server app is no exception; each is "
                "charged for the rounds in which it was asked",
            )  # fmt: skip
        if privacy.mechanism == "client":
            return Claim(
                **told, unit="client", neighbours="the update of one is replaced by none",
                sampling="each is charged for the rounds in which it was asked; nothing is "
                "assumed about sampling",
            )  # fmt: skip
        labels = "labels leave devices as they are"
        if privacy.label_epsilon is not None:
            labels = f"labels have {privacy.label_epsilon:g} of randomised response beside"
        return Claim(
            **told, unit="example", neighbours="its activation is replaced by any other",
            sampling="against edge servers, for activations alone, each released once in an "
            f"epoch; {labels}; nothing is promised of what the server app sees",
        )  # fmt: skip


def _reach(privacy: PrivacyConfig) -> float:
    """Return how far apart what two neighbours release may lie, over the norm."""
    return REACH if privacy.local else 1.0


def round_promise(config: Config, examples: Sequence[int]) -> RoundPromise:
    """Return the promise of a run, with the least noise that its rounds need.

    Args:
        config: The run, whose mechanism is ``cut`` or ``client``.
        examples: Of each client.

    Raises:
        ConfigError: No noise keeps the budget, or delta is too large.
    """
    privacy, client = config.privacy, config.privacy.mechanism == "client"
    releases = 1 if client else config.client.epochs
    units, name = (len(examples), "clients") if client else (sum(examples), "examples")
    check_delta(privacy, units, name)
    rounds = config.rounds * releases
    if privacy.noise_multiplier is not None:
        noise = privacy.noise_multiplier
    elif client:
        noise = _reach(privacy) * noise_of(privacy, 1.0, rounds)
    elif privacy.noise == "gaussian" and privacy.accountant != "pld":
        noise = REACH * noise_of(privacy, 1.0, rounds)
    else:
        made = cut_noise(
            privacy.epsilon, privacy.delta, privacy.clip_norm, rounds, kind=privacy.noise
        )
        noise = made.multiplier
    return RoundPromise(privacy, noise, releases)
