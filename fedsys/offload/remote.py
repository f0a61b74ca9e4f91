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

from fedsys.errors import (
    LinkClosed,
    LinkError,
    LinkRefused,
    LinkTimeout,
    RemoteError,
    SessionError,
)
from fedsys.offload.snapshot import natural
from fedsys.transport.link import Link
from fedsys.transport.patience import Patience
from fedsys.transport.wire import Frame, encode_parts

ASKING_S = 20.0
"""How long a device asks for a session at least; or as long as its work in the round took so far,
which is what it would cost to do it again."""

REFUSED_S = 1.5
"""How long it asks where every edge server refuses: their processes are gone, not the network."""

ASK_AGAIN_S = (0.02, 0.25)
"""Shortest and longest pause between two rounds of asking."""

GREETING_S = 10.0
"""How long the first greeting may take: before it, nothing is known of the network."""

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
}


class Moved(Exception):
    """The session continues on another edge, from `step`: both halves return there."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the session goes on from step {step}")
        self.step = step


class EdgesLost(LinkError):
    """No edge has the session any more."""


@dataclass
class Traffic:
    """What went over the links of a session.

    Attributes:
        bytes_up: Sent by the device, in bytes of frames, repetitions included.
        bytes_down: Received.
        waited_s: Seconds in which the device waited for answers.
        recoveries: One entry for each loss: what, from, to, seconds.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    waited_s: float = 0.0
    recoveries: list[dict[str, Any]] = field(default_factory=list)


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
        self._edges, self._session, self._token = list(edges), session, token
        self._connect, self._private, self._clock = connect, private, clock
        self._link: Link | None = None
        self._edge = self._edges[0]
        self._incarnation = ""
        self._unanswered: dict[tuple[str, int, int], tuple[float, list[Any]]] = {}
        self._arrived: dict[tuple[str, int, int], Frame] = {}
        self._patience, self._greetings = Patience(), Patience(GREETING_S)
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
        return self._ask()

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
        name = "index" if kind == "evaluate" else "piece"
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
        found = self._probe(self._edge)
        if found is None:  # it may only have been slow to answer this once
            found = next(filter(None, map(self._probe, self._edges)), None)
        if found == self._incarnation and self._late % ALIVE:
            self._heard = self._clock()
            return
        if found is None:
            if self._clock() - self._heard > self._worth_waiting():
                raise EdgesLost(
                    f"session {self._session}: none of {len(self._edges)} edge servers answers"
                ) from error
            return  # this end may be cut off; what is under way may yet arrive
        self._recover(error)

    def _probe(self, edge: str) -> str | None:
        """Ask an edge for the session, and leave it its link.

        Returns:
            The session's incarnation, empty if the edge does not have it; None without an answer.
        """
        began = self._clock()
        try:
            link = self._connect(edge)
            try:
                link.send(Frame("probe", {"session": self._session, "token": self._token}))
                answer = link.recv(self._greetings.limit_s)
            finally:
                link.close()
        except (LinkRefused, RemoteError):  # it says what is the matter when it is greeted
            return ""
        except LinkTimeout:
            self._greetings.missed()
            return None
        except LinkError:
            return None
        self._greetings.saw(self._clock() - began)
        return str(answer.meta.get("incarnation", ""))

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
        if _refusal(error):
            raise error
        if self._standing > STANDING:
            raise EdgesLost(f"session {self._session}: lost {STANDING} times at the same step")
        if self._fruitless > FRUITLESS:
            raise EdgesLost(
                f"session {self._session}: {FRUITLESS} links in a row without an answer"
            )
        began, former, known = self._clock(), self._edge, self._incarnation
        self.close()
        step = self._ask()
        same = self._incarnation == known
        self.traffic.recoveries.append(
            {
                "what": "link" if same else "edge",
                "why": f"{type(error).__name__}: {error}",
                "from": former,
                "to": self._edge,
                "repeated_steps": 0,
                "seconds": self._clock() - began,
            }
        )
        if not same:
            self.forget()
            raise Moved(step)
        for _, parts in list(self._unanswered.values()):
            self._transmit(parts)

    def _ask(self) -> int:
        """Ask edge after edge, the last known one first, until one welcomes the device."""
        order = [self._edge, *(edge for edge in self._edges if edge != self._edge)]
        began, longest = self._clock(), self._worth_waiting()
        wait, at_most = ASK_AGAIN_S
        again = False
        while True:
            refused = silent = 0
            for edge in order:
                if again and self._clock() - began > longest:
                    silent += 1  # each was asked, and this may take as long as all before
                    continue
                try:
                    step = self._greet(edge)
                except RemoteError as error:
                    if not _refusal(error):  # the greeting was damaged on its way
                        silent += 1
                        continue
                    raise SessionError(
                        f"edge {edge} refuses session {self._session}: {error}"
                    ) from error
                except LinkRefused:
                    refused += 1
                    continue
                except LinkError:
                    silent += 1
                    continue
                if step is not None:
                    return step
            asked = self._clock() - began
            if asked > (REFUSED_S if refused == len(order) else longest):
                raise EdgesLost(
                    f"session {self._session} is at none of {len(order)} edge servers, of which "
                    f"{refused} are gone and {silent} do not answer"
                )
            self._sleep(wait)
            wait, again = min(2 * wait, at_most), True

    def _greet(self, edge: str) -> int | None:
        """Present the token; return the session's step, or None if the edge does not know it."""
        began = self._clock()
        link = self._connect(edge)
        try:
            link.send(Frame("hello", {"session": self._session, "token": self._token}))
            answer = self._greeted(link, began)
            if answer.kind == "wait":
                answer = self._let_in(link, edge)
        except LinkError:
            link.close()
            raise
        if answer.kind != "welcome":
            link.close()
            if answer.kind == "unknown":
                return None
            raise LinkTimeout(f"edge {edge}: {answer.kind} instead of a welcome")
        self._link, self._edge = link, edge
        self._incarnation = str(answer.meta.get("incarnation"))
        return int(answer.meta.get("step", 0))

    def _greeted(self, link: Link, began: float) -> Frame:
        """Return the first answer over a link whose making began then."""
        try:
            answer = link.recv(self._greetings.limit_s)
        except LinkTimeout:
            self._greetings.missed()
            raise
        self._greetings.saw(self._clock() - began)
        return answer

    def _let_in(self, link: Link, edge: str) -> Frame:
        """Return what an edge says once the operation of this session that is in work is done.

        Raises:
            LinkError: The edge is gone, or this takes longer than any answer may.
        """
        for _ in range(ALIVE):
            try:
                return link.recv(self._patience.limit_s)
            except LinkTimeout:
                self._patience.missed()
            if not self._probe(edge):
                break
        raise LinkTimeout(f"edge {edge}: the operation in work does not come to its end")


def _refusal(error: LinkError) -> bool:
    """Say whether the edge will not do it next time either; a damaged frame may come well then."""
    return isinstance(error, RemoteError) and not str(error).startswith("FrameError")
