"""Where noise and the choice of examples come from: the address of a draw, or the operating system.

Draws by address repeat to the bit, on any machine and wherever a model is split, and so do the
experiments with them. Whoever knows the seed of a run can compute them too, and subtract them. With
``privacy.secure=true`` there is a key instead that the operating system draws for each round of a
client and that never leaves the process that drew it; ChaCha20 expands it (RFC 8439), as the
operating system's own generator does. Within a round a draw has an address here as well: what is
done again, because a link was lost, is the same release and no second one.

Normal values of the secure source are sums of four others, so that what a float can hold of them
tells an observer nothing of use (Holohan and Braghin, "Secure Random Sampling in Differential
Privacy", ESORICS 2021).
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsys.randomness import Address

_NORMALS: Final = 4
"""Whose sum, over its root, is one normal value."""


class NoiseSource(Protocol):
    """Draws that are functions of purpose, step and name."""

    def normal(self, purpose: str, step: int, name: str, shape: torch.Size) -> Tensor:
        """Return standard normal values, float32 on the CPU."""

    def uniform(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return values in [0, 1), of shape ``(count,)``."""


@dataclass(frozen=True)
class Addressed:
    """Draws by the address in a run: anybody who knows the seed has them."""

    address: Address

    def normal(self, purpose: str, step: int, name: str, shape: torch.Size) -> Tensor:
        """Return standard normal values, float32 on the CPU."""
        return torch.randn(shape, generator=self.address.torch(purpose, step, name))

    def uniform(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return values in [0, 1), of shape ``(count,)``."""
        return self.address.numpy(purpose, step).random(count)


@dataclass(frozen=True)
class Secret:
    """Draws by a key that the operating system drew and that nobody else has."""

    key: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    def normal(self, purpose: str, step: int, name: str, shape: torch.Size) -> Tensor:
        """Return standard normal values, float32 on the CPU."""
        count = math.prod(shape)
        pairs = -(-count * _NORMALS // 2)
        u = self._uniform(purpose, step, name, 2 * pairs).reshape(2, pairs)
        # Box and Muller; 1 - u is above zero
        radius = np.sqrt(-2.0 * np.log1p(-u[0]))
        both = radius * np.cos(2 * np.pi * u[1]), radius * np.sin(2 * np.pi * u[1])
        values = np.concatenate(both)[: count * _NORMALS].reshape(_NORMALS, count)
        summed = values.sum(0) / math.sqrt(_NORMALS)
        return torch.from_numpy(summed.astype(np.float32)).reshape(shape)

    def uniform(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return values in [0, 1), of shape ``(count,)``."""
        return self._uniform(purpose, step, "", count)

    def _uniform(self, purpose: str, step: int, name: str, count: int) -> NDArray[np.float64]:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        text = struct.pack("<q", step) + f"{purpose}\0{name}".encode()
        # Another key for each draw, so that no two share a part of a stream.
        own = hashlib.blake2b(text, key=self.key, digest_size=32).digest()
        cipher = Cipher(algorithms.ChaCha20(own, bytes(16)), mode=None)
        words = np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def source_of(address: Address, secure: bool) -> NoiseSource:
    """Return what a client draws from in a round; a new key each time that it is secure."""
    return Secret() if secure else Addressed(address)


def poisson_sample(source: NoiseSource, step: int, count: int, rate: float) -> NDArray[np.int64]:
    """Return the indices of a Poisson sample: each is in it by a draw of its own.

    Args:
        source: Draws.
        step: Index of the mini-batch in the round.
        count: Examples there are.
        rate: Probability of each.

    Returns:
        Ascending, of any length from 0 to `count`.
    """
    return np.flatnonzero(source.uniform("poisson", step, count) < rate).astype(np.int64)
