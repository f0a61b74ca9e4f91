"""The protocol by which a session moves: a copy and a message, to a copy and messages.

::

    device        source                              destination
      │ moving ─▶   │ prepare ─────────────────────────▶  │   may it come?
      │             │ ◀───────────────── prepared/refused  │
      │             │ (pre-copies, while it trains on: see `fedsys.offload.mirroring`)
      │             │ transfer ────────────────────────▶   │   the source does not train any more
      │             │ ◀──────────────── committed/refused  │   the destination has it whole
      │ ◀─ redirect │                                      │
      │ hello ─────────────────────────────────────────▶   │   from here on it may train
      │ operation ─────────────────────────────────────▶   │   it trains
      │             │ ◀─────────────────────────── release │   the source forgets its copy

A device that is simply there (`hello` at an edge without a copy) has that edge `fetch` the copy
from the one that the device names: what follows is the same from `transfer` on. A recovery is the
same move, whose source is the server app: it opens the newest replica under a token of the next
generation.

The edge servers run exactly these functions (`fedsys.offload.edge_moves`), and so does the model
check (`tests/offload/test_migration_model.py`). Which copies may train is the matter of
`fedsys.offload.fencing`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsys.offload import fencing
from fedsys.offload.fencing import Copy, CopyPhase, Epoch, Presented


@dataclass(frozen=True, slots=True)
class Say:
    """What an edge says about a session because of what it was told.

    Attributes:
        kind: ``welcome``, ``redirect``, ``unknown``, ``wait`` or ``staying`` to the device;
            ``prepare``, ``transfer``, ``cancel``, ``release`` to an edge; ``prepared``,
            ``committed``, ``refused``, ``released`` in reply to one; ``moved``, from an edge, to
            the server app.
        to: ``device``, or the name of an edge.
        epoch: The token that it is about.
    """

    kind: str
    to: str
    epoch: Epoch | None = None


Outcome = tuple[Copy | None, tuple[Say, ...]]
"""What becomes of a copy (None: there is none any more), and what is said."""

DEVICE = "device"


def on_hello(copy: Copy | None, me: str, shown: Presented) -> Outcome:
    """A device asks for its session."""
    unknown = (Say("unknown", DEVICE),)
    if copy is None:
        return None, unknown
    if not copy.knows(shown):
        return (None if fencing.outran(copy, shown) else copy), unknown
    if copy.phase in fencing.TRAINS:
        return copy, (Say("welcome", DEVICE, copy.epoch),)
    if copy.phase is CopyPhase.FROZEN:
        return copy, (Say("wait", DEVICE),)
    if copy.phase is CopyPhase.STAGED:
        if shown.told != copy.epoch:
            return copy, unknown
        last = {**dict(copy.outlives), copy.peer: copy.epoch}
        outlives = tuple(last.items())
        live = Copy(copy.epoch, issued=copy.issued, granted=shown.epoch, outlives=outlives)
        return live, (Say("welcome", DEVICE, live.epoch), Say("moved", copy.peer, live.epoch))
    if shown.back and shown.told == copy.offered:
        mine = fencing.taken_back(copy, me, shown)
        return mine, (Say("welcome", DEVICE, mine.epoch), Say("cancel", copy.peer, copy.offered))
    return copy, (Say("redirect", DEVICE, copy.offered),)


def on_train(copy: Copy) -> tuple[Copy, tuple[Say, ...]]:
    """A copy that may train is about to be trained.

    Only now does its device surely know its token, so only now may the edge from which it came
    forget its own copy: until then this one may be lost, and the device go back.
    """
    return fencing.trained(copy), _released(copy)


def on_move(copy: Copy | None, me: str, to: str) -> Outcome:
    """A session is to go to another edge: its device says so, or an operator, or a policy."""
    if copy is None or copy.phase is not CopyPhase.LIVE or to == me:
        return copy, (Say("staying", DEVICE),)
    now = fencing.offered(copy, to, CopyPhase.OFFERED)
    return now, (Say("prepare", to, now.offered),)


def on_prepared(copy: Copy | None, epoch: Epoch) -> Outcome:
    """The other edge would take it: from here on it does not train here."""
    if not _is(copy, CopyPhase.OFFERED, epoch):
        return copy, ()
    assert copy is not None
    now = replace(copy, phase=CopyPhase.FROZEN)
    return now, (Say("transfer", copy.peer, epoch),)


def on_other(copy: Copy | None, epoch: Epoch) -> Outcome:
    """The other edge has no shadow of it that is the same: it goes as a difference."""
    if not _is(copy, CopyPhase.FROZEN, epoch):
        return copy, ()
    assert copy is not None
    return copy, (Say("transfer", copy.peer, epoch),)


def on_committed(copy: Copy | None, epoch: Epoch) -> Outcome:
    """The other edge has it: only now its device is told."""
    if not _is(copy, CopyPhase.FROZEN, epoch):
        return copy, ()
    assert copy is not None
    return replace(copy, phase=CopyPhase.GIVEN), (Say("redirect", DEVICE, epoch),)


def on_failed(copy: Copy | None, epoch: Epoch) -> Outcome:
    """The other edge refuses, is gone, or does not answer; its device was told nothing."""
    if not (_is(copy, CopyPhase.OFFERED, epoch) or _is(copy, CopyPhase.FROZEN, epoch)):
        return copy, ()
    assert copy is not None
    return fencing.kept(copy), (Say("cancel", copy.peer, epoch), Say("staying", DEVICE))


def on_prepare(copy: Copy | None, source: str, epoch: Epoch) -> Outcome:
    """Another edge asks whether its session may come."""
    if copy is not None and copy.phase is not CopyPhase.GIVEN and copy.epoch.age >= epoch.age:
        return copy, (Say("refused", source, epoch),)
    return copy, (Say("prepared", source, epoch),)


def on_transfer(copy: Copy | None, source: str, epoch: Epoch) -> Outcome:
    """A session comes whole from another edge; a second time, if the answer was lost."""
    if copy is not None and copy.epoch == epoch:
        return copy, (Say("committed", source, epoch),)
    if copy is not None and copy.epoch.age >= epoch.age:
        return copy, (Say("refused", source, epoch),)
    # what a copy that is here from before outlives must hear of it from this one
    outlives = () if copy is None else copy.outlives
    staged = Copy(epoch, CopyPhase.STAGED, source, issued=epoch.moves, outlives=outlives)
    return staged, (Say("committed", source, epoch),)


def on_fetch(copy: Copy | None, me: str, to: str, shown: Presented) -> Outcome:
    """Another edge, at which the device is, wants the session."""
    refused = (Say("refused", to),)
    if copy is None:
        return None, refused
    if not copy.knows(shown) or shown.epoch.generation < copy.epoch.generation:
        return (None if fencing.outran(copy, shown) else copy), refused
    if copy.phase is CopyPhase.GIVEN:
        if copy.peer == to:
            return copy, (Say("transfer", to, copy.offered),)
        return copy, (Say("redirect", to, copy.offered),)
    if copy.phase in fencing.TRAINS:
        # The device is there and may be welcomed at any moment: there is no way back but by it.
        now = fencing.offered(copy, to, CopyPhase.GIVEN)
        return now, (Say("transfer", to, now.offered),)
    return copy, refused


def on_release(copy: Copy | None, epoch: Epoch) -> Outcome:
    """Another edge trains the device under a token of its own.

    Only the copy that was given to it is forgotten: one that came back since has another token,
    though its device may not have trained under that yet. Nor is the copy needed any more from
    which this one came, if its device was not trained here.
    """
    if copy is None or not _is(copy, CopyPhase.GIVEN, epoch):
        return copy, ()
    return None, _released(copy)


def on_cancel(copy: Copy | None, epoch: Epoch) -> Outcome:
    """The edge from which it came trains it on."""
    return (None if _came(copy, epoch) else copy), ()


def on_open(copy: Copy | None, epoch: Epoch) -> Outcome:
    """The server app opens a session; whatever is here of it from before is over."""
    if copy is not None and copy.epoch.generation >= epoch.generation:
        return copy, (Say("refused", "control", epoch),)
    return Copy(epoch), (Say("opened", "control", epoch),)


def _released(copy: Copy) -> tuple[Say, ...]:
    return tuple(Say("release", *each) for each in copy.outlives)


def _is(copy: Copy | None, phase: CopyPhase, epoch: Epoch) -> bool:
    return copy is not None and copy.phase is phase and copy.offered == epoch


def _came(copy: Copy | None, epoch: Epoch) -> bool:
    return copy is not None and copy.phase is CopyPhase.STAGED and copy.epoch == epoch
