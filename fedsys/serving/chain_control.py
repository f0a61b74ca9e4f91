"""The loop that looks at a chain's conditions, decides on its cuts, and keeps a record."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, final

from fedsys.errors import FedsysError, first_line
from fedsys.partition.conditions import Observer, told, under
from fedsys.partition.controller import MoveRules, Sight, StandingCuts, Verdict, decide_move
from fedsys.partition.problem import Partition, Problem
from fedsys.serving.chain import ChainEngine

_LEARN = 0.3  # weight of the newest change in what the next is expected to cost

_log = logging.getLogger(__name__)


@final
class ChainControl:
    """Lets the controller decide again and again, and the engine carry it out.

    Args:
        engine: Whose cuts change.
        problem: What is expected of hosts and links.
        rules: When cuts change.
        observer: Was told of requests.
        tell: Called with each record of a change, or of one that failed.
        among: The partitions that are looked at; empty: all.

    Attributes:
        records: Changes, and those that failed, as plain values.
        last: The last decision, as plain values.
    """

    def __init__(
        self,
        engine: ChainEngine,
        problem: Problem,
        rules: MoveRules,
        observer: Observer,
        tell: Callable[[Mapping[str, Any]], None] = lambda record: None,
        among: tuple[Partition, ...] = (),
    ) -> None:
        self._engine, self._problem, self._rules = engine, problem, rules
        self._observer, self._tell, self._among = observer, tell, among
        self.place = StandingCuts(engine.partition)
        self.records: deque[Mapping[str, Any]] = deque(maxlen=1000)
        self.last: Mapping[str, Any] = {}
        self._cost_s, self._answers, self._looked_s = 0.0, 0, time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self) -> Mapping[str, Any]:
        """Look, decide and, if need be, change the cuts; return what was decided."""
        now = time.monotonic()
        if self._engine.home not in ("", self._engine.switcher.current):
            self.last = {"time_s": time.time(), "verdict": "stay", "reason": "a host is lost"}
            return self.last
        self._look()
        conditions = self._observer.conditions()
        answers = self._engine.answered
        rate = (answers - self._answers) / max(1e-3, now - self._looked_s)
        self._answers, self._looked_s = answers, now
        problem = under(self._problem, conditions)
        sight = Sight(now, problem, self._observer.took_s, rate, self._cost_s * rate, self._among)
        place, decision = decide_move(self.place, sight, self._rules)
        names = [host.name for host in problem.hosts]
        self.last = {
            "time_s": time.time(),
            "verdict": decision.verdict.value,
            "cuts": list(decision.partition.cuts),
            "now_ms": 1e3 * decision.now_s,
            "best_ms": 1e3 * decision.best_s,
            "reason": decision.reason,
            "conditions": told(conditions, names),
        }
        if decision.verdict is Verdict.STAY:
            self.place = place
        else:
            self._carry_out(place)
        return self.last

    def _look(self) -> None:
        """Have hosts say what others take there, and what memory there is; some may be silent."""
        for index, host in enumerate(self._engine.chain.hosts):
            with suppress(FedsysError, KeyError, TypeError, ValueError):
                told = host.ask("status").meta
                room = float(told["free_bytes"]) + float(told["weights_bytes"])
                self._observer.noted(index, float(told["others"]), room)

    def _carry_out(self, place: StandingCuts) -> None:
        before = self.place
        try:
            why = {"reason": self.last["reason"], "predicted_ms": self.last["best_ms"]}
            cost = self._engine.move(place.partition, why)
        except FedsysError as error:
            until = time.monotonic() + self._rules.shun_s
            shunned = {**before.shunned, place.partition.cuts: until}
            self.place = dataclasses.replace(before, shunned=shunned)
            self._record({**self.last, "error": first_line(error)})
            return
        self.place = place
        self._observer.forget()
        blocked = cost.blocked_ms / 1e3
        self._cost_s += _LEARN * (blocked - self._cost_s)
        self._record({**self.last, "blocked_ms": cost.blocked_ms, "prepare_ms": cost.prepare_ms})

    def _record(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        self._tell(record)

    def start(self, interval_s: float) -> None:
        """Decide every `interval_s` seconds in a thread of its own, until it is closed."""
        self._thread = threading.Thread(
            target=self._loop, args=(interval_s,), name="chain control", daemon=True
        )
        self._thread.start()

    def _loop(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            try:
                self.step()
            except Exception:  # a decision that fails changes nothing: requests go on
                _log.exception("a decision on cuts failed; they stay")

    def close(self) -> None:
        """Decide no more; a change in work is finished."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
