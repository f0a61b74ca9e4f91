"""Who reads a link when nobody is in its `recv`: the thread that stands by.

A frame costs least if the thread that waits for it takes it off the socket itself: handing it over
from a thread that reads costs two switches of threads. But a link must be read also while its owner
computes or sends, else two peers that both send first wait for each other. So one thread for the
whole process looks every `TICK_S` at the links in use, and where nobody has been in `recv` since it
last looked, it has the link's own thread read until somebody is again. (The pattern is leader and
followers: Schmidt et al., "Leader/Followers", PLoP 2000; the promotion by a clock is ours: telling
a thread at the end of every `recv` would cost what it is to save.)
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final, Protocol

TICK_S: Final = 2e-3
"""Between two looks, in seconds; a link is read by somebody after two of them at the latest."""


class Attended(Protocol):
    """A link as it is looked after."""

    watched: bool

    def unattended(self) -> bool | None:
        """Return whether nobody reads it, or None if somebody came or left since the last call."""
        ...

    def summon(self) -> None:
        """Have its own thread read it."""
        ...


class _Standby:
    """The thread that looks, and the links that it looks at; it sleeps while there are none."""

    def __init__(self) -> None:
        self._links: set[Attended] = set()
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, link: Attended) -> None:
        """Look after a link from now on, until it was found with somebody who reads it."""
        with self._lock:
            self._links.add(link)
            link.watched = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stands by", daemon=True)
                self._thread.start()
            if not self._some.is_set():
                self._some.set()

    def _run(self) -> None:
        while True:
            self._some.wait()
            time.sleep(TICK_S)
            with self._lock:
                for link in list(self._links):
                    self._look(link)
                if not self._links:
                    self._some.clear()

    def _look(self, link: Attended) -> None:
        # Said before it is asked: whoever leaves `recv` after that finds it and comes to `watch`.
        link.watched = False
        alone = link.unattended()
        if alone is None:
            link.watched = True
            return
        self._links.discard(link)
        if alone:
            link.summon()


_standby = _Standby()


def watch(link: Attended) -> None:
    """Have somebody read a link whenever nobody is in its `recv`."""
    _standby.watch(link)


def _forget() -> None:
    global _standby
    _standby = _Standby()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads stay with the parent
