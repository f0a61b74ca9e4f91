"""Requests to an endpoint over HTTP at moments of their own, and what became of each."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, final

from fedsys.commands.bench.crowd import Form
from fedsys.serving import v2

_TIMEOUT_S = 60.0
_AT_ONCE = 32  # requests that may be on their way
_TICK_S = 0.1


@dataclass(frozen=True)
class TimedAnswer:
    """One request.

    Attributes:
        at_s: When it was sent, by `time.time`.
        ms: How long its answer took, in milliseconds.
        technique: What stood in for lost hosts when it was answered; ``none`` for nothing.
        cuts: Of who answered.
        error: Why there was no answer; empty if there was.
    """

    at_s: float
    ms: float
    technique: str = "none"
    cuts: str = ""
    error: str = ""

    @property
    def ended_s(self) -> float:
        """When the answer was there."""
        return self.at_s + self.ms / 1e3


def asked(address: str, form: Form) -> TimedAnswer:
    """Send one request, and wait for its answer."""
    at_s, began = time.time(), time.perf_counter()
    facts: Mapping[str, Any] = {}
    error = ""
    place = address.removeprefix("http://")
    try:
        with closing(http.client.HTTPConnection(place, timeout=_TIMEOUT_S)) as connection:
            connection.request(form.method, form.path, form.body, form.headers)
            response = connection.getresponse()
            body = response.read()
        if response.status == 200:
            head = int(response.headers.get(v2.HEADER_LENGTH) or len(body))
            facts = json.loads(body[:head]).get("parameters", {})
        else:
            error = f"status {response.status}"
    except (OSError, http.client.HTTPException, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    ms = (time.perf_counter() - began) * 1e3
    return TimedAnswer(
        at_s, ms, str(facts.get("technique", "none")), str(facts.get("cuts", "")), error
    )


@final
class PacedLoad:
    """Asks at equal distances until it is closed; requests do not wait for each other.

    Args:
        ask: Sends one request.
        rate: Requests per second; may be changed at any time.

    Attributes:
        rate: As given.
        answers: Requests that have ended.
        late: Requests that came due while as many as may be were under way.
    """

    def __init__(self, ask: Callable[[], TimedAnswer], rate: float) -> None:
        self.rate, self.answers, self.late = rate, list[TimedAnswer](), 0
        self._ask, self._issued, self._end = ask, 0, threading.Event()
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._thread = threading.Thread(target=self._issue, daemon=True)
        self._thread.start()

    def _issue(self) -> None:
        due = time.monotonic()
        while not self._end.wait(min(_TICK_S, max(0.0, due - time.monotonic()))):
            if time.monotonic() < due:
                continue
            due += 1 / self.rate
            if self._issued - len(self.answers) >= _AT_ONCE:
                self.late += 1
                continue
            self._issued += 1
            self._pool.submit(self._one)

    def _one(self) -> None:
        self.answers.append(self._ask())

    def close(self) -> Sequence[TimedAnswer]:
        """Ask no more; return all requests, in the order in which they were sent."""
        self._end.set()
        self._thread.join()
        self._pool.shutdown()
        return sorted(self.answers, key=lambda one: one.at_s)
