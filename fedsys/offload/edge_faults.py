"""Faults of a run that strike at an edge server: it is killed, or the link of a device is cut.

They come with the sessions that they strike, and go on with them when they move: those of links
strike wherever the session is, those of an edge server with whoever is there. The controller is
told before one does, because an edge server that was killed tells nothing any more, and it knows
of those that struck elsewhere meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fedsys.errors import FrameError, LinkClosed, SessionError
from fedsys.faults import Fault, from_json, to_json
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

_NOTED_S = 10.0  # for the controller to take note of a fault


class EdgeFaults:
    """What is to strike the sessions of one edge server. Methods may be called from any thread.

    Args:
        name: Of the edge server, for messages.
        crash: What ``edge_killed`` does; None refuses sessions that come with faults.
        tell: Sends a frame to the controller of a session and says whether there is one.
    """

    def __init__(
        self, name: str, crash: Callable[[], None] | None, tell: Callable[[str, Frame], bool]
    ) -> None:
        self._name, self._crash, self._tell = name, crash, tell
        self._planned: dict[str, list[Fault]] = {}  # by session
        self._noted: dict[str, threading.Event] = {}  # by fault: the controller knows of it
        self._over: set[str] = set()  # faults that had struck elsewhere
        self._lock = threading.Lock()

    def coming_with(self, frame: Frame) -> list[Fault]:
        """Return the faults that come with a session.

        Raises:
            FrameError: They are not faults.
            SessionError: The edge server is not one that may be struck.
        """
        try:
            planned = list(from_json(str(frame.meta.get("faults", "[]"))))
        except (ValueError, TypeError) as error:
            raise FrameError(f"{frame.kind}: faults={frame.meta['faults']!r:.40}") from error
        if self._crash is None and any(self._strikes_here(fault) for fault in planned):
            raise SessionError(f"{self._name} accepts no faults; start it with edge.faults=true")
        return planned

    def plan(self, session: str, faults: list[Fault]) -> None:
        """Have faults strike a session."""
        with self._lock:
            self._planned[session] = faults

    def going_with(self, session: str) -> dict[str, Any]:
        """Return what the header of a frame says in which a session goes elsewhere."""
        with self._lock:
            planned = self._planned.get(session)
        return {"faults": to_json(planned)} if planned else {}

    def forget(self, session: str) -> None:
        """Have nothing strike a session any more."""
        with self._lock:
            self._planned.pop(session, None)

    def noted(self, frame: Frame) -> None:
        """Take note that the controller knows of a fault."""
        text = str(frame.meta.get("faults"))
        with self._lock:
            noted = self._noted.pop(text, None)
            if noted is not None and frame.meta.get("again") is True:
                self._over.add(text)
        if noted is not None:
            noted.set()

    def strike(self, position: str, session: str, link: Link, frame: Frame) -> None:
        """Do what is due at a position of an operation, once the controller knows of it.

        Raises:
            LinkClosed: A fault struck.
        """
        fault = self._take(position, session, frame)
        if fault is None:
            return
        text = to_json([fault])
        with self._lock:
            noted = self._noted[text] = threading.Event()
        if self._tell(session, Frame("struck", {"faults": text})):
            noted.wait(_NOTED_S)
        with self._lock:
            if text in self._over:
                return
        if fault.kind == "edge_killed" and self._crash is not None:
            self._crash()
        link.close()
        raise LinkClosed(f"{fault.kind} (a fault of the run)")

    def _take(self, position: str, session: str, frame: Frame) -> Fault | None:
        if frame.kind == "evaluate":
            return None
        with self._lock:
            planned = self._planned.get(session, [])
            for fault in planned:
                at = fault.position, fault.step
                if at == (position, frame.meta.get("step")) and self._strikes_here(fault):
                    planned.remove(fault)
                    return fault
        return None

    def _strikes_here(self, fault: Fault) -> bool:
        return fault.kind != "edge_killed" or fault.who == self._name
