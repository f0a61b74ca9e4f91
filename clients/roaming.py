"""A device on its way: at which points of its round it leaves one edge server for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clients.watching import LinkWatcher
from fedsys.offload.leaving import Leaving
from fedsys.offload.remote import Remote
from fedsys.planning.moves import Handover, Move


@dataclass(frozen=True)
class _Stop:
    """A point of the round at which something is done about a move."""

    step: int
    piece: int
    move: Move
    foresees: bool


class Roaming:
    """Does the moves of one device in one round, each once. For one thread.

    Args:
        moves: The moves.
        addresses: Of all edge servers, as devices reach them, by their index.
        steps: Mini-batches of the round.
        remote: The session.
        restart: Whether the round begins anew at each edge server that the device comes to.
        watcher: Says when the link is so poor that the device leaves; None: nobody watches it.
        how: How it leaves then.
        cut: The cut from then on; None: as before.

    Attributes:
        cut: The cut that goes with the place where the device is; None: as before.
    """

    def __init__(
        self,
        moves: Sequence[Move],
        addresses: Sequence[str],
        steps: int,
        remote: Remote,
        *,
        restart: bool = False,
        watcher: LinkWatcher | None = None,
        how: str = "announced",
        cut: int | None = None,
    ) -> None:
        self._addresses, self._remote, self._restart = addresses, remote, restart
        self.cut: int | None = None
        self._watcher, self._led = watcher, ("restart" if restart else how, cut)
        self._foreseen = ""
        self._stops = [_Stop(m.step(steps), m.piece, m, False) for m in moves]
        if not restart:
            self._stops += [
                _Stop(m.notice_step(steps), 0, m, True) for m in moves if m.how == "foreseen"
            ]
        self._stops.sort(key=lambda stop: (stop.step, stop.piece, not stop.foresees))

    def at(self, step: int, piece: int) -> None:
        """Do what is due before a piece of a mini-batch is sent.

        Raises:
            Moved: The session goes on from an earlier step.
            EdgesLost: It is nowhere.
        """
        if self._watcher is not None and not piece:
            self._heed(self._watcher, step)
        while self._stops and (self._stops[0].step, self._stops[0].piece) <= (step, piece):
            stop = self._stops.pop(0)
            to = self._addresses[stop.move.edge % len(self._addresses)]
            if to == self._remote.edge:
                continue
            if stop.foresees:
                self._remote.foresee(to)
                continue
            if stop.move.cut is not None:
                self.cut = stop.move.cut
            how = "restart" if self._restart else stop.move.how
            self._remote.leave(to, how, stop.move.away_s, step=step, why=stop.move.why)

    def _heed(self, watcher: LinkWatcher, step: int) -> None:
        """Do what the link makes due.

        Raises:
            Moved: The session goes on from an earlier step.
            EdgesLost: It is nowhere.
        """
        due, (how, cut) = watcher.look(step), self._led
        if due == "foresee" and how == "announced":
            self._foreseen = watcher.target()
            if self._foreseen:
                self._remote.foresee(self._foreseen)
        elif due == "remain" and self._foreseen:
            self._foreseen = ""
            self._remote.remain()
        elif due == "leave":
            to, foreseen = self._foreseen or watcher.target(), bool(self._foreseen)
            self._foreseen = ""
            if to:
                self.cut = self.cut if cut is None else cut
                self._remote.leave(
                    to, "foreseen" if foreseen else how, step=step, why=watcher.why()
                )


def handover_of(
    leaving: Leaving, client: int, round_: int, began_s: float, steps: int, *, good: bool = True
) -> Handover:
    """Return a move of a device as its server app is told of it.

    Args:
        leaving: What the device took note of.
        client: Its partition id.
        round_: The round.
        began_s: When the device began it, by the same clock.
        steps: Mini-batches of the device in the round.
        good: Whether its link was good again at the end, if it left because of that.
    """
    one = leaving
    return Handover(
        client, round_, one.step, one.source, one.to, one.how, one.pause_s, one.bytes,
        one.precopied, one.repeated_steps, dict(one.parts), max(0.0, one.began_s - began_s),
        at=one.step / steps if steps else None, why=one.why, good_again=good,
    )  # fmt: skip
