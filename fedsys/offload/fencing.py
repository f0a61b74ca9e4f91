"""Which copy of a session may train its device: a token that each move makes anew.

An edge server that was left may not know it yet, and one that was to take a session over may have
it and never see the device. So there may be several copies of a session for a while. What decides
is the device, which is at one place at a time: it presents the token under which it was trained
last, and a copy is trained under its own token only. Whoever hands a session over makes a token
that nobody had before, and the copy that stays behind keeps the old one::

              open                 move                 move back            loss, then recovery
    token   (1, 0, a)   ──▶      (1, 1, b)    ──▶      (1, 2, a)    ──▶         (2, 0, b)

Every function here is pure: a copy, and what is presented or asked, to what becomes of the copy.
`fedsys.offload.migration` has the messages that bring them about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from fedsys.errors import FrameError


class Epoch(NamedTuple):
    """A fencing token. No two copies of unequal states ever have the same one.

    An edge server that crashed, or whose device never heard of it, may be given the same copy
    again, while another one has what it handed on before. What tells the two lines apart is how far
    the device was when a token was made.

    Attributes:
        generation: Grows with each session that the server app opens, at first or after a loss.
        moves: Tokens that edge servers made since.
        holder: Name of the edge server for which it was made.
        since: `moves` of the token that the device had when this one was made.
    """

    generation: int
    moves: int
    holder: str
    since: int = 0

    @property
    def age(self) -> tuple[int, int, int]:
        """What is larger for later ones: first what the device knew of, then how far it went."""
        return self.generation, self.since, self.moves

    @classmethod
    def of(cls, values: object) -> Epoch | None:
        """Return the token that a frame carries; None for none.

        Raises:
            FrameError: It is something else.
        """
        if values is None:
            return None
        if isinstance(values, Sequence) and [type(value) for value in values] == _KINDS:
            return cls(*values)
        raise FrameError(f"epoch={str(values)[:40]!r} is not a token")


_KINDS = [int, int, str, int]

NONE = Epoch(0, 0, "")
"""What a device presents that was not trained yet."""


class CopyPhase(StrEnum):
    """What an edge server does with its copy."""

    LIVE = "live"  # it trains
    OFFERED = "offered"  # it trains, and another edge was asked to take it
    FROZEN = "frozen"  # it is on its way to that edge
    GIVEN = "given"  # that edge has it; kept until that edge has the device, too
    STAGED = "staged"  # it came from another edge, and its device is yet to come


TRAINS = frozenset((CopyPhase.LIVE, CopyPhase.OFFERED))


@dataclass(frozen=True, slots=True)
class Presented:
    """What a device shows.

    Attributes:
        epoch: Token under which it was trained last, or was welcomed to be trained.
        told: Token of the edge that it was told to go to; None if it was told of none.
        back: Whether it was there, or tried to be, and found nothing.
    """

    epoch: Epoch = NONE
    told: Epoch | None = None
    back: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """An edge server's copy of a session.

    Attributes:
        epoch: Its token.
        phase: What is done with it.
        peer: The edge that it goes to, or from which it came.
        offered: Token that was made for that edge.
        issued: Largest `moves` of the tokens that were made of it.
        granted: Token of the device when this one was made, until it trains under this one.
        outlives: Edges with copies that this one outlives, and the tokens that were made of those,
            until they may be forgotten.
    """

    epoch: Epoch
    phase: CopyPhase = CopyPhase.LIVE
    peer: str = ""
    offered: Epoch | None = None
    issued: int = 0
    granted: Epoch | None = None
    outlives: tuple[tuple[str, Epoch], ...] = ()

    def knows(self, shown: Presented) -> bool:
        """Return whether the device that shows this is where this copy left it."""
        if self.epoch.generation > shown.epoch.generation:
            return True  # the server app opened it anew: all that was before is over
        return shown.epoch in (self.epoch, self.granted) or shown.told == self.epoch


def outran(copy: Copy, shown: Presented) -> bool:
    """Return whether a device has been trained elsewhere since this copy was the one."""
    return not copy.knows(shown) and shown.epoch.age > copy.epoch.age


def may_train(copy: Copy | None, bound: Epoch) -> bool:
    """Return whether an operation may be done on a link that was welcomed under a token."""
    return copy is not None and copy.phase in TRAINS and copy.epoch == bound


def trained(copy: Copy) -> Copy:
    """Return a copy after an operation: its device has no other token any more, nor needs one."""
    if copy.granted is None and not copy.outlives:
        return copy
    return replace(copy, granted=None, outlives=())


def offered(copy: Copy, peer: str, phase: CopyPhase) -> Copy:
    """Return a copy that is being handed to another edge, under a token that is new."""
    token = _next(copy, peer)
    return replace(copy, phase=phase, peer=peer, offered=token, issued=token.moves)


def kept(copy: Copy) -> Copy:
    """Return a copy whose move came to nothing before its device was told: it trains on."""
    return replace(copy, phase=CopyPhase.LIVE, peer="", offered=None)


def taken_back(copy: Copy, me: str, shown: Presented) -> Copy:
    """Return a copy whose device was told to go elsewhere and is back, under a token that is new.

    The other edge may have it by now and answer no more, or again later: so the old token is not
    taken up again.
    """
    token = _next(copy, me)
    return Copy(token, issued=token.moves, granted=shown.epoch, outlives=copy.outlives)


def _next(copy: Copy, holder: str) -> Epoch:
    confirmed = copy.epoch if copy.granted is None else copy.granted
    same = confirmed.generation == copy.epoch.generation
    count = max(copy.issued, copy.epoch.moves) + 1
    return Epoch(copy.epoch.generation, count, holder, confirmed.moves if same else 0)
