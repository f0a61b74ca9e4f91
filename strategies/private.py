"""A promise to each example: how much noise devices add, what is spent, and when a run ends.

Devices and edge servers clip and add noise themselves (`fedsys.privacy`), so whatever strategies do
with what they send back spends nothing more. This wrapper tells them how much noise, and holds the
budget: a round is charged before anybody is asked for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config import Config
from fedsys.privacy.budget import PrivacyLedger, RecordPlan, record_plans, spent
from fedsys.privacy.claim import Claim
from fedsys.transport import records
from fedsys.transport.messages import CONFIG
from strategies.budgeted import Budgeted
from strategies.roster import Roster


class PrivateRecords(Budgeted):
    """Tells clients how to be private by example, and stops before the budget is exceeded.

    Args:
        inner: Sees models to which noise was added.
        config: The run.
        examples: Of each client.
        roster: Who is there.
        folder: Of the run, for the journal; None: none is written.

    Attributes:
        noises: Noise multiplier of each client; a run that is continued for more rounds keeps them.

    Raises:
        ConfigError: The budget does not last for one round.
        RunError: The journal of an interrupted run is damaged.
    """

    STATE = ("noises", *Budgeted.STATE)

    def __init__(
        self,
        inner: Strategy,
        config: Config,
        examples: Sequence[int],
        roster: Roster,
        folder: Path | None = None,
    ) -> None:
        super().__init__(inner, config.privacy, roster, folder)
        self._made = record_plans(config, examples)
        self.noises = [plan.noise for plan in self._made]
        self.check_lasts(range(len(examples)))

    @property
    def plans(self) -> tuple[RecordPlan, ...]:
        """How each client trains."""
        return tuple(
            dataclasses.replace(plan, noise=noise)
            for plan, noise in zip(self._made, self.noises, strict=True)
        )

    @property
    def noise_multiplier(self) -> float:
        """Largest deviation of the noise of a client over the clipping norm."""
        return max(self.noises)

    def spent(self, ledger: PrivacyLedger) -> float:
        """Return the epsilon of the example with the least privacy left."""
        return spent(ledger, self.plans, self.privacy)

    def cost(self, ledger: PrivacyLedger) -> float:
        """Return `spent`, or up to 0.2 % more if that is within the budget and there sooner."""
        coarse = spent(ledger, self.plans, self.privacy, coarse=True)
        return coarse if coarse <= self.privacy.epsilon else self.spent(ledger)

    def claim_of(self, epsilon: float) -> Claim:
        """Return what is promised where so much was spent."""
        privacy = self.privacy
        rates = sorted({plan.rate for plan in self._made})
        which = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        return Claim(
            "record", "example", epsilon, privacy.delta,
            f"mini-batches are Poisson samples at rate {which}", privacy.accountant, privacy.secure,
        )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Charge the round and tell each client how much noise to add.

        Raises:
            BudgetSpent: It would exceed the budget; nobody was asked.
        """
        messages, plans = super().configure_train(server_round, arrays, config, grid), self.plans
        for message in messages:
            plan = plans[self._roster.partition_of(message.metadata.dst_node_id)]
            message.content = records.own_copy(message.content)
            settings = dict(message.content.config_records.get(CONFIG, ConfigRecord()))
            told = {"noise": plan.noise, "expected": plan.expected}
            message.content[CONFIG] = ConfigRecord({**settings, **told})
        return messages


def about(layer: PrivateRecords | None) -> list[str]:
    """Return lines about what a run will promise; none where it promises nothing."""
    if layer is None:
        return []
    privacy = layer.privacy
    claim = layer.claim_of(privacy.epsilon)
    low, high = min(layer.noises), max(layer.noises)
    noise = f"{high:.3g}" if high - low < 1e-3 else f"{low:.3g} to {high:.3g}"
    return [
        f"privacy of each {claim.unit}: epsilon up to {claim.epsilon:g} at delta "
        f"{claim.delta:g}; norms up to {privacy.clip_norm:g}, noise of {noise} times that; "
        f"{claim.sampling}; accountant {privacy.accountant}, "
        f"noise by the {'system' if privacy.secure else 'seed: for experiments, not for a claim'}"
    ]


def unprotected(config: Config, *, split: bool) -> str:
    """Return a warning where examples have a promise and edge servers see their activations.

    Args:
        config: The run.
        split: Whether models are split.
    """
    if not (split and config.privacy.per_example):
        return ""
    return (
        "privacy=record promises nothing about what edge servers see: activations leave devices as "
        "they are, and images can be read from them at any epsilon; docs/trust.md says what helps, "
        "and fedsys bench leakage measures it"
    )
