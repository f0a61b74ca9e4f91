"""The rules by which a session is mirrored: where it goes, a shadow does what it does meanwhile.

Weights and optimizer state change in every step, so the difference to what was sent ahead of a move
is nearly all of a session again. What its device sends is less, and computing is deterministic::

    source                                   destination
      │ ahead (the session as it stands) ──────▶ │  a shadow begins
      │ mirror 0, 1, 2 … (what its device sent) ▶│  it does the same
      │                (the device leaves)       │
      │ transfer (how many, digest) ───────────▶ │  as many, and the same bits?
      │ ◀─────────────────── committed / refused │  then the shadow is the session

If it is refused, the session goes as a difference to what was sent ahead, as without a shadow. A
shadow has no copy in the sense of `fedsys.offload.fencing`: no device is welcomed to it, under no
token, until a ``transfer`` under the token for which it was made turns it into a staged copy.

The edge servers run these functions (`fedsys.offload.mirror`, `fedsys.offload.shadows`), and so
does the model check (`tests/offload/test_migration_model.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsys.offload import migration
from fedsys.offload.fencing import Copy, Epoch

BEHIND: int = 4
"""How many differences' bytes may wait to be mirrored, before the shadow is given up."""

PATIENT_S: float = 1.0
"""How long a session waits for its shadow at most, in all; its destination may be slow, too."""

CHANGED: float = 0.8
"""Bytes of the difference of a session some steps later, as a share of its own: measured."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """What a destination knows of a shadow.

    Attributes:
        epoch: The token that was made for this move.
        done: Operations that it did since it began.
    """

    epoch: Epoch
    done: int = 0


def on_ahead(shadow: Shadow | None, copy: Copy | None, epoch: Epoch) -> Shadow | None:
    """A session comes ahead of its device; return the shadow that there is to be.

    One that is there for that token goes on: the frame came twice.
    """
    later = _is_later(copy, epoch) or (shadow is not None and _is_later(Copy(shadow.epoch), epoch))
    return shadow if later else Shadow(epoch)


def _is_later(copy: Copy | None, epoch: Epoch) -> bool:
    """Return whether a session that comes under a token would be refused because of a copy."""
    return migration.on_prepare(copy, "", epoch)[1][0].kind == "refused"


def on_mirror(shadow: Shadow | None, epoch: Epoch, number: int) -> tuple[Shadow | None, bool]:
    """An operation comes; return what becomes of the shadow, and whether it is to do it.

    It does them in their order, each once. Where one is missing it is of no use any more.
    """
    if shadow is None or shadow.epoch != epoch or number < shadow.done:
        return shadow, False
    if number > shadow.done:
        return None, False
    return replace(shadow, done=number + 1), True


def may_become(shadow: Shadow | None, epoch: Epoch, done: int, same: bool) -> bool:
    """Return whether a shadow is the session that is to come.

    Args:
        shadow: The shadow.
        epoch: Token of the move.
        done: Operations that the source has mirrored.
        same: Whether both have the same bits.
    """
    return shadow == Shadow(epoch, done) and same


def expected_difference(ahead: int, session: int) -> int:
    """Return the bytes that will go in the pause if a session has no shadow.

    What was sent ahead says so, unless it was sent before the first step: that is next to nothing.

    Args:
        ahead: Bytes that were sent ahead.
        session: Bytes of the session.
    """
    return max(ahead, round(CHANGED * session))


def keeps_up(operation: int, waiting: int, difference: int) -> bool:
    """Return whether it is worth while to go on mirroring.

    Args:
        operation: Bytes of an operation.
        waiting: Bytes of all that are not yet done by the shadow.
        difference: Bytes that would go in the pause instead.
    """
    return operation < difference and waiting <= BEHIND * difference


def may_begin(behind: int, gained: int) -> bool:
    """Return whether a session may begin its next mini-batch, or is to let its shadow catch up.

    What is left of more than that one when the device leaves, it waits for in the pause.

    Args:
        behind: Mini-batches before it that the shadow has not done.
        gained: Mini-batches that it has done since the last one began.
    """
    return behind <= 0 or gained >= 2


def patience_s(difference: int, sent: int, took_s: float, waited_s: float) -> float:
    """Return how long a session may still wait for its shadow: in all, about what that saves.

    Args:
        difference: Bytes that would go in the pause instead.
        sent: Bytes that the shadow has done.
        took_s: Seconds in which it did.
        waited_s: Seconds that the session has waited.
    """
    return min(PATIENT_S, difference * took_s / sent) - waited_s if sent else 0.0


def pays(waiting: int, difference: int) -> bool:
    """Return whether a shadow is nearer than the difference, now that the device leaves."""
    return waiting < difference
