"""Requests of an event loop, computed in it where that is quick, and else in threads beside it.

A request that is alone is computed at once. Where others are there, all that came in one turn of
the loop are computed in one batch at its end: with eight clients that is what arrived while the
batch before was computed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import final

from fedsys.serving.batching import Batcher, Served
from fedsys.serving.engine import Array


@final
class LoopTurns:
    """Has the requests of one event loop computed.

    Args:
        batcher: Computes.
        alone: Whether no other request is there that has not been submitted yet.
    """

    def __init__(self, batcher: Batcher, alone: Callable[[], bool]) -> None:
        self._batcher, self._alone = batcher, alone
        self._due = False

    async def served(self, images: Array, seconds: float) -> Served:
        """Return the answer to a request.

        Args:
            images: Normalised float32 ``(rows, C, H, W)``.
            seconds: Longest time for it; then it is not computed any more.

        Raises:
            TimeoutError: That time is over.
            RequestError: It is refused, or failed.
        """
        if self._alone() and (served := self._batcher.at_once(images)) is not None:
            return served
        future = self._batcher.submit(images, wake=False)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Served] = loop.create_future()
        future.add_done_callback(partial(_tell, loop, threading.get_ident(), waiter))
        if not self._due:
            self._due = True
            loop.call_soon(self._work_off, loop)
        timer = loop.call_later(max(seconds, 0.001), _give_up, waiter)
        try:
            return await waiter
        finally:
            timer.cancel()
            future.cancel()  # what is done, or being computed, does not mind

    def _work_off(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = False
        if self._batcher.work_off():  # one batch in a turn: others want to be heard
            self._due = True
            loop.call_soon(self._work_off, loop)


def _give_up(waiter: asyncio.Future[Served]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


def _tell(
    loop: asyncio.AbstractEventLoop,
    thread: int,
    waiter: asyncio.Future[Served],
    future: Future[Served],
) -> None:
    if threading.get_ident() == thread:
        _hand_over(waiter, future)
        return
    with suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(_hand_over, waiter, future)


def _hand_over(waiter: asyncio.Future[Served], future: Future[Served]) -> None:
    if waiter.done() or future.cancelled():
        return
    error = future.exception()
    if error is None:
        waiter.set_result(future.result())
    else:
        waiter.set_exception(error)
