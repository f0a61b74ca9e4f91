"""One budget for the rounds of a run: charged before anybody is asked, and none beyond it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config.privacy import PrivacyConfig
from fedsys.errors import ConfigError, RunError
from fedsys.files import write_atomic
from fedsys.privacy.budget import BudgetSpent, PrivacyLedger
from fedsys.privacy.claim import Claim
from strategies.around import Around
from strategies.roster import Roster

JOURNAL = "privacy.json"
"""File of a run with what was charged, written before the round is begun."""


class Budgeted(Around):
    """Charges rounds. What a round releases, and what clients are told of it, subclasses say.

    Args:
        inner: Asks the clients.
        privacy: The budget.
        roster: Who is there.
        folder: Of the run, for the journal; None: none is written.

    Attributes:
        privacy: The budget.
        rounds: By client, the rounds that were charged; in checkpoints.
        extra: By client, rounds that were charged once more, each time with new noise; likewise.

    Raises:
        RunError: The journal of an interrupted run is damaged.
    """

    STATE: ClassVar[tuple[str, ...]] = ("rounds", "extra")

    def __init__(
        self, inner: Strategy, privacy: PrivacyConfig, roster: Roster, folder: Path | None = None
    ) -> None:
        super().__init__(inner)
        self.privacy, self._roster = privacy, roster
        self._journal = None if folder is None else folder / JOURNAL
        self.rounds: dict[int, list[int]] = {}
        self.extra: dict[int, int] = {}
        # What an interrupted run charged since its last checkpoint. Its noise was the operating
        # system's: what is done again is another release. Noise by address is the same again, and
        # what was charged for it is charged again as it is
        self._before = _read(self._journal) if privacy.secure else PrivacyLedger()

    @abstractmethod
    def spent(self, ledger: PrivacyLedger) -> float:
        """Return the epsilon of the unit with the least privacy left."""

    @abstractmethod
    def claim_of(self, epsilon: float) -> Claim:
        """Return what is promised where so much was spent."""

    @property
    @abstractmethod
    def noise_multiplier(self) -> float:
        """Largest deviation of the noise over the clipping norm."""

    def cost(self, ledger: PrivacyLedger) -> float:
        """Return `spent`, or somewhat more if that is within the budget and there sooner."""
        return self.spent(ledger)

    @property
    def ledger(self) -> PrivacyLedger:
        """What was charged."""
        known = PrivacyLedger({c: tuple(r) for c, r in self.rounds.items()}, dict(self.extra))
        return known.merged(self._before)

    def claim(self) -> Claim:
        """Return what is promised for what was done."""
        return self.claim_of(self.spent(self.ledger))

    def check_lasts(self, clients: Iterable[int]) -> None:
        """Refuse a budget that does not last for one round of these clients.

        Raises:
            ConfigError: It is spent before.
        """
        first = self.cost(PrivacyLedger().charged(1, clients))
        if first > self.privacy.epsilon:
            raise ConfigError.of(
                "privacy.epsilon", self.privacy.epsilon,
                f"is spent before the first round is over, which takes {first:.3g}",
                "raise it or privacy.noise_multiplier, or lower client.epochs",
            )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Charge the round to those whom the inner strategy asks.

        Raises:
            BudgetSpent: It would exceed the budget; nobody was asked.
        """
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        asked = [self._roster.partition_of(m.metadata.dst_node_id) for m in messages]
        after = self.ledger.charged(server_round, asked, new_noise=self.privacy.secure)
        if (cost := self.cost(after)) > self.privacy.epsilon:
            raise BudgetSpent(
                f"round {server_round} would spend {cost:.4g} of the {self.privacy.epsilon:g} that "
                "privacy.epsilon allows"
            )
        self.rounds = {c: list(r) for c, r in after.rounds.items()}
        self.extra = dict(after.extra)
        if self._journal is not None:
            charged = {"rounds": self.rounds, "extra": self.extra}
            write_atomic(self._journal, json.dumps(charged, sort_keys=True).encode())
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass on, and tell what was spent until now."""
        aggregate, metrics = self.inner.aggregate_train(server_round, replies)
        return aggregate, MetricRecord({**(metrics or {}), "epsilon": self.cost(self.ledger)})


def _read(journal: Path | None) -> PrivacyLedger:
    """Return what a journal says was charged; nothing without one."""
    if journal is None or not journal.is_file():
        return PrivacyLedger()
    try:
        told: Mapping[str, Any] = json.loads(journal.read_text(encoding="utf-8"))
        rounds = {int(c): tuple(int(r) for r in of) for c, of in told["rounds"].items()}
        return PrivacyLedger(rounds, {int(c): int(n) for c, n in told["extra"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{journal} is damaged, so nobody knows what was spent: run again into another folder"
        ) from error


def figures(layer: Budgeted | None) -> dict[str, Any]:
    """Return what is told of privacy in the result of a run; nothing where none is promised."""
    if layer is None:
        return {}
    claim = layer.claim()
    more = {"claim": claim.sentence(), "noise_multiplier": layer.noise_multiplier}
    return {
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "privacy": {**claim.figures(), **more},
    }
