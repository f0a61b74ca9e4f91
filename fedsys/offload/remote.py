"""The device's end of a session: operations that survive the loss of a link, and of an edge.

What was sent and not answered is kept. When the link is lost it is sent again over a new one: the
edge answers what it has done already from memory, so nothing is computed twice. When the session
itself is gone, the device asks at the edges of its assignment until one of them has it again, at
an earlier step; `Moved` then tells the trainer to which step to return. When no edge has it,
`EdgesLost` says so.

An answer that is late (`fedsys.transport.patience`) may be on its way over a slow link, or its
edge may be gone without a word. The device asks over another link, and keeps the one that it has
for as long as the edge says that the session is there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsys.errors import LinkClosed, LinkError, LinkTimeout
from fedsys.offload.asking import Asking, EdgesLost, FoundSession, refusal
from fedsys.offload.leaving import Leaving
from fedsys.offload.outstanding import Outstanding
from fedsys.offload.snapshot import Snapshot
from fedsys.transport.link import Link
from fedsys.transport.patience import Patience
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload")

ASKING_S = 20.0
"""How long a device asks for a session at least; or as long as its work in the round took so far,
which is what it would cost to do it again."""

ALIVE = 6
"""Late answers in a row, with the edge alive, until the device connects again: the limit doubles
each time, so this is after 63 times the limit."""

FRUITLESS = 5
"""Recoveries in a row after which not one answer came, until the device gives up."""

STANDING = 12
"""Recoveries after which it got no further than before, until it gives up: an edge that dies again
and again has it do the same steps over and over."""


class Moved(Exception):
    """The session continues on another edge, from `step`: both halves return there.

    Attributes:
        step: The step.
        first: First unit that the edge has there; None: as at first.
    """

    def __init__(self, step: int, first: int | None = None) -> None:
        super().__init__(f"the session goes on from step {step}")
        self.step, self.first = step, first


@dataclass
class Traffic:
    """What went over the links of a session.

    Attributes:
        bytes_up: Sent by the device, in bytes of frames, repetitions included.
        bytes_down: Received.
        waited_s: Seconds in which the device waited for answers.
        recoveries: One entry for each loss, and for each move that came to nothing: what, from, to,
            seconds.
        moves: Those from edge to edge, in their order.
        gradients: Elements of all gradients that came.
        needed: Elements that were sent of them.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    waited_s: float = 0.0
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    moves: list[Leaving] = field(default_factory=list)
    gradients: int = 0
    needed: int = 0

    @property
    def gradient_share(self) -> float:
        """Share of the elements of gradients that was sent; 0 before any came."""
        return self.needed / self.gradients if self.gradients else 0.0

    def repeated(self, steps: int) -> None:
        """Note that steps are done again because of the last loss."""
        lost = [entry for entry in self.recoveries if entry["what"] != "stays"]
        if lost:
            lost[-1]["repeated_steps"] = steps


class Remote:
    """A session as its device sees it. For one thread.

    Args:
        edges: Addresses at which to ask, the one with the session first.
        session: Name of the session.
        token: Token of the session.
        connect: Dials an address; raises LinkError.
        private: Whether the edge's outputs come back (label-private cut).
        clock: Seconds, for time limits; replaced in tests.
        sleep: How to wait between two rounds of asking; replaced in tests.
    """

    def __init__(
        self,
        edges: Sequence[str],
        session: str,
        token: str,
        connect: Callable[[str], Link],
        *,
        private: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        self.traffic = Traffic()
        self._asking = Asking(edges, session, token, connect, clock=clock, sleep=sleep)
        self._edges, self._session = len(edges), session
        self._clock = clock
        self._link: Link | None = None
        self._leaving: Leaving | None = None
        self._incarnation, self._operations = "", Outstanding(private, clock)
        self._patience = Patience()
        self._began = self._heard = clock()
        self._fruitless = self._late = self._standing = 0

    def open(self) -> int:
        """Connect; return the step at which the session stands.

        Raises:
            EdgesLost: No edge has the session.
            RemoteError: The edge refuses the device.
        """
        self._began = self._clock()
        return self._ask().step

    @property
    def edge(self) -> str:
        """Address of the edge server that had the session last."""
        return self._asking.where.edge

    def close(self) -> None:
        """End the link. The session stays for the server app to collect."""
        if self._link is not None:
            self._link.close()

    def send(
        self,
        kind: str,
        step: int,
        piece: int,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Send an operation; its answer is fetched by `receive`.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
        """
        self.prepare(kind, step, piece, meta, tensors)
        self.post(kind, step, piece)

    def prepare(
        self,
        kind: str,
        step: int,
        piece: int,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> int:
        """Encode an operation, once for every time that it may be sent; return its bytes.

        The tensors must not change until it is answered: their memory is sent, no copy of it.
        """
        return self._operations.prepare(kind, step, piece, meta, tensors)

    def post(self, kind: str, step: int, piece: int) -> None:
        """Send an operation that was prepared.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
        """
        self._transmit(self._operations.posted(kind, step, piece))

    def receive(self, kind: str, step: int, piece: int) -> Frame:
        """Return the answer to the operation `kind` at a position.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
            RemoteError: The edge refused the operation.
        """
        began = self._clock()
        while not self._operations.is_answered(kind, step, piece):
            try:
                self._take(self._live().recv(self._patience.limit_s))
            except LinkTimeout as error:
                self._doubt(error)
            except LinkError as error:  # lost or broken: the same way out for both
                self._recover(error)
        self.traffic.waited_s += self._clock() - began
        answer, took = self._operations.answered(kind, step, piece)
        self._patience.saw(took)
        return answer

    def foresee(self, to: str) -> None:
        """Say that the device will soon go to the edge server at an address.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
        """
        self._say("foresee", to)

    def trip(self, step: int, number: int = 0) -> float:
        """Return the seconds of a round trip to the edge and back, between two mini-batches.

        Args:
            step: Mini-batches that are done.
            number: Distinguishes several of them.

        Raises:
            Moved: The session goes on elsewhere, from that step or an earlier one.
            EdgesLost: No edge has it.
        """
        began = self._clock()
        self.send("done", step, number, {"trip": True}, {})
        self.receive("done", step, number)
        return self._clock() - began

    def nearest(self, edges: Sequence[str]) -> str:
        """Return the address of the edge server that answers soonest; empty if none does."""
        took = {edge: self._asking.trip(edge) for edge in edges}
        return min((e for e in took if took[e] < math.inf), key=took.__getitem__, default="")

    def remain(self) -> None:
        """Say that the device does not go where it was foreseen to go.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
        """
        self._say("remain", "")

    def leave(
        self, to: str, how: str, away_s: float = 0.0, *, step: int = 0, why: str = ""
    ) -> None:
        """Go to the edge server at an address and go on there; `traffic` has what that took.

        A device that announces it goes when it is told to, and stays if that edge refuses it. One
        that does not is simply there.

        Args:
            to: The address.
            how: ``announced``, ``foreseen`` or ``unannounced``; or ``restart``: the round begins
                anew there.
            away_s: Seconds in which it reaches neither edge.
            step: Mini-batches that are done.
            why: In words, where it is no matter of places.

        Raises:
            Moved: The session goes on from an earlier step.
            EdgesLost: No edge has it.
        """
        leaving = self._leaving = Leaving(self.edge, to, how, self._clock(), away_s, why)
        leaving.step = step
        try:
            if how in ("announced", "foreseen"):
                self._say("moving", to)
                self._await_word(leaving)
            else:
                self._go(leaving)
        finally:
            self._leaving = None

    def recut(self, step: int, first: int, given: Snapshot) -> Snapshot | None:
        """Change the cut between two steps; return what the edge gives of the units concerned.

        Where the edge has no room for what it would get, nothing changes, and there is None.

        Args:
            step: Mini-batches that are done.
            first: First unit that the edge has from here on.
            given: Units that it gets.

        Raises:
            Moved: The session goes on elsewhere, from that step or an earlier one.
            EdgesLost: No edge has it.
        """
        began = self._clock()
        self.send("recut", step, 0, {"first": first}, given.tensors())
        answer = self.receive("recut", step, 0)
        if self.traffic.moves:
            self.traffic.moves[-1].was_recut(self._clock() - began)
        if "refused" in answer.meta:
            _log.warning("the cut stays: %s", answer.meta["refused"])
            return None
        return Snapshot.from_frame(answer)

    def forget(self) -> None:
        """Forget what was sent and not answered: the trainer begins a step anew."""
        self._operations.forget()

    # --- links ------------------------------------------------------------------------------------

    def _live(self) -> Link:
        if self._link is None:
            raise LinkClosed("not connected")
        return self._link

    def _transmit(self, parts: list[Any]) -> None:
        try:
            self._live().send_encoded(parts)
        except LinkError as error:
            self._recover(error)
            return
        self.traffic.bytes_up += sum(len(part) for part in parts)

    def _take(self, frame: Frame) -> None:
        self.traffic.bytes_down += frame.encoded_bytes
        self._fruitless = self._late = 0
        self._heard = self._clock()
        if frame.kind == "redirect":
            self._follow(frame)
            return
        if frame.kind == "staying":
            self._stay(str(frame.meta.get("reason", "")))
            return
        if self._operations.take(frame):
            self._standing = 0

    def _stay(self, reason: str) -> None:
        """Go on where the device is: the edge server that it was to go to did not take it."""
        leaving = self._leaving
        if leaving is None or leaving.over:
            return
        leaving.over = True
        self.traffic.recoveries.append(
            {
                "what": "stays",
                "why": reason,
                "from": self.edge,
                "to": leaving.to,
                "repeated_steps": 0,
                "seconds": self._clock() - leaving.began_s,
            }
        )

    def _doubt(self, error: LinkTimeout) -> None:
        """Find out what became of a session from which no answer comes; recover if it is gone.

        Raises:
            Moved: It was found elsewhere.
            EdgesLost: Nobody has answered for longer than is worth waiting.
        """
        self._patience.missed()
        self._late += 1
        found = self._asking.probe(self.edge)
        if found is None:  # it may only have been slow to answer this once
            found = self._asking.probe_all()
        if found == self._incarnation and self._late % ALIVE:
            self._heard = self._clock()
            return
        if found is None:
            if self._clock() - self._heard > self._worth_waiting():
                raise EdgesLost(
                    f"session {self._session}: none of {self._edges} edge servers answers"
                ) from error
            return  # this end may be cut off; what is under way may yet arrive
        self._recover(error)

    def _worth_waiting(self) -> float:
        return max(ASKING_S, self._heard - self._began)

    def _recover(self, error: LinkError) -> None:
        """Reach the session again and repeat what was not answered.

        Raises:
            Moved: The session that was found is not the one that was lost.
            EdgesLost: None was found.
        """
        self._fruitless += 1
        self._standing += 1
        if refusal(error):
            raise error
        if self._standing > STANDING:
            raise EdgesLost(f"session {self._session}: lost {STANDING} times at the same step")
        if self._fruitless > FRUITLESS:
            raise EdgesLost(
                f"session {self._session}: {FRUITLESS} links in a row without an answer"
            )
        began, former, known = self._clock(), self._asking.where.edge, self._incarnation
        self.close()
        found = self._ask()
        same = self._incarnation == known
        if same and found.told:  # it was handed over, and the word of that was lost with the link
            leaving = self._leaving or Leaving(
                former, "", "commanded", began, step=self._operations.step
            )
            self._arrived_at(leaving, found)
            self._repeat()
            return
        self.traffic.recoveries.append(
            {
                "what": "link" if same else "edge",
                "why": f"{type(error).__name__}: {error}",
                "from": former,
                "to": self._asking.where.edge,
                "repeated_steps": 0,
                "seconds": self._clock() - began,
            }
        )
        if not same:
            self.forget()
            raise Moved(found.step, found.first)
        self._repeat()

    def _repeat(self) -> None:
        """Send again what was not answered."""
        for parts in self._operations.unanswered():
            self._transmit(parts)

    def _ask(self, first: str = "", *, anew: bool = False) -> FoundSession:
        """Ask for the session, and have the link to it."""
        awaiting = self._operations.awaited()
        self._asking.patience = self._patience
        found = self._asking.ask(self._worth_waiting(), awaiting, first=first, anew=anew)
        self._link, self._incarnation = found.link, found.incarnation
        return found

    # --- from edge to edge ------------------------------------------------------------------------

    def _say(self, kind: str, to: str) -> None:
        awaiting = [list(operation) for operation in self._operations.awaited()]
        try:
            self._live().send(Frame(kind, {"to": to, "awaiting": awaiting}))
        except LinkError as error:
            if self._leaving is None:
                self._recover(error)
            else:
                self._go(self._leaving)

    def _await_word(self, leaving: Leaving) -> None:
        """Wait until the edge says where to go, or that the device is to stay."""
        while not leaving.over:
            try:
                self._take(self._live().recv(self._patience.limit_s))
            except LinkTimeout as error:
                if self._clock() - leaving.began_s > self._worth_waiting():
                    self._go(leaving)
                else:
                    self._doubt(error)
            except LinkError:
                self._go(leaving)

    def _follow(self, frame: Frame) -> None:
        """Go where the edge says that the session is now."""
        where, leaving = self._asking.where, self._leaving
        if leaving is None:
            leaving = Leaving(
                where.edge, "", "commanded", self._clock(), step=self._operations.step
            )
        leaving.to = where.redirected(frame)
        leaving.was_told(frame.meta, self._clock())
        self._go(leaving)

    def _go(self, leaving: Leaving) -> None:
        """Leave the edge, and go on where the session is found.

        Raises:
            Moved: It goes on from an earlier step.
            EdgesLost: It is nowhere.
        """
        known, leaving.over = self._incarnation, True
        self.close()
        if leaving.away_s:
            slept = self._clock()
            self._sleep(leaving.away_s)
            leaving.slept_s += self._clock() - slept
        found = self._ask(leaving.to, anew=leaving.how == "restart")
        self._arrived_at(leaving, found)
        if self._incarnation != known:
            leaving.repeated_steps = max(0, leaving.step - found.step)
            self.forget()
            raise Moved(found.step, found.first)
        self._repeat()

    def _arrived_at(self, leaving: Leaving, found: FoundSession) -> None:
        leaving.over = True
        leaving.arrived(self._asking.where.edge, found.told, self._clock())
        self._fruitless = 0
        if leaving.to != leaving.source:
            self.traffic.moves.append(leaving)
