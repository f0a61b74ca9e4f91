"""Watching hosts: heartbeats over a link of their own, and urgent orders on the same.

Each host has two threads here: one reads answers, dials again when the link has ended, and so sees
a closed connection at once; the other one, for all hosts, sends heartbeats and looks at the clock.
A host answers on its control links beside what it computes, so a heartbeat does not wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, final

from fedsys.errors import FedsysError, LinkError, RuntimeFailure, first_line
from fedsys.partition.remote_host import RemoteHost
from fedsys.serving.recovery import detector
from fedsys.serving.recovery.detector import DetectorRules, Health, Heart
from fedsys.transport.link import Link
from fedsys.transport.wire import Frame

Tell = Callable[[int, Heart], None]
"""Is told of a host whose health has changed, or that wants to leave: its index, and what is known.
Must return at once."""

_AGAIN_S = (0.1, 2.0)  # between two attempts to reach a host: the first, and at most
_ORDER_S = 2.0  # for a host to carry out an urgent order

_log = logging.getLogger(__name__)


@final
class _Watched:
    """One host: its link, what is known of it, and who waits for its replies."""

    def __init__(self, host: RemoteHost) -> None:
        self.host, self.heart = host, Heart()
        self.link: Link | None = None
        self.lock, self.ordering = threading.Lock(), threading.Lock()
        self.sent_s: dict[int, float] = {}
        self.replies: SimpleQueue[Frame | None] = SimpleQueue()


@final
class HostWatch:
    """Watches hosts until it is closed.

    Args:
        hosts: In their order in the chain.
        rules: How patient verdicts are.
        tell: Is told of changes.

    Raises:
        ConfigError: A host cannot be reached at the beginning.
    """

    def __init__(self, hosts: Sequence[RemoteHost], rules: DetectorRules, tell: Tell) -> None:
        self._rules, self._tell = rules, tell
        self._watched = [_Watched(host) for host in hosts]
        self._numbers, self._end = count(), threading.Event()
        self._threads: list[threading.Thread] = []
        try:
            for one in self._watched:
                one.link = one.host.connect()
        except FedsysError:
            self.close()
            raise
        beat = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._threads.append(beat)
        for index, one in enumerate(self._watched):
            name = f"heart of {one.host.name}"
            self._threads.append(
                threading.Thread(target=self._follow, args=(index, one), name=name, daemon=True)
            )
        for thread in self._threads:
            thread.start()

    @property
    def hearts(self) -> tuple[Heart, ...]:
        """What is known of each host."""
        return tuple(one.heart for one in self._watched)

    def end(self, index: int, why: str) -> None:
        """Take note that a host cannot be reached any more by another one."""
        self._change(index, lambda heart: detector.ended(heart, why))

    def lost(self, name: str, why: str) -> None:
        """Do so by the name of the host; returns at once."""
        for index, one in enumerate(self._watched):
            if one.host.name == name:
                self.end(index, why)

    def order(self, index: int, kind: str, meta: Mapping[str, Any]) -> Frame:
        """Have a host do something at once, beside what else it is asked for.

        Raises:
            RuntimeFailure: It refuses, or is lost.
        """
        one = self._watched[index]
        with one.ordering:
            while not one.replies.empty():
                one.replies.get()  # of an order that nobody waited for
            try:
                if one.link is None:
                    raise RuntimeFailure(f"{one.host.name} is lost")
                one.link.send(Frame(kind, dict(meta)))
                reply = one.replies.get(timeout=_ORDER_S)
            except (LinkError, Empty) as error:
                raise RuntimeFailure(f"{one.host.name} is lost: {error!r}") from error
        if reply is None or reply.kind == "refused":
            why = "it is lost" if reply is None else reply.meta.get("reason")
            raise RuntimeFailure(f"{one.host.name}: {why}")
        return reply

    def _change(self, index: int, change: Callable[[Heart], Heart]) -> None:
        one = self._watched[index]
        with one.lock:
            before, one.heart = one.heart, change(one.heart)
            after = one.heart
        if (after.health, after.leaves) != (before.health, before.leaves):
            self._tell(index, after)

    # ----------------------------------------------------------------------------------------------
    # Threads

    def _beat(self) -> None:
        tick = min(self._rules.interval_s, self._rules.floor_s / 4)
        due_s = time.monotonic()
        while not self._end.wait(tick):
            now = time.monotonic()
            for index in range(len(self._watched)):
                self._change(index, lambda heart: detector.look(heart, now, self._rules))  # noqa: B023
                suspected = self._watched[index].heart.health is Health.SUSPECTED
                if now >= due_s or suspected:
                    self._ping(index)
            if now >= due_s:
                due_s = now + self._rules.interval_s

    def _ping(self, index: int) -> None:
        one, number = self._watched[index], next(self._numbers)
        link = one.link
        if link is None or one.heart.full:
            return
        with one.lock:
            one.heart = detector.sent(one.heart, number)
            one.sent_s[number] = time.monotonic()
        try:
            link.send(Frame("ping", {"id": number}))
        except LinkError as error:
            self.end(index, first_line(error))

    def _follow(self, index: int, one: _Watched) -> None:
        wait_s = _AGAIN_S[0]
        while not self._end.is_set():
            if one.link is not None:
                self._read(index, one, one.link)
                one.link, wait_s = None, _AGAIN_S[0]
                continue
            if self._end.wait(wait_s):
                return
            wait_s = min(2 * wait_s, _AGAIN_S[1])
            try:
                one.link = one.host.connect()
            except FedsysError as error:
                _log.debug("%s is not there: %s", one.host.name, first_line(error))
                continue
            if self._end.is_set():
                one.link.close()

    def _read(self, index: int, one: _Watched, link: Link) -> None:
        try:
            while True:
                frame = link.recv()
                if frame.kind == "pong":
                    self._heard(index, one, frame)
                else:
                    one.replies.put(frame)
        except LinkError as error:
            reason = first_line(error)
        link.close()
        one.sent_s.clear()
        one.replies.put(None)
        if not self._end.is_set():
            self.end(index, reason)

    def _heard(self, index: int, one: _Watched, frame: Frame) -> None:
        number, leaves = frame.meta.get("id"), bool(frame.meta.get("leaves"))
        if type(number) is not int or (sent_s := one.sent_s.pop(number, None)) is None:
            return
        took = frame.arrived_s - sent_s
        self._change(index, lambda heart: detector.answered(heart, number, took, leaves))

    def close(self) -> None:
        """Watch no more."""
        self._end.set()
        for one in self._watched:
            if one.link is not None:
                one.link.close()
        for thread in self._threads:
            thread.join()
