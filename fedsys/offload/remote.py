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

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsys.errors import LinkClosed, LinkError, LinkTimeout
from fedsys.offload.asking import Asking, EdgesLost, FoundSession, refusal
from fedsys.offload.leaving import Leaving
from fedsys.offload.snapshot import Snapshot, natural
from fedsys.transport.link import Link
from fedsys.transport.patience import Patience
from fedsys.transport.wire import Frame, encode_parts

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

_REPLY = {
    ("activation", False): "gradient",
    ("activation", True): "activation",
    ("gradient", True): "gradient",
    ("norms", False): "norms",
    ("norms", True): "norms",
    ("evaluate", False): "outputs",
    ("done", False): "done",
    ("recut", False): "recut",
}


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
        recoveries: One entry for each loss: what, from, to, seconds.
        moves: Those from edge to edge, in their order.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    waited_s: float = 0.0
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    moves: list[Leaving] = field(default_factory=list)


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
        self._private, self._clock = private, clock
        self._link: Link | None = None
        self._leaving: Leaving | None = None
        self._incarnation, self._step = "", 0
        self._unanswered: dict[tuple[str, int, int], tuple[float, list[Any]]] = {}
        self._arrived: dict[tuple[str, int, int], Frame] = {}
        self._patience = Patience()
        self._began = self._heard = clock()
        self._fruitless = self._late = self._standing = 0
        self._furthest: dict[str, tuple[int, int]] = {}  # position answered, by kind of answer

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
        name, self._step = "index" if kind == "evaluate" else "piece", step
        frame = Frame(kind, {"step": step, name: piece, **meta}, tensors)
        parts: list[Any] = encode_parts(frame)
        self._unanswered[kind, step, piece] = (self._clock(), parts)
        return sum(len(part) for part in parts)

    def post(self, kind: str, step: int, piece: int) -> None:
        """Send an operation that was prepared.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
        """
        _, parts = self._unanswered[kind, step, piece]
        self._unanswered[kind, step, piece] = (self._clock(), parts)
        self._transmit(parts)

    def receive(self, kind: str, step: int, piece: int) -> Frame:
        """Return the answer to the operation `kind` at a position.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
            RemoteError: The edge refused the operation.
        """
        answer = _REPLY[kind, self._private and kind in ("activation", "gradient", "norms")]
        began = self._clock()
        while (answer, step, piece) not in self._arrived:
            try:
                self._take(self._live().recv(self._patience.limit_s))
            except LinkTimeout as error:
                self._doubt(error)
            except LinkError as error:  # lost or broken: the same way out for both
                self._recover(error)
        now = self._clock()
        self.traffic.waited_s += now - began
        sent, _ = self._unanswered.pop((kind, step, piece), (now, []))
        self._patience.saw(now - sent)
        return self._arrived.pop((answer, step, piece))

    def foresee(self, to: str) -> None:
        """Say that the device will soon go to the edge server at an address.

        Raises:
            Moved: The session goes on elsewhere, from an earlier step.
            EdgesLost: No edge has it.
        """
        self._say("foresee", to)

    def leave(self, to: str, how: str, away_s: float = 0.0, *, step: int = 0) -> None:
        """Go to the edge server at an address and go on there; `traffic` has what that took.

        A device that announces it goes when it is told to, and stays if that edge refuses it. One
        that does not is simply there.

        Args:
            to: The address.
            how: ``announced``, ``foreseen`` or ``unannounced``; or ``restart``: the round begins
                anew there.
            away_s: Seconds in which it reaches neither edge.
            step: Mini-batches that are done.

        Raises:
            Moved: The session goes on from an earlier step.
            EdgesLost: No edge has it.
        """
        leaving = self._leaving = Leaving(self.edge, to, how, self._clock(), away_s)
        leaving.step = step
        try:
            if how in ("announced", "foreseen"):
                self._say("moving", to)
                self._await_word(leaving)
            else:
                self._go(leaving)
        finally:
            self._leaving = None

    def recut(self, step: int, first: int, given: Snapshot) -> Snapshot:
        """Change the cut between two steps; return what the edge gives of the units concerned.

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
        return Snapshot.from_frame(answer)

    def forget(self) -> None:
        """Forget what was sent and not answered: the trainer begins a step anew."""
        self._unanswered.clear()
        self._arrived.clear()

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
            if self._leaving is not None:
                self._leaving.over = True
            return
        if frame.kind == "outputs":
            step, index = 0, natural(frame, "index")
        else:
            step = natural(frame, "step")
            index = natural(frame, "piece") if "piece" in frame.meta else 0
        if (step, index) > self._furthest.get(frame.kind, (-1, -1)):
            self._furthest[frame.kind] = step, index
            self._standing = 0
        asked = {"gradient": "gradient" if self._private else "activation", "outputs": "evaluate"}
        if (asked.get(frame.kind, frame.kind), step, index) in self._unanswered:
            self._arrived[frame.kind, step, index] = frame  # others came twice: forget them

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
            leaving = self._leaving or Leaving(former, "", "commanded", began, step=self._step)
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
        for _, parts in list(self._unanswered.values()):
            self._transmit(parts)

    def _ask(self, first: str = "", *, anew: bool = False) -> FoundSession:
        """Ask for the session, and have the link to it."""
        awaiting = [key for key in self._unanswered if key[0] != "evaluate"]
        self._asking.patience = self._patience
        found = self._asking.ask(self._worth_waiting(), awaiting, first=first, anew=anew)
        self._link, self._incarnation = found.link, found.incarnation
        return found

    # --- from edge to edge ------------------------------------------------------------------------

    def _say(self, kind: str, to: str) -> None:
        awaiting = [list(key) for key in self._unanswered if key[0] != "evaluate"]
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
            leaving = Leaving(where.edge, "", "commanded", self._clock(), step=self._step)
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
            self._sleep(leaving.away_s)
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
