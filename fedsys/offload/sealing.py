"""What two sessions have in common that are the same to the bit: a digest of all that counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsys.offload.snapshot import Snapshot
from fedsys.transport.tensors import dense_bytes
from fedsys.transport.wire import Frame


@dataclass(frozen=True)
class Sealed:
    """A session that stands still.

    Attributes:
        incarnation: Of the session.
        digest: Of its state, and of the replies that its device waits for.
        frozen_s: Since when it stands still, of the monotonic clock.
    """

    incarnation: str
    digest: str
    frozen_s: float


def digest_of(about: object, snapshot: Snapshot, replies: Sequence[Frame]) -> str:
    """Return 160 bits (BLAKE2b) of every bit of a session; checksums would do for damage alone.

    Args:
        about: Plain values that go in, too.
        snapshot: The state.
        replies: Those that the device waits for; when they were computed does not count.
    """
    total = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=20)
    tensors: list[Mapping[str, Tensor]] = [snapshot.tensors(), *(r.tensors for r in replies)]
    for named in tensors:
        for name, tensor in sorted(named.items()):
            data, dtype, shape, _ = dense_bytes(name, tensor.detach().cpu().contiguous())
            total.update(f"{name} {shape} {dtype}".encode())
            total.update(data)
    return total.hexdigest()
