"""The mean of replies, made while they arrive: memory does not grow with their number.

The arithmetic is that of `flwr.serverapp.strategy.FedAvg`, to the bit: each array is multiplied by
its weight over that of all, and the products are added up in the order of coming. So what all will
weigh together must be known before the first is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 1 << 16
"""Numbers that are multiplied and added at a time: a product of so many stays in a core's cache."""


class RunningMean:
    """The weighted mean of arrays by name, of as many states as are added.

    >>> mean = RunningMean(4)
    >>> mean.add({"w": np.array([1.0, 2.0])}, 1)
    >>> mean.add({"w": np.array([5.0, 2.0])}, 3)
    >>> mean.arrays["w"]
    array([4., 2.])

    Args:
        total: The weight of all states that will be added.

    Attributes:
        arrays: The mean, once all are there; of integers in float64.
        weight: Of the states that were added.
    """

    def __init__(self, total: float) -> None:
        self._total = total
        self.arrays: dict[str, NDArray[Any]] = {}
        self.weight: float = 0

    def add(self, state: Mapping[str, NDArray[Any]], weight: float) -> None:
        """Add a state; its arrays are only read.

        Raises:
            ValueError: An array has another shape than that of this name before.
        """
        factor = weight / self._total
        for name, array in state.items():
            mean = self.arrays.get(name)
            if mean is None:
                self.arrays[name] = np.asarray(array * factor)
            elif mean.shape != array.shape or not mean.ndim:  # 0-d: products are no arrays
                self.arrays[name] = np.asarray(mean + array * factor)
            else:
                _add(mean.reshape(-1), array.reshape(-1), factor)
        self.weight += weight


def _add(mean: NDArray[Any], array: NDArray[Any], factor: float) -> None:
    for start in range(0, len(mean), BLOCK):
        mean[start : start + BLOCK] += array[start : start + BLOCK] * factor
