"""Tensors of a host by what they hold: what is here already is not sent again, and is held once.

Two pipelines that have a layer in common share its weights: both are built of the same tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import final

from torch import Tensor

from fedsys.errors import ConfigError, FrameError
from fedsys.identity import state_sha256


def digest_of(tensor: Tensor) -> str:
    """Return what a tensor is known by: SHA-256 of type, shape and elements."""
    return state_sha256({"": tensor})


@final
class TensorStore:
    """Tensors by digest, and who uses them.

    Args:
        most_bytes: Of all tensors together.
        kept_bytes: Of those that nobody uses any more, for later.
    """

    def __init__(self, most_bytes: int, kept_bytes: int = 0) -> None:
        self._most, self._kept = most_bytes, kept_bytes
        self._tensors: dict[str, Tensor] = {}
        self._users: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Return those that are not here."""
        return [digest for digest in dict.fromkeys(digests) if digest not in self._tensors]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors.

        Raises:
            FrameError: One is not what its digest says.
            ConfigError: There is no room.
        """
        for digest, tensor in tensors.items():
            if digest_of(tensor) != digest:
                raise FrameError(f"tensor {digest[:12]} arrived as something else")
        with self._lock:
            coming = sum(t.nbytes for d, t in tensors.items() if d not in self._tensors)
            self._evict(max(0, self._most - coming))
            if self.nbytes + coming > self._most:
                raise ConfigError.of(
                    "host.memory_mb", self._most / 1e6,
                    f"must hold {(self.nbytes + coming) / 1e6:.1f} MB of weights",
                    "give the host less of the model, or more memory",
                )  # fmt: skip
            for digest, tensor in tensors.items():
                self._tensors.setdefault(digest, tensor)
                self._users.setdefault(digest, frozenset())

    def use(self, user: str, digests: Mapping[str, str]) -> dict[str, Tensor]:
        """Return tensors by the name that `user` has for them; they stay until it leaves.

        Raises:
            FrameError: One is not here.
        """
        with self._lock:
            if lost := self.missing(digests.values()):
                raise FrameError(f"{len(lost)} tensors were not sent, for instance {lost[0][:12]}")
            for digest in digests.values():
                self._users[digest] |= {user}
            return {name: self._tensors[digest] for name, digest in digests.items()}

    def leave(self, user: str) -> None:
        """Take note that `user` needs nothing any more."""
        with self._lock:
            self._users = {digest: users - {user} for digest, users in self._users.items()}
            self._evict(self._kept + self._used_bytes())

    def _used_bytes(self) -> int:
        return sum(t.nbytes for digest, t in self._tensors.items() if self._users[digest])

    def _evict(self, most: int) -> None:
        for digest in [digest for digest, users in self._users.items() if not users]:
            if self.nbytes <= most:
                return
            del self._tensors[digest], self._users[digest]
