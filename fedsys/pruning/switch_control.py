"""The loop that looks, decides and switches, and keeps a record of each decision."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

from fedsys.errors import ConfigError, first_line
from fedsys.pruning.switch import Cost, Switcher
from fedsys.pruning.switch_policy import (
    Decision,
    How,
    Objective,
    Profile,
    Signals,
    Standing,
    decide,
    smallest,
)

KEPT = 1000
"""Records of switches that are kept."""

SHUN_S = 60.0
"""How long a variant that could not be loaded is left alone, in seconds."""

_NICE = 10
_LEARN = 0.3  # weight of the newest switch in the predicted time of the next


@dataclass(frozen=True)
class Record:
    """One switch, or one that failed.

    Attributes:
        decision: What was decided and why, with the predicted latencies.
        predicted_ms: Expected duration of loading and warming up; None before the first.
        cost: What the switch took; None if it failed.
        error: Why it failed.
        p95_before_ms: Of the answers before it, as measured.
        p95_after_ms: Of the answers after it, at the next decision that had some.
    """

    decision: Decision
    predicted_ms: float | None
    cost: Cost | None
    error: str = ""
    p95_before_ms: float | None = None
    p95_after_ms: float | None = None

    def as_row(self) -> dict[str, Any]:
        """Return it as plain values for JSON, without the signals that nobody reads later."""
        d, after = self.decision, self.decision.predicted[self.decision.after]
        return {
            "time_s": d.time_s,
            "before": d.before,
            "after": d.after,
            "how": d.how.value,
            "reason": d.reason,
            "meets_objective": d.meets,
            "predicted_p95_ms": after.p95_ms,
            "p95_before_ms": self.p95_before_ms,
            "p95_after_ms": self.p95_after_ms,
            "predicted_prepare_ms": self.predicted_ms,
            **(dataclasses.asdict(self.cost) if self.cost else {}),
            "error": self.error,
        }


def give_way() -> None:
    """Give this thread a lower priority for good: a variant is loaded beside requests."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):  # a sandbox may forbid it; then loading is only less polite
            who = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, who)
            os.setpriority(os.PRIO_PROCESS, who, max(own, _NICE))


@final
class Control:
    """Lets the policy decide again and again, and the switcher carry it out.

    Args:
        switcher: Holds the variant that answers.
        variants: The portfolio.
        objective: What is asked for; may be changed at any time by `aim`.
        signals: What was seen lately.
        tell: Called with each record.
    """

    def __init__(
        self,
        switcher: Switcher,
        variants: Sequence[Profile],
        objective: Objective,
        signals: Callable[[], Signals],
        tell: Callable[[Record], None] = lambda record: None,
    ) -> None:
        if not variants:
            raise ConfigError("portfolio: must hold at least one variant")
        self._switcher, self._variants = switcher, tuple(variants)
        self._objective, self._signals, self._tell = objective, signals, tell
        self.records: deque[Record] = deque(maxlen=KEPT)
        self.standing = Standing(switcher.current)
        self.last: Decision | None = None
        self._shunned: dict[str, float] = {}
        self._ms_per_byte: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def objective(self) -> Objective:
        """What is asked for."""
        return self._objective

    def aim(self, objective: Objective) -> None:
        """Ask for something else from now on."""
        self._objective = objective

    def step(self) -> Decision:
        """Look, decide and, if need be, switch; return the decision."""
        seen = self._signals()
        usable = [v for v in self._variants if self._shunned.get(v.name, 0.0) <= seen.time_s]
        usable = usable or [smallest(self._variants)]
        standing, decision = decide(self.standing, seen, usable, self._objective)
        self._complete(seen)
        if decision.after != self._switcher.current:
            record = self._carry_out(decision)
            if record.cost is None:
                standing = dataclasses.replace(standing, current=self._switcher.current)
            self.records.append(record)
            self._tell(record)
        self.standing, self.last = standing, decision
        return decision

    def _complete(self, seen: Signals) -> None:
        """Add to the last switch what was measured after it."""
        last = self.records[-1] if self.records else None
        if last is None or last.cost is None or last.p95_after_ms is not None:
            return
        if seen.p95_ms is not None and seen.time_s - last.decision.time_s >= 1.0:
            self.records[-1] = dataclasses.replace(last, p95_after_ms=seen.p95_ms)

    def _carry_out(self, decision: Decision) -> Record:
        size = next(v.bytes for v in self._variants if v.name == decision.after)
        expected = None if self._ms_per_byte is None else self._ms_per_byte * size
        before = decision.signals.p95_ms
        try:
            cost = self._switch(decision)
        except Exception as error:  # of a file, of torch, for want of memory: the record says it
            self._shunned[decision.after] = decision.time_s + SHUN_S
            return Record(decision, expected, None, first_line(error), before)
        rate = cost.prepare_ms / max(1, size)
        old = self._ms_per_byte
        self._ms_per_byte = rate if old is None else old + _LEARN * (rate - old)
        return Record(decision, expected, cost, "", before)

    def _switch(self, decision: Decision) -> Cost:
        """Switch: at once if the objective is missed, else politely, as nobody waits for it."""
        beside = decision.how is not How.COLD
        now = decision.predicted.get(decision.before or "")
        if not beside or now is None or not now.meets(self._objective):
            return self._switcher.switch(decision.after, beside=beside)
        with ThreadPoolExecutor(1, "switch", give_way) as polite:
            return polite.submit(self._switcher.switch, decision.after).result()

    def start(self, interval_s: float) -> None:
        """Decide every `interval_s` seconds in a thread of its own, until it is closed."""
        self._thread = threading.Thread(
            target=self._loop, args=(interval_s,), name="switch control", daemon=True
        )
        self._thread.start()

    def _loop(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self.step()

    def close(self) -> None:
        """Decide no more; a switch in work is finished."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
