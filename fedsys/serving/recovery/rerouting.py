"""Where requests go: at once another way when theirs is lost, and the best way when it stands.

All of it is called by one thread, that of `fedsys.serving.recovery.continuer`, which never waits:
what takes time is told to a `PipelineBuilder`, and what became of it comes back as `built`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol, final
from weakref import WeakSet

from fedsys.errors import PipelineLeft, RuntimeFailure, first_line
from fedsys.partition.problem import Partition
from fedsys.serving.chain import ChainEngine, ChainModule
from fedsys.serving.recovery.building import BuiltPipeline, PipelineBuilder
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective
from fedsys.serving.recovery.diverting import divert
from fedsys.serving.recovery.outlook import Foreseen, RecoveryOutlook
from fedsys.serving.recovery.watch import HostWatch
from fedsys.serving.routes import Route

_TOLD = 12  # candidates of a decision that are told
_AGAIN_S, _SOON_S = 2.5, 0.5  # before another attempt at what could not be built; if requests wait


class Note(Protocol):
    """Takes note of an event."""

    def __call__(self, what: str, **values: Any) -> None:
        """Take note of an event of a kind, with plain values."""


@final
class Rerouter:
    """Sends requests where they can be answered.

    Args:
        engine: Whose requests they are.
        outlook: Knows what could answer.
        builder: Makes what is to answer.
        objective: What is asked of the way to answer on.
        warm: Techniques whose pipelines stand ready in advance.
        note: Takes note of what happens.

    Attributes:
        target: Label of the route that requests take.
        chosen: What stands in for lost hosts, as it was expected; None where nothing had to.
        failovers: Decisions that sent requests another way.
        replayed: Requests that were under way then.
    """

    def __init__(
        self,
        engine: ChainEngine,
        outlook: RecoveryOutlook,
        builder: PipelineBuilder,
        objective: RecoveryObjective,
        warm: tuple[str, ...],
        note: Note,
    ) -> None:
        self._engine, self._outlook, self._builder = engine, outlook, builder
        self._objective, self._warm, self._note = objective, warm, note
        self.target = engine.route.label
        self._next = ""  # what is built to answer
        self._used: WeakSet[ChainModule] = WeakSet(engine.live)
        self.chosen: RecoveryCandidate | None = None
        self._coming: RecoveryCandidate | None = None  # what is built, as it is expected
        self._unproven: RecoveryCandidate | None = None  # not known yet what it really took
        self._again_s: float | None = None  # when what could not be built is tried again
        self.failovers = self.replayed = 0

    def ask(self, objective: RecoveryObjective) -> None:
        """Ask something else of the ways to answer on, from now on."""
        self._objective = objective
        self.settle()

    def lost(self, index: int, name: str, told_s: float, watch: HostWatch | None) -> None:
        """Go on without a host."""
        for module in self._engine.live:
            broken = any(stood.index == index for stood in module.stages)
            if broken and module not in self._used:  # no requests wait there to be sent on
                module.pipeline.fail(f"{name} is lost", PipelineLeft)
        if self._engine.out or self._unanswered():
            self._fail_over(name, told_s, watch)
        else:
            self.settle()

    def moved(self, partition: Partition) -> None:
        """Take note that cuts were changed by somebody else."""
        self._outlook.settled(partition)
        self.target = self._engine.home = Route(partition).label
        if (module := self._outlook.module(self.target)) is not None:
            self._used.add(module)
        if self._outlook.stands(self.target):
            self.keep_ready()
        else:  # a host was lost while they were changed
            self._fail_over("", time.monotonic(), None)

    # ----------------------------------------------------------------------------------------------

    def _fail_over(self, host: str, told_s: float, watch: HostWatch | None) -> None:
        """Send requests another way at once, if one stands ready, and prepare the best one."""
        began, before = time.monotonic(), self.target
        try:
            foreseen = self._outlook.foresee(self._objective)
        except RuntimeFailure as error:
            self._give_up(first_line(error))
            return
        decided, count, chosen = time.monotonic(), 0, foreseen.chosen
        self.chosen = self._unproven = chosen
        new = self._outlook.module(chosen.path) if foreseen.ready else None
        if new is not None:
            count = self._apply(new, watch)
        else:
            self.target = self._next = chosen.path
            self._builder.build(chosen.path)
        done = time.monotonic()
        self.failovers += 1
        times = {"began_s": began, "decided_s": decided, "done_s": done, "told_s": told_s}
        self._tell(host, before, foreseen, times, count)
        self._outlook.downtimes.decided(decided - began)
        if new is not None:
            self._outlook.downtimes.switched(done - decided)
            self.settle()

    def _tell(
        self, host: str, before: str, foreseen: Foreseen, times: Mapping[str, float], count: int
    ) -> None:
        chosen, decision = foreseen.chosen, foreseen.decision
        self._note(
            "failover", host=host, technique=chosen.technique, route=chosen.path,
            predicted_ms=chosen.latency_ms, accuracy=chosen.accuracy, before=before,
            accuracy_before=self._outlook.accuracy(before), ready=foreseen.ready,
            tell_ms=1e3 * (times["began_s"] - times["told_s"]),
            decide_ms=1e3 * (times["decided_s"] - times["began_s"]),
            apply_ms=1e3 * (times["done_s"] - times["decided_s"]),
            replayed=count, reason=decision.reason, decided=decision.choice.path,
            feasible=decision.feasible,
            candidates=[plain(each.candidate) for each in decision.candidates[:_TOLD]],
        )  # fmt: skip

    def _give_up(self, reason: str) -> None:
        self._engine.out = f"no host is left that could answer: {reason}"
        for module in self._engine.live:
            module.pipeline.fail(self._engine.out)
        self._note("nobody", reason=self._engine.out)

    def _apply(self, new: ChainModule, watch: HostWatch | None) -> int:
        """Send requests into a pipeline that stands; return how many were under way."""
        used, count = self._in_use(), 0
        watch = watch if len(used) == 1 else None  # else requests have been diverted before
        for old in used:
            if old is not new and not self._outlook.sound(old):
                count += divert(old, new, self._outlook.gone, self._outlook.units, watch)
        self.replayed += count
        self._go(new)
        return count

    def _in_use(self) -> list[ChainModule]:
        return [module for module in self._engine.live if module in self._used]

    def _go(self, module: ChainModule) -> None:
        self._used.add(module)
        self.target, self._engine.out = module.label, ""
        self._outlook.went(self.target)
        self._builder.switch(self.target)

    # ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Prepare what is best in the long run, if that is not what answers."""
        try:
            best, expected = self._outlook.best(self._objective)
        except RuntimeFailure as error:
            if self._outlook.broken(self.target):
                self._give_up(first_line(error))
            return
        waits = self._engine.out or self._next == self.target
        if best == self.target and not waits and not self._outlook.broken(best):
            self.keep_ready()
            return
        self._next, self._coming = best, expected
        self._note("prepares", route=best)
        self._builder.build(best)

    def built(self, built: BuiltPipeline, watch: HostWatch | None) -> None:
        """Take note of what became of an order to the builder."""
        if built.cost is not None:
            self.keep_ready()
            return
        due = built.label == self._next
        self._next = "" if due else self._next
        new = None if built.error else self._outlook.module(built.label)
        if new is None:
            self._not_built(built, watch)
        elif self._interrupted():
            self._note("applied", route=built.label, replayed=self._apply(new, watch))
            self.settle()
        elif due:
            self._note("switched", route=built.label, build_ms=1e3 * built.took_s)
            self.chosen = self._coming
            self._go(new)
        else:  # something else was wanted meanwhile
            self.keep_ready()

    def _not_built(self, built: BuiltPipeline, watch: HostWatch | None) -> None:
        """Do without a pipeline that could not be built, or could not be made the one in use."""
        self._note("not_built", route=built.label, error=built.error or "a host was lost")
        failed_before = self._outlook.shun(built.label)
        waits = not self._next and self._interrupted()
        soon = waits and failed_before
        self._again_s = time.monotonic() + (_SOON_S if soon else _AGAIN_S)
        if waits and not failed_before:
            self._fail_over("", time.monotonic(), watch)

    def _interrupted(self) -> bool:
        """Whether nobody can answer, or requests wait in a pipeline that cannot."""
        return bool(self._engine.out) or any(
            not module.pipeline.diverted and not self._outlook.sound(module)
            for module in self._in_use()
        )

    def _unanswered(self) -> bool:
        """Whether requests that come are answered neither by their route nor by one in work."""
        if self._next == self.target:
            return not self._outlook.stands(self.target)
        return self._outlook.broken(self.target)

    def keep_ready(self) -> None:
        """Have ways around hosts ready; which ones is found out where nobody waits for it."""
        target = self.target

        def prepare() -> None:
            found = self._outlook.in_case(target, self._warm, self._objective)
            coming = self._next  # as it is now: it may have been told while the others were found
            self._builder.keep([*filter(None, [coming]), *found, *self._engine.prepared])

        self._builder.carry_out_later(prepare)

    def look(self) -> None:
        """Compute anew what a lost pipeline has not answered; say what a decision came to."""
        self._try_again()
        new = self._outlook.module(self.target)
        if new is None or not self._outlook.ready(self.target):
            return
        for old in self._in_use():
            waits = old.pipeline.in_flight or not old.pipeline.diverted
            stuck = waits and old is not new
            if stuck and not self._outlook.sound(old):
                self.replayed += old.pipeline.divert(new.pipeline)
        told = self._unproven
        if told is not None and (took_s := self._engine.times.took_s(told.path)) is not None:
            self._unproven, took_ms = None, 1e3 * took_s
            self._note("proved", route=told.path, predicted_ms=told.latency_ms, measured_ms=took_ms)

    def _try_again(self) -> None:
        """Look for another way if nobody does, and there is none, or not the best one."""
        if self._next or self._builder.busy:
            return
        due = self._again_s is not None and time.monotonic() > self._again_s
        current = self._engine.switcher.current
        stuck = not self._engine.out and self._outlook.broken(current)
        if due or stuck:
            self._again_s = None
            if self._interrupted() or stuck:
                self._fail_over("", time.monotonic(), None)
            else:
                self.settle()


def plain(candidate: RecoveryCandidate) -> dict[str, Any]:
    """Return a candidate as plain values."""
    return {
        "technique": candidate.technique,
        "route": candidate.path,
        "latency_ms": candidate.latency_ms,
        "accuracy": candidate.accuracy,
        "downtime_ms": candidate.downtime_ms,
        "measured": sorted(candidate.measured),
    }
