"""One budget for a run: what is planned to be released, what has been, and what may still be.

Everything here is a function of values. A release is named by what it is of: its client and its
round. Draws have addresses, so a round that is done again after a crash, a lost link or a move
makes the same release to the bit, tells nobody anything new, and is not charged again. With
``privacy.secure=true`` the noise of a round that begins anew is new: it is another release, which
`PrivacyLedger.charged` adds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedsys.config import Config
from fedsys.config.privacy import PrivacyConfig
from fedsys.errors import ConfigError, FedsysError
from fedsys.privacy.accountant import Releases, cached_noise, epsilon

_GROUPS: Final = 12
"""Numbers of examples that noise is computed for, at most: others take that of the next lower."""


class BudgetSpent(FedsysError):
    """The next release would exceed the budget."""


@dataclass(frozen=True)
class RecordPlan:
    """How a client trains in each round, where each of its examples has a promise.

    Attributes:
        noise: Deviation of the noise over the largest norm of an example's gradient.
        rate: Probability with which an example is in a mini-batch.
        steps: Mini-batches in a round.
        expected: Examples in a mini-batch on average, by which sums are divided.
    """

    noise: float
    rate: float
    steps: int
    expected: float


def sampling_rate(examples: int, batch_size: int) -> float:
    """Return the probability with which an example is in a mini-batch.

    >>> sampling_rate(1000, 100), sampling_rate(20, 32)
    (0.1, 1.0)
    """
    return min(1.0, batch_size / examples)


def epoch_steps(examples: int, batch_size: int) -> int:
    """Return the mini-batches of an epoch: as many as without sampling.

    >>> epoch_steps(10, 4), epoch_steps(9, 4), epoch_steps(3, 4)
    (3, 2, 1)
    """
    whole, rest = divmod(examples, batch_size)
    return whole + (rest > (1 if whole else 0))  # a single one joins its neighbour


def record_plans(config: Config, examples: Sequence[int]) -> tuple[RecordPlan, ...]:
    """Return how each client trains.

    Noise is computed for each number of examples. Where clients have more than a dozen different
    ones, it is computed for groups of them, as if a client had the least examples of its group
    (and so the highest rate) and the most steps.

    Args:
        config: The run.
        examples: Of each client.

    Raises:
        ConfigError: No noise keeps the budget, or delta is too large.
    """
    privacy, client = config.privacy, config.client
    check_delta(privacy, sum(examples), "examples")
    noises: dict[int, float] = {}
    for group in _grouped(examples):
        rate = sampling_rate(min(group), client.batch_size)
        steps = config.rounds * client.epochs * epoch_steps(max(group), client.batch_size)
        noises |= dict.fromkeys(group, noise_of(privacy, rate, steps))
    return tuple(
        RecordPlan(
            noises[size],
            sampling_rate(size, client.batch_size),
            client.epochs * epoch_steps(size, client.batch_size),
            float(min(size, client.batch_size)),
        )
        for size in examples
    )


def noise_of(privacy: PrivacyConfig, rate: float, count: int) -> float:
    """Return the noise that was asked for, or the least with which `count` releases are paid.

    Raises:
        ConfigError: No noise keeps the budget.
    """
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    return cached_noise(privacy.epsilon, privacy.delta, rate, count, privacy.accountant)


def check_delta(privacy: PrivacyConfig, units: int, name: str) -> None:
    """Refuse a delta with which publishing a single unit would be private.

    Args:
        privacy: What is promised.
        units: How many are protected.
        name: What they are, in words.

    Raises:
        ConfigError: It is one over the number of units, or more.
    """
    if privacy.delta * units >= 1:
        raise ConfigError.of(
            "privacy.delta", privacy.delta, f"must be below 1/{units}, of the {units} {name}",
            "at one over their number, publishing one of them whole would be within it",
        )  # fmt: skip


def _grouped(examples: Iterable[int]) -> list[list[int]]:
    """Return the different sizes, ascending, in at most `_GROUPS` groups."""
    sizes = sorted(set(examples))
    count = min(len(sizes), _GROUPS)
    bounds = [round(i * len(sizes) / count) for i in range(count + 1)]
    return [sizes[a:b] for a, b in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class PrivacyLedger:
    """What was released of each client.

    Attributes:
        rounds: By client, the rounds that were charged.
        extra: By client, rounds that began anew with new noise, beside these.
    """

    rounds: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    extra: Mapping[int, int] = field(default_factory=dict)

    def charged(
        self, round_: int, clients: Iterable[int], *, new_noise: bool = False
    ) -> PrivacyLedger:
        """Return the ledger after clients were asked for a round.

        >>> once = PrivacyLedger().charged(1, [0])
        >>> once.charged(1, [0]) == once, once.charged(1, [0], new_noise=True).count(0)
        (True, 2)

        Args:
            round_: The round.
            clients: Who was asked.
            new_noise: Whether a round that is charged already is another release.
        """
        rounds, extra = dict(self.rounds), dict(self.extra)
        for client in clients:
            known = rounds.get(client, ())
            if round_ not in known:
                rounds[client] = (*known, round_)
            elif new_noise:
                extra[client] = extra.get(client, 0) + 1
        return dataclasses.replace(self, rounds=rounds, extra=extra)

    def count(self, client: int) -> int:
        """Return the rounds that a client is charged for."""
        return len(self.rounds.get(client, ())) + self.extra.get(client, 0)

    def merged(self, other: PrivacyLedger) -> PrivacyLedger:
        """Return what stands in one or the other: the charges of a run that was interrupted."""
        clients = sorted({*self.rounds, *other.rounds})
        rounds = {
            c: tuple(sorted({*self.rounds.get(c, ()), *other.rounds.get(c, ())})) for c in clients
        }
        extra = {c: max(self.extra.get(c, 0), other.extra.get(c, 0)) for c in clients}
        return PrivacyLedger(rounds, {c: n for c, n in extra.items() if n})


def spent(
    ledger: PrivacyLedger,
    plans: Sequence[RecordPlan],
    privacy: PrivacyConfig,
    *,
    coarse: bool = False,
) -> float:
    """Return the epsilon of the example with the least privacy left.

    Every example is of one client, so clients do not add up: the largest counts.

    Args:
        ledger: What was charged.
        plans: How each client trains.
        privacy: Delta and accountant.
        coarse: As for `epsilon`.
    """
    kinds = {
        Releases(plan.noise, plan.rate, plan.steps * ledger.count(client))
        for client, plan in enumerate(plans)
        if ledger.count(client)
    }
    most: dict[tuple[float, float], int] = {}
    for kind in kinds:
        key = kind.noise, kind.rate
        most[key] = max(most.get(key, 0), kind.count)
    found = [
        epsilon([Releases(noise, rate, count)], privacy.delta, privacy.accountant, coarse=coarse)
        for (noise, rate), count in most.items()
    ]
    return max(found, default=0.0)
