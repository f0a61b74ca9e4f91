"""Promises whose rounds release alike: to examples at the cut, and to clients."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.privacy.budget import PrivacyLedger
from fedsys.privacy.claim import Claim
from fedsys.privacy.promises import RoundPromise
from strategies.budgeted import Budgeted
from strategies.roster import Roster


class PrivateRounds(Budgeted):
    """Tells everybody how much noise is to be added, and stops before the budget is exceeded.

    Args:
        inner: Asks the clients.
        promise: What a round releases.
        roster: Who is there.
        folder: Of the run, for the journal; None: none is written.

    Attributes:
        noise: That of the promise; a run that is continued for more rounds keeps it.

    Raises:
        ConfigError: The budget does not last for one round.
        RunError: The journal of an interrupted run is damaged.
    """

    STATE = ("noise", *Budgeted.STATE)

    def __init__(
        self, inner: Strategy, promise: RoundPromise, roster: Roster, folder: Path | None = None
    ) -> None:
        super().__init__(inner, promise.privacy, roster, folder)
        self._made, self.noise = promise, promise.noise
        self.check_lasts([0])

    @property
    def promise(self) -> RoundPromise:
        """What a round releases."""
        return self._made.with_noise(self.noise)

    @property
    def noise_multiplier(self) -> float:
        """Deviation of the noise (Laplace: its scale) over the clipping norm."""
        return self.noise

    def spent(self, ledger: PrivacyLedger) -> float:
        """Return the epsilon of the unit with the least privacy left."""
        return self.promise.spent(ledger)

    def claim_of(self, epsilon: float) -> Claim:
        """Return what is promised where so much was spent."""
        return self.promise.claim(epsilon)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Charge the round and tell everybody how much noise is to be added.

        Raises:
            BudgetSpent: It would exceed the budget; nobody was asked.
        """
        told = ConfigRecord({**config, **self.promise.settings()})
        return super().configure_train(server_round, arrays, told, grid)
