"""A link with faults: values in a list, fired by counting frames, the same in every run."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedsys.errors import ConfigError, FrameError, LinkClosed, LinkTimeout
from fedsys.transport.link import Link
from fedsys.transport.link_around import LinkAround
from fedsys.transport.wire import Buffer, Frame, decode, encode, kind_of

OVERTAKING_S = 0.1
"""How long a received frame waits for one that overtakes it."""

FaultKind = Literal["cut", "delay", "duplicate", "reorder", "corrupt", "drop"]


@dataclass(frozen=True, slots=True)
class LinkFault:
    """One fault of one link, seen from the end that is wrapped.

    Attributes:
        kind: ``cut`` ends the link; ``delay`` holds the frame for `delay_s`; ``duplicate`` gives
            it twice; ``reorder`` puts it after the next one (or, if this end then waits for an
            answer, merely late); ``corrupt`` flips one bit; ``drop`` loses it.
        frame: Which one it hits, counted from 0 among the frames of its direction and `of_kind`.
        direction: Frames that this end sends, or receives.
        when: For ``cut``: before the frame has passed (it is lost), or after.
        of_kind: Count frames of this kind only; empty: all.
        delay_s: For ``delay``, in seconds.

    Raises:
        ConfigError: A value is outside of what is said here.
    """

    kind: FaultKind
    frame: int = 0
    direction: Literal["send", "recv"] = "send"
    when: Literal["before", "after"] = "before"
    of_kind: str = ""
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            known = ", ".join(get_args(FaultKind))
            raise ConfigError.of("faults.kind", self.kind, f"must be one of {known}")
        if self.direction not in ("send", "recv") or self.when not in ("before", "after"):
            at = f"{self.direction}, {self.when}"
            raise ConfigError.of("faults", at, "must be send or recv, and before or after")
        if self.frame < 0 or self.delay_s < 0:
            at = f"frame {self.frame}, {self.delay_s} s"
            raise ConfigError.of("faults", at, "must not be negative")


class Faulty(LinkAround):
    """A link that does what a list of faults says, once each.

    Args:
        link: The link to wrap; closed with this one.
        faults: Fired in the order in which their frames come.
        sleep: How to wait for a delay; replaced in tests.

    Attributes:
        fired: The faults that have fired so far, in order.
    """

    def __init__(
        self,
        link: Link,
        faults: Iterable[LinkFault],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(link)
        self._sleep = sleep
        self._waiting = list(faults)
        self.fired: list[LinkFault] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._held: list[bytes] = []  # sent frames that a reordering keeps back
        self._ready: deque[Frame] = deque()  # received frames to be given before others
        self._lock = threading.RLock()

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        """Send the bytes of a frame, or what a fault makes of them."""
        with self._lock:
            fault = self._next("send", kind_of(parts[0]))
            match fault.kind if fault else None:
                case "drop":
                    pass
                case "reorder":
                    self._held.append(b"".join(parts))
                    return
                case "corrupt":
                    self.inner.send_encoded([_flip(b"".join(parts))])
                case "duplicate":
                    data = b"".join(parts)
                    self.inner.send_encoded([data])
                    self.inner.send_encoded([data])
                case "cut" if fault and fault.when == "before":
                    self._cut()
                case _:
                    if fault and fault.kind == "delay":
                        self._sleep(fault.delay_s)
                    self.inner.send_encoded(parts)
            self._release()
            if fault and fault.kind == "cut":
                self.inner.close()

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Return the next frame, or do what a fault makes of it."""
        with self._lock:
            self._release()
        while not self._ready:
            frame = self.inner.recv(timeout_s)
            with self._lock:
                fault = self._next("recv", frame.kind)
                match fault.kind if fault else None:
                    case "drop":
                        pass
                    case "reorder":
                        self._ready.extend((*self._next_soon(timeout_s), frame))
                    case "corrupt":
                        self._refuse(frame)
                    case "duplicate":
                        self._ready.extend((frame, frame))
                    case "cut" if fault and fault.when == "before":
                        self._cut()
                    case _:
                        if fault and fault.kind == "delay":
                            self._sleep(fault.delay_s)
                        if fault and fault.kind == "cut":
                            self.inner.close()
                        self._ready.append(frame)
        return self._ready.popleft()

    def close(self) -> None:
        """Close the link that is wrapped."""
        with self._lock:
            self._held.clear()
        self.inner.close()

    def _next(self, direction: str, kind: str) -> LinkFault | None:
        """Count one frame; return the fault that hits it."""
        indices = {"": self._seen[direction, ""], kind: self._seen[direction, kind]}
        self._seen.update([(direction, ""), (direction, kind)])
        for fault in self._waiting:
            if fault.direction == direction and indices.get(fault.of_kind) == fault.frame:
                self._waiting.remove(fault)
                self.fired.append(fault)
                return fault
        return None

    def _next_soon(self, timeout_s: float | None) -> list[Frame]:
        """Return the frame that overtakes another, or nothing if none is under way."""
        try:
            return [self.inner.recv(min(OVERTAKING_S, timeout_s or OVERTAKING_S))]
        except LinkTimeout:
            return []

    def _release(self) -> None:
        while self._held:
            self.inner.send_encoded([self._held.pop(0)])

    def _cut(self) -> None:
        self.inner.close()
        raise LinkClosed(f"the link to {self.peer or 'the peer'} was lost (a fault of the run)")

    def _refuse(self, frame: Frame) -> None:
        try:
            decode(_flip(encode(frame)))
        except FrameError:
            self.inner.close()
            raise


def _flip(data: bytes) -> bytes:
    """Flip one bit of the header, which every frame has."""
    damaged = bytearray(data)
    damaged[40] ^= 1
    return bytes(damaged)
