"""A clipping norm that follows a quantile of the norms of updates.

Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm 1.
Flower's wrapper counts who was clipped where the paper counts who was not, so it runs away from the
quantile; here is the paper's direction.
"""

from __future__ import annotations

import math

from fedsys.errors import ConfigError

RATE = 0.2
"""Of the geometric rule, as the paper advises."""

COUNT_NOISE = 20.0
"""The count of who is within has noise of one over this of the clients, as the paper advises."""


def next_norm(norm: float, within: float, quantile: float, rate: float = RATE) -> float:
    """Return the clipping norm of the next round.

    >>> round(next_norm(1.0, within=0.0, quantile=0.5), 3)  # all are clipped: larger
    1.105
    >>> round(next_norm(1.0, within=1.0, quantile=0.5), 3)
    0.905

    Args:
        norm: Of this round.
        within: Share of the clients whose update was not longer than that, with noise.
        quantile: Share that is wanted.
        rate: Of the rule.
    """
    return norm * math.exp(-rate * (within - quantile))


def split_noise(multiplier: float, clients: int) -> tuple[float, float]:
    """Return the noise multiplier of the updates and the deviation of the count's noise.

    Both together cost what updates alone would with `multiplier`: each client adds plus or minus a
    half to the count (theorem 1).

    Raises:
        ConfigError: The count alone would cost more.
    """
    deviation = clients / COUNT_NOISE
    rest = multiplier**-2 - (2 * deviation) ** -2
    if rest <= 0:
        raise ConfigError.of(
            "privacy.clipping", "adaptive",
            f"must have more than {clients} clients in a round with so much noise: the noise on "
            "their count would be too small for it", "privacy.clipping=fixed",
        )  # fmt: skip
    return rest**-0.5, deviation
