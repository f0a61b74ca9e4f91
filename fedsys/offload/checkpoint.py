"""A session as it travels between edge servers: whole, checked, and of a version that is known.

The header of its frame is plain values, its tensors are as they are or differences from what the
receiver has (`fedsys.offload.delta`)::

    schema        version of this form
    spec          run (``config``), client, round, cut, codecs, pieces of a mini-batch
    step          mini-batches that are done; the position within the next one is that of operations
    operations    what was done of it, piece by piece: gradients that pend and replies come of these
    replies       to the mini-batch before, as far as the device still waits for them
    address       seed, client, round, step: all that random draws and the learning rate depend on
    examples      of the mini-batches that are done
    incarnation   of the session; it stays the same, so the device goes on as if nothing were
    checksum      of all tensors as they were before they were made differences

Tensors are weights and buffers, the state of their optimizer, FedProx's anchor, masks, and those
of operations and replies.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from fedsys.errors import FrameError
from fedsys.offload import delta
from fedsys.offload.snapshot import SessionPosition, SessionSpec, State, natural
from fedsys.offload.turns import Awaited
from fedsys.transport.tensors import dense_bytes
from fedsys.transport.wire import Frame, checksum

SCHEMA: Final = 1


@dataclass(frozen=True)
class SessionCheckpoint:
    """A session on its way.

    Attributes:
        spec: What its edges are told of it.
        position: Where it stands.
        seed: Of the run.
    """

    spec: SessionSpec
    position: SessionPosition
    seed: int

    def to_frame(
        self, kind: str, meta: Mapping[str, Any], base: State, awaited: Iterable[Awaited] = ()
    ) -> Frame:
        """Return the frame that carries it.

        Args:
            kind: Of the frame.
            meta: What more it says.
            base: Tensors, of `tensors`, that the receiver has.
            awaited: What the device waits for; other replies stay behind.
        """
        wanted = set(awaited)
        replies = tuple(r for r in self.position.replies if _answers(r) in wanted)
        position, spec = replace(self.position, replies=replies), self.spec
        tensors, step = position.tensors(), position.snapshot.step
        about = {
            "schema": SCHEMA,
            "spec": spec.to_meta(),
            "step": step,
            "address": [self.seed, spec.client, spec.round, step],
            **position.to_meta(),
        }
        about["checksum"] = _checksum(about, tensors)
        return Frame(kind, {**meta, **about}, delta.encode(tensors, base))

    @classmethod
    def of(cls, frame: Frame, base: State) -> SessionCheckpoint:
        """Return what a frame carries.

        Raises:
            FrameError: It is of another version, damaged, or a difference from something else.
        """
        meta = frame.meta
        if meta.get("schema") != SCHEMA:
            raise FrameError(f"{frame.kind}: schema {meta.get('schema')!r:.20}, not {SCHEMA}")
        tensors = delta.decode(frame.tensors, base)
        keys = "schema", "spec", "step", "operations", "replies", "address", "incarnation"
        about = {key: meta.get(key) for key in keys}
        if meta.get("checksum") != _checksum(about, tensors):
            raise FrameError(f"{frame.kind}: the checksum is not that of what came")
        spec, address = about["spec"], about["address"]
        if not isinstance(spec, dict) or not isinstance(address, list) or len(address) != 4:
            raise FrameError(f"{frame.kind}: spec or address is missing")
        made = SessionSpec.from_meta(spec)
        if address[1:] != [made.client, made.round, natural(frame, "step")]:
            raise FrameError(f"{frame.kind}: address {str(address)[:60]} of another session")
        position = SessionPosition.from_frame(Frame("state", about, tensors))
        return cls(made, position, int(address[0]))


def awaited_of(value: object) -> list[Awaited]:
    """Return what a frame says that a device waits for; what is none of that is left out."""
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    return [
        (str(one[0]), one[1], one[2])
        for one in listed
        if isinstance(one, Sequence) and len(one) == 3 and all(type(n) is int for n in one[1:])
    ]


def _answers(reply: Frame) -> Awaited:
    meta = reply.meta
    return str(meta["for"]), int(meta["step"]), int(meta.get("piece", 0))


def _checksum(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    text = json.dumps(about, sort_keys=True, default=str)
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        data, dtype, shape, _ = dense_bytes(name, tensors[name].detach().cpu().contiguous())
        total = zlib.crc32(f"{name} {shape} {dtype}".encode(), total)
        total = zlib.crc32(checksum(data).to_bytes(4, "little"), total)
    return total
