"""A promise to each example: how much noise devices add, what is spent, and when a run ends.

Devices and edge servers clip and add noise themselves (`fedsys.privacy`), so whatever strategies do
with what they send back spends nothing more. This wrapper tells them how much noise, and holds the
budget: a round is charged before anybody is asked for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedsys.config import Config
from fedsys.data import Dataset
from fedsys.errors import ConfigError, RunError
from fedsys.files import write_atomic
from fedsys.privacy.budget import BudgetSpent, PrivacyLedger, RecordPlan, record_plans, spent
from fedsys.privacy.check import check_record_model, check_record_run
from fedsys.privacy.claim import Claim
from fedsys.transport import records
from fedsys.transport.messages import CONFIG
from strategies.around import Around
from strategies.roster import Roster

JOURNAL = "privacy.json"
"""File of a run with what was charged, written before the round is begun."""


class PrivateRecords(Around):
    """Tells clients how to be private by example, and stops before the budget is exceeded.

    Args:
        inner: Sees models to which noise was added.
        config: The run.
        examples: Of each client.
        roster: Who is there.
        folder: Of the run, for the journal; None: none is written.

    Attributes:
        plans: How each client trains.
        privacy: What is promised.
        ledger: What was charged.

    Raises:
        ConfigError: The budget does not last for one round.
    """

    STATE = ("noises", "rounds", "extra")

    def __init__(
        self,
        inner: Strategy,
        config: Config,
        examples: Sequence[int],
        roster: Roster,
        folder: Path | None = None,
    ) -> None:
        super().__init__(inner)
        self._config, self._roster, self.privacy = config, roster, config.privacy
        self._journal = None if folder is None else folder / JOURNAL
        self._examples = examples
        self.plans = record_plans(config, examples)
        first = spent(PrivacyLedger().charged(1, range(len(examples))), self.plans, config.privacy)
        if first > config.privacy.epsilon:
            raise ConfigError.of(
                "privacy.epsilon", config.privacy.epsilon,
                f"is spent before the first round is over, which takes {first:.3g}",
                "raise it or privacy.noise_multiplier, or lower client.epochs",
            )  # fmt: skip
        # for checkpoints: noise stays what it was if a run is continued for more rounds
        self.noises = [plan.noise for plan in self.plans]
        self.rounds: dict[int, list[int]] = {}
        self.extra: dict[int, int] = {}
        self._spent = 0.0
        self._looked = False

    @property
    def ledger(self) -> PrivacyLedger:
        """What was charged."""
        return PrivacyLedger({c: tuple(r) for c, r in self.rounds.items()}, dict(self.extra))

    @property
    def epsilon(self) -> float:
        """What was spent."""
        return spent(self.ledger, self._present(), self._config.privacy)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Charge the round and tell each client how much noise to add.

        Raises:
            BudgetSpent: It would exceed the budget; nobody was asked.
        """
        self._look_back()
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        by_client = {self._roster.partition_of(m.metadata.dst_node_id): m for m in messages}
        privacy = self._config.privacy
        after = self.ledger.charged(server_round, by_client, new_noise=privacy.secure)
        plans = self._present()
        cost = spent(after, plans, privacy, coarse=True)
        if cost > privacy.epsilon:
            cost = spent(after, plans, privacy)
        if cost > privacy.epsilon:
            raise BudgetSpent(
                f"round {server_round} would spend {cost:.4g} of the {privacy.epsilon:g} that "
                "privacy.epsilon allows"
            )
        self._put(after)
        self._write()
        for client, message in by_client.items():
            message.content = records.own_copy(message.content)
            settings = dict(message.content.config_records.get(CONFIG, ConfigRecord()))
            told = {"noise": plans[client].noise, "expected": plans[client].expected}
            message.content[CONFIG] = ConfigRecord({**settings, **told})
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
        privacy = self._config.privacy
        rates = sorted({plan.rate for plan in self.plans})
        which = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        return Claim(
            "record", "example", self.epsilon, privacy.delta,
            f"mini-batches are Poisson samples at rate {which}", privacy.accountant, privacy.secure,
        )  # fmt: skip

    # --- inside -----------------------------------------------------------------------------------

    def _present(self) -> tuple[RecordPlan, ...]:
        return tuple(
            dataclasses.replace(plan, noise=noise)
            for plan, noise in zip(self.plans, self.noises, strict=True)
        )

    def _put(self, ledger: PrivacyLedger) -> None:
        self.rounds = {c: list(r) for c, r in ledger.rounds.items()}
        self.extra = dict(ledger.extra)

    def _look_back(self) -> None:
        """Take in what an interrupted run had charged since its last checkpoint.

        Its noise was of the operating system: what it does again will be another release. Noise
        by address is the same again, and what was charged for it is charged again as it is.
        """
        if self._looked or self._journal is None or not self._config.privacy.secure:
            return
        self._looked = True
        if self._journal.is_file():
            self._put(self.ledger.merged(_read(self._journal)))

    def _write(self) -> None:
        if self._journal is not None:
            charged = {"rounds": self.rounds, "extra": self.extra}
            write_atomic(self._journal, json.dumps(charged, sort_keys=True).encode())


def check_private(config: Config, model: nn.Module, dataset: Dataset | None) -> None:
    """Refuse runs whose promise cannot be kept, before an example is looked at.

    Raises:
        ConfigError: Names the option and the way out.
        ModelError: An example has no gradient of its own.
    """
    if dataset is None:
        raise ConfigError.of("dataset", None, "must be given for privacy=record")
    check_record_run(config)
    check_record_model(model, dataset.input_shape)


def _read(path: Path) -> PrivacyLedger:
    try:
        told: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rounds = {int(c): tuple(int(r) for r in of) for c, of in told["rounds"].items()}
        return PrivacyLedger(rounds, {int(c): int(n) for c, n in told["extra"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged, so nobody knows what was spent: run again into another folder"
        ) from error


def about(layer: PrivateRecords | None) -> list[str]:
    """Return lines about what a run will promise; none where it promises nothing."""
    if layer is None:
        return []
    claim, privacy = layer.claim(), layer.privacy
    low, high = min(layer.noises), max(layer.noises)
    noise = f"{high:.3g}" if high - low < 1e-3 else f"{low:.3g} to {high:.3g}"
    return [
        f"privacy of each {claim.unit}: epsilon up to {privacy.epsilon:g} at delta "
        f"{privacy.delta:g}; norms up to {privacy.clip_norm:g}, noise of {noise} times that; "
        f"{claim.sampling}; accountant {privacy.accountant}, "
        f"noise by the {'system' if privacy.secure else 'seed: for experiments, not for a claim'}"
    ]


def figures(layer: PrivateRecords | None) -> dict[str, Any]:
    """Return what is told of privacy in the result of a run; nothing where none is promised."""
    if layer is None:
        return {}
    claim = layer.claim()
    more = {"claim": claim.sentence(), "noise_multiplier": max(layer.noises)}
    return {
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "privacy": {**claim.figures(), **more},
    }
