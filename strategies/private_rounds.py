"""Rounds that cost privacy: charged before anybody is asked, and none beyond the budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.errors import ConfigError, RunError
from fedsys.files import write_atomic
from fedsys.privacy.budget import BudgetSpent, PrivacyLedger
from fedsys.privacy.claim import Claim
from fedsys.privacy.promises import RoundPromise
from strategies.around import Around
from strategies.roster import Roster

JOURNAL = "privacy.json"
"""File of a run with what was charged, written before the round is begun."""


class PrivateRounds(Around):
    """Charges rounds that release alike, of examples at the cut or of clients.

    Args:
        inner: Asks the clients.
        promise: What a round releases.
        roster: Who is there.
        folder: Of the run, for the journal; None: none is written.

    Attributes:
        noise: That of the promise; a run that is continued for more rounds keeps it.

    Raises:
        ConfigError: The budget does not last for one round.
    """

    STATE = ("noise", "rounds", "extra")

    def __init__(
        self, inner: Strategy, promise: RoundPromise, roster: Roster, folder: Path | None = None
    ) -> None:
        super().__init__(inner)
        self._made, self._roster = promise, roster
        self._journal = None if folder is None else folder / JOURNAL
        first, privacy = promise.cost(promise.releases), promise.privacy
        if first > privacy.epsilon:
            raise ConfigError.of(
                "privacy.epsilon", privacy.epsilon,
                f"is spent before the first round is over, which takes {first:.3g}",
                "raise it or privacy.noise_multiplier, or lower client.epochs",
            )  # fmt: skip
        self.noise = promise.noise
        self.rounds: dict[int, list[int]] = {}
        self.extra: dict[int, int] = {}
        self._spent, self._looked = 0.0, False

    @property
    def promise(self) -> RoundPromise:
        """What a round releases."""
        return self._made.with_noise(self.noise)

    @property
    def ledger(self) -> PrivacyLedger:
        """What was charged."""
        return PrivacyLedger({c: tuple(r) for c, r in self.rounds.items()}, dict(self.extra))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Charge the round and tell everybody how much noise is to be added.

        Raises:
            BudgetSpent: It would exceed the budget; nobody was asked.
        """
        self._look_back()
        told = ConfigRecord({**config, **self.promise.settings()})
        messages = list(self.inner.configure_train(server_round, arrays, told, grid))
        by_client = {self._roster.partition_of(m.metadata.dst_node_id): m for m in messages}
        promise = self.promise
        privacy = promise.privacy
        after = self.ledger.charged(server_round, by_client, new_noise=privacy.secure)
        cost = promise.spent(after)
        if cost > privacy.epsilon:
            raise BudgetSpent(
                f"round {server_round} would spend {cost:.4g} of the {privacy.epsilon:g} that "
                "privacy.epsilon allows"
            )
        self._put(after)
        if self._journal is not None:
            charged = {"rounds": self.rounds, "extra": self.extra}
            write_atomic(self._journal, json.dumps(charged, sort_keys=True).encode())
        self._spent = cost
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass on, and tell what was spent until now."""
        aggregate, metrics = self.inner.aggregate_train(server_round, replies)
        return aggregate, MetricRecord({**(metrics or {}), "epsilon": self._spent})

    def claim(self) -> Claim:
        """Return what is promised for what was done."""
        return self.promise.claim(self.promise.spent(self.ledger))

    def _put(self, ledger: PrivacyLedger) -> None:
        self.rounds = {c: list(r) for c, r in ledger.rounds.items()}
        self.extra = dict(ledger.extra)

    def _look_back(self) -> None:
        """Take in what an interrupted run had charged since its last checkpoint.

        Noise by address is the same again, and so is its charge; noise of the operating system
        makes another release.
        """
        if self._looked or self._journal is None or not self._made.privacy.secure:
            return
        self._looked = True
        if self._journal.is_file():
            self._put(self.ledger.merged(_read(self._journal)))


def _read(path: Path) -> PrivacyLedger:
    try:
        told: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rounds = {int(c): tuple(int(r) for r in of) for c, of in told["rounds"].items()}
        return PrivacyLedger(rounds, {int(c): int(n) for c, n in told["extra"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged, so nobody knows what was spent: run again into another folder"
        ) from error


def figures(layer: PrivateRounds | None) -> dict[str, Any]:
    """Return what is told of privacy in the result of a run; nothing where none is promised."""
    if layer is None:
        return {}
    claim = layer.claim()
    told = {**claim.figures(), "claim": claim.sentence(), "noise_multiplier": layer.noise}
    return {"epsilon": claim.epsilon, "delta": claim.delta, "privacy": told}
