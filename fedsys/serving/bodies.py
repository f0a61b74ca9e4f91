"""Bodies of requests, read up to their limit, and all of them within one limit of memory.

A small body is read as it comes. A larger one asks for as much memory as it says that it has, and
is read no further until others have ended: TCP holds its client back, not memory here. Who asks for
memory and then sends slowly gives it back to those who wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request

from fedsys.config.serving import ServingConfig
from fedsys.errors import RequestError

DISCARD_S = 60.0
"""How long the rest of a body that is too large is read and dropped, in seconds.

A client hears the refusal only after it has sent its body, and whoever closes before cuts it off.
"""

FREE_BYTES = 65_536
"""Of each body that are read without asking: uvicorn buffers as many."""

MOST_WAITING = 64
"""Bodies that may wait for memory; further ones are refused."""

SLOW_RATE = 65_536.0
"""Bytes per second below which a body that has memory gives it to one that waits."""

_PATIENCE_S = 1.0


@dataclass(eq=False)
class _Share:
    """What one body has of the memory."""

    deadline: asyncio.Timeout | None = None
    held: int = 0
    got: int = 0
    since: float = 0.0
    complete: bool = False
    granted: asyncio.Future[None] = field(default_factory=asyncio.Future)

    def is_slow(self, now: float) -> bool:
        took = now - self.since
        return not self.complete and took > _PATIENCE_S and self.got < SLOW_RATE * took


@final
class Bodies:
    """Reads the bodies of one endpoint.

    Args:
        options: Limits.
    """

    def __init__(self, options: ServingConfig) -> None:
        self._options = options
        self._free = min(FREE_BYTES, options.max_body_bytes)
        self._total = max(options.max_waiting_bytes, options.max_body_bytes)
        self._shares: list[_Share] = []
        self._queue: deque[tuple[int, _Share]] = deque()
        self._refused = self._hurried = 0

    def small(self, request: Request) -> bytes | bytearray | None:
        """Return a small body that has come already; None if it is large, or not there yet.

        It takes no memory that counts. That it is there, uvicorn knows of the request, and gives
        out a copy; so it is taken from where it lies.
        """
        of: Any = getattr(request.receive, "__self__", None)
        if getattr(of, "more_body", True) or len(of.body) > self._free:
            return None
        if self._refusal(request) is not None:
            return None
        body: bytes | bytearray = of.body
        of.body = bytearray()
        return body

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the body; its memory counts until the block ends.

        Raises:
            RequestError: It is compressed, too large or too slow, or too many others are here.
        """
        share = _Share()
        try:
            yield await self._read(request, share)
        finally:
            self._give_back(share)

    async def _read(self, request: Request, share: _Share) -> bytearray:
        stream = request.stream()
        refusal = self._refusal(request)
        body = bytearray()
        of: Any = getattr(request.receive, "__self__", None)
        if refusal is not None and getattr(of, "waiting_for_100_continue", False):
            raise refusal  # its client has sent no body yet, and need not
        try:
            if refusal is None:
                async with asyncio.timeout(self._options.timeout_s) as share.deadline:
                    await self._fill(body, request, stream, share)
                    return body
        except TimeoutError as error:
            if self._is_waiting(share):
                refusal = self._busy()
            else:
                limit = f"serving.timeout_s={self._options.timeout_s:g}"
                text = f"the body did not arrive within {limit}, or others waited for its memory"
                raise RequestError(408, text) from error
        except RequestError as error:
            refusal = error
        del body
        self._give_back(share)
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                async for _ in stream:
                    pass
        assert refusal is not None
        raise refusal

    def _refusal(self, request: Request) -> RequestError | None:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            return RequestError(415, f"Content-Encoding: {encoding[:30]}: must be identity")
        declared = _declared(request)
        if declared is not None and declared > self._options.max_body_bytes:
            return self._too_large(declared)
        return None

    async def _fill(
        self, body: bytearray, request: Request, stream: AsyncIterator[bytes], share: _Share
    ) -> None:
        limit = self._options.max_body_bytes
        async for chunk in stream:
            size = len(body) + len(chunk)
            if size > limit:
                raise self._too_large(size)
            if size > FREE_BYTES and not share.held:
                declared = _declared(request)
                await self._ask(share, limit if declared is None else declared)
            body += chunk
            share.got = size
        share.complete = True

    def _too_large(self, size: int) -> RequestError:
        must = f"serving.max_body_bytes={self._options.max_body_bytes:,}"
        return RequestError(413, f"the body has {size:,} bytes or more: must be at most {must}")

    # ----------------------------------------------------------------------------------------------
    # Memory

    @property
    def held(self) -> int:
        """Bytes that are asked for and given."""
        return sum(share.held for share in self._shares)

    async def _ask(self, share: _Share, size: int) -> None:
        """Wait until there is memory, in the order of asking.

        Raises:
            RequestError: Too many wait already.
        """
        if len(self._queue) >= MOST_WAITING:
            raise self._busy()
        self._queue.append((size, share))
        self._grant()
        while not share.granted.done():
            self._hurry()
            await asyncio.wait({share.granted}, timeout=_PATIENCE_S / 2)

    def _grant(self) -> None:
        while self._queue and self.held + self._queue[0][0] <= self._total:
            size, share = self._queue.popleft()
            share.held, share.since = size, time.monotonic()
            self._shares.append(share)
            share.granted.set_result(None)

    def _give_back(self, share: _Share) -> None:
        self._queue = deque(entry for entry in self._queue if entry[1] is not share)
        if share in self._shares:
            self._shares.remove(share)
        self._grant()

    def _hurry(self) -> None:
        """End the slowest body that has memory while others wait for it."""
        now = time.monotonic()
        slow = [share for share in self._shares if share.is_slow(now)]
        if slow:
            slowest = min(slow, key=lambda share: share.got / (now - share.since))
            slowest.complete = True  # once
            self._hurried += 1
            assert slowest.deadline is not None
            slowest.deadline.reschedule(asyncio.get_running_loop().time())

    def _is_waiting(self, share: _Share) -> bool:
        return any(entry[1] is share for entry in self._queue)

    def _busy(self) -> RequestError:
        self._refused += 1
        rule = f"serving.max_waiting_bytes={self._options.max_waiting_bytes:,}"
        return RequestError(503, f"large requests wait for memory ({rule}); ask again later")

    def collect(self) -> Iterator[Metric]:
        """Yield what Prometheus is told."""
        name = "fedsys_serving_bodies"
        yield GaugeMetricFamily(f"{name}_bytes", "Memory of large requests.", value=self.held)
        yield GaugeMetricFamily(
            f"{name}_waiting", "Large requests that wait for memory.", value=len(self._queue)
        )
        yield CounterMetricFamily(
            f"{name}_refused", "Large requests refused for memory.", value=self._refused
        )
        yield CounterMetricFamily(
            f"{name}_slow", "Large requests ended as they came slowly while others waited.",
            value=self._hurried,
        )  # fmt: skip


def _declared(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < 19 else None
