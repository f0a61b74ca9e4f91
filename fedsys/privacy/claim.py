"""What a run promises, to whom, and on which assumptions: in one sentence and as figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

ACCOUNTANTS = {
    "pld": "privacy loss distributions (dp-accounting)",
    "rdp": "Rényi divergences (dp-accounting)",
    "prv": "privacy random variables (Opacus)",
}

NEIGHBOURS = "one is added or removed"
"""The relation of data sets that are to be told apart, of every mechanism here."""


@dataclass(frozen=True)
class Claim:
    """A promise of differential privacy.

    Attributes:
        mechanism: ``record``, ``client`` or ``cut``.
        unit: What is protected: ``example``, ``client``.
        epsilon: That was spent.
        delta: At which.
        sampling: What is assumed about who takes part.
        accountant: By which epsilon was computed.
        secure: Whether noise and sampling are unknown to those who know the configuration.
        neighbours: Which data sets are not to be told apart.
    """

    mechanism: str
    unit: str
    epsilon: float
    delta: float
    sampling: str
    accountant: str
    secure: bool
    neighbours: str = NEIGHBOURS

    def figures(self) -> dict[str, Any]:
        """Return the claim as values for JSON."""
        return dataclasses.asdict(self)

    def sentence(self) -> str:
        """Return the claim in one sentence."""
        limits = "" if self.secure else (
            "; noise follows from the seed, so this holds for those alone who do not know it "
            "(privacy.secure=true)"
        )  # fmt: skip
        return (
            f"({self.epsilon:.3g}, {self.delta:g})-differential privacy for each {self.unit}, "
            f"where {self.neighbours}; {self.sampling}; by {ACCOUNTANTS[self.accountant]}{limits}"
        )
