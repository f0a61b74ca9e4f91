"""A session made ready to travel, with what that took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsys import config as configuration
from fedsys.offload.checkpoint import SessionCheckpoint
from fedsys.offload.edge_session import EdgeSession, Follower
from fedsys.offload.fencing import Epoch
from fedsys.offload.turns import Awaited
from fedsys.transport.wire import Frame


@dataclass(frozen=True)
class Packed:
    """A session that is ready to travel.

    Attributes:
        frame: What is sent.
        step: Mini-batches that are done.
        tensors: The session's own, as they are.
        nbytes: Bytes of all tensors that are sent.
        freeze_s: Seconds until it stood still.
        encode_s: Seconds after that until the frame was ready.
    """

    frame: Frame
    step: int
    tensors: Mapping[str, Tensor]
    nbytes: int
    freeze_s: float
    encode_s: float


def packed(
    session: EdgeSession,
    base: Mapping[str, Tensor],
    epoch: Epoch,
    base_name: str | None,
    awaited: Sequence[Awaited],
    began: float | None = None,
    *,
    stop: bool = True,
    follower: Follower | None = None,
) -> Packed:
    """Return a session as a frame ``transfer``.

    Args:
        session: The session.
        base: What the receiver has of it.
        epoch: Token of the receiver.
        base_name: How the receiver calls that.
        awaited: Operations whose answers the device waits for.
        began: When it was to be made ready, of the monotonic clock; None: now.
        stop: Whether it trains no more from here on.
        follower: Takes each operation after that; only of a session that trains on.
    """
    began = time.monotonic() if began is None else began
    position = session.hold_still() if stop else session.followed(follower)
    frozen = time.monotonic()
    seed = configuration.parse(session.spec.config).seed
    meta = {"session": session.spec.id, "epoch": list(epoch), "base": base_name}
    made = SessionCheckpoint(session.spec, position, seed)
    frame = made.to_frame("transfer", meta, base, awaited)
    nbytes = sum(tensor.nbytes for tensor in frame.tensors.values())
    return Packed(
        frame,
        position.snapshot.step,
        position.snapshot.tensors(),
        nbytes,
        frozen - began,
        time.monotonic() - frozen,
    )


def sealed(
    session: EdgeSession, epoch: Epoch, awaited: Sequence[Awaited], began: float, waiting: int
) -> Packed:
    """Return a frame ``transfer`` for a session that is there already, if the bits are the same.

    Args:
        session: The session.
        epoch: Token of the receiver.
        awaited: Operations whose answers the device waits for.
        began: When it was to be made ready, of the monotonic clock.
        waiting: Bytes that go in the pause, of what is mirrored.
    """
    seal = session.sealed(awaited)
    about = {"incarnation": seal.incarnation, "digest": seal.digest, "awaiting": list(awaited)}
    frame = Frame("transfer", {"session": session.spec.id, "epoch": list(epoch), **about})
    freeze_s = seal.frozen_s - began
    return Packed(frame, 0, {}, waiting, freeze_s, time.monotonic() - seal.frozen_s)
