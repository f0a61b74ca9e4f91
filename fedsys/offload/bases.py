"""What an edge server has of a session before it comes, so that only the difference has to be sent.

Sessions of a round that begin with the same units begin with the same tensors: an edge server that
holds one of them has what another one began with. And a session of which it is known that it will
come is sent ahead.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from fedsys.offload.fencing import Epoch
from fedsys.offload.snapshot import SessionSpec, Snapshot, State
from fedsys.transport.tensors import dense_bytes
from fedsys.transport.wire import checksum

Tensors = Mapping[str, Tensor]

EXPECTED_S = 900.0
"""How long something is kept for a session of which nothing is heard any more, in seconds."""


@dataclass(frozen=True)
class _Expected:
    key: str  # of the beginning
    sign: str  # of the token
    since_s: float


class Bases:
    """Tensors that other edge servers may refer to. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._starts: dict[str, State] = {}
        self._keys: dict[str, str] = {}  # by session
        self._ahead: dict[str, tuple[str, Tensors]] = {}  # by session: its name, and what came
        self._coming: dict[str, _Expected] = {}  # by session: the beginning that it needs here
        self._borrowers = itertools.count()
        self._lock = threading.Lock()

    def began(self, spec: SessionSpec, start: Snapshot) -> None:
        """Keep what a session begins with, once for all that begin so."""
        if not spec.fleet or start.step:
            return
        tensors = {f"state/{name}": tensor for name, tensor in start.state.items()}
        key = f"{spec.round}-{spec.first}-{spec.last}-{_digest(tensors)}"
        with self._lock:
            if key not in self._starts:
                self._starts[key] = {n: t.cpu().clone() for n, t in tensors.items()}
            self._keys[spec.id] = key

    def expect(self, session: str, key: object, sign: str) -> bool:
        """Return whether a beginning is here; it stays until the session came, or will not.

        Args:
            session: A session that is to come as a difference from it.
            key: Name of the beginning.
            sign: Of the token under which it is to come.
        """
        now = time.monotonic()
        with self._lock:
            late = [n for n, one in self._coming.items() if one.since_s < now - EXPECTED_S]
            for name in late:
                self._expect_no_more(name)
            before = self._coming.pop(session, None)
            here = isinstance(key, str) and key in self._starts
            if here:
                self._coming[session] = _Expected(str(key), sign, now)
            self._left(None if before is None else before.key)
            return here

    def goes_on(self, session: str, key: str | None) -> None:
        """Take note of what a session that came began with, if that is here."""
        with self._lock:
            if key in self._starts:
                self._keys[session] = str(key)

    def key_of(self, session: str) -> str | None:
        """Return the name of what a session began with; None where it is not here."""
        with self._lock:
            return self._keys.get(session)

    def keys(self) -> list[str]:
        """Return the names of all beginnings that are here."""
        with self._lock:
            return list(self._starts)

    @contextmanager
    def lent(self) -> Iterator[list[str]]:
        """Keep all beginnings that are here for the length of a block; yields their names.

        Whoever is told that they are here sends differences from them, whatever ends meanwhile.
        """
        with self._lock:
            borrower = f"borrower {next(self._borrowers)} of"  # no name of a session
            lent = {f"{borrower} {key}": key for key in self._starts}
            self._keys.update(lent)
        try:
            yield list(lent.values())
        finally:
            for name in lent:
                self.forget(name)

    def came_ahead(self, session: str, name: str, tensors: Tensors) -> None:
        """Keep what was sent ahead of a session, instead of what came before."""
        with self._lock:
            self._ahead[session] = name, dict(tensors)

    def never_came(self, session: str, sign: str) -> None:
        """Forget what was kept for a session that does not come, under a token.

        Args:
            session: Its name.
            sign: Of the token: another move of the session may have begun meanwhile.
        """
        with self._lock:
            if session in self._ahead and self._ahead[session][0].endswith(sign):
                del self._ahead[session]
            if session in self._coming and self._coming[session].sign.endswith(sign):
                self._expect_no_more(session)

    def get(self, session: str, name: object) -> Tensors:
        """Return tensors by the name of a beginning, or of what was sent ahead; else nothing."""
        with self._lock:
            ahead = self._ahead.get(session)
            if ahead is not None and ahead[0] == name:
                return ahead[1]
            return self._starts.get(str(name), {})

    def forget(self, session: str) -> None:
        """Forget a session, and its beginning if no other session began so."""
        with self._lock:
            self._ahead.pop(session, None)
            self._expect_no_more(session)
            self._left(self._keys.pop(session, None))

    def _expect_no_more(self, session: str) -> None:
        expected = self._coming.pop(session, None)
        self._left(None if expected is None else expected.key)

    def _left(self, key: str | None) -> None:
        """Forget a beginning that nobody needs any more."""
        needed = {*self._keys.values(), *(one.key for one in self._coming.values())}
        if key is not None and key not in needed:
            self._starts.pop(key, None)


def sign_of(epoch: Epoch) -> str:
    """Return what ends the name of what is sent ahead under a token."""
    return f"({epoch.generation}, {epoch.moves}, {epoch.since})"


def _digest(tensors: Tensors) -> str:
    total = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        data, dtype, shape, _ = dense_bytes(name, tensor.detach().cpu().contiguous())
        total.update(f"{name} {shape} {dtype}".encode())
        total.update(checksum(data).to_bytes(4, "big"))
    return total.hexdigest()
