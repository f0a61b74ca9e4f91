"""How a device finds its session: it asks at the edges of its assignment until one welcomes it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.errors import (
    FrameError,
    LinkClosed,
    LinkError,
    LinkRefused,
    LinkTimeout,
    RemoteError,
    SessionError,
)
from fedsys.offload.snapshot import natural
from fedsys.offload.whereabouts import Whereabouts
from fedsys.transport.link import Link
from fedsys.transport.patience import Patience
from fedsys.transport.wire import Frame

REFUSED_S = 1.5
"""How long it asks where every edge server refuses: their processes are gone, not the network."""

_OF_THE_LINK = tuple(kind.__name__ for kind in (FrameError, LinkClosed, LinkTimeout))

ASK_AGAIN_S = (0.02, 0.25)
"""Shortest and longest pause between two rounds of asking."""

GREETING_S = 10.0
"""How long the first greeting may take: before it, nothing is known of the network."""

WAITS = 6
"""Late answers in a row, with the edge alive, until the device asks again elsewhere: the limit
doubles each time, so this is after 63 times the limit."""

HOPS = 8
"""How many edge servers in a row may send a device on to another one."""


class EdgesLost(LinkError):
    """No edge has the session any more."""


@dataclass(frozen=True)
class FoundSession:
    """A session that was found.

    Attributes:
        link: To the edge server that has it.
        step: Where it stands.
        incarnation: Which of its lives it is.
        first: First unit that it has; None: it does not say.
        told: What the edge servers said of a move on the way there.
    """

    link: Link
    step: int
    incarnation: str
    first: int | None
    told: Mapping[str, Any]


class Asking:
    """Finds one session. For one thread.

    Args:
        edges: Addresses at which to ask, the one with the session first.
        session: Name of the session.
        token: Token of the session.
        connect: Dials an address; raises LinkError.
        clock: Seconds, for time limits.
        sleep: How to wait between two rounds of asking.

    Attributes:
        where: Where the session is, as far as is known.
        patience: For an answer that an edge says will come.
    """

    def __init__(
        self,
        edges: Sequence[str],
        session: str,
        token: str,
        connect: Callable[[str], Link],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.where, self.patience = Whereabouts(edges[0]), Patience()
        self._edges, self._session, self._token = list(edges), session, token
        self._connect, self._clock, self._sleep = connect, clock, sleep
        self._greetings = Patience(GREETING_S)

    def ask(
        self,
        longest: float,
        awaiting: Sequence[Sequence[Any]] = (),
        *,
        first: str = "",
        anew: bool = False,
    ) -> FoundSession:
        """Ask edge after edge until one welcomes the device.

        Args:
            longest: Seconds after which it is over.
            awaiting: Operations whose answers are waited for: kind, step, piece.
            first: Address at which to begin; empty: where the session was last.
            anew: Whether the round is to begin anew there, and nowhere else.

        Raises:
            EdgesLost: None did.
            SessionError: One refuses the device.
        """
        start = first or self.where.edge
        order = [start] if anew else [start, *(edge for edge in self._edges if edge != start)]
        began = self._clock()
        wait, at_most = ASK_AGAIN_S
        again = False
        while True:
            refused = silent = 0
            for edge in order:
                if again and self._clock() - began > longest:
                    silent += 1  # each was asked, and this may take as long as all before
                    continue
                try:
                    found = self._follow(edge, awaiting, anew=anew)
                except (LinkError, RemoteError) as error:
                    gone = self._gone(edge, error)
                    refused, silent = refused + gone, silent + (not gone)
                    continue
                if found is not None:
                    return found
            asked = self._clock() - began
            if asked > (REFUSED_S if refused == len(order) else longest):
                raise EdgesLost(
                    f"session {self._session} is at none of {len(order)} edge servers, of which "
                    f"{refused} are gone and {silent} do not answer"
                )
            self._sleep(wait)
            wait, again = min(2 * wait, at_most), True

    def _gone(self, edge: str, error: LinkError | RemoteError) -> bool:
        """Return whether nobody listens there; else it does not answer.

        Raises:
            SessionError: It answers, and refuses the device.
        """
        if isinstance(error, RemoteError) and refusal(error):  # else the greeting was damaged
            raise SessionError(f"edge {edge} refuses session {self._session}: {error}") from error
        return isinstance(error, LinkRefused)

    def probe(self, edge: str) -> str | None:
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

    def trip(self, edge: str) -> float:
        """Return the seconds of a round trip over a new link to an edge; infinite if it is silent.

        It need not have the session.
        """
        try:
            link = self._connect(edge)
            try:
                began = self._clock()
                link.send(Frame("probe", {"session": self._session, "token": self._token}))
                link.recv(self._greetings.limit_s)
                return self._clock() - began
            finally:
                link.close()
        except LinkError:
            return math.inf

    def probe_all(self) -> str | None:
        """Ask one edge after the other, as `probe` does; return the first answer that has it."""
        return next(filter(None, map(self.probe, self._edges)), None)

    def _follow(
        self, edge: str, awaiting: Sequence[Sequence[Any]], *, anew: bool
    ) -> FoundSession | None:
        """Greet an edge, and those to which it sends the device on; None if it is at none.

        Raises:
            LinkError: The first one cannot be reached.
        """
        told: dict[str, Any] = {}
        first = edge
        for _ in range(HOPS):
            try:
                answer = self._greet(edge, awaiting, anew=anew)
            except LinkError:
                self.where.missed(edge)
                if edge == first:
                    raise
                return None
            if isinstance(answer, FoundSession):
                return dataclasses.replace(answer, told={**told, **answer.told})
            if answer is None:
                self.where.missed(edge)
                return None
            edge, told = self.where.redirected(answer), dict(answer.meta)
        return None

    def _greet(
        self, edge: str, awaiting: Sequence[Sequence[Any]], *, anew: bool
    ) -> FoundSession | Frame | None:
        """Present the token; return where the device may train, or is sent on to, or None."""
        began = self._clock()
        link = self._connect(edge)
        meta = {"session": self._session, "token": self._token, **self.where.shows(edge)}
        if awaiting:
            meta["awaiting"] = [list(one) for one in awaiting]
        if anew:
            meta["anew"] = True
        try:
            link.send(Frame("hello", meta))
            answer = self._greeted(link, began)
            if answer.kind == "wait":
                answer = self._let_in(link, edge)
        except LinkError:
            link.close()
            raise
        if answer.kind == "welcome":
            self.where.welcomed(edge, answer)
            told = answer.meta.get("moved")
            return FoundSession(
                link,
                int(answer.meta.get("step", 0)),
                str(answer.meta.get("incarnation")),
                natural(answer, "first") if "first" in answer.meta else None,
                told if isinstance(told, dict) else {},
            )
        link.close()
        if answer.kind == "redirect":
            return answer
        if answer.kind == "unknown":
            return None
        raise LinkTimeout(f"edge {edge}: {answer.kind} instead of a welcome")

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
        """Return what an edge says once an operation is done that is in work, or the session there.

        Raises:
            LinkError: The edge is gone, or this takes longer than any answer may.
        """
        for _ in range(WAITS):
            try:
                return link.recv(self.patience.limit_s)
            except LinkTimeout:
                self.patience.missed()
            if not self.probe(edge):
                break
        raise LinkTimeout(f"edge {edge}: the operation in work does not come to its end")


def refusal(error: LinkError) -> bool:
    """Say whether the edge will not do it next time either.

    What it says of its link may be otherwise then: a damaged frame comes well, a full server has a
    place.
    """
    return isinstance(error, RemoteError) and not str(error).startswith(_OF_THE_LINK)
