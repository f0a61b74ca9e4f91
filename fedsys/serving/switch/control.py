"""The loop that looks, decides and switches, and keeps a record of each decision.

What is needed is loaded at once, in the loop. What is only better is loaded by a thread of its own,
and the loop goes on meanwhile: with all processors busy that may take seconds, in which the loop
may have to go down. No thread has a lower priority: it would hold Python's lock, or one of an
allocator, while it waits for a processor, and requests would wait for that lock.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

from fedsys.errors import ConfigError, first_line
from fedsys.serving.switch.policy import (
    Decision,
    How,
    Objective,
    Profile,
    Signals,
    Standing,
    decide,
    room_of,
    smallest,
)
from fedsys.serving.switch.relief import Backlog, relieve, standbys, tails_of
from fedsys.serving.switch.switcher import Cost, Switcher

KEPT = 1000
"""Records of switches that are kept."""

SHUN_S = 60.0
"""How long a variant that could not be loaded is left alone, in seconds."""

_PAUSE_S = 0.01  # between two decisions, however much they are hurried
_LEARN = 0.3  # weight of the newest switch in the predicted time of the next

_log = logging.getLogger(__name__)


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


@final
class Control:
    """Lets the policy decide again and again, and the switcher carry it out.

    Args:
        switcher: Holds the variant that answers.
        variants: The portfolio.
        objective: What is asked for; may be changed at any time by `aim`.
        signals: What was seen lately.
        tell: Called with each record.
        standby: Share of the weights of the largest variant that smaller ones may take which stay
            in memory; none without.
    """

    def __init__(
        self,
        switcher: Switcher,
        variants: Sequence[Profile],
        objective: Objective,
        signals: Callable[[], Signals],
        tell: Callable[[Record], None] = lambda record: None,
        standby: float = 0.0,
    ) -> None:
        if not variants:
            raise ConfigError("portfolio: must hold at least one variant")
        self._switcher, self._standby = switcher, standby
        self._variants = {v.name: v for v in variants}
        self._objective, self._signals, self._tell = objective, signals, tell
        self.records: deque[Record] = deque(maxlen=KEPT)
        self.standing = Standing(switcher.current)
        self.last: Decision | None = None
        self._shunned: dict[str, float] = {}
        self._ms_per_byte: float | None = None
        self._stop = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._keeper = ThreadPoolExecutor(1, "upkeep")
        self._keeping: tuple[tuple[str, ...], Decision | None, Future[None]] | None = None

    @property
    def objective(self) -> Objective:
        """What is asked for."""
        return self._objective

    def aim(self, objective: Objective) -> None:
        """Ask for something else from now on."""
        self._objective = objective
        self.hurry()

    def hurry(self) -> None:
        """Have the loop decide now, and not at its next interval."""
        self._wake.set()

    def pick(self, backlog: Backlog) -> tuple[str, bool]:
        """Return the variant in memory that should compute a batch, and whether it is in time."""
        current, spare = self._switcher.current, self._switcher.spare
        if len(self._variants) == 1:
            return current, True  # there is nothing else, now or later
        seen = self.last.signals if self.last is not None else Signals(0.0)
        others = [self._variants[name] for name in spare if name in self._variants]
        by, in_time = relieve(self._variants[current], others, backlog, seen, self._objective)
        return by.name, in_time

    def step(self) -> Decision:
        """Look, decide and, if need be, switch; return the decision.

        Something better that has to be loaded first is switched to by a later step, unless no loop
        has been started.
        """
        seen = self._signals()
        self._finish_keeping(seen.time_s)
        usable = [
            v for v in self._variants.values() if self._shunned.get(v.name, 0.0) <= seen.time_s
        ]
        usable = usable or [smallest([*self._variants.values()])]
        helper = self._helper()
        tails = tails_of(usable, helper)
        standing, decision = decide(self.standing, seen, usable, self._objective, tails, helper)
        self._complete(seen)
        self.last = decision
        if decision.after == self._switcher.current and self._switcher.ready:
            self.standing = standing
            self._keep(decision, usable)
        elif self._is_urgent(decision) or decision.after in self._switcher.spare:
            self._follow(decision, standing, usable)
        else:
            self._keep(decision, usable, decision.after)
            if self._thread is None and decision.after in self._switcher.spare:
                self._follow(decision, standing, usable)
        return decision

    def _helper(self) -> Profile | None:
        """Return what takes over what would be late: the smallest that is kept in memory."""
        spare = [self._variants[name] for name in self._switcher.spare]
        return smallest(spare) if spare and self._standby else None

    def _is_urgent(self, decision: Decision) -> bool:
        now = decision.predicted.get(decision.before or "")
        if not self._switcher.ready:  # a switch failed and left nothing in memory
            return True
        return decision.how is How.COLD or now is None or not now.meets(self._objective)

    def _follow(self, decision: Decision, standing: Standing, usable: Sequence[Profile]) -> None:
        record = self._carry_out(decision)
        if record.cost is None:
            standing = dataclasses.replace(standing, current=self._switcher.current)
        self.standing = standing
        self._note(record)
        if record.cost is not None:
            self._keep(decision, usable)

    def _note(self, record: Record) -> None:
        self.records.append(record)
        self._tell(record)

    def _complete(self, seen: Signals) -> None:
        """Add to the last switch what was measured after it."""
        last = self.records[-1] if self.records else None
        if last is None or last.cost is None or last.p95_after_ms is not None:
            return
        if seen.p95_ms is not None and seen.time_s - last.decision.time_s >= 1.0:
            self.records[-1] = dataclasses.replace(last, p95_after_ms=seen.p95_ms)

    def _expected_ms(self, name: str) -> float | None:
        if name in self._switcher.spare and self._keeping is None:
            return 0.0
        size = self._variants[name].bytes
        return None if self._ms_per_byte is None else self._ms_per_byte * size

    def _carry_out(self, decision: Decision) -> Record:
        expected, before = self._expected_ms(decision.after), decision.signals.p95_ms
        try:
            cold = decision.how is How.COLD
            if cold:  # what is there need not be read again
                there = decision.after in self._switcher.spare
                self._switcher.keep((decision.after,) if there else ())
            cost = self._switcher.switch(decision.after, beside=not cold)
        except Exception as error:  # of a file, of torch, for want of memory: the record says it
            return self._failed(decision, error)
        if cost.prepare_ms:
            rate = cost.prepare_ms / max(1, self._variants[decision.after].bytes)
            old = self._ms_per_byte
            self._ms_per_byte = rate if old is None else old + _LEARN * (rate - old)
        return Record(decision, expected, cost, "", before)

    def _failed(self, decision: Decision, error: BaseException) -> Record:
        self._shunned[decision.after] = decision.time_s + SHUN_S
        expected = self._expected_ms(decision.after)
        return Record(decision, expected, None, first_line(error), decision.signals.p95_ms)

    # ------------------------------------------------------------------------ what stays in memory

    def _keep(self, decision: Decision, usable: Sequence[Profile], *also: str) -> None:
        """Have the standbys loaded beside the requests, and what is to answer next."""
        current = self._variants[self._switcher.current]
        free = dataclasses.replace(decision.signals, free_memory=None)
        room = room_of(free, self._objective, current)
        if decision.signals.free_memory is not None:
            held = sum(self._variants[name].bytes for name in self._switcher.spare)
            room = min(room, decision.signals.free_memory + current.peak_bytes + held)
        names = standbys(usable, current, room, self._standby)
        names = (*names, *(name for name in also if name not in names))
        if self._keeping is not None or set(names) == set(self._switcher.spare):
            return
        future = self._keeper.submit(self._switcher.keep, names)
        self._keeping = names, decision if also else None, future
        if self._thread is None:
            self._finish_keeping(decision.time_s, wait=True)

    def _finish_keeping(self, now_s: float, *, wait: bool = False) -> None:
        """Look whether loading has ended; a variant that failed is left alone for a while."""
        if self._keeping is None or not (wait or self._keeping[2].done()):
            return
        names, decision, future = self._keeping
        self._keeping = None
        error = future.exception()
        if error is None:
            return
        there = (self._switcher.current, *self._switcher.spare)
        for name in [name for name in names if name not in there][:1]:
            self._shunned[name] = now_s + SHUN_S
            if decision is not None and decision.after == name:
                self._note(self._failed(decision, error))

    def start(self, interval_s: float) -> None:
        """Decide every `interval_s` seconds in a thread of its own, until it is closed.

        It decides at once where it is hurried. If it was told a first decision (`last`), the
        variants that stay in memory are there when this returns: a rush may come at once.
        """
        if self.last is not None:
            self._keep(self.last, list(self._variants.values()))
        self._thread = threading.Thread(
            target=self._loop, args=(interval_s,), name="switch control", daemon=True
        )
        self._thread.start()

    def _loop(self, interval_s: float) -> None:
        while True:
            self._wake.wait(interval_s)
            self._wake.clear()
            if self._stop:
                return
            try:
                self.step()
            except Exception:  # signals come from the system; requests are answered all the same
                _log.exception("a decision on variants failed; what answers stays")
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Decide no more; a switch in work is finished."""
        self._stop = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._keeper.shutdown(cancel_futures=True)
